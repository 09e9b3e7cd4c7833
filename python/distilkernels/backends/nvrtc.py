"""CUDA C++ of ``csrc/cuda``, compiled at first use by NVRTC and kept: in the process, and on disk by content.

A disk entry is named by a hash of everything that its machine code depends on, and is written to a temporary file and
renamed, so any number of processes may share a cache folder. It begins with a hash of itself: a damaged one is compiled
again. The folder is ``DISTILKERNELS_CACHE_DIR``, or ``distilkernels`` in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.resources
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

_DIGEST = hashlib.sha256().digest_size

# sums must have the same bits in every variant of a kernel: it writes its fma's out
_OPTIONS = {"std": "c++17", "fma": False, "ptxas_options": ["-v"]}


@functools.cache
def why_not() -> str | None:
    """None if kernels can be compiled and loaded here, else the sentence that says what is missing. Asks once."""
    install = "pip install 'distilkernels[cuda]'"
    for package in ("cuda", "cuda.core", "cuda.bindings"):
        if importlib.util.find_spec(package) is None:
            return f"cuda-core is not installed ({install})"
    import cuda.core
    from cuda.bindings import driver

    if not hasattr(cuda.core, "Program"):
        return f"cuda-core {cuda.core.__version__} is too old: it must be 0.5 or newer ({install})"
    try:
        compiles = version()
    except RuntimeError as reason:
        return f"NVRTC is not installed ({install}): {str(reason).splitlines()[0]}"
    error, runs = driver.cuDriverGetVersion()
    if not error and runs // 1000 < compiles[0]:
        serves = f"cu{runs // 1000}"
        return f"NVRTC {compiles[0]}.{compiles[1]} compiles for newer drivers than this one, which serves {serves}: pip install 'cuda-core[{serves}]'"
    return None


@functools.cache
def version() -> tuple[int, int]:
    """NVRTC's (major, minor); RuntimeError if the library is not there."""
    from cuda.bindings import nvrtc

    error, major, minor = nvrtc.nvrtcVersion()
    if error:
        raise RuntimeError(f"nvrtcVersion: {error}")
    return major, minor


@functools.cache
def kernel(name: str, architecture: str, defines: tuple[tuple[str, int], ...]):
    """The function `name` of ``name.cu``, loaded. Once per process: the module serves every device of its architecture."""
    from cuda.core import ObjectCode

    return ObjectCode.from_cubin(cubin(name, architecture, dict(defines))).get_kernel(name)


def launch(function, device: torch.device, grid: int, block: int, *arguments: int | float) -> None:
    """Queues `grid` blocks of `block` threads on torch's current stream of `device`; ints are passed as 64 bits, floats as double."""
    from cuda.core import LaunchConfig
    from cuda.core import launch as queue

    with torch.cuda.device(device):
        queue(_Stream(torch.cuda.current_stream(device).cuda_stream), LaunchConfig(grid=grid, block=block), function, *arguments)


class _Stream(NamedTuple):
    """torch's stream under the protocol by which cuda.core takes streams of others; torch's own class has it in newer releases only."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        # torch's default stream has handle 0, for which CUDA's own name is 1
        return 0, self.handle or 1


def cubin(name: str, architecture: str, defines: Mapping[str, int]) -> bytes:
    """Machine code of ``name.cu`` for an architecture such as "sm_90", from the disk cache or the compiler."""
    folder = cache_folder()
    entry = folder / f"{name}-{architecture}-{_key(name, architecture, defines)}.cubin"
    with contextlib.suppress(OSError):
        stored = entry.read_bytes()
        if stored[:_DIGEST] == hashlib.sha256(stored[_DIGEST:]).digest():
            return stored[_DIGEST:]
    code = compiled(name, architecture, defines)
    try:
        _write(entry, hashlib.sha256(code).digest() + code)
    except OSError as reason:
        _warn_uncached(str(folder), str(reason))
    return code


def compiled(name: str, architecture: str, defines: Mapping[str, int], log=None) -> bytes:
    """Machine code from the compiler. `log`, an object with ``write``, gets its messages, register and stack use among them."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        name=f"{name}.cu",
        arch=architecture,
        include_path=str(_sources()),
        define_macro=[(key, str(value)) for key, value in defines.items()],
        **_OPTIONS,
    )
    return bytes(Program((_sources() / f"{name}.cu").read_text(encoding="utf-8"), "c++", options).compile("cubin", logs=log).code)


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    chosen = os.environ.get("DISTILKERNELS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "distilkernels"


def _sources() -> Path:
    return Path(str(importlib.resources.files("distilkernels.csrc"))) / "cuda"


def _key(name: str, architecture: str, defines: Mapping[str, int]) -> str:
    digest = hashlib.sha256(repr((name, architecture, sorted(defines.items()), _OPTIONS, version())).encode())
    for source in sorted(_sources().glob("*.cu*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _write(entry: Path, content: bytes) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=entry.parent, prefix=entry.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, entry)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@functools.cache
def _warn_uncached(folder: str, reason: str) -> None:
    warnings.warn(f"compiled CUDA kernels cannot be kept in {folder} and will be compiled by every process: {reason}", stacklevel=2)
