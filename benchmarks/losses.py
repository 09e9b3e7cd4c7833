"""Top-k distillation on logits: forward KL with the tail bucket, forward and backward.

Bytes: the row is read forward, read again and written backward, 3·N·V·itemsize; K entries are noise beside it.
FLOPs: about 20 per entry forward and backward, far under the machine's rate. The floor is those bytes at the rate of a
copy measured in the same run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

import distilkernels as dk
from distilkernels import backends

from .cases import LOSSES, Case
from .measure import Contender, copy_contender, median, peak_extra_bytes, race

GROUP = ("case", "N", "V", "K", "dtype")


def eager_loss(z: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> Tensor:
    """What a trainer writes: a float32 log-softmax, a gather, and the tail as 1 − Σ."""
    log_q = torch.log_softmax(z.float(), -1).gather(-1, ids)
    log_q_tail = torch.log1p(-log_q.exp().sum(-1).clamp(max=1 - 1e-7))
    kl = (logprobs.exp() * (logprobs - log_q)).sum(-1) + tail.exp() * (tail - log_q_tail)
    return kl.mean()


def exact_rows(z: Tensor, teacher: dk.TeacherTopK, rows: int) -> tuple[Tensor, Tensor]:
    """Per-row loss and d(sum)/d logits of the first rows in fp64, from a full softmax."""
    z = z[:rows].double().requires_grad_()
    ids = teacher.ids[:rows].long()
    log_q = z.log_softmax(-1)
    inside = torch.zeros_like(z, dtype=torch.bool).scatter(1, ids, True)
    log_q = torch.cat([log_q.gather(1, ids), log_q.masked_fill(inside, -torch.inf).logsumexp(1, keepdim=True)], 1)
    log_p = torch.cat([teacher.logprobs[:rows].double(), teacher.tail_logprob[:rows].double()[:, None]], 1)
    loss = (log_p.exp() * (log_p - log_q)).sum(-1)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


def check(name: str, loss: Tensor, grad: Tensor, z: Tensor, teacher: dk.TeacherTopK, each: Tensor | None = None) -> None:
    """The gate: no time is taken of a contender whose gradient is wrong."""
    rows = min(4, z.shape[0])
    want_loss, want = exact_rows(z, teacher, rows)
    error = (grad[:rows].double() * z.shape[0] - want).norm() / want.norm()
    limit = 1e-5 if z.dtype == torch.float32 else 2e-2
    assert error < limit, f"{name}: relative gradient error {error:.2e} against fp64 is above {limit}"
    if each is not None:
        assert torch.allclose(each[:rows].double(), want_loss, rtol=1e-5, atol=1e-6), f"{name}: loss"


def contenders(case: Case, dtype: torch.dtype, device: str, with_compile: bool) -> tuple[list[Contender], dict]:
    source = case.logits(dtype, device)
    teacher = dk.capture_topk(case.logits(torch.float32, device, seed=7), case.k)
    ids, logprobs, tail = teacher.ids.long(), teacher.logprobs, teacher.tail_logprob
    made: list[Contender] = []

    def add(name: str, loss_of, refill: bool = False, checked: bool = True) -> None:
        leaf = source.clone().requires_grad_()

        def run():
            return torch.autograd.grad(loss_of(leaf), leaf)

        def before():
            if refill:
                with torch.no_grad():
                    leaf.copy_(source)

        before()
        loss = loss_of(leaf)
        (grad,) = torch.autograd.grad(loss, leaf)
        check(name, loss, grad, source, teacher)
        del grad, loss
        made.append(Contender(name, run, before))

    for isa in isas(device):
        mark = "" if isa is None else f" {isa}"

        def ours(z, inplace=False, isa=isa):
            if isa is not None:
                backends.module("cpp").set_isa(isa)
            return dk.topk_distill_loss(z, teacher, inplace_backward=inplace)

        add(f"ours in place{mark}", lambda z, ours=ours: ours(z, True), refill=True)
        if mark in ("", f" {isas(device)[0]}"):
            add(f"ours fresh{mark}", ours)
    add("eager", lambda z: eager_loss(z, ids, logprobs, tail))
    if with_compile:
        compiled = torch.compile(eager_loss, dynamic=False)
        add("torch.compile", lambda z: compiled(z, ids, logprobs, tail))
    return made, {"bytes": 3 * source.numel() * source.element_size()}


def isas(device: str) -> list[str | None]:
    """The instruction sets to compare on a CPU, the best one first."""
    cpp = backends.module("cpp")
    if device == "cuda" or cpp.why_not("vocab_stats", torch.empty(1, 1, 1)) is not None:
        return [None]
    return [isa for isa in cpp.available_isas() if isa != "baseline"] or [None]


def liger(case: Case, device: str) -> Contender | None:
    """liger-kernel's dense forward KL at K = V, where it can run (a GPU): it computes its gradient in the forward."""
    if device != "cuda":
        return None
    try:
        from liger_kernel.transformers.functional import liger_kl_div
    except ImportError:
        return None
    student = case.logits(torch.float32, device).requires_grad_()
    target = case.logits(torch.float32, device, seed=7).softmax(-1)
    return Contender("liger dense KL", lambda: torch.autograd.grad(liger_kl_div(student.log_softmax(-1), target, reduction="batchmean"), student))


def bench(device: str, repeats: int, quick: bool, progress) -> Iterator[dict]:
    """One row of the table per contender."""
    for case in LOSSES[:1] if quick else LOSSES:
        for dtype in (torch.float32, torch.bfloat16):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made, facts = contenders(case, dtype, device, with_compile=not quick)
            extra = {c.name: (c.before(), peak_extra_bytes(c.run, device))[1] for c in made}
            copy = copy_contender(device, case.n * case.v * dtype.itemsize)
            peer = liger(case, device) if dtype == torch.float32 else None
            everyone = [*made, copy, *([peer] if peer else [])]
            progress.reset(total=len(everyone) * (repeats + 2))
            progress.set_description(f"{case.name} {str(dtype).removeprefix('torch.')}")
            times = race(everyone, device, repeats, progress=progress)
            rate = 2 * case.n * case.v * dtype.itemsize / median(times["copy"]) / 1e6
            floor = facts["bytes"] / rate / 1e6
            eager = median(times["eager"])
            for name, taken in times.items():
                ms = median(taken)
                moved = facts["bytes"] if name != "copy" else 2 * facts["bytes"] / 3
                yield {
                    "case": case.name, "N": case.n, "V": case.v, "K": case.k, "dtype": str(dtype).removeprefix("torch."), "contender": name,
                    "ms": round(ms, 3), "best_ms": round(min(taken), 3), "x_eager": round(eager / ms, 2), "floor_ms": round(floor, 2),
                    "over_floor": round(ms / floor, 2) if name != "copy" else None, "GB/s": round(moved / ms / 1e6, 1),
                    "extra_MB": None if extra.get(name) is None else round(extra[name] / 1e6, 1),
                }  # fmt: skip
