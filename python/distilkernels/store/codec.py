"""Rows of teacher slots to bytes and back: the reference in numpy. ``csrc/cpu/store_codec.cpp`` gives the same bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .layout import PAD, RowLayout, row_layout

try:
    from .. import _cpp
except ImportError:
    _cpp = None

# float32 log-probs round twice: once where a float64 one comes in, once where the decoded one goes out
_ROUNDING = 2.0**-23 * 1.01


@dataclass(frozen=True)
class Scale:
    """The uniform code of a block: logprob = float32(hi − code·step), code 0…max_code; max_code + 1 is −inf.

    The code is absolute, not relative to each row's best slot: rows whose best log-prob is near 0 have the widest range
    and set the width, so a reference per row would cost 4 bytes and save nothing.
    """

    hi: float
    step: float
    max_code: int


def largest_logprob(max_error: float) -> float:
    """The largest |log-prob| in nats that float32 still holds to half of `max_error`."""
    return 0.5 * max_error / _ROUNDING


def block_scale(logprobs: np.ndarray, max_error: float) -> Scale:
    """The widest step that keeps every finite log-prob (float32 [n, K]) within `max_error` nats after float32 rounding."""
    finite = np.isfinite(logprobs)
    if not finite.any():
        return Scale(0.0, 2 * max_error, 0)
    hi = float(logprobs.max(where=finite, initial=-np.inf))
    lo = float(logprobs.min(where=finite, initial=np.inf))
    step = 2 * (max_error - max(abs(hi), abs(lo)) * _ROUNDING)
    return Scale(hi, step, int((hi - lo) / step + 0.5))


def encode(ids: np.ndarray, logprobs: np.ndarray, tail: np.ndarray, vocab_size: int, scale: Scale, reference: bool = False) -> np.ndarray:
    """One block: uint8 [row_layout(…).block_bytes(n)].

    Args:
        ids: int32 [n, K] in [−1, vocab_size); logprobs: float32 [n, K], descending within a row, −inf where ids is −1;
            empty slots last. tail: float32 [n], NaN where there is none.
        scale: :func:`block_scale` of these log-probs.
        reference: encodes in numpy even where the extension is built.
    """
    layout = row_layout(ids.shape[1], vocab_size, scale.max_code)
    out = np.zeros(layout.block_bytes(len(ids)), np.uint8)
    rows = out[: len(out) - PAD].reshape(len(ids), layout.row_bytes)
    if _cpp is not None and not reference:
        ids, logprobs, tail = (np.ascontiguousarray(a, t) for a, t in ((ids, np.int32), (logprobs, np.float32), (tail, np.float32)))
        _cpp.store_encode(_numbers(layout), scale.hi, scale.step, len(ids), *(a.ctypes.data for a in (ids, logprobs, tail, rows)))
        return out
    codes = np.full(ids.shape, scale.max_code + 1, np.int64)
    finite = np.isfinite(logprobs)
    codes[finite] = ((scale.hi - logprobs[finite].astype(np.float64)) / scale.step + 0.5).astype(np.int64)
    rows[:, :4] = tail.astype("<f4").view(np.uint8).reshape(-1, 4)
    digits = np.where(ids < 0, layout.base - 1, ids).astype(np.uint64)
    rows[:, 4 : layout.low_start] = _packed_ids(digits, layout)
    rows[:, layout.low_start : layout.high_start] = _packed(codes & ((1 << layout.low_bits) - 1), [layout.low_bits] * layout.k)
    high = np.zeros((len(ids), layout.high_bits), np.uint8)
    np.put_along_axis(high, (codes >> layout.low_bits) + np.arange(layout.k), 1, axis=1)
    rows[:, layout.high_start :] = np.packbits(high, axis=1, bitorder="little")
    return out


def decode(
    block: np.ndarray, first: int, scale: Scale, vocab_size: int, ids: np.ndarray, logprobs: np.ndarray, tail: np.ndarray, reference: bool = False
) -> int | None:
    """Rows `first`… of a block into ids [n, K] int32, logprobs [n, K] float32 and tail [n] float32, all contiguous.

    Returns None, or the index within the block of the first row that no encoder writes.
    """
    layout = row_layout(ids.shape[1], vocab_size, scale.max_code)
    n = len(ids)
    if _cpp is not None and not reference:
        begin = block.ctypes.data + first * layout.row_bytes
        bad = _cpp.store_decode(_numbers(layout), scale.hi, scale.step, n, begin, *(a.ctypes.data for a in (ids, logprobs, tail)))
        return None if bad < 0 else first + bad
    rows = block[first * layout.row_bytes : (first + n) * layout.row_bytes].reshape(n, layout.row_bytes)
    tail[:] = np.ascontiguousarray(rows[:, :4]).view("<f4")[:, 0]
    numbers = _unpacked(rows[:, 4 : layout.low_start], _group_widths(layout))
    codes = _unpacked(rows[:, layout.low_start : layout.high_start], [layout.low_bits] * layout.k).astype(np.int64)
    high = np.unpackbits(rows[:, layout.high_start :], axis=1, bitorder="little")
    bad = high.sum(1) != layout.k
    if not bad.any():
        codes += (np.nonzero(high)[1].reshape(n, layout.k) - np.arange(layout.k)) << layout.low_bits
        bad = (codes > layout.max_code + 1).any(1) | (numbers >= _group_limits(layout)).any(1)
    if bad.any():
        return first + int(bad.argmax())
    digits = _digits(numbers, layout)
    ids[:] = np.where(digits == layout.base - 1, -1, digits.astype(np.int64))
    logprobs[:] = np.where(codes > layout.max_code, -np.inf, scale.hi - codes * scale.step)
    return None


def _numbers(layout: RowLayout) -> tuple[int, ...]:
    return (
        layout.k, layout.base, layout.max_code, layout.group, layout.group_bits, layout.low_bits, layout.high_bits,
        layout.low_start, layout.high_start, layout.row_bytes,
    )  # fmt: skip


def _packed(values: np.ndarray, widths: list[int]) -> np.ndarray:
    """[n, m] numbers of `widths` bits one behind another: uint8 [n, ⌈Σ widths / 8⌉]."""
    fields = [(values[:, i, None].astype(np.uint64) >> np.arange(w, dtype=np.uint64)) & np.uint64(1) for i, w in enumerate(widths)]
    bits = np.concatenate(fields, axis=1) if fields else np.zeros((len(values), 0), np.uint64)
    return np.packbits(bits.astype(np.uint8), axis=1, bitorder="little")


def _unpacked(data: np.ndarray, widths: list[int]) -> np.ndarray:
    """The inverse of :func:`_packed`: uint64 [n, m]."""
    bits = np.unpackbits(data, axis=1, bitorder="little").astype(np.uint64)
    out = np.zeros((len(data), len(widths)), np.uint64)
    start = 0
    for i, w in enumerate(widths):
        out[:, i] = (bits[:, start : start + w] << np.arange(w, dtype=np.uint64)).sum(1, dtype=np.uint64)
        start += w
    return out


def _group_widths(layout: RowLayout) -> list[int]:
    full, last = divmod(layout.k, layout.group)
    return [layout.group_bits] * full + [layout.last_bits] * (last > 0)


def _packed_ids(digits: np.ndarray, layout: RowLayout) -> np.ndarray:
    widths = _group_widths(layout)
    padded = np.zeros((len(digits), len(widths) * layout.group), np.uint64)
    padded[:, : layout.k] = digits
    place = np.uint64(layout.base) ** np.arange(layout.group, dtype=np.uint64)
    return _packed((padded.reshape(len(digits), len(widths), layout.group) * place).sum(2, dtype=np.uint64), widths)


def _group_limits(layout: RowLayout) -> np.ndarray:
    full, last = divmod(layout.k, layout.group)
    return np.array([layout.base**layout.group] * full + [layout.base**last] * (last > 0), np.uint64)


def _digits(numbers: np.ndarray, layout: RowLayout) -> np.ndarray:
    digits = np.empty((*numbers.shape, layout.group), np.uint64)
    for i in range(layout.group):
        numbers, digits[:, :, i] = np.divmod(numbers, np.uint64(layout.base))
    return digits.reshape(len(numbers), numbers.shape[1] * layout.group)[:, : layout.k]
