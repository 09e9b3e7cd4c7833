"""``draw_rows`` in Triton: one read of the logits, then one tile for every draw. Two launches.

    _tiles_kernel    (tiles.py) row → maximum, Σ e^z and Σ e^{τz} of each tile: the only read of the whole row;
    _draw_kernel     row × some draws → a group of tiles, a tile of the group and a column of the tile for each uniform.
Each level inverts a cumulative sum in double and hands the fraction of the piece that is left over to the next, so a draw
keeps the 53 bits of its uniform. The uniforms are triton.language's Philox4x32-10.

Bytes at V = 151,936, R = 64, τ ≠ 1 in 16 bits, of the row's: read 1.000, records written 0.047 and read 0.047, tiles again
at most 0.054.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..primitives.draw_rows import Draws
from ..primitives.head import Head
from ..primitives.philox import Stream
from . import tiles
from .head import Launch, exp, on_device_of, row_offset
from .tiles import fall_to, finite_or_0, loaded, shifted, tiles_launch, z_of
from .vocab_stats import _INF, _NAN


@dataclass(frozen=True)
class Config:
    """Launch configuration of _draw_kernel."""

    # draws a program: 16 × 128 columns of a tile are 16 doubles a thread on 4 warps; each program reads the row's records
    draws: int = 16
    num_warps: int = 4
    # tiles a group: of 1,187 tiles 38 groups, so that neither level compares many sums with every draw
    group: int = 32


CONFIG = Config()


@triton.jit
def uniform53(words_high, words_low):
    """As ``primitives.philox.uniform53``."""
    bits = (words_high.to(tl.int64) << 21) | (words_low >> 11).to(tl.int64)
    return tl.minimum((bits.to(tl.float64) + 0.5) * (1.0 / 9007199254740992.0), 1.0 - 1.0 / 9007199254740992.0)


@triton.jit
def uniforms(seed, position, draw, STREAM: tl.constexpr):
    """As ``primitives.draw_rows.uniforms``: u float64 of int32 draws of one row, whose seed and position are int64."""
    pair = (draw >> 1).to(tl.uint32)
    low = pair * 0 + (position & 0xFFFFFFFF).to(tl.uint32)
    high = pair * 0 + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, pair, low, high, pair * 0 + STREAM)
    odd = (draw & 1) == 1
    return uniform53(tl.where(odd, w2, w0), tl.where(odd, w3, w1))


@triton.jit
def _inverted(weights, fraction, WIDTH: tl.constexpr):
    """(index, fraction left) of the lowest of a row's WIDTH weights whose cumulative sum exceeds the fraction of their total.

    A weight of 0 is never taken, though rounding may move a partial sum: the last one above 0 is meant where none exceeds.
    """
    index = tl.arange(0, WIDTH)[None, :]
    target = fraction * tl.sum(weights, 1)
    exceeds = (tl.cumsum(weights, 1) > target[:, None]) & (weights > 0)
    taken = tl.min(tl.where(exceeds, index, WIDTH), 1)
    last = tl.max(tl.where(weights > 0, index, 0), 1)
    taken = tl.minimum(taken, last)
    before = tl.sum(tl.where(index < taken[:, None], weights, 0.0), 1)
    own = tl.sum(tl.where(index == taken[:, None], weights, 0.0), 1)
    left = tl.where(own > 0, (target - before) / own, 0.0)
    return taken, tl.minimum(tl.maximum(left, 0.0), 1.0)


@triton.jit
def _draw_kernel(
    logits, records, seeds, positions, ids, values, lse, lse_tau,
    columns, inner_rows, stride_o, stride_i, n_tiles, field, blocks, draws, scale, cap, inv_t, tau,
    HEAD: tl.constexpr, ORDER: tl.constexpr, TAU: tl.constexpr, STREAM: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
    GROUP: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """Some draws of one row; the first program of a row writes its sums. Program = (row, block of DRAWS)."""
    program = tl.program_id(0)
    block = program % blocks
    row = (program // blocks).to(tl.int64)
    line = logits + row_offset(row, inner_rows, stride_o, stride_i)
    records += row * (3 if TAU else 2) * field

    tile = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    live = tile < n_tiles
    z = z_of(tl.load(records + tile, mask=live, other=-_INF), scale, cap, inv_t, HEAD, ORDER)
    top = tl.max(tl.max(tl.where(live, z, -_INF), 1), 0)
    fall = fall_to(z, top)
    groups = tl.sum(tl.load(records + field + tile, mask=live, other=0.0) * exp(fall), 1).to(tl.float64)
    total = tl.sum(groups, 0)
    if TAU:
        groups = tl.sum(tl.load(records + 2 * field + tile, mask=live, other=0.0) * exp(tau * fall), 1).to(tl.float64)
    total_tau = tl.sum(groups, 0)
    # an infinite logit, a NaN, or nothing but −inf: no distribution
    bad = (total_tau != total_tau) | (total_tau == 0.0) | (total_tau == _INF)
    if block == 0:
        tl.store(lse + row, finite_or_0(top) + tl.log(total))
        tl.store(lse_tau + row, tau * finite_or_0(top).to(tl.float64) + tl.log(total_tau))

    draw = block * DRAWS + tl.arange(0, DRAWS)
    u = uniforms(tl.load(seeds + row), tl.load(positions + row), draw, STREAM)
    group, left = _inverted(groups[None, :] + tl.zeros([DRAWS, 1], tl.float64), u, GROUPS)

    tile = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    live = tile < n_tiles
    m = z_of(tl.load(records + tile, mask=live, other=-_INF), scale, cap, inv_t, HEAD, ORDER)
    sums = tl.load(records + ((2 if TAU else 1) * field) + tile, mask=live, other=0.0)
    inside_group, left = _inverted((sums * exp(tau * fall_to(m, top))).to(tl.float64), left, GROUP)

    tile = group * GROUP + inside_group
    m = z_of(tl.load(records + tile, mask=tile < n_tiles, other=0.0), scale, cap, inv_t, HEAD, ORDER)
    column = tl.multiple_of(tile * TILE, TILE)[:, None] + tl.arange(0, TILE)[None, :]
    x, inside = loaded(line, column, columns, ORDER)
    d = shifted(x, inside, finite_or_0(m)[:, None], scale, cap, inv_t, HEAD, ORDER)
    lane, _ = _inverted(exp(tau * d).to(tl.float64), left, TILE)
    column = tile * TILE + lane
    x, inside = loaded(line, column, columns, ORDER)
    z = shifted(x, inside, 0.0, scale, cap, inv_t, HEAD, ORDER)
    tl.store(ids + row * draws + draw, tl.where(bad, -1, column), mask=draw < draws)
    tl.store(values + row * draws + draw, tl.where(bad, _NAN, z), mask=draw < draws)


def launches(
    logits: Tensor, tau: float, seeds: Tensor, positions: Tensor, head: Head, out: Draws,
    tiles_config: tiles.Config = tiles.CONFIG, config: Config = CONFIG,
) -> list[Launch]:  # fmt: skip
    """The two launches that write `out`; the arguments are those of ``primitives.draw_rows.reference``."""
    n, draws = out.ids.shape
    tile = tiles_config.tile(head.columns(logits.shape[2]), draws, logits.element_size())
    shared, first = tiles_launch(logits, head, tile, None if tau == 1 else tau, tiles_config)
    block = min(triton.next_power_of_2(draws), config.draws)
    blocks = triton.cdiv(draws, block)
    arguments = shared | {
        "seeds": seeds, "positions": positions, "ids": out.ids, "values": out.values, "lse": out.lse, "lse_tau": out.lse_tau,
        "blocks": blocks, "draws": draws, "tau": tau, "TAU": tau != 1, "STREAM": int(Stream.CAPTURE), "DRAWS": block,
        "GROUPS": triton.next_power_of_2(triton.cdiv(shared["n_tiles"], config.group)), "GROUP": config.group,
    }  # fmt: skip
    return [first, Launch(_draw_kernel, n * blocks, arguments, config.num_warps)]


def draw_rows(logits: Tensor, tau: float, seeds: Tensor, positions: Tensor, head: Head, out: Draws) -> None:
    """As ``primitives.draw_rows.reference``."""
    with on_device_of(logits):
        for launch in launches(logits, tau, seeds, positions, head, out):
            launch.run()
