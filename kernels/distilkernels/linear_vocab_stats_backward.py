"""The backward of ``linear_vocab_stats`` in Triton: d hidden, d weight and d bias, a panel of the vocabulary at a time.

For each panel of columns:
    _panel_kernel    recomputes its tiles of logits and writes d logits, rounded to the operands' dtype, to a scratch [N, panel];
    _live_kernel     lists the blocks of the scratch that count;
    _product_kernel  d hidden += dz W, and d weight = dzᵀ hidden with all of N in one sum;
    _bias_kernel     d bias from the column sums of _panel_kernel, in float32.
6·N·V·H FLOPs, those of three GEMMs, and 8·N·V·H/panel bytes of d hidden. Without the scratch, a program would have to
own [128, H] sums: at H = 4,096 they are 2 MB of float32, more than a multiprocessor holds, so they would go through memory
once per tile (74 ms of it at N = 8,192 and V = 151,936) and each of the two products would recompute the logits
(10·N·V·H FLOPs). No atomics: each output has one program and each sum one order.

Skipping. The level of a block (block_m × block_n of dz) is its largest |dz| over its row's scale, which is the row's
largest |entry|, or |A·dz/dx| where there are no ids. `skip` leaves blocks with level ≤ skip out of d hidden, `skip_weight`
out of d weight. The default `skip` is u/V, u the relative rounding error of the dtype (2⁻⁸ for bfloat16, 2⁻¹¹ for
float16): all that can be left out of a row then adds up to u·scale, which is what rounding dz to 16 bits may change its
largest entry by. 0 leaves out exact zeros only: the default for float32, and for d weight, where a rare token's whole row
may be made of such blocks and an optimizer that normalises would see its direction vanish. A row's d hidden may then
depend, within that bound, on which rows share its block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.head import Head
from .head import _SOFTCAP, Launch, exp, head_arguments, on_device_of, tempered, untempered
from .ids import _NO_ID
from .linear_vocab_stats import Config, _dot, _first_at, _grouped, _hits, _logits_tile, config_for, major_of, tiles
from .vocab_stats import _INF, _finite

# ---------------------------------------------------------------------------------------------- device


@triton.jit
def _panel_kernel(
    hidden, weight, bias, order, entries, coef, scales, dz, levels, sums,
    n, h, columns, start, stride_h, stride_w, stride_dz, row_blocks, column_blocks, k, scale, cap, inv_t, t, slope,
    HEAD: tl.constexpr, LINEAR: tl.constexpr, CONSTANT: tl.constexpr, T1: tl.constexpr, EVEN_H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of d logits: the dense formula, then the entries. Rows and columns beyond the last are written as zeros."""
    block, across = _grouped(tl.program_id(0), row_blocks, column_blocks, GROUP)
    lines = block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.minimum(lines, n - 1).to(tl.int64)
    base = start + across * BLOCK_N
    offs = base + tl.arange(0, BLOCK_N)
    x = _logits_tile(hidden, weight, bias, block * BLOCK_M, n, base, columns, h, stride_h, stride_w, EVEN_H, BLOCK_M, BLOCK_N, BLOCK_H, STAGES)

    six = coef + rows * 6
    ref, a, b = tl.load(six), tl.load(six + 1), tl.load(six + 2)
    c, d, lse_t1 = tl.load(six + 3), tl.load(six + 4), tl.load(six + 5)
    live = ((a != 0) | (b != 0) | (c != 0) | (d != 0)) & (lines < n)
    # a row that nothing is asked of is zeros about a reference of zero: its own may be NaN
    ref = tl.where(live, ref, 0.0)
    hi = ref.to(tl.float32)
    lo = (ref - hi).to(tl.float32)
    a, b, c, d = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)
    z1 = untempered(tl.where(live[:, None], x, 0.0), scale, cap, HEAD)
    z = tempered(z1, inv_t, HEAD)
    distance = (z - hi[:, None]) - lo[:, None]
    if LINEAR:
        grad = exp(distance) * (a[:, None] + b[:, None] * tl.where(distance == -_INF, 0.0, distance))
    else:
        grad = exp(distance) * a[:, None]
    if CONSTANT:
        grad += tl.where(_finite(z), c[:, None], 0.0)
    if T1:
        lse_t1 = tl.where(live, lse_t1, 0.0)
        hi = lse_t1.to(tl.float32)
        lo = (lse_t1 - hi).to(tl.float32)
        grad += d[:, None] * exp((z1 - hi[:, None]) - lo[:, None])
    if HEAD == _SOFTCAP:
        share = z1 / cap
        grad *= slope * (1.0 - share * share)
    else:
        grad *= slope
    grad = tl.where(live[:, None] & (offs < columns)[None, :], grad, 0.0)

    if order is not None:
        here = rows * k
        at = _first_at(order, here, base, k, 16)
        following = tl.load(order + here + at, mask=(at < k) & (lines < n), other=_NO_ID)
        while tl.min(following, 0) < base + BLOCK_N:
            value = tl.load(entries + here + at, mask=following < base + BLOCK_N, other=0.0)
            grad = tl.where(_hits(following, base, BLOCK_M, BLOCK_N), value[:, None], grad)
            at += (following < base + BLOCK_N).to(tl.int32)
            following = tl.load(order + here + at, mask=(at < k) & (lines < n), other=_NO_ID)

    if levels is not None:
        highest = tl.max(tl.where(grad == grad, tl.abs(grad), _INF), 1)
        level = tl.where(highest == 0, 0.0, highest / tl.load(scales + rows))
        tl.store(levels + block * column_blocks + across, tl.max(tl.where(level == level, level, _INF), 0))
    if sums is not None:
        tl.store(sums + block.to(tl.int64) * stride_dz + across * BLOCK_N + tl.arange(0, BLOCK_N), tl.sum(grad, 0))
    if dz is not None:
        place = lines.to(tl.int64)[:, None] * stride_dz + (across * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        tl.store(dz + place, grad.to(dz.dtype.element_ty))


@triton.jit
def _live_kernel(levels, listed, counts, blocks, stride_unit, stride_block, threshold, WIDTH: tl.constexpr):
    """The blocks of one row (or column) of blocks whose level exceeds the threshold, ascending, and their number."""
    unit = tl.program_id(0)
    count = 0
    for first in range(0, blocks, WIDTH):
        some = first + tl.arange(0, WIDTH)
        level = tl.load(levels + unit * stride_unit + some * stride_block, mask=some < blocks, other=0.0)
        live = level > threshold
        ahead = tl.cumsum(live.to(tl.int32), 0)
        tl.store(listed + unit * blocks + count + ahead - 1, some, mask=live)
        count += tl.sum(live.to(tl.int32), 0)
    tl.store(counts + unit, count)


@triton.jit
def _product_kernel(
    left, right, out, listed, counts, m, depth, h, stride_m, stride_d, stride_right, stride_out, m_blocks, h_blocks, listed_blocks,
    ADD: tl.constexpr, UNIT: tl.constexpr, PER_LIST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[m, h] (+)= Σ_d left[m, d]·right[d, h] over the listed blocks of UNIT depths.

    left is zero beyond `m` and `depth`; right repeats its last row there. A list serves PER_LIST blocks of m.
    """
    block, across = _grouped(tl.program_id(0), m_blocks, h_blocks, GROUP)
    rows = tl.arange(0, BLOCK_M)
    columns = across * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = block // PER_LIST
    count = tl.load(counts + unit)
    listed += unit * listed_blocks
    steps: tl.constexpr = UNIT // BLOCK_D
    if (count > 0) | (not ADD):
        lanes = tl.arange(0, BLOCK_D)
        left += tl.cast(block * BLOCK_M, tl.int64) * stride_m
        a = rows[:, None] * stride_m + lanes[None, :] * stride_d
        place = rows[:, None] * stride_out + columns[None, :]
        out += tl.cast(block * BLOCK_M, tl.int64) * stride_out
        inside = (block * BLOCK_M + rows < m)[:, None] & (columns < h)[None, :]
        if ADD:
            total = tl.load(out + place, mask=inside, other=0.0)
        else:
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        unit_at = tl.load(listed, mask=count > 0, other=0)
        for step in tl.range(0, count * steps, num_stages=STAGES):
            at = unit_at * UNIT + step % steps * BLOCK_D
            unit_at = tl.load(listed + tl.minimum((step + 1) // steps, count - 1))
            x = tl.load(left + at.to(tl.int64) * stride_d + a)
            b = right + at.to(tl.int64) * stride_right + (tl.minimum(lanes, depth - 1 - at)[:, None] * stride_right + columns[None, :])
            total = _dot(x, tl.load(b, mask=(columns < h)[None, :], other=0.0), total)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _bias_kernel(sums, out, blocks, columns, stride, WIDTH: tl.constexpr):
    offs = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for block in range(0, blocks):
        total += tl.load(sums + tl.cast(block, tl.int64) * stride + offs, mask=offs < columns, other=0.0)
    tl.store(out + offs, total.to(out.dtype.element_ty), mask=offs < columns)


# ------------------------------------------------------------------------------------------------ host


def default_skip(dtype: torch.dtype, columns: int) -> float:
    """The level up to which blocks are left out of d hidden; see the module's page."""
    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 / columns


def heavy(terms: tuple[str, ...], head: Head) -> bool:
    """Whether d logits needs more registers beside a tile than the losses' and the entropy's do."""
    return head.softcap is not None or not set(terms) <= {"linear"}


def _ascending(ids: Tensor | None, entries: Tensor | None, columns: int) -> tuple[Tensor | None, Tensor | None]:
    """Ids of each row in ascending order, those that do not count last, and the entries at them."""
    if ids is None or ids.shape[1] == 0:
        return None, None
    order, at = ids.masked_fill((ids < 0) | (ids >= columns), _NO_ID.value).to(torch.int32).sort(-1)
    return order, entries.to(torch.float32).gather(1, at).masked_fill(order == _NO_ID.value, 0)


def _product(config: Config, left: Tensor, right: Tensor, out: Tensor, blocks: dict[str, object], m: int, add: bool) -> Launch:
    """out [m, H] (+)= left·right, where left [.., ..] is padded to whole blocks and right [depth, H] is not."""
    depth, h = right.shape
    m_blocks, h_blocks = triton.cdiv(m, config.block_m), triton.cdiv(h, config.block_n)
    arguments = {
        "left": left, "right": right, "out": out, "m": m, "depth": depth, "h": h, "stride_m": left.stride(0), "stride_d": left.stride(1),
        "stride_right": right.stride(0), "stride_out": out.stride(0), "m_blocks": m_blocks, "h_blocks": h_blocks, "ADD": add,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": config.block_h,
        "GROUP": config.group, "STAGES": config.stages,
    }  # fmt: skip
    return Launch(_product_kernel, m_blocks * h_blocks, arguments | blocks, config.num_warps)


def _live(levels: Tensor, threshold: float) -> tuple[Launch, dict[str, object]]:
    """The launch that lists, for each row of `levels`, the blocks above the threshold, and the lists as arguments."""
    units, blocks = levels.shape
    listed = torch.empty((units, blocks), dtype=torch.int32, device=levels.device)
    counts = torch.empty(units, dtype=torch.int32, device=levels.device)
    lists = {"listed": listed, "counts": counts}
    arguments = {"levels": levels, "blocks": blocks, "stride_unit": levels.stride(0), "stride_block": levels.stride(1)}
    launch = Launch(_live_kernel, units, arguments | lists | {"threshold": threshold, "WIDTH": 128}, 1)
    return launch, lists | {"listed_blocks": blocks}


def backward_launches(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, entries: Tensor | None, coef: Tensor,
    terms: tuple[str, ...], head: Head, grads: dict[str, Tensor], skip: float | None = None, skip_weight: float = 0.0,
    config: Config | None = None,
) -> Iterator[Launch]:  # fmt: skip
    """The launches of :func:`linear_vocab_stats_backward`, panel after panel over one scratch; grads["hidden"] is float32."""
    config = config or config_for(hidden.dtype, major_of(hidden), heavy(terms, head))
    n = hidden.shape[0]
    tile, heads = tiles(hidden, config), head_arguments(head, weight.shape[0])
    row_blocks, vocab = tile["row_blocks"], heads["columns"]
    del heads["MASKED"]
    slope = head.logit_scale / head.temperature
    order, entries = _ascending(ids, entries, vocab)
    scales = (coef[:, 1] * slope if order is None else entries).abs().view(n, -1).amax(1).to(torch.float32)
    panel = min(config.panel, triton.cdiv(vocab, config.block_n) * config.block_n)
    products = "hidden" in grads or "weight" in grads
    new = hidden.new_empty
    dz = new((row_blocks * config.block_m, panel)) if products else None
    sums = new((row_blocks, panel), dtype=torch.float32) if "bias" in grads else None
    skip = default_skip(hidden.dtype, vocab) if skip is None else skip
    shared = tile | heads | {
        "weight": weight, "bias": bias, "order": order, "entries": entries, "coef": coef.contiguous(), "scales": scales,
        "dz": dz, "sums": sums, "stride_w": weight.stride(0), "stride_dz": panel, "slope": slope,
        "k": 0 if order is None else order.shape[1],
        "LINEAR": "linear" in terms, "CONSTANT": "constant" in terms, "T1": "t1" in terms,
    }  # fmt: skip
    for start in range(0, vocab, panel):
        stop = min(start + panel, vocab)
        column_blocks = triton.cdiv(stop - start, config.block_n)
        levels = new((row_blocks, column_blocks), dtype=torch.float32) if products else None
        place = {"start": start, "column_blocks": column_blocks, "levels": levels}
        yield Launch(_panel_kernel, row_blocks * column_blocks, shared | place, config.num_warps)
        if "hidden" in grads:
            launch, lists = _live(levels, skip)
            yield launch
            lists |= {"UNIT": config.block_n, "PER_LIST": 1}
            yield _product(config, dz, weight[start:stop], grads["hidden"], lists, n, start > 0)
        if "weight" in grads:
            launch, lists = _live(levels.t(), skip_weight)
            yield launch
            lists |= {"UNIT": config.block_m, "PER_LIST": config.block_n // config.block_m}
            yield _product(config, dz.t(), hidden, grads["weight"][start:stop], lists, stop - start, False)
        if "bias" in grads:
            arguments = {"sums": sums, "out": grads["bias"][start:stop], "blocks": row_blocks, "columns": stop - start}
            yield Launch(_bias_kernel, triton.cdiv(stop - start, 128), arguments | {"stride": panel, "WIDTH": 128}, 4)


def linear_vocab_stats_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, entries: Tensor | None, coef: Tensor,
    terms: tuple[str, ...], head: Head, grads: dict[str, Tensor], skip: float | None = None, skip_weight: float = 0.0,
) -> None:  # fmt: skip
    """Writes those of d hidden [N, H], d weight [V, H] and d bias [V] that `grads` holds, under "hidden", "weight", "bias".

    hidden, weight, bias and head are those of the forward; ids, entries, coef and terms those of
    ``primitives.vocab_stats.dense_coefficients``. Outputs are contiguous, in any of the three dtypes, rounded once from float32
    sums (d hidden in 16 bits needs N·H floats beside it). `skip` and `skip_weight`: see the module's page.
    """
    n, columns = hidden.shape[0], head.columns(weight.shape[0])
    for name in ("weight", "bias"):
        if name in grads:
            grads[name][columns if n else 0 :].zero_()
    if n == 0 or not grads:
        return
    inner = dict(grads)
    if "hidden" in grads and grads["hidden"].dtype != torch.float32:
        inner["hidden"] = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    with on_device_of(hidden):
        for launch in backward_launches(hidden, weight, bias, ids, entries, coef, terms, head, inner, skip, skip_weight):
            launch.run()
    if inner.get("hidden") is not grads.get("hidden"):
        grads["hidden"].copy_(inner["hidden"])
