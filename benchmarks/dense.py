"""A dense teacher: divergences of two whole rows, forward and backward; behind two lm_heads; and a teacher of weighted samples.

Bytes on logits: forward KL, reverse KL, JSD, total variation and alpha-beta read both rows in the forward, read them again and
write d logits in the backward, 5·N·V·itemsize. What runs on blocks of rows (adaptive KL) takes its gradient in the forward while the
block is in a cache, 3·N·V·itemsize, and in place from the blocks again, 5·N·V·itemsize. FLOPs: about 40 an entry, those with a
second look 70 to 100. The floor is those bytes at the rate of a copy measured in the same run. From hidden states: three products of
2·N·V·H of the student and one of the teacher, gradients in the forward (liger-kernel's are too); the floor is those four
products. Weighted samples: 3·N·V·itemsize. Extra memory is above what was held before, the returned gradient included.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import distilkernels as dk
from distilkernels import backends

from .cases import Case
from .losses import isas
from .measure import Contender, copy_contender, median, peak_extra_bytes, race

GROUP = ("case", "N", "V", "H", "dtype", "divergence")

CPU = (Case("qwen", 256, 151_936, 64, "a micro-batch at Qwen's vocabulary"), Case("llama2", 1024, 32_000, 64, "a small vocabulary"))
GPU = (Case("step", 8192, 151_936, 64, "a trainer's micro-batch"),)
HIDDEN = {"cpu": (256, 151_936, 1024), "cuda": (8192, 151_936, 4096)}
TOKENS = (64, 128, 256, 512, 1024)
MEMORY_VOCAB = 40_000
# the GKD form by its share of the teacher, where a divergence has one
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
SUMS = ("total_variation", "alpha_beta", "todi")
BLOCKS = ("adaptive_kl",)


def eager_loss(z: Tensor, t: Tensor, divergence: str) -> Tensor:
    """What a trainer writes: two log-softmaxes, at least float32, and the formula."""
    wide = torch.promote_types(z.dtype, torch.float32)
    log_q, log_p = z.to(wide).log_softmax(-1), t.to(wide).log_softmax(-1)
    kl = partial(F.kl_div, log_target=True, reduction="batchmean")
    if divergence == "forward_kl":
        return kl(log_q, log_p)
    if divergence == "reverse_kl":
        return kl(log_p, log_q)
    if divergence == "jsd":
        log_m = torch.logaddexp(log_q, log_p) - math.log(2)
        return 0.5 * (kl(log_m, log_p) + kl(log_m, log_q))
    if divergence == "total_variation":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1).mean()
    if divergence == "todi":
        w = torch.sigmoid(log_p - log_q).detach()
        return (w * log_p.exp() * (log_p - log_q) + (1 - w) * log_q.exp() * (log_q - log_p)).sum(-1).mean()
    if divergence == "adaptive_kl":
        return dk.divergences.AdaptiveKL()(log_p, log_q).mean()
    # α = β = ½: 4·(1 − Σ √(p·q))
    return 4 * (1 - (0.5 * (log_p + log_q)).exp().sum(-1)).mean()


def eager_linear(hidden: Tensor, weight: Tensor, their_hidden: Tensor, their_weight: Tensor, divergence: str) -> Tensor:
    return eager_loss(hidden @ weight.t(), their_hidden @ their_weight.t(), divergence)


def eager_sampled(z: Tensor, samples: dk.TeacherSamples) -> Tensor:
    wide = torch.promote_types(z.dtype, torch.float32)
    log_q = z.to(wide).log_softmax(-1).gather(-1, samples.ids.long().clamp(min=0))
    # duplicates are merged: the slots that they leave hold −1
    return -(samples.weights.masked_fill(samples.ids < 0, 0) * log_q).sum(-1).mean()


def check(name: str, loss_of: Callable[[Tensor, Tensor], Tensor], grad: Tensor, z: Tensor, t) -> None:
    """The gate: d logits of the first rows against the eager formula `loss_of` in fp64."""
    rows = min(4, z.shape[0])
    exact = z[:rows].double().requires_grad_()
    (want,) = torch.autograd.grad(loss_of(exact, t[:rows]) * rows / z.shape[0], exact)
    error = ((grad[:rows].double() - want).norm() / want.norm()).item()
    limit = 1e-4 if z.dtype == torch.float32 else 2e-2
    assert error < limit, f"{name}: relative gradient error {error:.2e} against fp64 is above {limit}"


def on_isa(call: Callable, isa: str | None) -> Callable:
    def run(*args):
        if isa is not None:
            backends.module("cpp").set_isa(isa)
        return call(*args)

    return run


def trl(divergence: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """trl's generalized JSD (its ends are the KLs), a mean over the tokens here too; None where trl is not installed."""
    if divergence not in BETA:
        return None
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError:
        return None
    return lambda z, t: GKDTrainer.generalized_jsd_loss(z.unsqueeze(1), t.unsqueeze(1), beta=BETA[divergence], reduction="batchmean")


def liger(divergence: str, device: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """liger-kernel's JSD on log-probs, a Triton kernel that computes its gradient in the forward; None without a GPU."""
    if divergence not in BETA or device != "cuda":
        return None
    try:
        from liger_kernel.transformers.functional import liger_jsd
    except ImportError:
        return None
    return lambda z, t: liger_jsd(z.float().log_softmax(-1), t.float().log_softmax(-1), beta=BETA[divergence])


def on_logits(case: Case, dtype: torch.dtype, divergence: str, device: str, with_compile: bool) -> tuple[list[Contender], dict[str, int]]:
    """Contenders, and how many times each moves [N, V]."""
    source, t = case.logits(dtype, device), case.logits(dtype, device, seed=7)
    made, reads = [], {}

    def exact(z, rows):
        return eager_loss(z, rows.double(), divergence)

    def add(name: str, loss_of: Callable[[Tensor, Tensor], Tensor], moved: int, refill: bool = False) -> None:
        leaf = source.clone().requires_grad_()

        def run():
            return torch.autograd.grad(loss_of(leaf, t), leaf)

        def before():
            if refill:
                with torch.no_grad():
                    leaf.copy_(source)

        check(name, exact, run()[0], source, t)
        made.append(Contender(name, run, before))
        reads[name] = moved

    fresh = 3 if divergence in BLOCKS else 5
    served = [None] if divergence in BLOCKS else isas(device)
    for isa in served:
        mark = "" if isa is None else f" {isa}"
        add(f"ours in place{mark}", on_isa(lambda z, y: dk.distill_loss(z, y, divergence=divergence, inplace_backward=True), isa), 5, refill=True)
        if isa == served[0]:
            add(f"ours fresh{mark}", on_isa(lambda z, y: dk.distill_loss(z, y, divergence=divergence), isa), fresh)
    add("eager", partial(eager_loss, divergence=divergence), fresh)
    for name, peer in (("trl", trl(divergence)), ("liger", liger(divergence, device))):
        if peer is not None:
            add(name, peer, fresh)
    if with_compile:
        add("torch.compile", torch.compile(partial(eager_loss, divergence=divergence), dynamic=False), fresh)
    return made, reads


def sampled(case: Case, dtype: torch.dtype, device: str) -> tuple[list[Contender], dict[str, int]]:
    source = case.logits(dtype, device)
    samples = dk.capture_samples(case.logits(torch.float32, device, seed=7), case.k, seed=3)
    made = []
    for name, loss_of in (("ours fresh", dk.sampled_distill_loss), ("eager", eager_sampled)):
        leaf = source.clone().requires_grad_()

        def run(leaf=leaf, loss_of=loss_of):
            return torch.autograd.grad(loss_of(leaf, samples), leaf)

        check(name, eager_sampled, run()[0], source, samples)
        made.append(Contender(name, run))
    return made, dict.fromkeys(("ours fresh", "eager"), 3)


def from_hidden(shape: tuple[int, int, int], dtype: torch.dtype, device: str, quick: bool) -> list[Contender]:
    n, v, h = shape
    g = torch.Generator().manual_seed(0)
    hidden, theirs = (torch.randn(n, h, generator=g).to(dtype).to(device) for _ in range(2))
    weight, their_weight = (torch.randn(v, h, generator=g).mul_(0.1).to(dtype).to(device) for _ in range(2))
    made = []

    def add(name: str, loss_of: Callable[[Tensor, Tensor], Tensor], divergence: str) -> None:
        x, w = hidden.clone().requires_grad_(), weight.detach().requires_grad_()

        def run():
            return torch.autograd.grad(loss_of(x, w), (x, w))

        # d hidden of two rows tells of both logits and the divergence; d weight is the tests' business
        (got, _), exact = run(), hidden[:2].double().requires_grad_()
        loss = eager_linear(exact, weight.double(), theirs[:2].double(), their_weight.double(), divergence)
        (want,) = torch.autograd.grad(loss * 2 / n, exact)
        error = ((got[:2].double() - want).norm() / want.norm()).item()
        # a peer's probabilities are float32 exponentials of rounded log-softmaxes
        limit = 5e-2 if dtype != torch.float32 else 1e-4 if name.startswith("ours") else 1e-3
        assert error < limit, f"{name}: relative error of d hidden {error:.2e} is above {limit}"
        made.append(Contender(name, run))

    for divergence in ("forward_kl", "jsd") if not quick else ("forward_kl",):
        add(f"ours {divergence}", lambda x, w, d=divergence: dk.linear_distill_loss(x, w, theirs, their_weight, divergence=d), divergence)
        add(f"eager {divergence}", lambda x, w, d=divergence: eager_linear(x, w, theirs, their_weight, d), divergence)
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        pass
    else:
        labels = torch.zeros(n, dtype=torch.int64, device=device)
        fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)
        if not quick and dtype == torch.float32:
            add("liger fused JSD", lambda x, w: fused(x, w, theirs, their_weight, labels), "jsd")
    dz = torch.randn(n, v, generator=g).to(dtype).to(device)
    made.append(Contender("4 GEMMs", lambda: (hidden @ weight.t(), theirs @ their_weight.t(), dz @ weight, dz.t() @ hidden)))
    return made


def peaks(device: str, progress, quick: bool) -> Iterator[dict]:
    """Peak extra memory of one forward + backward over the number of tokens: the gradient that is returned, and what comes beside it."""
    v, h = MEMORY_VOCAB, 64
    weight, their_weight = torch.randn(v, h, device=device).mul_(0.1).requires_grad_(), torch.randn(v, h, device=device).mul_(0.1)
    progress.reset(total=len(TOKENS))
    for n in TOKENS[:2] if quick else TOKENS:
        z, t = torch.randn(n, v, device=device).requires_grad_(), torch.randn(n, v, device=device)
        hidden, theirs = torch.randn(n, h, device=device).requires_grad_(), torch.randn(n, h, device=device)
        sides = (theirs, their_weight)
        for divergence in ("jsd", *BLOCKS):
            runs = {
                "ours in place": (partial(dk.distill_loss, z, t, divergence=divergence, inplace_backward=True), (z,)),
                "ours fresh": (partial(dk.distill_loss, z, t, divergence=divergence), (z,)),
                "eager": (partial(eager_loss, z, t, divergence), (z,)),
                "ours linear": (partial(dk.linear_distill_loss, hidden, weight, *sides, divergence=divergence), (hidden, weight)),
                "eager linear": (partial(eager_linear, hidden, weight, *sides, divergence=divergence), (hidden, weight)),
            }
            for name, (loss, leaves) in runs.items():
                extra = peak_extra_bytes(lambda loss=loss, leaves=leaves: torch.autograd.grad(loss(), leaves), device)
                yield _line("memory", n, v, h if "linear" in name else 0, torch.float32, divergence, name, extra=extra)
        progress.update()


def bench(device: str, repeats: int, quick: bool, progress) -> Iterator[dict]:
    """One row of the table per contender."""
    cases = GPU if device == "cuda" else CPU
    for case in cases[:1] if quick else cases:
        for dtype in (torch.float32, torch.bfloat16):
            # blocks of rows once: eager takes seconds
            blocks = BLOCKS if case is cases[0] and dtype == torch.float32 else ()
            for divergence in (*BETA, *(SUMS[:1] if quick else (*SUMS, *blocks)), "samples"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    if divergence == "samples":
                        made, moved = sampled(case, dtype, device)
                    else:
                        made, moved = on_logits(case, dtype, divergence, device, with_compile=not quick)
                extra = {c.name: (c.before(), peak_extra_bytes(c.run, device))[1] for c in made}
                nbytes = case.n * case.v * dtype.itemsize
                times = _race([*made, copy_contender(device, nbytes)], device, repeats, progress, f"{case.name} {dtype} {divergence}")
                for name, taken in times.items():
                    reads = moved.get(name, 2)
                    floor = reads * median(times["copy"]) / 2
                    yield _line(case.name, case.n, case.v, 0, dtype, divergence, name, taken, median(times["eager"]), floor, extra.get(name)) | {
                        "GB/s": round(reads * nbytes / median(taken) / 1e6, 1)
                    }
                del made
    if not quick:
        n, v, h = HIDDEN[device]
        for dtype in (torch.float32, torch.bfloat16):
            made = from_hidden((n, v, h), dtype, device, quick)
            extra = {c.name: peak_extra_bytes(c.run, device) for c in made}
            times = _race(made, device, max(repeats // 2, 3), progress, f"hidden {dtype}")
            for name, taken in times.items():
                eager = median(times["eager jsd" if "jsd" in name.lower() else "eager forward_kl"])
                yield _line("hidden", n, v, h, dtype, "both", name, taken, eager, median(times["4 GEMMs"]), extra[name]) | {
                    "GFLOP/s": round(8 * n * v * h / median(taken) / 1e6, 1)
                }
            del made
    yield from peaks(device, progress, quick)


def _race(made: list[Contender], device: str, repeats: int, progress, label: str) -> dict[str, list[float]]:
    progress.reset(total=len(made) * (repeats + 2))
    progress.set_description(label)
    return race(made, device, repeats, progress=progress)


def _line(case: str, n: int, v: int, h: int, dtype: torch.dtype, divergence: str, name: str, taken: list[float] | None = None,
          eager: float = 0.0, floor: float = 0.0, extra: int | None = None) -> dict:  # fmt: skip
    row = {"case": case, "N": n, "V": v, "H": h, "dtype": str(dtype).removeprefix("torch."), "divergence": divergence, "contender": name}
    if taken is not None:
        ms = median(taken)
        row |= {"ms": round(ms, 3), "best_ms": round(min(taken), 3), "x_eager": round(eager / ms, 2), "floor_ms": round(floor, 2)}
        row["over_floor"] = round(ms / floor, 2)
    return row | {"extra_MB": None if extra is None else round(extra / 1e6, 1)}
