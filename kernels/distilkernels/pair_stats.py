"""``pair_stats`` in Triton: one read of both rows forward (two with a second look), one read and one write backward.

Forward:
    _pair_kernel      a span of both rows → sums relative to the span's own maxima;
    _pair_row_kernel  the spans of a row → its statistics, in double;
    for a second look _second_kernel and _second_row_kernel, the same again when both lse are known.
Rows are cut into spans of a fixed number of bytes, so a row's bits depend on V and the dtypes, not on N. Loads are of 16 bytes
where both rows' widths are a multiple of 16, however many columns are valid: what lies behind those is read and not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.pair_stats import SECOND, Sides
from .head import _SOFTCAP, Launch, exp, head_arguments, on_device_of, row_offset, row_strides, tempered, untempered
from .pair_entries import apart, balance, mixed, powers, two_parts
from .vocab_stats import _FAR, _INF, _NAN, _fold, _weighted


@dataclass(frozen=True)
class Config:
    """Launch configuration; the reasons are for an H200 and hold on other recent devices."""

    # as in vocab_stats: two loads of each row before anything waits keep 64 bytes in flight a thread
    num_warps: int = 4
    vector_bytes: int = 16
    span_bytes: int = 1 << 16

    def span(self, itemsize: int, aligned: bool) -> dict[str, int]:
        """VECTOR (neighbours in one thread's load), TILE and SPAN, in elements of the wider dtype."""
        vector = self.vector_bytes // itemsize
        lanes = vector if aligned else min(vector, 4)
        return {"VECTOR": vector if aligned else 1, "TILE": 32 * self.num_warps * lanes, "SPAN": self.span_bytes // itemsize}


CONFIG = Config()

# fields of one span's record, in doubles: of each side maximum, Σ e^d, Σ e^d·d and the gap; see _pair_kernel
_FIELDS = tl.constexpr(10)
_TOP, _SUM, _MOMENT, _GAP = (tl.constexpr(i) for i in range(4))
_TEACHERS, _BETWEEN, _SUM_T1 = tl.constexpr(4), tl.constexpr(8), tl.constexpr(9)
# columns of the primitive's output and of the backward's coefficients
_OUT, _COEF, _LOOKED = tl.constexpr(11), tl.constexpr(12), tl.constexpr(7)
# what the second look is for
_MIXTURE, _POWER, _DISTANCE, _BALANCE = (tl.constexpr(SECOND.index(name)) for name in ("mixture", "power", "distance", "balance"))


# ---------------------------------------------------------------------------------------------- device


@triton.jit
def _loaded(line, offs, width, columns, scale, cap, inv_t, HEAD: tl.constexpr):
    """z at some columns of a row of `width`, −inf beyond the valid ones."""
    z = tempered(untempered(tl.load(line + offs, mask=offs < width, other=0.0), scale, cap, HEAD), inv_t, HEAD)
    return tl.where(offs < columns, z, -_INF)


@triton.jit
def _moved(top, highest):
    """(the new maximum, the reference for it, by what sums shrink, its logarithm) when `highest` joins `top`."""
    higher = tl.maximum(top, highest)
    shift = tl.where(higher == -_INF, 0.0, higher)
    fall = tl.maximum(top - shift, _FAR)
    return higher, shift, exp(fall), fall


@triton.jit
def _shrunk(gap, decay):
    """An infinite gap stays one, unless what it belongs to has vanished."""
    return tl.where(decay == 0, 0.0, gap * decay)


@triton.jit
def _gap(weight, gap):
    """weight·gap; 0 where there is no weight, whatever the gap is."""
    return tl.where(weight > 0, weight * gap, 0.0)


@triton.jit
def _pair_kernel(
    logits, teacher, spans,
    vocab, their_vocab, columns, inner_rows, stride_o, stride_i, their_inner_rows, their_stride_o, their_stride_i, n_spans,
    scale, cap, inv_t, t, their_scale, their_cap,
    HEAD: tl.constexpr, THEIR_HEAD: tl.constexpr, T1: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Sums over one span: Σ e^d and Σ e^d·d of each side, d counted from its maximum there, Σ q·((z − t) + b) and Σ p·((t − z) − b).

    b is the distance of the two maxima in the first step: of close rows that differ by a constant what is summed is small.
    """
    program = tl.program_id(0)
    span = program % n_spans
    row = program // n_spans
    line = logits + row_offset(row, inner_rows, stride_o, stride_i)
    their_line = teacher + row_offset(row, their_inner_rows, their_stride_o, their_stride_i)
    start = span * SPAN
    z_top, t_top = -_INF, -_INF
    between = 0.0
    q_sum = tl.zeros([TILE // VECTOR], tl.float32)
    q_moment, q_gap, p_sum, p_moment, p_gap = q_sum, q_sum, q_sum, q_sum, q_sum
    if T1:
        sum_t1 = q_sum
    for base in range(start, tl.minimum(start + SPAN, columns), 2 * TILE):
        o0 = tl.multiple_of(base, TILE) + tl.arange(0, TILE)
        o1 = o0 + TILE
        z0 = _loaded(line, o0, vocab, columns, scale, cap, inv_t, HEAD)
        t0 = _loaded(their_line, o0, their_vocab, columns, their_scale, their_cap, inv_t, THEIR_HEAD)
        z1 = _loaded(line, o1, vocab, columns, scale, cap, inv_t, HEAD)
        t1 = _loaded(their_line, o1, their_vocab, columns, their_scale, their_cap, inv_t, THEIR_HEAD)
        z_top, z_shift, z_decay, z_fall = _moved(z_top, tl.max(tl.maximum(z0, z1), 0))
        t_top, t_shift, t_decay, t_fall = _moved(t_top, tl.max(tl.maximum(t0, t1), 0))
        first = t_top - z_top
        between = tl.where((base == start) & (first > -_INF) & (first < _INF), first, between)
        dz0, dz1, dt0, dt1 = z0 - z_shift, z1 - z_shift, t0 - t_shift, t1 - t_shift
        q0, q1, p0, p1 = exp(dz0), exp(dz1), exp(dt0), exp(dt1)
        g0, g1 = (t0 - z0) - between, (t1 - z1) - between
        q_moment = (q_moment + z_fall * q_sum) * z_decay + _fold(_weighted(q0, dz0) + _weighted(q1, dz1), VECTOR)
        p_moment = (p_moment + t_fall * p_sum) * t_decay + _fold(_weighted(p0, dt0) + _weighted(p1, dt1), VECTOR)
        q_sum = q_sum * z_decay + _fold(q0 + q1, VECTOR)
        p_sum = p_sum * t_decay + _fold(p0 + p1, VECTOR)
        q_gap = _shrunk(q_gap, z_decay) - _fold(_gap(q0, g0) + _gap(q1, g1), VECTOR)
        p_gap = _shrunk(p_gap, t_decay) + _fold(_gap(p0, g0) + _gap(p1, g1), VECTOR)
        if T1:
            sum_t1 = sum_t1 * exp(t * z_fall) + _fold(exp(t * dz0) + exp(t * dz1), VECTOR)

    spans += (row.to(tl.int64) * n_spans + span) * _FIELDS
    tl.store(spans + _TOP, z_top.to(tl.float64))
    tl.store(spans + _SUM, tl.sum(q_sum.to(tl.float64), 0))
    tl.store(spans + _MOMENT, tl.sum(q_moment.to(tl.float64), 0))
    tl.store(spans + _GAP, tl.sum(q_gap.to(tl.float64), 0))
    tl.store(spans + _TEACHERS + _TOP, t_top.to(tl.float64))
    tl.store(spans + _TEACHERS + _SUM, tl.sum(p_sum.to(tl.float64), 0))
    tl.store(spans + _TEACHERS + _MOMENT, tl.sum(p_moment.to(tl.float64), 0))
    tl.store(spans + _TEACHERS + _GAP, tl.sum(p_gap.to(tl.float64), 0))
    tl.store(spans + _BETWEEN, between.to(tl.float64))
    if T1:
        tl.store(spans + _SUM_T1, tl.sum(sum_t1.to(tl.float64), 0))


@triton.jit
def _joined(record, live, distance):
    """(reference, Σ e^d, expected value, mean gap, shrinkage of each span's logarithm) of one side's spans; `distance` is what its gaps lack."""
    tops = tl.load(record + _TOP, mask=live, other=-_INF)
    sums = tl.load(record + _SUM, mask=live, other=0.0)
    top = tl.max(tops, 0)
    shift = tl.where(top == -_INF, 0.0, top)
    falls = tl.maximum(tops - shift, _FAR)
    decays = tl.exp(falls)
    total = tl.sum(sums * decays, 0)
    moment = tl.sum((tl.load(record + _MOMENT, mask=live, other=0.0) + falls * sums) * decays, 0)
    gap = tl.sum(_shrunk(tl.load(record + _GAP, mask=live, other=0.0) + distance * sums, decays), 0)
    return shift, total, shift + moment / total, gap / total, falls


@triton.jit
def _pair_row_kernel(spans, out, n_spans, t, T1: tl.constexpr, SPANS: tl.constexpr):
    """The statistics of one row in double; those of a second look are written as if none was asked for."""
    row = tl.program_id(0).to(tl.int64)
    span = tl.arange(0, SPANS)
    live = span < n_spans
    record = spans + (row * n_spans + span) * _FIELDS
    between = tl.load(record + _BETWEEN, mask=live, other=0.0)
    z_shift, q_total, expected, student_gap, falls = _joined(record, live, -between)
    t_shift, p_total, teacher_expected, teacher_gap, _ = _joined(record + _TEACHERS, live, between)
    lse = z_shift + tl.log(q_total)
    bad = (q_total != q_total) | (p_total != p_total)
    out += row * _OUT
    tl.store(out, lse)
    tl.store(out + 1, t_shift + tl.log(p_total))
    tl.store(out + 2, tl.where(bad, _NAN, teacher_gap))
    tl.store(out + 3, tl.where(bad, _NAN, student_gap))
    tl.store(out + 4, expected)
    tl.store(out + 5, teacher_expected)
    lse_t1 = lse
    if T1:
        total_t1 = tl.sum(tl.load(record + _SUM_T1, mask=live, other=0.0) * tl.exp(t * falls), 0)
        lse_t1 = tl.where(q_total != q_total, _NAN, t * z_shift + tl.log(total_t1))
    tl.store(out + 6, lse_t1)
    nothing = tl.where(bad, _NAN, 0.0).to(tl.float64)
    for i in tl.static_range(4):
        tl.store(out + _LOOKED + i, nothing)


@triton.jit
def _second_kernel(
    logits, teacher, shares, out, parts,
    vocab, their_vocab, columns, inner_rows, stride_o, stride_i, their_inner_rows, their_stride_o, their_stride_i, n_spans,
    scale, cap, inv_t, their_scale, their_cap,
    HEAD: tl.constexpr, THEIR_HEAD: tl.constexpr, LOOK: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Of one span Σ p·log p/m, Σ q·log q/m, Σ p·r and Σ q·r; or what powers lack; or Σ |p − q| and, last, Σ q·sign(q − p); or of the balance."""
    program = tl.program_id(0)
    span = program % n_spans
    row = program // n_spans
    line = logits + row_offset(row, inner_rows, stride_o, stride_i)
    their_line = teacher + row_offset(row, their_inner_rows, their_stride_o, their_stride_i)
    row = row.to(tl.int64)
    lse, lse_low = two_parts(tl.load(out + row * _OUT))
    their_lse, their_low = two_parts(tl.load(out + row * _OUT + 1))
    share = tl.load(shares + row)
    w, rest = share.to(tl.float32), (1.0 - share).to(tl.float32)
    start = span * SPAN
    to_p = tl.zeros([TILE // VECTOR], tl.float32)
    to_q, p_r, q_r = to_p, to_p, to_p
    for base in range(start, tl.minimum(start + SPAN, columns), TILE):
        offs = tl.multiple_of(base, TILE) + tl.arange(0, TILE)
        z = _loaded(line, offs, vocab, columns, scale, cap, inv_t, HEAD)
        t = _loaded(their_line, offs, their_vocab, columns, their_scale, their_cap, inv_t, THEIR_HEAD)
        log_p, log_q = (t - their_lse) - their_low, (z - lse) - lse_low
        if LOOK == _MIXTURE:
            p, q, over_p, over_q, r, counts = mixed(log_p, log_q, w, rest)
            to_p += _fold(tl.where(counts, p * over_p, 0.0), VECTOR)
            to_q += _fold(tl.where(counts, q * over_q, 0.0), VECTOR)
            p_r += _fold(tl.where(counts, p * r, 0.0), VECTOR)
            q_r += _fold(tl.where(counts, q * r, 0.0), VECTOR)
        elif LOOK == _POWER:
            _, lack = powers(log_p, log_q, w, rest)
            to_p += _fold(lack, VECTOR)
        elif LOOK == _DISTANCE:
            distance, signed = apart(log_p, log_q)
            to_p += _fold(distance, VECTOR)
            q_r += _fold(signed, VECTOR)
        else:
            both, tilt = balance(log_p, log_q)
            to_p += _fold(both, VECTOR)
            q_r += _fold(tilt, VECTOR)
    parts += (row * n_spans + span) * 4
    tl.store(parts, tl.sum(to_p.to(tl.float64), 0))
    tl.store(parts + 1, tl.sum(to_q.to(tl.float64), 0))
    tl.store(parts + 2, tl.sum(p_r.to(tl.float64), 0))
    tl.store(parts + 3, tl.sum(q_r.to(tl.float64), 0))


@triton.jit
def _second_row_kernel(parts, out, n_spans, SPANS: tl.constexpr):
    """The spans' sums, added to the zeros (or NaN) that _pair_row_kernel wrote."""
    row = tl.program_id(0).to(tl.int64)
    span = tl.arange(0, SPANS)
    parts += (row * n_spans + span) * 4
    out += row * _OUT + _LOOKED
    for i in tl.static_range(4):
        tl.store(out + i, tl.load(out + i) + tl.sum(tl.load(parts + i, mask=span < n_spans, other=0.0), 0))


@triton.jit
def _pair_backward_kernel(
    logits, teacher, coef, out,
    vocab, their_vocab, columns, inner_rows, stride_o, stride_i, their_inner_rows, their_stride_o, their_stride_i, out_stride_o, out_stride_i, n_spans,
    scale, cap, inv_t, t, their_scale, their_cap, slope,
    HEAD: tl.constexpr, THEIR_HEAD: tl.constexpr, T1: tl.constexpr, LOOK: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One span of a row of d logits; the formula is that of primitives/pair_stats.py."""
    program = tl.program_id(0)
    span = program % n_spans
    row = (program // n_spans).to(tl.int64)
    line = logits + row_offset(row, inner_rows, stride_o, stride_i)
    their_line = teacher + row_offset(row, their_inner_rows, their_stride_o, their_stride_i)
    grads = out + row_offset(row, inner_rows, out_stride_o, out_stride_i)
    coef += row * _COEF
    a, b, c = tl.load(coef + 2), tl.load(coef + 3), tl.load(coef + 4)
    d, e, f = tl.load(coef + 5), tl.load(coef + 6), tl.load(coef + 8)
    g, h, share = tl.load(coef + 9), tl.load(coef + 10), tl.load(coef + 11)
    # what nothing is asked of is read as zeros about a reference of zero: it may hold NaN
    asks = (c != 0) | (d != 0) | (f != 0) | (g != 0) | (h != 0)
    live = asks | (a != 0) | (b != 0) | (e != 0)
    lse, lse_low = two_parts(tl.where(live, tl.load(coef), 0.0))
    their_lse, their_low = two_parts(tl.where(asks, tl.load(coef + 1), 0.0))
    lse_t1, low_t1 = two_parts(tl.where(live, tl.load(coef + 7), 0.0))
    w, rest = share.to(tl.float32), (1.0 - share).to(tl.float32)
    a, b, c, d = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)
    e, f, g, h = e.to(tl.float32), f.to(tl.float32), g.to(tl.float32), h.to(tl.float32)
    readable, theirs, written = tl.where(live, vocab, 0), tl.where(asks, their_vocab, 0), tl.where(live, columns, 0)
    start = span * SPAN
    for base in range(start, tl.minimum(start + SPAN, vocab), TILE):
        offs = tl.multiple_of(base, TILE) + tl.arange(0, TILE)
        x1 = untempered(tl.load(line + offs, mask=offs < readable, other=0.0), scale, cap, HEAD)
        y1 = untempered(tl.load(their_line + offs, mask=offs < theirs, other=0.0), their_scale, their_cap, THEIR_HEAD)
        log_q = (tempered(x1, inv_t, HEAD) - lse) - lse_low
        log_p = (tempered(y1, inv_t, THEIR_HEAD) - their_lse) - their_low
        # a gap that nothing is asked of may be infinite
        gap = tl.where(c != 0, log_q - log_p, 0.0)
        if LOOK == _MIXTURE:
            p, q, _, over_q, r, counts = mixed(log_p, log_q, w, rest)
            grad = tl.where(counts, f * p * r + q * (g * over_q + h * r), 0.0)
        else:
            p, q = exp(log_p), exp(log_q)
            grad = tl.zeros([TILE], tl.float32)
            if LOOK == _POWER:
                power, _ = powers(log_p, log_q, w, rest)
                grad = tl.where(f != 0, f * power, 0.0)
            elif LOOK == _DISTANCE:
                _, signed = apart(log_p, log_q)
                grad = f * signed
            elif LOOK == _BALANCE:
                _, tilt = balance(log_p, log_q)
                grad = tl.where(f != 0, f * tilt, 0.0)
        grad += tl.where(q > 0, q * (a + b * log_q + c * gap), 0.0) + d * p
        if T1:
            grad += e * exp((x1 - lse_t1) - low_t1)
        if HEAD == _SOFTCAP:
            y = x1 / cap
            grad *= slope * (1.0 - y * y)
        else:
            grad *= slope
        grad = tl.where(offs < written, grad, 0.0)
        tl.store(grads + offs, grad.to(out.dtype.element_ty), mask=offs < vocab)


# ------------------------------------------------------------------------------------------------ host


def _rows(logits: Tensor, teacher: Tensor, sides: Sides) -> dict[str, object]:
    """What every kernel on both rows takes."""
    ours, theirs = head_arguments(sides.student, logits.shape[2]), head_arguments(sides.teacher, teacher.shape[2])
    (stride_o, stride_i), (their_stride_o, their_stride_i) = row_strides(logits), row_strides(teacher)
    return {
        "logits": logits, "teacher": teacher, "vocab": logits.shape[2], "their_vocab": teacher.shape[2], "columns": ours["columns"],
        "inner_rows": logits.shape[1], "stride_o": stride_o, "stride_i": stride_i,
        "their_inner_rows": teacher.shape[1], "their_stride_o": their_stride_o, "their_stride_i": their_stride_i,
        "scale": ours["scale"], "cap": ours["cap"], "inv_t": ours["inv_t"], "HEAD": ours["HEAD"],
        "their_scale": theirs["scale"], "their_cap": theirs["cap"], "THEIR_HEAD": theirs["HEAD"],
    }  # fmt: skip


def _aligned(*rows: Tensor) -> bool:
    return all(offset * x.element_size() % 16 == 0 for x in rows for offset in (x.storage_offset(), *row_strides(x)))


def forward_launches(
    logits: Tensor, teacher: Tensor, w: Tensor | None, sides: Sides, out: Tensor, config: Config = CONFIG
) -> list[Launch]:
    """The launches that write `out`; the arguments are those of ``primitives.pair_stats.reference``."""
    n = logits.shape[0] * logits.shape[1]
    rows = _rows(logits, teacher, sides)
    sizes = config.span(max(logits.element_size(), teacher.element_size()), _aligned(logits, teacher))
    n_spans = triton.cdiv(rows["columns"], sizes["SPAN"])
    shared = rows | sizes | {"n_spans": n_spans}
    t, spans = sides.student.temperature, torch.empty((n, n_spans, _FIELDS.value), dtype=torch.float64, device=logits.device)
    widths = {"n_spans": n_spans, "SPANS": triton.next_power_of_2(n_spans)}
    launches = [
        Launch(_pair_kernel, n * n_spans, shared | {"spans": spans, "t": t, "T1": sides.with_t1}, config.num_warps),
        Launch(_pair_row_kernel, n, widths | {"spans": spans, "out": out, "t": t, "T1": sides.with_t1}, 1),
    ]
    if w is not None:
        parts = torch.empty((n, n_spans, 4), dtype=torch.float64, device=logits.device)
        more = {"shares": w.contiguous(), "out": out, "parts": parts, "LOOK": SECOND.index(sides.second)}
        launches += [
            Launch(_second_kernel, n * n_spans, shared | more, config.num_warps),
            Launch(_second_row_kernel, n, widths | {"parts": parts, "out": out}, 1),
        ]
    return launches


def backward_launch(
    logits: Tensor, teacher: Tensor, coef: Tensor, sides: Sides, second: str, out: Tensor, config: Config = CONFIG
) -> Launch:
    """The launch that writes d logits; the arguments are those of ``primitives.pair_stats.reference_backward``."""
    itemsize = max(logits.element_size(), teacher.element_size())
    vocab, span = logits.shape[2], config.span_bytes // 2 // itemsize
    n_spans = triton.cdiv(vocab, span)
    out_stride_o, out_stride_i = row_strides(out)
    head = sides.student
    arguments = _rows(logits, teacher, sides) | {
        "coef": coef.contiguous(), "out": out, "out_stride_o": out_stride_o, "out_stride_i": out_stride_i, "n_spans": n_spans,
        "t": head.temperature, "slope": head.logit_scale / head.temperature, "T1": sides.with_t1, "LOOK": SECOND.index(second),
        "TILE": 32 * config.num_warps * config.vector_bytes // itemsize, "SPAN": span,
    }  # fmt: skip
    return Launch(_pair_backward_kernel, logits.shape[0] * logits.shape[1] * n_spans, arguments, config.num_warps)


def pair_stats(logits: Tensor, teacher: Tensor, w: Tensor | None, sides: Sides, out: Tensor) -> None:
    """As ``primitives.pair_stats.reference``."""
    with on_device_of(logits):
        for launch in forward_launches(logits, teacher, w, sides, out):
            launch.run()


def pair_stats_backward(logits: Tensor, teacher: Tensor, coef: Tensor, sides: Sides, second: str, out: Tensor) -> None:
    """As ``primitives.pair_stats.reference_backward``; `out` may be `logits`."""
    with on_device_of(logits):
        backward_launch(logits, teacher, coef, sides, second, out).run()
