"""Losses fused with the lm_head: forward KL with the tail bucket from hidden states, forward and backward.

FLOPs: three products of 2·N·V·H. Bytes beside them: the logits chunk read forward, read and written backward, and d weight
written once per chunk. The floor is the three GEMMs measured in the same run, with their results allocated (as a step of
training allocates d weight) and with ``out=``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import distilkernels as dk

from .losses import eager_loss
from .measure import Contender, median, peak_extra_bytes, race

GROUP = ("case", "N", "V", "H", "K", "dtype")


@dataclass(frozen=True)
class Shape:
    name: str
    n: int
    v: int
    h: int
    k: int
    dtype: torch.dtype = torch.float32


CPU = (
    Shape("micro-batch", 256, 151_936, 1024, 64),
    Shape("micro-batch", 256, 151_936, 1024, 64, torch.bfloat16),
    Shape("memory", 1024, 151_936, 1024, 64),
)
GPU = (Shape("step", 8192, 151_936, 4096, 64, torch.bfloat16),)


def checkpointed_chunks(hidden: Tensor, weight: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor, chunk: int = 256) -> Tensor:
    """What one writes without kernels to save memory: chunks whose logits are recomputed in the backward (four GEMMs)."""

    def part(h, i, lp, t):
        return eager_loss(h @ weight.t(), i, lp, t) * h.shape[0]

    pieces = zip(*(t.split(chunk) for t in (hidden, ids, logprobs, tail)))
    return sum(checkpoint(part, *piece, use_reentrant=False) for piece in pieces) / hidden.shape[0]


def check(name: str, grads: tuple, hidden: Tensor, weight: Tensor, teacher: dk.TeacherTopK, tail: str, tolerance: float) -> None:
    """d hidden of the first rows against fp64: a wrong loss or statistic shows in it. d weight is the tests' business."""
    rows = 2
    h = hidden[:rows].detach().double().requires_grad_()
    exact = dk.topk_distill_loss(h @ weight.detach().double().t(), teacher[:rows], tail=tail, backend="reference", reduction="sum")
    (want,) = torch.autograd.grad(exact / hidden.shape[0], h)
    error = (grads[0][:rows].double() - want).norm() / want.norm()
    assert error < tolerance, f"{name}: relative error of d hidden {error:.2e} is above {tolerance}"


def contenders(shape: Shape, device: str, quick: bool) -> list[Contender]:
    g = torch.Generator().manual_seed(0)
    hidden0 = torch.randn(shape.n, shape.h, generator=g).to(shape.dtype).to(device)
    weight0 = (torch.randn(shape.v, shape.h, generator=g) * 0.1).to(shape.dtype).to(device)
    ids = torch.rand(shape.n, shape.v // 8, generator=g).topk(shape.k).indices.to(device) * 8
    logprobs = (torch.randn(shape.n, shape.k, generator=g) * 2).log_softmax(-1).to(device) - 0.1
    tail = torch.log1p(-logprobs.exp().sum(-1))
    teacher = dk.TeacherTopK(ids, logprobs, tail)
    tolerance = 1e-4 if shape.dtype == torch.float32 else 5e-2
    made: list[Contender] = []

    def add(name: str, loss_of: Callable[[Tensor, Tensor], Tensor], frozen: bool = False, tail_mode: str = "bucket", checked: bool = True) -> None:
        h = hidden0.clone().requires_grad_()
        w = weight0.detach().requires_grad_(not frozen)
        leaves = (h,) if frozen else (h, w)

        def run():
            return torch.autograd.grad(loss_of(h, w), leaves)

        if checked:
            check(name, run(), hidden0, weight0, teacher, tail_mode, tolerance)
        made.append(Contender(name, run))

    add("ours", lambda h, w: dk.linear_topk_distill_loss(h, w, teacher))
    add("ours, frozen weight", lambda h, w: dk.linear_topk_distill_loss(h, w, teacher), frozen=True)
    if shape.n == 256 or device == "cuda":
        def renormalized(h, w, sparse=False):
            return dk.linear_topk_distill_loss(h, w, teacher, tail="renormalize", sparse_weight_grad=sparse)

        add("ours renormalize, frozen", renormalized, True, "renormalize")
        add("ours renormalize, sparse dW", lambda h, w: renormalized(h, w, True), False, "renormalize")
        add("ours renormalize, dense dW", renormalized, False, "renormalize")
    add("eager", lambda h, w: eager_loss(h @ w.t(), ids, logprobs, tail))
    if not quick:
        add("checkpointed chunks", lambda h, w: checkpointed_chunks(h, w, ids, logprobs, tail))
        compiled = torch.compile(lambda h, w: eager_loss(h @ w.t(), ids, logprobs, tail), dynamic=False)
        add("torch.compile", compiled)
        if hasattr(torch.nn.functional, "linear_cross_entropy"):
            labels = ids[:, 0]
            add("F.linear_cross_entropy (K = 1)", lambda h, w: torch.nn.functional.linear_cross_entropy(h, w, labels), checked=False)
            add("ours, one label (K = 1)", lambda h, w: -dk.linear_row_loss(h, w, labels[:, None], lambda s: s.logprobs[:, 0]), checked=False)
        made += device_peers(hidden0, weight0, ids[:, 0], device)
    dz = torch.randn(shape.n, shape.v, generator=g).to(shape.dtype).to(device)
    made.append(Contender("3 GEMMs", lambda: (hidden0 @ weight0.t(), dz @ weight0, dz.t() @ hidden0)))
    z, dh, dw = torch.empty_like(dz), torch.empty_like(hidden0), torch.empty_like(weight0)

    def in_place() -> None:
        torch.mm(hidden0, weight0.t(), out=z)
        torch.mm(dz, weight0, out=dh)
        torch.mm(dz.t(), hidden0, out=dw)

    made.append(Contender("3 GEMMs, out=", in_place))
    return made


def device_peers(hidden: Tensor, weight: Tensor, labels: Tensor, device: str) -> list[Contender]:
    """The fused cross-entropies of liger-kernel and cut-cross-entropy (K = 1), which need a GPU."""
    if device != "cuda":
        return []
    made = []
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        made.append(Contender("liger FLCE (K = 1)", lambda: torch.autograd.grad(liger(h, w, labels), (h, w))))
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy as cut

        made.append(Contender("cut-cross-entropy (K = 1)", lambda: torch.autograd.grad(cut(h, w, labels), (h, w))))
    except ImportError:
        pass
    return made


def bench(device: str, repeats: int, quick: bool, progress) -> Iterator[dict]:
    """One row of the table per contender."""
    shapes = GPU if device == "cuda" else CPU
    for shape in shapes[:1] if quick else shapes:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = contenders(shape, device, quick or shape.n > 256)
        extra = {c.name: peak_extra_bytes(c.run, device) for c in made}
        progress.reset(total=len(made) * (repeats + 1))
        progress.set_description(f"{shape.name} {str(shape.dtype).removeprefix('torch.')}")
        times = race(made, device, repeats, warmup=1, progress=progress)
        gemms, eager = median(times["3 GEMMs"]), median(times["eager"])
        flops = 6 * shape.n * shape.v * shape.h
        for name, taken in times.items():
            ms = median(taken)
            yield {
                "case": shape.name, "N": shape.n, "V": shape.v, "H": shape.h, "K": shape.k, "dtype": str(shape.dtype).removeprefix("torch."),
                "contender": name, "ms": round(ms, 2), "best_ms": round(min(taken), 2), "x_eager": round(eager / ms, 2),
                "over_3_gemms": round(ms / gemms, 3), "GFLOP/s": round(flops / ms / 1e6, 1),
                "extra_MB": None if extra[name] is None else round(extra[name] / 1e6),
            }  # fmt: skip
