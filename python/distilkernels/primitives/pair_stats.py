"""``pair_stats``: what the KL divergences of two whole rows are made of, from one read of both.

z are the student's transformed logits (see :class:`~.head.Head`) and q = softmax(z); t and p = softmax(t) the teacher's. The
cross terms are sums of differences, Σ p·(t − z) and Σ q·(z − t), not differences of sums: of two close rows the latter lose what
is asked for. The teacher is a constant. The student's gradient is one formula, with d = z − lse and e = t − teacher_lse:

    dz_v = e^{d_v}·(A + B·d_v + C·(d_v − e_v)) + D·e^{e_v} + E·e^{T·z_v − lse_t1}

and the exact entry at a label, where one is given.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import resolve
from .boundary import Once, functorch_refused, plain_eager, rows_of
from .head import Head
from .memory import recycled_empty
from .vocab_stats import gather_logits, row_dtype

KERNEL = ("lse", "teacher_lse", "teacher_gap", "student_gap", "expected_logit", "teacher_expected_logit", "lse_t1")

# Numbers of one block of the reference: a few blocks of float32 in a CPU's cache, or enough to fill a GPU
_BLOCK = {"cpu": 2**18, "cuda": 2**26}


class PairStats(NamedTuple):
    """Statistics of pairs of rows in nats, all [...]; differentiable in the student's logits.

    ============================ ==============================================================================
    ``lse``, ``teacher_lse``     log Σ exp z_v and log Σ exp t_v
    ``teacher_gap``              Σ p_v (t_v − z_v); +inf where p_v > 0 = q_v
    ``student_gap``              Σ q_v (z_v − t_v); +inf where q_v > 0 = p_v
    ``expected_logit``           Σ q_v z_v; the student's entropy is lse minus it
    ``teacher_expected_logit``   Σ p_v t_v
    ``lse_t1``                   log Σ exp(T·z_v), the student's at temperature 1
    ``label_logit``              z at the label; 0 where there is none
    ============================ ==============================================================================
    """

    lse: Tensor
    teacher_lse: Tensor
    teacher_gap: Tensor
    student_gap: Tensor
    expected_logit: Tensor
    teacher_expected_logit: Tensor
    lse_t1: Tensor
    label_logit: Tensor

    @property
    def forward_kl(self) -> Tensor:
        """KL(p ‖ q)."""
        return self.teacher_gap - self.teacher_lse + self.lse

    @property
    def reverse_kl(self) -> Tensor:
        """KL(q ‖ p)."""
        return self.student_gap - self.lse + self.teacher_lse


class Sides(NamedTuple):
    """The heads of a pair. They share the temperature, and the student's valid columns; `with_t1` asks for lse_t1 where T ≠ 1."""

    student: Head
    teacher: Head
    with_t1: bool = False


def row_blocks(n: int, numbers: int, device: torch.device, *inner: int):
    """Slices of at most `numbers`-wide rows that a block holds; none crosses a multiple of an `inner` row count."""
    size = max(1, _BLOCK.get(device.type, 2**22) // max(numbers, 1))
    start = 0
    while start < n:
        stop = min([start + size, n] + [(start // i + 1) * i for i in inner if i])
        yield slice(start, stop)
        start = stop


def rows_at(rows: Tensor, block: slice) -> Tensor:
    """Rows [n, V] of [O, I, V], a view; the block lies within one of O."""
    inner = rows.shape[1]
    outer, first = divmod(block.start, inner)
    return rows[outer, first : first + block.stop - block.start]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------------------------------------- reference


def reference(logits: Tensor, teacher: Tensor, sides: Sides, out: Tensor) -> None:
    """Writes the statistics :data:`KERNEL` of logits [O, I, V] and teacher [O', I', V'] into out [N, 7], N = O·I = O'·I'.

    The definition, in fp64 where the logits are, and fp32 otherwise; block by block, so that [N, V] is never made.
    """
    columns = sides.student.columns(logits.shape[2])
    for block in row_blocks(out.shape[0], columns, logits.device, logits.shape[1], teacher.shape[1]):
        x, y = (_wide(rows_at(rows, block)[:, :columns]) for rows in (logits, teacher))
        z, t = sides.student._replace(valid_vocab=None).apply(x), sides.teacher.apply(y)
        lse, teacher_lse = z.logsumexp(-1), t.logsumexp(-1)
        q, p = (z - lse[:, None]).exp(), (t - teacher_lse[:, None]).exp()
        gap = t - z
        values = {
            "lse": lse,
            "teacher_lse": teacher_lse,
            "teacher_gap": torch.where(p == 0, 0.0, p * gap).sum(-1),
            "student_gap": torch.where(q == 0, 0.0, q * -gap).sum(-1),
            "expected_logit": torch.where(q == 0, 0.0, q * z).sum(-1),
            "teacher_expected_logit": torch.where(p == 0, 0.0, p * t).sum(-1),
            "lse_t1": (z * sides.student.temperature).logsumexp(-1) if sides.with_t1 else lse,
        }
        out[block] = torch.stack([values[name] for name in KERNEL], -1).to(out.dtype)


def reference_backward(logits: Tensor, teacher: Tensor, coef: Tensor, sides: Sides, out: Tensor) -> None:
    """Writes d logits: the formula of the module's page times dz/dx. `out` [O, I, V] may be `logits` itself.

    coef [N, 8] holds lse, teacher_lse, A, B, C, D, E, lse_t1. A row with A = … = E = 0 is written as zeros whatever it holds,
    and one with C = D = 0 asks nothing of its teacher.
    """
    columns = sides.student.columns(logits.shape[2])
    for block in row_blocks(coef.shape[0], columns, logits.device, logits.shape[1], teacher.shape[1], out.shape[1]):
        x, y = (_wide(rows_at(rows, block)[:, :columns]) for rows in (logits, teacher))
        z, t = sides.student._replace(valid_vocab=None).apply(x), sides.teacher.apply(y)
        target = rows_at(out, block)
        target[:, :columns] = gradient(z, t, coef[block].unsqueeze(1), sides)
        target[:, columns:] = 0


def gradient(z: Tensor, t: Tensor, coef: Tensor, sides: Sides) -> Tensor:
    """d x at entries z, t [N, ...] from coef [N, 1, 8] in the dtype of z."""
    lse, teacher_lse, a, b, c, d, e, lse_t1 = coef.unbind(-1)
    alone = (c == 0) & (d == 0)
    ours = (z - lse).to(z.dtype)
    theirs = torch.where(alone, 0.0, t - teacher_lse).to(z.dtype)
    q, p = ours.exp(), theirs.exp()
    found = torch.where(q == 0, 0.0, q * (a + b * ours.masked_fill(q == 0, 0) + c * (ours - theirs)))
    found = found + torch.where(d == 0, 0.0, d * p)
    if sides.with_t1:
        found = found + torch.where(e == 0, 0.0, e * (z * sides.student.temperature - lse_t1).exp())
    found = found * sides.student.chain(z)
    return torch.where((coef[..., 2:7] == 0).all(-1), 0.0, found)


# ---------------------------------------------------------------------------------------------- autograd


def coefficients(stats: Tensor, grads: Tensor, sides: Sides) -> Tensor:
    """[N, 8] for the backward kernel from the statistics [N, ≥ 7] and their gradients; nothing comes of a zero gradient."""
    s, g = PairStats(*stats.unbind(-1)), PairStats(*grads.unbind(-1))

    def times(slope: Tensor, value: Tensor) -> Tensor:
        return torch.where(slope == 0, 0.0, slope * value)

    # q_v·(1 + (z_v − t_v) − student_gap) and q_v·(1 + z_v − expected_logit), with z and t counted from their lse
    a = g.lse + times(g.student_gap, 1 + s.lse - s.teacher_lse - s.student_gap) + times(g.expected_logit, 1 + s.lse - s.expected_logit)
    e = g.lse_t1 * sides.student.temperature
    if not sides.with_t1:
        a, e = a + g.lse_t1, torch.zeros_like(e)
    return torch.stack([s.lse, s.teacher_lse, a, g.expected_logit, g.student_gap, -g.teacher_gap, e, s.lse_t1], -1)


def statistics(logits: Tensor, teacher: Tensor, labels: Tensor | None, sides: Sides, backend: str | None) -> Tensor:
    """[N, 9] of logits [O, I, V] and teacher [O', I', V']: the fields of :class:`PairStats`, and t at the label."""
    n = logits.shape[0] * logits.shape[1]
    out = torch.empty((n, len(KERNEL)), dtype=row_dtype(logits.device), device=logits.device)
    if out.numel():
        resolve("pair_stats", logits, teacher, backend=backend)(logits, teacher, sides, out)
    if labels is None:
        at = out.new_zeros((n, 2))
    else:
        # the teacher's row may be narrower than a label that no valid column has
        known = labels.clamp(max=sides.student.columns(logits.shape[2]) - 1)
        at = torch.cat([gather_logits(logits, labels[:, None], sides.student), gather_logits(teacher, known[:, None], sides.teacher)], -1)
        at = at.to(out.dtype).masked_fill((labels < 0)[:, None], 0)
    return torch.cat([out, at], -1)


def logits_grad(
    logits: Tensor, teacher: Tensor, labels: Tensor | None, stats: Tensor, grads: Tensor, sides: Sides, backend: str | None, inplace: bool
) -> Tensor:  # fmt: skip
    """d logits [O, I, V] from the gradients [N, 8] of the statistics [N, 9]."""
    coef = coefficients(stats[:, :-1], grads, sides)
    out = logits if inplace else recycled_empty(tuple(logits.shape), logits.dtype, logits.device)
    if logits.numel():
        resolve("pair_stats_backward", logits, teacher, backend=backend)(logits, teacher, coef, sides, out)
    if labels is None:
        return out
    # the label's own entry is written whole: added to a rounded q it would keep the rounding of q
    z, t = stats[:, 7:8], stats[:, 8:9]
    entry = gradient(z, t, coef.unsqueeze(1), sides) + grads[:, 7:8] * sides.student.chain(z)
    columns = sides.student.columns(logits.shape[2])
    real = (labels >= 0) & (labels < columns) & (z[:, 0] > -math.inf)
    # rows without a label rewrite what is at column 0
    index = torch.where(real, labels, 0).view(*logits.shape[:2], 1)
    entry = torch.where(real.view_as(index), entry.to(out.dtype).view(index.shape), out.gather(2, index))
    return out.scatter_(2, index, entry)


class _PairStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, teacher, labels, sides, backend, inplace):
        stats = statistics(logits, teacher, labels, sides, backend)
        ctx.save_for_backward(logits, teacher, labels, stats)
        ctx.sides, ctx.backend, ctx.inplace = sides, backend, inplace
        return stats[:, :-1].clone()

    @staticmethod
    def backward(ctx, grads):
        twice = torch.is_grad_enabled()
        logits, teacher, labels, stats = ctx.saved_tensors
        with torch.no_grad():
            grad = logits_grad(logits, teacher, labels, stats, grads, ctx.sides, ctx.backend, ctx.inplace)
            if ctx.inplace:
                torch.autograd.graph.increment_version(logits)
                grad = grad.detach()
        return Once.apply(grad, logits, "pair_stats") if twice else grad, None, None, None, None, None


# --------------------------------------------------------------------------------------------- torch.library


def _sides(temperature, valid_vocab, logit_scale, softcap, teacher_logit_scale, teacher_softcap, with_t1) -> Sides:
    return Sides(Head(temperature, logit_scale, softcap, valid_vocab), Head(temperature, teacher_logit_scale, teacher_softcap), with_t1)


def _numbers(sides: Sides) -> tuple:
    s, t = sides.student, sides.teacher
    return s.temperature, s.valid_vocab, s.logit_scale, s.softcap, t.logit_scale, t.softcap, sides.with_t1


@torch.library.custom_op("distilkernels::pair_stats", mutates_args=())
def _op(
    logits: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float, valid_vocab: int | None, logit_scale: float,
    softcap: float | None, teacher_logit_scale: float, teacher_softcap: float | None, with_t1: bool, backend: str | None,
) -> Tensor:  # fmt: skip
    sides = _sides(temperature, valid_vocab, logit_scale, softcap, teacher_logit_scale, teacher_softcap, with_t1)
    return statistics(logits, teacher, labels, sides, backend)


@_op.register_fake
def _(logits, teacher, labels, *_):
    return torch.empty((logits.shape[0] * logits.shape[1], 9), dtype=row_dtype(logits.device), device=logits.device)


@torch.library.custom_op("distilkernels::pair_stats_backward", mutates_args=())
def _op_backward(
    logits: Tensor, teacher: Tensor, labels: Tensor | None, stats: Tensor, grads: Tensor, temperature: float, valid_vocab: int | None,
    logit_scale: float, softcap: float | None, teacher_logit_scale: float, teacher_softcap: float | None, with_t1: bool, backend: str | None,
) -> Tensor:  # fmt: skip
    sides = _sides(temperature, valid_vocab, logit_scale, softcap, teacher_logit_scale, teacher_softcap, with_t1)
    return logits_grad(logits, teacher, labels, stats, grads, sides, backend, False)


@_op_backward.register_fake
def _(logits, *_):
    return logits.new_empty(logits.shape)


def _op_setup(ctx, inputs, output):
    logits, teacher, labels, *ctx.options = inputs
    ctx.save_for_backward(logits, teacher, labels, output)


def _op_gradient(ctx, grads):
    logits, teacher, labels, stats = ctx.saved_tensors
    return (_op_backward(logits, teacher, labels, stats, grads[:, :-1], *ctx.options), *(None,) * 10)


_op.register_autograd(_op_gradient, setup_context=_op_setup)


# --------------------------------------------------------------------------------------------- calls


def pair_stats(
    logits: Tensor, teacher: Tensor, labels: Tensor | None, sides: Sides, *, backend: str | None = None, inplace_backward: bool = False
) -> PairStats:  # fmt: skip
    """Statistics of logits [..., V] beside teacher [..., V'], flat [N] in fp64. Arguments are already checked.

    `labels` int64 [N], −1 where there is none. Differentiable in the logits; `inplace_backward` writes d logits over them.
    """
    x, y = rows_of(logits), rows_of(teacher.detach())
    if plain_eager(logits, teacher):
        return PairStats(*_PairStats.apply(x, y, labels, sides, backend, inplace_backward).unbind(-1))
    functorch_refused("pair_stats")
    return PairStats(*_op(x, y, labels, *_numbers(sides), backend)[:, :-1].unbind(-1))
