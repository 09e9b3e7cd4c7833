"""Losses of a dense teacher: both rows whole, [N, V] log-softmaxes never.

Forward and reverse KL, JSD, the skewed KLs, total variation, alpha-beta and ToDi are a few sums over both rows
(:mod:`.primitives.pair_stats`). Every other divergence runs on blocks of rows that fit into a cache, where its gradient is taken too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .divergences import JSD, AlphaBeta, Divergence, ForwardKL, ReverseKL, SkewForwardKL, SkewReverseKL, ToDi, TotalVariation
from .linear import epilogue_gradient, refusing_twice, scaled
from .losses import DistillStats, checked_cross_entropy, checked_pair, checked_parameters, two_terms
from .primitives.boundary import functorch_refused, plain_eager, rows_of
from .primitives.head import Head, checked_number
from .primitives.memory import recycled_empty
from .primitives.pair_stats import PairStats, Sides, logits_grad, named, pair_stats, row_blocks, rows_at, statistics
from .primitives.vocab_stats import checked_inplace, checked_logits
from .primitives.vocab_stats import statistics as row_statistics
from .row_loss import checked_reduction, checked_weights, denominator, weighted

# what the second look at the rows is for, and the number of each row there
_SECOND = {
    JSD: ("mixture", lambda d: d.beta),
    SkewForwardKL: ("mixture", lambda d: d.alpha),
    SkewReverseKL: ("mixture", lambda d: 1 - d.alpha),
    AlphaBeta: ("power", lambda d: d.alpha),
    TotalVariation: ("distance", lambda d: 0.0),
    ToDi: ("balance", lambda d: 0.0),
}
_PAIRED = (ForwardKL, ReverseKL, *_SECOND)


def _ends(w: Tensor) -> Tensor:
    return (w == 0) | (w == 1)


def divergence_of_stats(divergence, s: PairStats, w: Tensor | None) -> Tensor:
    """The divergence per row from the statistics of both rows; `w` [N] as :meth:`DenseDistillation.shares` gives it.

    At w = 0 the mixture is q and at w = 1 it is p: one of the two divergences to it is a KL then, and the other 0.
    """
    if w is None:
        return s.forward_kl if type(divergence) is ForwardKL else s.reverse_kl
    if type(divergence) is TotalVariation:
        return 0.5 * s.distance
    if type(divergence) is ToDi:
        return s.balance
    if type(divergence) is AlphaBeta:
        return s.power_gap / (w * (1 - w))
    to_p = torch.where(_ends(w), torch.where(w == 0, s.forward_kl, 0.0), s.teacher_to_mixture)
    to_q = torch.where(_ends(w), torch.where(w == 1, s.reverse_kl, 0.0), s.student_to_mixture)
    if type(divergence) is JSD:
        # in between nothing is rescaled, at the ends JSD *is* a KL
        return torch.where(_ends(w), to_p + to_q, w * to_p + (1 - w) * to_q)
    return to_p if type(divergence) is SkewForwardKL else to_q


class DenseDistillation:
    """The loss of rows of a student beside rows of a teacher: one object for logits and for hidden states.

    `kd` and `ce` are the flat weights of the divergence and the cross-entropy, None where every row counts 1 and 0.
    """

    def __init__(
        self, lead: tuple[int, ...], vocab_size: int, device: torch.device, sides: Sides, *, divergence, scale_by_t2: bool,
        token_weights: Tensor | None, labels: Tensor | None, ce_weight: float, ignore_index: int, reduction: str, num_items_in_batch, backend,
    ):  # fmt: skip
        checked_reduction(reduction)
        n = math.prod(lead)
        self.divergence = checked_pair(divergence, "bucket")
        if isinstance(self.divergence, Divergence) and hasattr(self.divergence, "buckets"):
            self.divergence = self.divergence.buckets(False)
        checked_parameters(self.divergence, n)
        temperature = sides.student.temperature
        self.scale = temperature**2 if scale_by_t2 else 1.0
        self.columns, self.backend = sides.student.columns(vocab_size), backend
        self.labels = checked_cross_entropy(labels, ce_weight, ignore_index, lead, vocab_size, device)
        second = _SECOND.get(type(self.divergence), ("", None))[0]
        self.sides = sides._replace(with_t1=self.labels is not None and temperature != 1, second=second)
        self.kd, self.ce, self.index = checked_weights(token_weights, lead, device), None, None
        if self.labels is not None:
            counted = self.labels != ignore_index
            self.labels = self.labels.masked_fill(~counted, -1)
            kd = torch.ones(n, dtype=torch.float64, device=device) if self.kd is None else self.kd
            self.kd, self.ce, num_items_in_batch = two_terms(kd, counted, self.kd, reduction, num_items_in_batch)
            self.ce = self.ce * ce_weight
        self.count = denominator(self.kd, n, reduction, num_items_in_batch)

    @property
    def paired(self) -> bool:
        """Whether a few sums over the rows are enough for the divergence."""
        return type(self.divergence) in _PAIRED

    def shares(self, n: int, device: torch.device) -> Tensor | None:
        """The teacher's share w in what the divergence compares with, [n] in float64; None where it needs no second look."""
        if not self.sides.second:
            return None
        w = torch.as_tensor(_SECOND[type(self.divergence)][1](self.divergence), dtype=torch.float64, device=device)
        return w.reshape(-1) if w.numel() == n and w.dim() else w.expand(n)

    @property
    def used(self) -> Tensor | None:
        """Which rows count for anything, or None where all do."""
        if self.kd is None:
            return None
        return self.kd != 0 if self.ce is None else (self.kd != 0) | (self.ce != 0)

    def on_columns(self) -> DenseDistillation:
        """The same loss on rows that hold the valid columns alone."""
        part = copy.copy(self)
        part.sides = self.sides._replace(student=self.sides.student._replace(valid_vocab=None))
        return part

    def rows(self, index: slice | Tensor) -> DenseDistillation:
        """The same loss on some of its rows."""
        part = copy.copy(self)
        for name in ("kd", "ce", "labels"):
            value = getattr(self, name)
            setattr(part, name, None if value is None else value[index])
        part.divergence = self.divergence.rows(index) if hasattr(self.divergence, "rows") else self.divergence
        return part

    def of_stats(self, stats: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
        """(weighted loss, divergence × scale) per row from the statistics [n, 10] and the shares w."""
        if self.kd is not None:
            # constants in rows that do not count, so that whatever those hold meets no arithmetic
            stats = stats.masked_fill(~self.used[:, None], 0)
        s = PairStats(*stats.unbind(-1))
        plain = divergence_of_stats(self.divergence, s, w) * self.scale
        rows = weighted(plain, self.kd)
        if self.ce is not None:
            rows = rows + weighted(s.lse_t1 - s.label_logit * self.sides.student.temperature, self.ce)
        return rows, plain

    def of_logits(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The same for any divergence, from raw logits [n, columns] of both sides; float32, or float64 for float64 logits."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        z, t = (head._replace(valid_vocab=None).apply(rows.to(dtype)) for head, rows in zip(self.sides, (x, y)))
        if self.kd is not None:
            # rows that do not count hold a constant, and those without a divergence compare the student with itself
            z = z.masked_fill(~self.used[:, None], 0)
            t = torch.where((self.kd != 0)[:, None], t, z.detach())
        log_q = z.log_softmax(-1)
        found = self.divergence(t.log_softmax(-1), log_q)
        if not isinstance(found, Tensor) or found.shape != z.shape[:-1]:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"divergence must return one value per row, shape {tuple(z.shape[:-1])}; got {got}")
        plain = found.double() * self.scale
        rows = weighted(plain, self.kd)
        if self.ce is not None:
            z1 = z * self.sides.student.temperature
            label = z1.gather(-1, self.labels.clamp(0, self.columns - 1)[:, None])[:, 0]
            label = label.masked_fill(self.labels >= self.columns, -math.inf)
            rows = rows + weighted((z1.logsumexp(-1) - label).double(), self.ce)
        return rows, plain

    def sweep(self, x: Tensor, y: Tensor, out: Tensor | None = None, upstream: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """:meth:`of_logits` of rows [O, I, V], no graph; with `out` also d Σ upstream·loss / dx, which may lie over x.

        One block of rows is all that exists beside the arguments.
        """
        if self.paired:
            return self._pair_sweep(x, y, out, upstream)
        n = x.shape[0] * x.shape[1]
        rows, plain = (torch.zeros(n, dtype=torch.float64, device=x.device) for _ in range(2))
        used = self.used if x.device.type == "cpu" else None
        for block in row_blocks(n, self.columns, x.device, x.shape[1], y.shape[1], *([] if out is None else [out.shape[1]])):
            target = None if out is None else rows_at(out, block)
            if used is not None and not used[block].any():
                if target is not None:
                    target.zero_()
                continue
            task, ours, theirs = self.rows(block), rows_at(x, block)[:, : self.columns], rows_at(y, block)[:, : self.columns]
            if target is None:
                rows[block], plain[block] = task.of_logits(ours, theirs)
                continue
            factor = upstream[block] if isinstance(upstream, Tensor) and upstream.dim() else upstream

            def value(leaves, task=task, theirs=theirs, factor=factor):
                found = task.of_logits(leaves["stats"]["logits"], theirs)
                return (found[0] * factor).sum(), found

            slopes, (_, found) = epilogue_gradient(value, {"stats": {"logits": ours}, "per_token": []})
            rows[block], plain[block] = (t.detach() for t in found)
            target[:, self.columns :] = 0
            if "logits" in slopes["stats"]:
                target[:, : self.columns] = slopes["stats"]["logits"]
            else:
                target[:, : self.columns] = 0
        return rows, plain

    def _pair_sweep(self, x: Tensor, y: Tensor, out: Tensor | None, upstream: Tensor | float) -> tuple[Tensor, Tensor]:
        w, inner = self._shares(x)
        stats = statistics(x, y, self.labels, inner, self.sides, self.backend)

        def value(leaves):
            found = self.of_stats(leaves["stats"]["pair"], w)
            return (found[0] * upstream).sum(), found

        leaves = {"stats": {"pair": named(stats)}, "per_token": []}
        if out is None:
            return value(leaves)[1]
        slopes, (_, found) = epilogue_gradient(value, leaves)
        logits_grad(x, y, self.labels, inner, stats, slopes["stats"]["pair"], self.sides, self.backend, True)
        return tuple(t.detach() for t in found)

    def _shares(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(w, what the kernel gets): at the ends of [0, 1] the numbers of a mixture are not used."""
        w = self.shares(x.shape[0] * x.shape[1], x.device)
        return w, w if self.sides.second != "mixture" else w.masked_fill(_ends(w), 0.5)

    def of_pairs(self, x: Tensor, y: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
        """:meth:`of_stats` of logits [O, I, V], differentiable."""
        w, inner = self._shares(x)
        return self.of_stats(pair_stats(x, y, self.labels, inner, self.sides, backend=self.backend, inplace_backward=inplace), w)

    @torch.no_grad()
    def diagnostics(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(the student's entropy, whether both have one argmax) of rows [O, I, V]: one more read of both."""
        ours = row_statistics(x, None, None, ("lse", "expected_logit", "argmax"), self.sides.student, self.backend)
        theirs = row_statistics(y[..., : self.columns], None, None, ("argmax",), self.sides.teacher, self.backend)
        return ours["lse"] - ours["expected_logit"], ours["argmax"] == theirs["argmax"]

    def with_stats(self, loss: Tensor, plain: Tensor, entropy: Tensor, agreement: Tensor, lead: tuple[int, ...]):
        unused = torch.zeros_like(agreement) if self.kd is None else ~self.used
        whole = torch.ones_like(plain)
        numbers = (t.detach().masked_fill(unused, 0).to(loss.dtype).view(lead) for t in (plain, entropy, whole, whole))
        return loss, DistillStats(*numbers, (agreement & ~unused).view(lead))


class _Total(torch.autograd.Function):
    """Σ of the rows / count, with d logits computed on the way."""

    @staticmethod
    def forward(ctx, x, y, task, with_grad):
        ctx.save_for_backward(x)
        ctx.grad = recycled_empty(tuple(x.shape), x.dtype, x.device) if with_grad and ctx.needs_input_grad[0] else None
        rows, plain = task.sweep(x, y, ctx.grad, 1 / task.count)
        ctx.mark_non_differentiable(plain)
        return rows.sum() / task.count, plain

    @staticmethod
    @refusing_twice
    def backward(ctx, upstream, _):
        if ctx.grad is None:
            raise RuntimeError("a second backward through distill_loss needs retain_graph=True in the first: its gradient is given away")
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        # on a CPU the usual factor of 1 is seen without waiting for anything
        unscaled = upstream.device.type == "cpu" and plain_eager(upstream) and bool(upstream == 1)
        grad = scaled(ctx.grad, None if unscaled else upstream, ctx.grad.dtype, keep)
        if not keep:
            ctx.grad = None
        return grad, None, None, None


class _Rows(torch.autograd.Function):
    """The rows themselves; blocks are computed again in the backward, when the upstream gradient is known."""

    @staticmethod
    def forward(ctx, x, y, task, inplace):
        ctx.save_for_backward(x, y)
        ctx.task, ctx.inplace = task, inplace
        rows, plain = task.sweep(x, y)
        ctx.mark_non_differentiable(plain)
        return rows, plain

    @staticmethod
    @refusing_twice
    def backward(ctx, upstream, _):
        x, y = ctx.saved_tensors
        out = x if ctx.inplace else recycled_empty(tuple(x.shape), x.dtype, x.device)
        ctx.task.sweep(x, y, out, upstream)
        if ctx.inplace:
            torch.autograd.graph.increment_version(x)
            out = out.detach()
        return out, None, None, None


def _by_blocks(task: DenseDistillation, x: Tensor, y: Tensor, per_row: bool, inplace: bool) -> tuple[Tensor, Tensor]:
    """(rows [N] or their total / count, plain rows), differentiable."""
    functorch_refused("distill_loss")
    # the gradient of a total is known up to a factor before its backward; in fp16 it would underflow without that factor
    if per_row or inplace or x.dtype == torch.float16:
        rows, plain = _Rows.apply(x, y, task, inplace)
        return (rows, plain) if per_row else (rows.sum() / task.count, plain)
    return _Total.apply(x, y, task, torch.is_grad_enabled())


def distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str | Callable[[Tensor, Tensor], Tensor] = "forward_kl",
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | float | Tensor | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    valid_vocab: int | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
    backend: str | None = None,
):
    """Divergence between two whole distributions, ``reduce(w · T² · D(p ‖ q))`` in nats; the gradient is the student's alone.

    The KLs, JSD, total variation, alpha-beta and ToDi take one read of both rows forward (all but forward and reverse KL a second look
    from the cache), and one more with the gradient's write backward. Any other divergence runs as plain PyTorch on blocks of
    rows that fit into a cache, and its gradient is taken there: in the forward for a scalar, in the backward (from the blocks
    again) with reduction="none", `inplace_backward` or float16 logits. Beside the arguments there exist one gradient [..., V]
    in the logits' dtype (none with `inplace_backward`), a few numbers per token, and one block.

    Args:
        student_logits: [..., V] float32, bfloat16, float16 or float64.
        teacher_logits: [..., V'] of the same tokens, any of these dtypes; a constant. V' = V unless `valid_vocab` says which
            columns the two share (padded vocabularies).
        divergence: as in :func:`topk_distill_loss`, over all V columns. A callable gets log-probs [rows, V] in float32 (float64 for
            float64 logits) and is called once per block: parameters that differ per token need ``rows(index)``.
        temperature, scale_by_t2: softmax temperature of both; value and gradient times T² unless switched off.
        token_weights, reduction, num_items_in_batch: see :func:`row_loss`.
        labels, ce_weight, ignore_index: see :func:`topk_distill_loss`.
        logit_scale, softcap, teacher_logit_scale, teacher_softcap: of each side's head; see :func:`vocab_stats`.
        valid_vocab: columns from it on are −inf on both sides and get no gradient.
        inplace_backward: d logits overwrite the logits' memory, in the backward.
        return_stats: also return :class:`DistillStats`, from one more read of both rows; both masses are 1.
        backend: of the kernels; see :func:`vocab_stats`.

    Returns:
        The loss, a float32 scalar (float64 for float64 logits), or [...] with reduction="none"; or (loss, DistillStats).

    Raises:
        ValueError, TypeError: naming the argument. BackendError: `backend` cannot serve these tensors. RuntimeError: a second
        backward without retain_graph.
    """
    checked_logits(student_logits, "student_logits")
    checked_logits(teacher_logits, "teacher_logits")
    lead, vocab = tuple(student_logits.shape[:-1]), student_logits.shape[-1]
    if tuple(teacher_logits.shape[:-1]) != lead:
        raise ValueError(f"teacher_logits must have the student's token shape {lead}; got {tuple(teacher_logits.shape[:-1])}")
    if teacher_logits.device != student_logits.device:
        raise ValueError(f"teacher_logits must be on {student_logits.device}, where student_logits is; got {teacher_logits.device}")
    sides = checked_sides(
        vocab, teacher_logits.shape[-1], "teacher_logits", temperature, logit_scale, softcap, teacher_logit_scale, teacher_softcap, valid_vocab
    )
    task = DenseDistillation(
        lead, vocab, student_logits.device, sides, divergence=divergence, scale_by_t2=scale_by_t2, token_weights=token_weights, labels=labels,
        ce_weight=ce_weight, ignore_index=ignore_index, reduction=reduction, num_items_in_batch=num_items_in_batch, backend=backend,
    )  # fmt: skip
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    # the teacher's columns beyond the valid ones are not cut off: rows of a whole number of vectors are read by vectors
    x, y = rows_of(student_logits), rows_of(teacher_logits.detach())
    if inplace_backward:
        checked_inplace(x)
    extra = task.diagnostics(x.detach(), y) if return_stats else None
    if task.paired:
        rows, plain = task.of_pairs(x, y, inplace_backward)
        loss = rows if reduction == "none" else rows.sum() / task.count
    else:
        run = torch.compiler.disable(_by_blocks) if torch.compiler.is_compiling() else _by_blocks
        loss, plain = run(task, x, y, reduction == "none", inplace_backward)
    loss = (loss.view(lead) if reduction == "none" else loss).to(dtype)
    return task.with_stats(loss, plain, *extra, lead) if return_stats else loss


def checked_sides(vocab, teacher_vocab, name, temperature, logit_scale, softcap, teacher_logit_scale, teacher_softcap, valid_vocab) -> Sides:
    """The heads of both sides, or an error that names the argument; `name` is that of the teacher's rows."""
    student = Head.checked(vocab, temperature, logit_scale, softcap, valid_vocab)
    checked_number("teacher_logit_scale", teacher_logit_scale)
    if teacher_softcap is not None and checked_number("teacher_softcap", teacher_softcap) <= 0:
        raise ValueError(f"teacher_softcap must be positive; got {teacher_softcap}")
    if teacher_vocab < student.columns(vocab) or (teacher_vocab != vocab and valid_vocab is None):
        raise ValueError(
            f"{name} must have the student's {student.columns(vocab)} columns (valid_vocab says how many the two share); got {teacher_vocab}"
        )
    return Sides(student, Head.checked(teacher_vocab, temperature, teacher_logit_scale, teacher_softcap))
