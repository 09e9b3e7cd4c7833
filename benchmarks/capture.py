"""Teacher capture: the top-k with the log-sum-exp and the tail, from logits and from hidden states; random samples.

From logits. Bytes: the row is read once, N·V·itemsize; 12·K + 16 bytes a row are written. FLOPs: an exponential, about 15 an
entry. The floor is those bytes at the rate of a copy measured in the same run (a copy moves two bytes for each it copies).
From hidden states. FLOPs: one product, 2·N·V·H; beside it the logits of a chunk are written and read once. The floor is that
product alone, chunk by chunk into the same buffer.
Samples. Bytes as from logits: R draws look at R tiles again, in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import distilkernels as dk
from distilkernels import backends
from distilkernels.primitives.draw_rows import draw
from distilkernels.primitives.head import Head
from distilkernels.primitives.head_gemm import HeadGemm, default_chunk_size

from .cases import Case
from .losses import isas
from .measure import Contender, copy_contender, median, race

GROUP = ("case", "N", "V", "H", "K", "dtype")

CPU = (
    Case("qwen", 256, 151_936, 64, "a micro-batch at Qwen's vocabulary"),
    Case("llama2", 1024, 32_000, 64, "a small vocabulary"),
    Case("deep", 64, 151_936, 1024, "the largest K"),
)
GPU = (Case("step", 8192, 151_936, 64, "a teacher's batch"), Case("deep", 1024, 151_936, 1024, "the largest K"))
SAMPLES = 64


@dataclass(frozen=True)
class Hidden:
    n: int
    v: int
    h: int
    k: int


HIDDEN = {"cpu": Hidden(512, 151_936, 1024, 64), "cuda": Hidden(8192, 151_936, 4096, 64)}

Captured = tuple[Tensor, Tensor]  # ids and log-probs [N, K]


def log_softmax_topk(z: Tensor, k: int) -> Captured:
    """What a capture script writes: float32 log-probs of everything, then the best of them."""
    logprobs, ids = z.float().log_softmax(-1).topk(k)
    return ids, logprobs


def logsumexp_topk(z: Tensor, k: int) -> Captured:
    """The frugal form: no log-prob of what is not kept, and no tail."""
    values, ids = z.topk(k)
    return ids, values.float() - z.float().logsumexp(-1, keepdim=True)


def check(name: str, got: Captured, z: Tensor, k: int, ours: bool, tolerance: float) -> None:
    """The gate, on the first rows against an fp64 sort: the log-probs, and for ours the ids of every tie."""
    rows = min(4, z.shape[0])
    exact = z[:rows].double().log_softmax(-1)
    order = z[:rows].double().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    ids, logprobs = (t[:rows] for t in got)
    error = (logprobs.double() - exact.gather(1, order)).abs().max().item()
    assert error < tolerance, f"{name}: log-probs are {error:.2e} from fp64"
    assert not ours or torch.equal(ids.long(), order), f"{name}: ids differ from a stable fp64 sort"


def on_isa(isa: str | None, call: Callable[[], object]) -> Callable[[], object]:
    def run():
        if isa is not None:
            backends.module("cpp").set_isa(isa)
        return call()

    return run


def from_logits(case: Case, z: Tensor, device: str) -> list[Contender]:
    made = []

    def add(name: str, run: Callable[[], object], captured: Callable[[object], Captured], ours: bool = False) -> None:
        check(name, captured(run()), z, case.k, ours, 1e-5)
        made.append(Contender(name, run))

    for isa in isas(device):
        name = "ours" if isa is None else f"ours {isa}"
        add(name, on_isa(isa, lambda: dk.capture_topk(z, case.k)), lambda t: (t.ids, t.logprobs), ours=True)
    add("log_softmax + topk", lambda: log_softmax_topk(z, case.k), lambda t: t)
    add("logsumexp + topk", lambda: logsumexp_topk(z, case.k), lambda t: t)
    made.append(Contender("topk alone", lambda: torch.topk(z, case.k)))
    return made


def softmax_multinomial(z: Tensor, r: int) -> Captured:
    p = z.float().softmax(-1)
    ids = torch.multinomial(p, r, replacement=True)
    return ids, p.gather(1, ids)


def from_draws(z: Tensor, device: str) -> list[Contender]:
    n, rows = z.shape[0], min(4, z.shape[0])
    seeds, positions = torch.full((n,), 1, device=device), torch.arange(n, device=device)
    exact = draw(z[:rows].double(), SAMPLES, 1.0, seeds[:rows], positions[:rows], Head(), "reference")
    made = []
    for isa in isas(device):
        name = f"ours, {SAMPLES} samples" + ("" if isa is None else f" {isa}")
        same = on_isa(isa, lambda: draw(z, SAMPLES, 1.0, seeds, positions, Head()))().ids[:rows] == exact.ids
        assert same.float().mean() > 0.97, f"{name}: only {same.float().mean():.3f} of the draws are those of fp64"
        made.append(Contender(name, on_isa(isa, lambda: dk.capture_samples(z, SAMPLES, seed=1))))
    made.append(Contender(f"softmax + multinomial({SAMPLES}) + gather", lambda: softmax_multinomial(z, SAMPLES)))
    return made


def from_hidden(shape: Hidden, dtype: torch.dtype, device: str) -> list[Contender]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.n, shape.h, generator=g).to(dtype).to(device)
    weight = torch.randn(shape.v, shape.h, generator=g).mul_(0.1).to(dtype).to(device)
    chunk = default_chunk_size(shape.n, hidden.device)
    gemm = HeadGemm(weight, None, dtype)
    own = torch.empty(chunk, shape.v, dtype=gemm.scratch, device=device)
    plain = own if gemm.scratch == dtype else torch.empty(chunk, shape.v, dtype=dtype, device=device)

    def own_gemm() -> None:
        for h in hidden.split(chunk):
            gemm.logits(gemm.tokens(h), own[: h.shape[0]])

    def plain_gemm() -> None:
        for h in hidden.split(chunk):
            torch.mm(h, weight.t(), out=plain[: h.shape[0]])

    # what was rounded to 16 bits in the GEMM differs from fp64 before anything is selected
    top = dk.linear_capture_topk(hidden, weight, shape.k)
    exact = (hidden[:4].double() @ weight.double().t()).log_softmax(-1).topk(shape.k).values
    error = (top.logprobs[:4].double() - exact).abs().max().item()
    assert error < (1e-4 if dtype == torch.float32 else 0.1), f"from hidden: log-probs are {error:.2e} from fp64"
    return [
        Contender("ours", lambda: dk.linear_capture_topk(hidden, weight, shape.k)),
        Contender("logits + log_softmax + topk", lambda: log_softmax_topk(hidden @ weight.t(), shape.k)),
        Contender("its GEMM alone", own_gemm),
        Contender("torch.mm chunks, out=", plain_gemm),
    ]


def bench(device: str, repeats: int, quick: bool, progress) -> Iterator[dict]:
    """One row of the table per contender."""
    dtypes = (torch.float32, torch.bfloat16)
    cases = GPU if device == "cuda" else CPU
    for case in cases[:1] if quick else cases:
        for dtype in dtypes:
            z = case.logits(dtype, device)
            nbytes = z.numel() * z.element_size()
            made = from_logits(case, z, device)
            draws = from_draws(z, device) if case is cases[0] else []
            everyone = [*made, *draws, copy_contender(device, nbytes)]
            times = _race(everyone, device, repeats, progress, f"{case.name} {dtype}")
            floor = median(times["copy"]) / 2
            for name, taken in times.items():
                peer = "log_softmax + topk" if name in {c.name for c in made} else everyone[-2].name if name != "copy" else "copy"
                yield _line(case.name, case.n, case.v, None, case.k, dtype, name, taken, median(times[peer]), floor) | {
                    "GB/s": round((2 if name == "copy" else 1) * nbytes / median(taken) / 1e6, 1)
                }
    if quick:
        return
    shape = HIDDEN[device]
    for dtype in dtypes:
        times = _race(from_hidden(shape, dtype, device), device, max(repeats // 2, 3), progress, f"hidden {dtype}")
        floor, eager = median(times["its GEMM alone"]), median(times["logits + log_softmax + topk"])
        for name, taken in times.items():
            yield _line("hidden", shape.n, shape.v, shape.h, shape.k, dtype, name, taken, eager, floor) | {
                "GFLOP/s": round(2 * shape.n * shape.v * shape.h / median(taken) / 1e6, 1)
            }


def _race(contenders: list[Contender], device: str, repeats: int, progress, about: str) -> dict[str, list[float]]:
    progress.reset(total=len(contenders) * (repeats + 2))
    progress.set_description(about)
    return race(contenders, device, repeats, progress=progress)


def _line(case, n, v, h, k, dtype, name, taken, eager, floor) -> dict:
    ms = median(taken)
    return {
        "case": case, "N": n, "V": v, "H": h or 0, "K": k, "dtype": str(dtype).removeprefix("torch."), "contender": name,
        "ms": round(ms, 3), "best_ms": round(min(taken), 3), "x_eager": round(eager / ms, 2), "floor_ms": round(floor, 2),
        "over_floor": None if name == "copy" else round(ms / floor, 2),
    }  # fmt: skip
