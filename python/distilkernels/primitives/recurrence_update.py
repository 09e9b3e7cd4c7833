"""``recurrence_update``: LazyEviction's two integers a head and token, after some steps of attention (arXiv 2506.15969).

A token is looked at in step s when its attention, the largest over the query group, exceeds alpha. ``last_seen`` is the last such
step, ``max_interval`` the largest gap between two of them. Bytes: the attention rows once, 8·B·H·T read and written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import resolve
from .boundary import plain_eager


def reference(attention: Tensor, last_seen: Tensor, max_interval: Tensor, step: int, alpha: float) -> None:
    """Updates the state in place for the steps step, …, step + W − 1, in this order.

    attention [B, Hq, W, T] float32, bfloat16, float16 or float64, last stride 1, any other strides: row w is the query of step + w.
    last_seen, max_interval int32 [B, H, T], last stride 1; H divides Hq. A NaN exceeds nothing.
    """
    for w in range(attention.shape[2]):
        seen = (attention[:, :, w].unflatten(1, (last_seen.shape[1], -1)) > alpha).any(2)
        gap = torch.maximum(max_interval, step + w - last_seen)
        max_interval.copy_(torch.where(seen, gap, max_interval))
        last_seen.masked_fill_(seen, step + w)


def launched(attention: Tensor, last_seen: Tensor, max_interval: Tensor, step: int, alpha: float, backend: str | None) -> None:
    if attention.numel():
        resolve("recurrence_update", attention, last_seen, max_interval, backend=backend)(attention, last_seen, max_interval, step, alpha)


@torch.library.custom_op("distilkernels::recurrence_update", mutates_args=("last_seen", "max_interval"))
def _op(attention: Tensor, last_seen: Tensor, max_interval: Tensor, step: int, alpha: float, backend: str | None) -> None:
    launched(attention, last_seen, max_interval, step, alpha, backend)


@_op.register_fake
def _(attention, last_seen, max_interval, step, alpha, backend):
    return None


def recurrence(attention: Tensor, last_seen: Tensor, max_interval: Tensor, step: int, alpha: float, backend: str | None = None) -> None:
    """:func:`reference` on the chosen backend; arguments are already checked. Outside any graph."""
    attention = attention.detach()
    if plain_eager(attention, last_seen, max_interval):
        launched(attention, last_seen, max_interval, step, alpha, backend)
    else:
        _op(attention, last_seen, max_interval, step, alpha, backend)
