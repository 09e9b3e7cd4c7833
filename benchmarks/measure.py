"""Timing that can be trusted: contenders alternate, medians, the machine's own limits from the same run, peak memory."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import distilkernels
from distilkernels import backends
from distilkernels.primitives import memory


@dataclass
class Contender:
    """`run()` is timed, `before()` is not; a contender owns its tensors, so that freeing another's costs it nothing."""

    name: str
    run: Callable[[], object]
    before: Callable[[], object] = lambda: None


def timed(contender: Contender, device: str) -> float:
    """Milliseconds of one run. The result is dropped inside the timer: freeing a gradient is part of its cost."""
    contender.before()
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _flush_l2()
        start.record()
        contender.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    contender.run()
    return (time.perf_counter() - start) * 1e3


def race(contenders: list[Contender], device: str, repeats: int = 9, warmup: int = 2, progress=None) -> dict[str, list[float]]:
    """Times of every contender, taken in turn so that a slow spell of the machine hits all of them."""
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    gc.collect()
    gc.disable()
    try:
        for i in range(warmup + repeats):
            for c in contenders:
                ms = timed(c, device)
                if i >= warmup:
                    times[c.name].append(ms)
                if progress is not None:
                    progress.update()
    finally:
        gc.enable()
    return times


def median(times: list[float]) -> float:
    return statistics.median(times)


_l2: torch.Tensor | None = None


def _flush_l2() -> None:
    global _l2
    if _l2 is None:
        _l2 = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    _l2.zero_()


def copy_contender(device: str, nbytes: int) -> Contender:
    """A copy between touched buffers: `nbytes` read and as many written. Its rate is the byte floor's."""
    source = torch.empty(nbytes // 4, device=device).uniform_()
    target = torch.zeros_like(source)
    return Contender("copy", lambda: target.copy_(source))


def gemm_contender(device: str, m: int, n: int, k: int, dtype: torch.dtype) -> Contender:
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    return Contender("gemm", lambda: torch.mm(a, b.t(), out=out))


def peak_extra_bytes(run: Callable[[], object], device: str) -> int | None:
    """Peak memory of one run above what was held before: allocator statistics on a GPU, resident pages on Linux."""
    gc.collect()
    memory.release()  # buffers kept from an earlier run would hide what this one needs
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform != "win32" else None
    if trim is not None:
        trim(0)  # so would what the C allocator kept
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status_kib("VmRSS")
        result = run()
        peak = _status_kib("VmHWM")
        del result
    except OSError:
        return None
    return max(0, peak - before) * 1024


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def environment(device: str) -> dict[str, str]:
    """What a number means nothing without: hardware, versions, threads, instruction set."""
    cpp = backends.module("cpp")
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "distilkernels": distilkernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()
        import triton

        return about | {"device": torch.cuda.get_device_name(), "driver": driver[0] if driver else "unknown", "triton": triton.__version__}
    served = cpp.why_not("vocab_stats", torch.empty(1, 1, 1)) is None
    return about | {"device": _cpu_name(), "threads": str(torch.get_num_threads()), "isa": cpp.isa() if served else "none"}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
