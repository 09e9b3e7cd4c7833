"""``sample_rows`` and ``weigh_rows`` in Triton: every chosen row cut into spans, a program a span. Two launches each and no wait for the
device.

    _race_kernel     draw × span → the least score of the span and its id (of the residual and, beside it, of Q);
    _rank_kernel     draw × span → the least of the spans' scores, and how many of the judge's logits in this span are larger;
    _weigh_kernel    draw × span → Σ w of the span;
    _total_kernel    draw → the sum of the spans'.
A score is −log1p(−u)/w in float32; which of them is least does not depend on the cut, and Σ w is cut by V alone. Tiles whose weights
cannot win at any u, because the filters leave nothing of them or because 2⁻³⁴ over the weight exceeds what the span has seen, take no
random numbers.

Bytes: each chosen row is read once (P's too), and again from cache for the rank; 8 bytes a span and race are kept between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.sample_rows import MODES, Drawn, Noise, Operand
from .filter_rows import inverse_of
from .head import Launch, exp, on_device_of, row_offset, row_strides
from .tiles import loaded
from .vocab_stats import _INF, _NAN

_PLAIN, _RESIDUAL, _GATE = (tl.constexpr(i) for i in range(3))


@dataclass(frozen=True)
class Config:
    """Launch configuration; the reasons are for an H200 (132 SMs, 4.3 TB/s) and hold on other recent devices."""

    num_warps: int = 4
    # 8 columns a thread: a Philox block of 4 is 40 multiplications, and two rows' logits and weights are alive beside it
    tile: int = 1024
    # 64 rows of 151,936 columns are 1,216 programs, 9 an SM; the first tile of each runs without a score to beat
    span: int = 8192
    # ranks are one comparison a column, nothing but bandwidth
    rank_tile: int = 2048
    rank_span: int = 16384


CONFIG = Config()


# ---------------------------------------------------------------------------------------------- noise


@triton.jit
def uniform32(words):
    """As ``primitives.sample_rows.uniform32``, of uint32."""
    return tl.minimum((words.to(tl.float32) + 0.5) * (1.0 / 4294967296.0), 1.0 - 1.0 / 16777216.0)


@triton.jit
def uniforms(seed, position, offset, stream, start, TILE: tl.constexpr):
    """u [TILE] of the columns from `start`, a multiple of 4, as ``primitives.sample_rows.uniforms_at``."""
    block = (start // 4 + tl.arange(0, TILE // 4)).to(tl.uint32)
    c1 = block * 0 + (position & 0xFFFFFFFF).to(tl.uint32)
    c2 = block * 0 + (offset & 0xFFFFFFFF).to(tl.uint32)
    c3 = block * 0 + (stream & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, block, c1, c2, c3)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return uniform32(tl.reshape(words, [TILE]))


@triton.jit
def exponential(u):
    """−log1p(−u) to 4e-7 of itself, from u = 2⁻³³ to 1 − 2⁻²⁴. The devices' logarithm has no digits left near 1.

    1 − u = 2^e·m with m in [√½, √2), log m = 2·artanh((m − 1)/(m + 1)); where e = 0, m − 1 is −u itself, whatever 1 − u rounds to.
    """
    v = 1.0 - u
    bits = v.to(tl.int32, bitcast=True)
    # 0x3F3504F3 is √½
    e = (bits - 0x3F3504F3) >> 23
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    f = tl.where(e == 0, -u, m - 1.0)
    s = f / (2.0 + f)
    q = s * s
    series = tl.fma(q, tl.full(q.shape, 2 / 9, tl.float32), tl.full(q.shape, 2 / 7, tl.float32))
    series = tl.fma(q, series, tl.full(q.shape, 2 / 5, tl.float32))
    series = tl.fma(q, series, tl.full(q.shape, 2 / 3, tl.float32))
    log_m = tl.fma(s * q, series, 2.0 * s)
    return -tl.fma(e.to(tl.float32), tl.full(q.shape, 0.6931471805599453, tl.float32), log_m)


# ---------------------------------------------------------------------------------------------- weights


@triton.jit
def _law_of(draw, temperature, bar, lse, argmax):
    """(cold, 1/T, pivot, rest, bar, argmax) of a draw's law: log Q = (x − pivot)/T + rest. The pivot is T·lse rounded, so the
    difference of a likely logit from it is exact, and what rounding took is the rest."""
    t = tl.load(temperature + draw)
    total = tl.load(lse + draw)
    cold = t == 0.0
    pivot = (t * total).to(tl.float32)
    rest = tl.where(cold, 0.0, pivot.to(tl.float64) / tl.where(cold, 1.0, t) - total).to(tl.float32)
    return cold, inverse_of(t), pivot, rest, tl.load(bar + draw), tl.load(argmax + draw)


@triton.jit
def _probability(x, column, columns, cold, inv_t, pivot, rest, bar, argmax):
    """Q at some columns, the same bits for the same logit and law. Where cold, of the argmax alone."""
    warm = exp(tl.fma(x - pivot, tl.zeros_like(x) + inv_t, tl.zeros_like(x) + rest))
    q = tl.where(cold, (column == argmax).to(tl.float32), tl.where(x >= bar, warm, 0.0))
    return tl.where(column < columns, q, 0.0)


@triton.jit
def _broken(draw, first_rows, second_rows, first_lse, second_lse, scale, MODE: tl.constexpr):
    """Whether a draw's weights are NaN."""
    lse = tl.load(first_lse + draw)
    broken = lse != lse
    if MODE == _RESIDUAL:
        p_lse, c = tl.load(second_lse + draw), tl.load(scale + draw)
        broken = broken | ((tl.load(second_rows + draw) >= 0) & ((p_lse != p_lse) | (c != c)))
    return broken


@triton.jit
def _weigh_kernel(
    first, first_rows, first_inner, first_stride_o, first_stride_i, first_columns,
    first_temperature, first_bar, first_lse, first_argmax,
    second, second_rows, second_inner, second_stride_o, second_stride_i, second_columns,
    second_temperature, second_bar, second_lse, second_argmax, scale,
    sums, columns, n_spans, MODE: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """sums [R, n_spans] float64. Program = (draw, span)."""
    program = tl.program_id(0)
    span = program % n_spans
    draw = (program // n_spans).to(tl.int64)
    row = tl.load(first_rows + draw)
    total = tl.full([], 0.0, tl.float64)
    if row >= 0:
        line = first + row_offset(row, first_inner, first_stride_o, first_stride_i)
        cold, inv_t, pivot, rest, bar, argmax = _law_of(draw, first_temperature, first_bar, first_lse, first_argmax)
        other = tl.load(second_rows + draw)
        other_line = second + row_offset(tl.maximum(other, 0), second_inner, second_stride_o, second_stride_i)
        p_cold, p_inv_t, p_pivot, p_rest, p_bar, p_argmax = _law_of(draw, second_temperature, second_bar, second_lse, second_argmax)
        start = span * SPAN
        for base in range(start, tl.minimum(start + SPAN, columns), TILE):
            base = tl.multiple_of(base, TILE)
            column = base + tl.arange(0, TILE)
            x, _ = loaded(line, column, first_columns, 1)
            w = _probability(x, column, first_columns, cold, inv_t, pivot, rest, bar, argmax)
            if MODE != _PLAIN:
                if other >= 0:
                    y, inside = loaded(other_line, column, second_columns, 1)
                    if MODE == _GATE:
                        w = tl.where(inside & (y >= p_bar), w, 0.0)
                    else:
                        p = _probability(y, column, second_columns, p_cold, p_inv_t, p_pivot, p_rest, p_bar, p_argmax)
                        w = tl.maximum(tl.fma(tl.zeros_like(w) + tl.load(scale + draw).to(tl.float32), w, -p), 0.0)
            total += tl.sum(w, 0).to(tl.float64)
        if _broken(draw, first_rows, second_rows, first_lse, second_lse, scale, MODE):
            total = tl.full([], _NAN, tl.float64)
    tl.store(sums + program, total)


@triton.jit
def _total_kernel(sums, out, n_spans, SPANS: tl.constexpr):
    draw = tl.program_id(0).to(tl.int64)
    span = tl.arange(0, SPANS)
    tl.store(out + draw, tl.sum(tl.load(sums + draw * n_spans + span, mask=span < n_spans, other=0.0), 0))


# ---------------------------------------------------------------------------------------------- draws


@triton.jit
def _better(best, token, clock, w, column, columns):
    """(best, token) after some columns: of equal scores the lowest id, which the earlier columns have."""
    score = tl.where(w > 0.0, clock / w, _INF)
    least = tl.min(score, 0)
    if least < best:
        token = tl.min(tl.where(score == least, column, columns), 0)
        best = least
    return best, token


@triton.jit
def _race_kernel(
    first, first_rows, first_inner, first_stride_o, first_stride_i, first_columns,
    first_temperature, first_bar, first_lse, first_argmax,
    second, second_rows, second_inner, second_stride_o, second_stride_i, second_columns,
    second_temperature, second_bar, second_lse, second_argmax, scale,
    seeds, positions, offsets, stream, scores, tokens, rank, columns, n_spans,
    MODE: tl.constexpr, STREAMS: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """scores, tokens [R, 2, n_spans]: of w, and in a residual of Q; +inf where there is none. Program = (draw, span)."""
    program = tl.program_id(0)
    span = program % n_spans
    draw = (program // n_spans).to(tl.int64)
    row = tl.load(first_rows + draw)
    best, token = tl.full([], _INF, tl.float32), tl.full([], 0, tl.int32)
    q_best, q_token = best, token
    if (row >= 0) & ~_broken(draw, first_rows, second_rows, first_lse, second_lse, scale, MODE):
        line = first + row_offset(row, first_inner, first_stride_o, first_stride_i)
        cold, inv_t, pivot, rest, bar, argmax = _law_of(draw, first_temperature, first_bar, first_lse, first_argmax)
        other = tl.load(second_rows + draw)
        other_line = second + row_offset(tl.maximum(other, 0), second_inner, second_stride_o, second_stride_i)
        p_cold, p_inv_t, p_pivot, p_rest, p_bar, p_argmax = _law_of(draw, second_temperature, second_bar, second_lse, second_argmax)
        seed, position, offset = tl.load(seeds + draw), tl.load(positions + draw), tl.load(offsets + draw)
        if STREAMS:
            word = tl.load(stream + draw)
        else:
            word = seed * 0 + stream
        start = span * SPAN
        for base in range(start, tl.minimum(start + SPAN, columns), TILE):
            base = tl.multiple_of(base, TILE)
            column = base + tl.arange(0, TILE)
            x, _ = loaded(line, column, first_columns, 1)
            q = _probability(x, column, first_columns, cold, inv_t, pivot, rest, bar, argmax)
            w = q
            if MODE != _PLAIN:
                if other >= 0:
                    y, inside = loaded(other_line, column, second_columns, 1)
                    if MODE == _GATE:
                        w = tl.where(inside & (y >= p_bar), w, 0.0)
                    else:
                        p = _probability(y, column, second_columns, p_cold, p_inv_t, p_pivot, p_rest, p_bar, p_argmax)
                        w = tl.maximum(tl.fma(tl.zeros_like(w) + tl.load(scale + draw).to(tl.float32), w, -p), 0.0)
            # no clock is below 2⁻³³, with a bit to spare for its rounding
            wins = tl.max(w, 0) * best > 1.0 / 17179869184.0
            if MODE == _RESIDUAL:
                wins = wins | (tl.max(q, 0) * q_best > 1.0 / 17179869184.0)
            if wins:
                clock = exponential(uniforms(seed, position, offset, word, base, TILE))
                best, token = _better(best, token, clock, w, column, columns)
                if MODE == _RESIDUAL:
                    q_best, q_token = _better(q_best, q_token, clock, q, column, columns)
    at = draw * 2 * n_spans + span
    tl.store(scores + at, best)
    tl.store(tokens + at, token)
    if MODE == _RESIDUAL:
        tl.store(scores + at + n_spans, q_best)
        tl.store(tokens + at + n_spans, q_token)
    if span == 0:
        # _rank_kernel adds to it
        tl.store(rank + draw, 0)


@triton.jit
def _winner(scores, tokens, n_spans, SPANS: tl.constexpr):
    """(score, id) of the least of a draw's spans; spans ascend in id."""
    span = tl.arange(0, SPANS)
    live = span < n_spans
    score = tl.load(scores + span, mask=live, other=_INF)
    best = tl.min(score, 0)
    token = tl.load(tokens + span, mask=live, other=0)
    return best, tl.min(tl.where(live & (score == best), token, 0x7FFFFFFF), 0)


@triton.jit
def _rank_kernel(
    judge, judge_rows, judge_inner, judge_stride_o, judge_stride_i, vocab, second_rows, scores, tokens, token, value, rank, compared,
    n_spans, rank_spans, MODE: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """The draw's outcome, and this span's share of its rank: integers, so the order in which they are added leaves no trace.
    Program = (draw, span of the judge's row)."""
    program = tl.program_id(0)
    span = program % rank_spans
    draw = (program // rank_spans).to(tl.int64)
    scores += draw * 2 * n_spans
    tokens += draw * 2 * n_spans
    best, chosen = _winner(scores, tokens, n_spans, SPANS)
    weighed = best < _INF
    if MODE == _RESIDUAL:
        q_best, q_chosen = _winner(scores + n_spans, tokens + n_spans, n_spans, SPANS)
        chosen = tl.where(weighed, chosen, q_chosen)
        best = tl.minimum(best, q_best)
    drawn = best < _INF
    row = tl.maximum(tl.load(judge_rows + draw), 0)
    line = judge + row_offset(row, judge_inner, judge_stride_o, judge_stride_i)
    x, _ = loaded(line, tl.where(drawn, chosen, 0), vocab, 1)
    if span == 0:
        both = weighed
        if MODE == _PLAIN:
            both = weighed & False
        else:
            both = weighed & (tl.load(second_rows + draw) >= 0)
        tl.store(token + draw, tl.where(drawn, chosen, -1).to(tl.int64))
        tl.store(value + draw, tl.where(drawn, x, _NAN))
        tl.store(compared + draw, both)
    count = tl.zeros([TILE], tl.int32)
    if drawn:
        start = span * SPAN
        for base in range(start, tl.minimum(start + SPAN, vocab), TILE):
            base = tl.multiple_of(base, TILE)
            z, inside = loaded(line, base + tl.arange(0, TILE), vocab, 1)
            count += (inside & (z > x)).to(tl.int32)
    share = tl.sum(count, 0)
    tl.atomic_add(rank + draw, tl.where(drawn, share, tl.where(span == 0, -1, 0)).to(tl.int64))


# ---------------------------------------------------------------------------------------------- host


def _row_arguments(name: str, operand: Operand, columns: int) -> dict[str, object]:
    stride_o, stride_i = row_strides(operand.logits)
    law = operand.law
    return {
        name: operand.logits, f"{name}_rows": operand.rows.contiguous(), f"{name}_inner": operand.logits.shape[1], f"{name}_stride_o": stride_o,
        f"{name}_stride_i": stride_i, f"{name}_columns": min(columns, operand.logits.shape[2]),
        **{f"{name}_{field}": getattr(law, field).contiguous() for field in ("temperature", "bar", "lse", "argmax")},
    }  # fmt: skip


def _weight_arguments(first: Operand, second: Operand | None, scale: Tensor | None, mode: str, columns: int, config: Config) -> dict[str, object]:
    shared = _row_arguments("first", first, columns) | _row_arguments("second", first if second is None else second, columns)
    tile = min(config.tile, max(triton.next_power_of_2(columns), 4))
    return shared | {
        # not read where there is none
        "scale": first.law.lse if scale is None else scale.contiguous(), "columns": columns, "n_spans": triton.cdiv(columns, config.span),
        "MODE": 0 if second is None else MODES.index(mode), "TILE": tile, "SPAN": config.span,
    }  # fmt: skip


def sample_launches(
    first: Operand, second: Operand | None, scale: Tensor | None, mode: str, columns: int, vocab: int, noise: Noise, out: Drawn, config: Config = CONFIG
) -> list[Launch]:
    """The two launches that write `out`; the arguments are those of ``primitives.sample_rows.reference``."""
    r, device = first.rows.shape[0], first.rows.device
    shared = _weight_arguments(first, second, scale, mode, columns, config)
    n_spans, streams = shared["n_spans"], isinstance(noise.stream, Tensor)
    records = {
        "scores": torch.empty((r, 2, n_spans), dtype=torch.float32, device=device),
        "tokens": torch.empty((r, 2, n_spans), dtype=torch.int32, device=device),
    }
    race = shared | records | {
        "seeds": noise.seeds.contiguous(), "positions": noise.positions.contiguous(), "offsets": noise.offsets.contiguous(),
        "stream": noise.stream.contiguous() if streams else int(noise.stream), "rank": out.rank, "STREAMS": streams,
    }  # fmt: skip
    judge = "second" if shared["MODE"] == MODES.index("gate") else "first"
    vocab = min(vocab, (second if judge == "second" else first).logits.shape[2])
    rank_spans = triton.cdiv(vocab, config.rank_span)
    rank = records | out._asdict() | {
        "judge": shared[judge], **{f"judge_{field}": shared[f"{judge}_{field}"] for field in ("rows", "inner", "stride_o", "stride_i")},
        "vocab": vocab, "second_rows": shared["second_rows"], "n_spans": n_spans, "rank_spans": rank_spans, "MODE": shared["MODE"],
        "TILE": min(config.rank_tile, triton.next_power_of_2(vocab)), "SPAN": config.rank_span, "SPANS": triton.next_power_of_2(n_spans),
    }  # fmt: skip
    return [Launch(_race_kernel, r * n_spans, race, config.num_warps), Launch(_rank_kernel, r * rank_spans, rank, config.num_warps)]


def weigh_launches(
    first: Operand, second: Operand | None, scale: Tensor | None, mode: str, columns: int, out: Tensor, config: Config = CONFIG
) -> list[Launch]:
    """The two launches that write `out`; the arguments are those of ``primitives.sample_rows.reference_mass``."""
    r, shared = first.rows.shape[0], _weight_arguments(first, second, scale, mode, columns, config)
    n_spans = shared["n_spans"]
    sums = torch.empty((r, n_spans), dtype=torch.float64, device=first.rows.device)
    total = {"sums": sums, "out": out, "n_spans": n_spans, "SPANS": triton.next_power_of_2(n_spans)}
    return [Launch(_weigh_kernel, r * n_spans, shared | {"sums": sums}, config.num_warps), Launch(_total_kernel, r, total, 1)]


def sample_rows(
    first: Operand, second: Operand | None, scale: Tensor | None, mode: str, columns: int, vocab: int, noise: Noise, out: Drawn
) -> None:
    """As ``primitives.sample_rows.reference``."""
    with on_device_of(first.logits):
        for launch in sample_launches(first, second, scale, mode, columns, vocab, noise, out):
            launch.run()


def weigh_rows(first: Operand, second: Operand | None, scale: Tensor | None, mode: str, columns: int, out: Tensor) -> None:
    """As ``primitives.sample_rows.reference_mass``."""
    with on_device_of(first.logits):
        for launch in weigh_launches(first, second, scale, mode, columns, out):
            launch.run()
