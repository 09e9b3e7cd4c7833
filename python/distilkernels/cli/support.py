"""Versions, instruction set, devices, and which backend serves what here."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import __version__
from ..backends import module, support
from ..primitives.head_gemm import converts_weight_tiles


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _describe(cpp) -> str:
    refusal = cpp.why_not("vocab_stats", torch.empty(1, 1, 1))
    if refusal is not None:
        return refusal
    others = ", ".join(cpp.available_isas())
    return f"{cpp.isa()} (of {others}), {'OpenMP' if cpp.openmp() else 'one thread: built without OpenMP'}"


def print_support() -> None:
    cpp = module("cpp")
    print(f"distilkernels {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(", ".join(f"{name} {_version(name)}" for name in ("triton", "transformers", "cuda-core", "numpy")))
    print(f"CPU: {platform.machine()}, {torch.get_num_threads()} threads; C++ kernels: {_describe(cpp)}")
    tiles = {dtype: converts_weight_tiles(dtype) for dtype in (torch.bfloat16, torch.float16)}
    print("16-bit lm_heads on this CPU (measured): " + ", ".join(
        f"{str(dtype).removeprefix('torch.')} {'float32 tiles of the weight' if tiled else 'the library GEMM'}" for dtype, tiled in tiles.items()
    ))  # fmt: skip
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    print("CUDA: " + (", ".join(devices) or "no device"))
    rows = support()
    width = max(len(r.primitive) for r in rows)
    print()
    refusals: dict[str, list[str]] = {}
    for primitive in dict.fromkeys(r.primitive for r in rows):
        for backend in dict.fromkeys(r.backend for r in rows):
            mine = [r for r in rows if (r.primitive, r.backend) == (primitive, backend)]
            served = [f"{r.device}:{r.dtype}" for r in mine if r.refusal is None]
            print(f"{primitive:{width}}  {backend:9}  {' '.join(served) or '-'}")
            for r in mine:
                if r.refusal is not None:
                    refusals.setdefault(r.refusal, []).append(f"{primitive} {backend} {r.device}:{r.dtype}")
    print("\nRefusals")
    for sentence, calls in refusals.items():
        shown = ", ".join(calls[:3]) + (f" and {len(calls) - 3} more" if len(calls) > 3 else "")
        print(f"- {sentence}\n    ({shown})")

