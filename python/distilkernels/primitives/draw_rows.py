"""``draw_rows``: R independent draws from every row's softmax to a power, from one read.

g ∝ exp(τ·z) is cut at uniforms of the counter-based generator: draw r of a row takes the 53-bit uniform of words
2(r mod 2), 2(r mod 2) + 1 of Philox(seed; r div 2, position mod 2³², position div 2³², stream CAPTURE), and is the lowest v with
Σ_{w ≤ v} g_w > u·Σ g. The same on every backend, but where u falls within the rounding of a partial sum.

Bytes: N·V·itemsize read once, then one tile a draw; the sums of tiles are the only thing kept. An exponential race, as a
single draw uses, would take R·V random numbers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import resolve
from .boundary import plain_eager, rows_of
from .head import Head
from .philox import Stream, philox, uniform53
from .vocab_stats import row_dtype


class Draws(NamedTuple):
    """``ids`` [N, R] int32 in the order of the draws, ``values`` [N, R]: z there (float32, float64 for float64 logits);
    ``lse``, ``lse_tau`` [N] float64: log Σ e^z and log Σ e^{τz}. A row with a NaN, or with nothing but −inf, has ids −1 and
    NaN values; its lse is NaN or −inf."""

    ids: Tensor
    values: Tensor
    lse: Tensor
    lse_tau: Tensor


def allocate(logits: Tensor, draws: int) -> Draws:
    n, device = logits.shape[0] * logits.shape[1], logits.device
    values = torch.empty((n, draws), dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32, device=device)
    rows = [torch.empty(n, dtype=row_dtype(device), device=device) for _ in range(2)]
    return Draws(torch.empty((n, draws), dtype=torch.int32, device=device), values, *rows)


def uniforms(seeds: Tensor, positions: Tensor, draws: int) -> Tensor:
    """u [N, R] float64 of seeds and positions int64 [N]."""
    pair = torch.arange((draws + 1) // 2, device=seeds.device)
    words = philox(seeds[:, None], (pair[None, :], positions[:, None], positions[:, None] >> 32, int(Stream.CAPTURE)))
    both = torch.stack([uniform53(words[0], words[1]), uniform53(words[2], words[3])], -1)
    return both.reshape(seeds.shape[0], 2 * pair.shape[0])[:, :draws]


def reference(logits: Tensor, tau: float, seeds: Tensor, positions: Tensor, head: Head, out: Draws) -> None:
    """Writes `out` for logits [O, I, V] with last stride 1, seeds and positions int64 [N]; R is out.ids.shape[1]."""
    vocab = logits.shape[2]
    raw = logits.reshape(-1, vocab)[:, : head.columns(vocab)]
    z = head._replace(valid_vocab=None).apply(raw if raw.dtype == torch.float64 else raw.float())
    out.lse.copy_(z.logsumexp(-1))
    out.lse_tau.copy_((z * tau).logsumexp(-1))
    top = z.amax(-1, keepdim=True)
    g = (tau * (z - top).double()).exp()
    sums = g.cumsum(-1)
    bad = ~sums[:, -1].isfinite()
    last = torch.where(g > 0, torch.arange(g.shape[1], device=g.device), -1).amax(-1, keepdim=True)
    target = uniforms(seeds, positions, out.ids.shape[1]) * sums[:, -1:]
    # rounding may put u·Σg at the end of the sum: the last column that has any weight is meant
    ids = torch.minimum(torch.searchsorted(sums, target, right=True), last).clamp_(min=0)
    out.values.copy_(z.gather(-1, ids).masked_fill(bad[:, None], math.nan))
    out.ids.copy_(ids.masked_fill(bad[:, None], -1))


def launched(logits: Tensor, draws: int, tau: float, seeds: Tensor, positions: Tensor, head: Head, backend: str | None) -> Draws:
    """:func:`draw` without checks and without the registered op."""
    launch = resolve("draw_rows", logits, backend=backend)
    out = allocate(logits, draws)
    if logits.numel():
        launch(logits, tau, seeds, positions, head, out)
    return out


@torch.library.custom_op("distilkernels::draw_rows", mutates_args=())
def _op(
    logits: Tensor, draws: int, tau: float, seeds: Tensor, positions: Tensor,
    temperature: float, logit_scale: float, softcap: float | None, valid_vocab: int | None, backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(launched(logits, draws, tau, seeds, positions, Head(temperature, logit_scale, softcap, valid_vocab), backend))


@_op.register_fake
def _(logits, draws, tau, seeds, positions, temperature, logit_scale, softcap, valid_vocab, backend):
    return tuple(allocate(logits, draws))


def draw(logits: Tensor, draws: int, tau: float, seeds: Tensor, positions: Tensor, head: Head, backend: str | None = None) -> Draws:
    """R draws of each row of logits [..., V], flat; arguments are already checked. Outside any graph."""
    rows = rows_of(logits.detach())
    if plain_eager(logits):
        return launched(rows, draws, tau, seeds, positions, head, backend)
    return Draws(*_op(rows, draws, tau, seeds, positions, *head, backend))
