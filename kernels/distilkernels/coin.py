"""``coin`` in Triton: a 53-bit uniform for each place. One launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .draw_rows import uniform53
from .head import Launch, on_device_of

# one program serves 16 requests' blocks of 8
_BLOCK = 128


@triton.jit
def _coin_kernel(seeds, positions, offsets, out, count, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    seed = tl.load(seeds + place, mask=inside, other=0)
    position = (tl.load(positions + place, mask=inside, other=0) & 0xFFFFFFFF).to(tl.uint32)
    offset = (tl.load(offsets + place, mask=inside, other=0) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, _, _ = tl.philox(seed, position * 0, position, offset, position * 0 + STREAM)
    tl.store(out + place, uniform53(w0, w1), mask=inside)


def coin_launch(seeds: Tensor, positions: Tensor, offsets: Tensor, stream: int, out: Tensor) -> Launch:
    arguments = {"seeds": seeds, "positions": positions, "offsets": offsets, "out": out, "count": out.numel(), "STREAM": stream, "BLOCK": _BLOCK}
    return Launch(_coin_kernel, triton.cdiv(out.numel(), _BLOCK), arguments, 4)


def coin(seeds: Tensor, positions: Tensor, offsets: Tensor, stream: int, out: Tensor) -> None:
    """As ``primitives.sample_rows.reference_coin``, of contiguous places."""
    with on_device_of(seeds):
        coin_launch(seeds, positions, offsets, stream, out).run()
