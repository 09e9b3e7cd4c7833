"""``pair_stats``: what the KL divergences of two whole rows are made of, from one read of both.

z are the student's transformed logits (see :class:`~.head.Head`) and q = softmax(z); t and p = softmax(t) the teacher's. The
cross terms are sums of differences, Σ p·(t − z) and Σ q·(z − t), not differences of sums: of two close rows the latter lose what
is asked for. On request one of the following as well, from a second look at the rows when their lse are known; w is each
row's own number:

    "mixture"   KL(p ‖ m) and KL(q ‖ m) to m = w·p + (1 − w)·q, w in (0, 1)
    "power"     Σ [w·p + (1 − w)·q − p^w·q^{1−w}], any w
    "distance"  Σ |p − q|
    "balance"   Σ [(1 − r)·p·log(p/q) + r·q·log(q/p)], r = q/(p + q), which the gradient holds constant

The teacher is a constant. The student's gradient is one formula, with r = (1 − w)·q/m (w = ½ for "balance"), and one
of the lines in brackets:

    dz_v = q_v·(A + B·log q_v + C·log(q_v/p_v)) + D·p_v + E·e^{T·z_v − lse_t1}
         + [F·p_v·r_v + G·q_v·log(q_v/m_v) + H·q_v·r_v]
         + [F·p_v^w·q_v^{1−w}]
         + [F·q_v·sign(q_v − p_v)]
         + [F·q_v·r_v·log(q_v/p_v)]

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

# the columns that kernels write; what the others than "mixture" sum is in teacher_to_mixture, the last two are for the backward alone:
# Σ p·r and Σ q·r, or in student_share Σ q·sign(q − p) or Σ q·r·log(q/p)
_KERNEL = (
    "lse", "teacher_lse", "teacher_gap", "student_gap", "expected_logit", "teacher_expected_logit", "lse_t1",
    "teacher_to_mixture", "student_to_mixture", "teacher_share", "student_share",
)  # fmt: skip

# Numbers of one block of the reference: enough to fill a GPU, and on a CPU 1 MB of float32 for each thread. An operation on less is
# over before its threads have met (PyTorch gives none fewer than 2^15 numbers); on more it comes from memory.
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
    ``teacher_to_mixture``       KL(p ‖ w·p + (1 − w)·q), or what :attr:`power_gap`, :attr:`distance` or :attr:`balance` says; 0 where nothing was asked for
    ``student_to_mixture``       KL(q ‖ w·p + (1 − w)·q); 0 without a mixture
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
    teacher_to_mixture: Tensor
    student_to_mixture: Tensor
    label_logit: Tensor

    @property
    def forward_kl(self) -> Tensor:
        """KL(p ‖ q)."""
        return self.teacher_gap - self.teacher_lse + self.lse

    @property
    def reverse_kl(self) -> Tensor:
        """KL(q ‖ p)."""
        return self.student_gap - self.lse + self.teacher_lse

    @property
    def power_gap(self) -> Tensor:
        """Σ [w·p + (1 − w)·q − p^w·q^{1−w}], where "power" was asked for."""
        return self.teacher_to_mixture

    @property
    def distance(self) -> Tensor:
        """Σ |p − q|, where "distance" was asked for."""
        return self.teacher_to_mixture

    @property
    def balance(self) -> Tensor:
        """Σ [(1 − r)·p·log(p/q) + r·q·log(q/p)] = Σ (p − q)·log(p/q), where "balance" was asked for; r is no part of its gradient."""
        return self.teacher_to_mixture


# the numbers by which kernels know them
SECOND = ("", "mixture", "power", "distance", "balance")


class Sides(NamedTuple):
    """The heads of a pair. They share the temperature, and the student's valid columns; `with_t1` asks for lse_t1 where T ≠ 1.

    `second` says what the second look is for where rows have a w (see the module's page); without one there is none.
    """

    student: Head
    teacher: Head
    with_t1: bool = False
    second: str = "mixture"

    def looks_for(self, w: Tensor | None) -> str:
        return "" if w is None else self.second


def row_blocks(n: int, numbers: int, device: torch.device, *inner: int):
    """Slices of at most `numbers`-wide rows that a block holds; none crosses a multiple of an `inner` row count."""
    whole = _BLOCK.get(device.type, 2**22) * (torch.get_num_threads() if device.type == "cpu" else 1)
    size = max(1, whole // max(numbers, 1))
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


# ---------------------------------------------------------------------------------------------- reference


def reference(logits: Tensor, teacher: Tensor, w: Tensor | None, sides: Sides, out: Tensor) -> None:
    """Writes the statistics of logits [O, I, V] and teacher [O', I', V'] into out [N, 11], N = O·I = O'·I'.

    The definition, in fp64 where one of the sides is, and fp32 otherwise; block by block, so that [N, V] is never made. `w` [N].
    """
    for block, z, t in _blocks(logits, teacher, sides):
        lse, teacher_lse = z.logsumexp(-1), t.logsumexp(-1)
        log_q, log_p = z - lse[:, None], t - teacher_lse[:, None]
        q, p = log_q.exp(), log_p.exp()
        gap = t - z
        values = {
            "lse": lse,
            "teacher_lse": teacher_lse,
            "teacher_gap": _nothing_at_0(p, gap).sum(-1),
            "student_gap": _nothing_at_0(q, -gap).sum(-1),
            "expected_logit": _nothing_at_0(q, z).sum(-1),
            "teacher_expected_logit": _nothing_at_0(p, t).sum(-1),
            "lse_t1": (z * sides.student.temperature).logsumexp(-1) if sides.with_t1 else lse,
        }
        values |= dict.fromkeys(_KERNEL[7:], torch.zeros_like(lse))
        second = sides.looks_for(w)
        if second == "mixture":
            log_m, share = _mixed(log_p, log_q, w[block][:, None])
            values["teacher_to_mixture"] = _nothing_at_0(p, log_p - log_m).sum(-1)
            values["student_to_mixture"] = _nothing_at_0(q, log_q - log_m).sum(-1)
            values["teacher_share"], values["student_share"] = (_nothing_at_0(m, share).sum(-1) for m in (p, q))
        elif second == "power":
            share = w[block][:, None].to(z.dtype)
            values["teacher_to_mixture"] = (share * p + (1 - share) * q - _power(log_p, log_q, share)).sum(-1)
        elif second == "distance":
            values["teacher_to_mixture"] = (p - q).abs().sum(-1)
            values["student_share"] = (q * (q - p).sign()).sum(-1)
        elif second == "balance":
            gap = log_q - log_p
            values["teacher_to_mixture"] = _nothing_at_0((p > 0) | (q > 0), (q - p) * gap).sum(-1)
            values["student_share"] = _tilt(log_p, log_q).sum(-1)
        out[block] = torch.stack([values[name] for name in _KERNEL], -1).to(out.dtype)


def _blocks(logits: Tensor, teacher: Tensor, sides: Sides):
    """(rows, z, t) of one block after another."""
    columns = sides.student.columns(logits.shape[2])
    dtype = torch.float64 if torch.float64 in (logits.dtype, teacher.dtype) else torch.float32
    for block in row_blocks(logits.shape[0] * logits.shape[1], columns, logits.device, logits.shape[1], teacher.shape[1]):
        x, y = (rows_at(rows, block)[:, :columns].to(dtype) for rows in (logits, teacher))
        yield block, sides.student._replace(valid_vocab=None).apply(x), sides.teacher.apply(y)


def _nothing_at_0(mass: Tensor, value: Tensor) -> Tensor:
    """mass·value, 0 where there is no mass."""
    return torch.where(mass == 0, 0.0, mass * value)


def _mixed(log_p: Tensor, log_q: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """log m and r = (1 − w)·q/m of m = w·p + (1 − w)·q, w fp64 in (0, 1)."""
    ours, theirs = log_q + (1 - w).log().to(log_q.dtype), log_p + w.log().to(log_p.dtype)
    log_m = torch.logaddexp(theirs, ours)
    return log_m, (ours - log_m).exp()


def _power(log_p: Tensor, log_q: Tensor, w: Tensor) -> Tensor:
    """p^w·q^{1−w}, 0 where both are."""
    nothing = (log_p == -math.inf) & (log_q == -math.inf)
    return (w * log_p + (1 - w) * log_q).masked_fill(nothing, -math.inf).exp()


def _tilt(log_p: Tensor, log_q: Tensor) -> Tensor:
    """q·r·log(q/p) with r = q/(p + q)."""
    gap = log_q - log_p
    return _nothing_at_0(log_q.exp(), gap.sigmoid() * gap)


def reference_backward(logits: Tensor, teacher: Tensor, coef: Tensor, sides: Sides, second: str, out: Tensor) -> None:
    """Writes d logits: the formula of the module's page times dz/dx. `out` [O, I, V] may be `logits` itself.

    coef fp64 [N, 12] holds lse, teacher_lse, A, B, C, D, E, lse_t1, F, G, H, w. A row with A = … = H = 0 is written as zeros whatever
    it holds, and one with C = D = F = G = H = 0 asks nothing of its teacher.
    """
    columns = sides.student.columns(logits.shape[2])
    for block, z, t in _blocks(logits, teacher, sides):
        # the rows of a contiguous gradient are those of logits, whatever the strides of these
        target = out.flatten(0, 1)[block] if out.is_contiguous() else rows_at(out, block)
        target[:, :columns] = gradient(z, t, coef[block].unsqueeze(1), sides, second)
        target[:, columns:] = 0


def gradient(z: Tensor, t: Tensor, coef: Tensor, sides: Sides, second: str) -> Tensor:
    """d x at entries z, t [N, ...] from coef [N, 1, 12] in the dtype of z."""
    lse, teacher_lse, a, b, c, d, e, lse_t1, f, g, h, w = coef.unbind(-1)
    alone = (torch.stack([c, d, f, g, h], -1) == 0).all(-1)
    log_q = (z - lse).to(z.dtype)
    log_p = torch.where(alone, 0.0, t - teacher_lse).to(z.dtype)
    q, p = log_q.exp(), log_p.exp()
    found = _nothing_at_0(q, a + _nothing_at_0(b, log_q) + _nothing_at_0(c, log_q - log_p)) + _nothing_at_0(d, p)
    if sides.with_t1:
        found = found + _nothing_at_0(e, (z * sides.student.temperature - lse_t1).exp())
    if second == "mixture":
        log_m, share = _mixed(log_p, log_q, w)
        found = found + _nothing_at_0(p, f * share) + _nothing_at_0(q, g * (log_q - log_m) + h * share)
    elif second == "power":
        found = found + _nothing_at_0(f, _power(log_p, log_q, w))
    elif second == "distance":
        found = found + f * q * (q - p).sign()
    elif second == "balance":
        found = found + _nothing_at_0(f, _tilt(log_p, log_q))
    found = found * sides.student.chain(z)
    return torch.where(alone & (torch.stack([a, b, e], -1) == 0).all(-1), 0.0, found)


# ---------------------------------------------------------------------------------------------- autograd


def coefficients(stats: Tensor, grads: Tensor, share: Tensor | None, sides: Sides) -> Tensor:
    """[N, 12] for the backward kernel from the statistics [N, 13] and the gradients [N, 10] of :class:`PairStats`."""
    s, g = dict(zip(_KERNEL, stats.unbind(-1))), PairStats(*grads.unbind(-1))
    zero = torch.zeros_like(g.lse)
    # q_v·(1 + (z_v − t_v) − student_gap) and q_v·(1 + z_v − expected_logit), with z and t counted from their lse
    a = g.lse + _nothing_at_0(g.student_gap, 1 + s["lse"] - s["teacher_lse"] - s["student_gap"])
    a = a + _nothing_at_0(g.expected_logit, 1 + s["lse"] - s["expected_logit"])
    e = g.lse_t1 * sides.student.temperature
    if not sides.with_t1:
        a, e = a + g.lse_t1, zero
    d, f, h, to_q, w = -g.teacher_gap, zero, zero, zero, zero
    second = sides.looks_for(share)
    if second:
        w = share
    if second == "power":
        # Σ [w·p + (1 − w)·q] is 1
        f = g.power_gap * (w - 1)
        a = a - _nothing_at_0(f, 1 - s["teacher_to_mixture"])
    elif second == "distance":
        f = g.distance
        a = a - _nothing_at_0(f, s["student_share"])
    elif second == "balance":
        # q − p beside the tilt
        f = g.balance
        a, d = a + f - _nothing_at_0(f, s["student_share"]), d - f
    elif second == "mixture":
        to_p, to_q = g.teacher_to_mixture, g.student_to_mixture
        # −F·p·r − H·q·r = (w·p + (1 − w)·q)·r = (1 − w)·q where F = −w and H = w − 1, all of it in JSD: that part is taken out,
        # since in the sums it would have to cancel
        both = torch.where(to_p * to_q > 0, torch.minimum((to_p / w).abs(), (to_q / (1 - w)).abs()).copysign(to_p), zero)
        f, h = both * w - to_p, both * (1 - w) - to_q
        a = a - _nothing_at_0(f, s["teacher_share"]) - _nothing_at_0(h, s["student_share"]) - _nothing_at_0(to_q, s["student_to_mixture"])
    return torch.stack([s["lse"], s["teacher_lse"], a, g.expected_logit, g.student_gap, d, e, s["lse_t1"], f, to_q, h, w], -1)


def statistics(logits: Tensor, teacher: Tensor, labels: Tensor | None, w: Tensor | None, sides: Sides, backend: str | None) -> Tensor:
    """[N, 13] of logits [O, I, V] and teacher [O', I', V']: what kernels write, and z and t at the label."""
    n = logits.shape[0] * logits.shape[1]
    out = torch.empty((n, len(_KERNEL)), dtype=row_dtype(logits.device), device=logits.device)
    run = resolve("pair_stats", logits, teacher, backend=backend)  # refuses without rows too
    if n:
        run(logits, teacher, w, sides, out)
    if labels is None:
        return torch.cat([out, out.new_zeros((n, 2))], -1)
    # both rows may be narrower than a label that no valid column has: its logit is −inf
    columns = sides.student.columns(logits.shape[2])
    known = labels.clamp(max=columns - 1)[:, None]
    z, t = (gather_logits(rows, known, head).to(out.dtype) for rows, head in ((logits, sides.student), (teacher, sides.teacher)))
    z = z.masked_fill((labels >= columns)[:, None], -math.inf)
    return torch.cat([out, *(at.masked_fill((labels < 0)[:, None], 0) for at in (z, t))], -1)


def named(stats: Tensor) -> Tensor:
    """The fields of :class:`PairStats`, [N, 10], of statistics [N, 13]."""
    return torch.cat([stats[:, :9], stats[:, 11:12]], -1)


def logits_grad(
    logits: Tensor, teacher: Tensor, labels: Tensor | None, w: Tensor | None, stats: Tensor, grads: Tensor, sides: Sides,
    backend: str | None, inplace: bool,
) -> Tensor:  # fmt: skip
    """d logits [O, I, V] from the statistics [N, 13] and the gradients [N, 10] of :class:`PairStats`."""
    coef, second = coefficients(stats, grads, w, sides), sides.looks_for(w)
    out = logits if inplace else recycled_empty(tuple(logits.shape), logits.dtype, logits.device)
    if logits.numel():
        resolve("pair_stats_backward", logits, teacher, backend=backend)(logits, teacher, coef, sides, second, out)
    if labels is None:
        return out
    # the label's own entry is written whole: added to a rounded q it would keep the rounding of q
    z, t = stats[:, 11:12], stats[:, 12:13]
    entry = gradient(z, t, coef.unsqueeze(1), sides, second) + grads[:, 9:10] * sides.student.chain(z)
    columns = sides.student.columns(logits.shape[2])
    real = (labels >= 0) & (labels < columns) & (z[:, 0] > -math.inf)
    # rows without a label rewrite what is at column 0
    index = torch.where(real, labels, 0).view(*logits.shape[:2], 1)
    entry = torch.where(real.view_as(index), entry.to(out.dtype).view(index.shape), out.gather(2, index))
    return out.scatter_(2, index, entry)


class _PairStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, teacher, labels, w, sides, backend, inplace):
        stats = statistics(logits, teacher, labels, w, sides, backend)
        ctx.save_for_backward(logits, teacher, labels, w, stats)
        ctx.sides, ctx.backend, ctx.inplace = sides, backend, inplace
        return named(stats)

    @staticmethod
    def backward(ctx, grads):
        twice = torch.is_grad_enabled()
        logits, teacher, labels, w, stats = ctx.saved_tensors
        with torch.no_grad():
            grad = logits_grad(logits, teacher, labels, w, stats, grads, ctx.sides, ctx.backend, ctx.inplace)
            if ctx.inplace:
                torch.autograd.graph.increment_version(logits)
                grad = grad.detach()
        return Once.apply(grad, logits, "pair_stats") if twice else grad, *(None,) * 6


# --------------------------------------------------------------------------------------------- torch.library


def _sides(temperature, valid_vocab, logit_scale, softcap, teacher_logit_scale, teacher_softcap, with_t1, second) -> Sides:
    return Sides(Head(temperature, logit_scale, softcap, valid_vocab), Head(temperature, teacher_logit_scale, teacher_softcap), with_t1, second)


def _numbers(sides: Sides) -> tuple:
    s, t = sides.student, sides.teacher
    return s.temperature, s.valid_vocab, s.logit_scale, s.softcap, t.logit_scale, t.softcap, sides.with_t1, sides.second


@torch.library.custom_op("distilkernels::pair_stats", mutates_args=())
def _op(
    logits: Tensor, teacher: Tensor, labels: Tensor | None, w: Tensor | None, temperature: float, valid_vocab: int | None,
    logit_scale: float, softcap: float | None, teacher_logit_scale: float, teacher_softcap: float | None, with_t1: bool, second: str,
    backend: str | None,
) -> Tensor:  # fmt: skip
    sides = _sides(temperature, valid_vocab, logit_scale, softcap, teacher_logit_scale, teacher_softcap, with_t1, second)
    return statistics(logits, teacher, labels, w, sides, backend)


@_op.register_fake
def _(logits, *_):
    return torch.empty((logits.shape[0] * logits.shape[1], 13), dtype=row_dtype(logits.device), device=logits.device)


@torch.library.custom_op("distilkernels::pair_stats_backward", mutates_args=())
def _op_backward(
    logits: Tensor, teacher: Tensor, labels: Tensor | None, w: Tensor | None, stats: Tensor, grads: Tensor, temperature: float,
    valid_vocab: int | None, logit_scale: float, softcap: float | None, teacher_logit_scale: float, teacher_softcap: float | None,
    with_t1: bool, second: str, backend: str | None,
) -> Tensor:  # fmt: skip
    sides = _sides(temperature, valid_vocab, logit_scale, softcap, teacher_logit_scale, teacher_softcap, with_t1, second)
    return logits_grad(logits, teacher, labels, w, stats, grads, sides, backend, False)


@_op_backward.register_fake
def _(logits, *_):
    return logits.new_empty(logits.shape)


def _op_setup(ctx, inputs, output):
    logits, teacher, labels, w, *ctx.options = inputs
    ctx.save_for_backward(logits, teacher, labels, w, output)


def _op_gradient(ctx, grads):
    logits, teacher, labels, w, stats = ctx.saved_tensors
    return (_op_backward(logits, teacher, labels, w, stats, named(grads), *ctx.options), *(None,) * 12)


_op.register_autograd(_op_gradient, setup_context=_op_setup)


# --------------------------------------------------------------------------------------------- calls


def pair_stats(
    logits: Tensor, teacher: Tensor, labels: Tensor | None, w: Tensor | None, sides: Sides, *, backend: str | None = None,
    inplace_backward: bool = False,
) -> Tensor:  # fmt: skip
    """The fields of :class:`PairStats`, flat [N, 10] in fp64, of logits [..., V] beside teacher [..., V']; arguments are already checked.

    `labels` int64 [N], −1 where there is none; `w` fp64 [N], each row's number of the second look (any for "distance"). Differentiable in the logits;
    `inplace_backward` writes d logits over them.
    """
    x, y = rows_of(logits), rows_of(teacher.detach())
    if plain_eager(logits, teacher):
        return _PairStats.apply(x, y, labels, w, sides, backend, inplace_backward)
    functorch_refused("pair_stats")
    return named(_op(x, y, labels, w, *_numbers(sides), backend))
