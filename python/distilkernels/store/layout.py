"""How many bits a stored row has and where they are. A row, little-endian throughout, bits from the least significant one:

    tail      float32; NaN where the document was stored without a tail
    ids       K digits of base V + 1, `group` of them to a number Σ id_i (V + 1)^i of `group_bits` bits (the last group may
              be shorter); V is an empty slot
    low       the `low_bits` low bits of each code
    high      the high bits of the codes, Elias–Fano: bit (code_j >> low_bits) + j is set for slot j, all others are 0

The slots are in descending order of log-prob, so the codes (hi − logprob in steps) ascend: −inf and empty slots have the
code max_code + 1. Each part starts at a byte. All rows of a block have one length, so a row's place is a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

# Parts are read by unaligned 8-byte loads that start up to 7 bits early; a block ends with PAD zero bytes for the last load.
PAD = 8
_WIDEST = 57


@dataclass(frozen=True)
class RowLayout:
    """Offsets and widths of one row of K slots; see the module's docstring. Sizes ending in `_bits` are bits, others bytes."""

    k: int
    base: int
    max_code: int
    group: int
    group_bits: int
    last_bits: int
    low_bits: int
    high_bits: int
    low_start: int
    high_start: int
    row_bytes: int

    def block_bytes(self, rows: int) -> int:
        return rows * self.row_bytes + PAD


@lru_cache(maxsize=4096)
def row_layout(k: int, vocab_size: int, max_code: int) -> RowLayout:
    """The layout of a block whose largest finite code is `max_code`."""
    base = vocab_size + 1
    group = min(range(1, 8), key=lambda g: (_bits(base, g) / g if _bits(base, g) <= _WIDEST else 64, g))
    group = min(group, k)
    full, last = divmod(k, group)
    id_bits = full * _bits(base, group) + _bits(base, last)
    low_bits = min(range(33), key=lambda low: (k * low + _high_bits(k, max_code, low), low))
    high_bits = _high_bits(k, max_code, low_bits)
    low_start = 4 + _bytes(id_bits)
    high_start = low_start + _bytes(k * low_bits)
    return RowLayout(
        k, base, max_code, group, _bits(base, group), _bits(base, last), low_bits, high_bits, low_start, high_start, high_start + _bytes(high_bits)
    )


def _bits(base: int, digits: int) -> int:
    """Bits of the largest number of `digits` digits; 0 of none."""
    return (base**digits - 1).bit_length()


def _high_bits(k: int, max_code: int, low_bits: int) -> int:
    return k + ((max_code + 1) >> low_bits) + 1


def _bytes(bits: int) -> int:
    return (bits + 7) // 8
