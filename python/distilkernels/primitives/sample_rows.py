"""``sample_rows``: one draw from each of R chosen rows, and ``weigh_rows``: the total weight of such a draw.

The weights of a draw are those of one filtered row, or of two compared column by column:

    Q_v                          a draw from a row
    max(c·Q_v − P_v, 0)          "residual": what speculative sampling draws at a rejection (c = 1), and block verification
    Q_v·[y_v ≥ bar_P]            "gate": a proposer's pool restricted to what the judge's raw logits y pass

The token is argmin_v −log1p(−u_v)/w_v over w_v > 0, the lowest id on ties: an exponential race, distributed as w/Σw. u_v is
the 32-bit uniform of word v & 3 of Philox(seed; v >> 2, position, offset, stream), so a draw depends on its row, seed and place
alone. A residual of no weight at all is replaced by a draw from Q.

Bytes: each chosen row is read once (P's too), and once more from cache for the drawn token's rank.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import resolve
from .filter_rows import Filtered
from .philox import philox, uniform53

MODES = ("plain", "residual", "gate")


class Noise(NamedTuple):
    """What a draw's random numbers are a function of: int64 [R] each, ``stream`` an int or int64 [R]."""

    seeds: Tensor
    positions: Tensor
    offsets: Tensor
    stream: Tensor | int


class Operand(NamedTuple):
    """A row for each draw: ``rows`` int64 [R] of logits [O, I, V] with last stride 1 and their laws, fields [R]. Row −1 is no draw,
    or, in the second operand, a plain draw from the first."""

    logits: Tensor
    rows: Tensor
    law: Filtered


class Drawn(NamedTuple):
    """``token`` int64 [R], −1 where there was no draw, no weight or no law; ``value`` [R] float32 or float64: the judge's raw logit
    there (NaN without a token); ``rank`` int64 [R]: how many of the judge's `vocab` first columns have a larger one (−1 without a
    token); ``compared`` bool [R]: the draw was from two rows (False where a residual had no weight and Q was drawn from).

    The judge is the row whose logits decide what a token is worth: the first operand, but the second in a gate."""

    token: Tensor
    value: Tensor
    rank: Tensor
    compared: Tensor


def uniform32(words: Tensor) -> Tensor:
    """u = min((float32(x) + ½)·2⁻³², 1 − 2⁻²⁴), float32: never 0 or 1, fine near 0, where a race is won."""
    return ((words.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)


def uniforms_at(noise: Noise, columns: int) -> Tensor:
    """u [R, columns] float32."""
    blocks = torch.arange((columns + 3) // 4, device=noise.seeds.device)
    stream = noise.stream[:, None] if isinstance(noise.stream, Tensor) else noise.stream
    words = philox(noise.seeds[:, None], (blocks[None, :], noise.positions[:, None], noise.offsets[:, None], stream))
    return uniform32(torch.stack(words, -1).flatten(1))[:, :columns]


def reference_coin(seeds: Tensor, positions: Tensor, offsets: Tensor, stream: int, out: Tensor) -> None:
    """Writes `out`, of the places' shape."""
    words = philox(seeds, (0, positions, offsets, stream))
    out.copy_(uniform53(words[0], words[1]))


def coin(seeds: Tensor, positions: Tensor, offsets: Tensor, stream: int, backend: str | None = None) -> Tensor:
    """53-bit uniforms, float64, of words 0 and 1 at v = 0, of int64 places broadcast: for tests against a probability rather than a race."""
    places = [t.contiguous() for t in torch.broadcast_tensors(seeds, positions, offsets)]
    launch = resolve("coin", *places, backend=backend)
    out = torch.empty(places[0].shape, dtype=torch.float64, device=seeds.device)
    if out.numel():
        launch(*places, stream, out)
    return out


def _row(operand: Operand, columns: int) -> Tensor:
    return operand.logits.reshape(-1, operand.logits.shape[2])[operand.rows.clamp(min=0)][:, :columns]


def _law(operand: Operand, columns: int) -> Tensor:
    """Q [R, columns] float64, 0 beyond the operand's own columns."""
    x = _row(operand, columns)
    ids = torch.arange(x.shape[1], device=x.device).expand(x.shape)
    return torch.nn.functional.pad(operand.law.logprob(x, ids).exp(), (0, columns - x.shape[1]))


def weights(first: Operand, second: Operand | None, scale: Tensor | None, mode: str, columns: int) -> Tensor:
    """w [R, columns] float64 of the module's page; NaN rows have NaN weights."""
    q = _law(first, columns)
    if second is None:
        return q
    alone = (second.rows < 0)[:, None]
    if mode == "gate":
        y = _row(second, columns)
        passed = torch.nn.functional.pad(y >= second.law.bar[:, None], (0, columns - y.shape[1]))
        return torch.where(passed | alone, q, 0.0)
    return torch.where(alone, q, (scale[:, None] * q - _law(second, columns)).clamp(min=0))


def reference(
    first: Operand, second: Operand | None, scale: Tensor | None, mode: str, columns: int, vocab: int, noise: Noise, out: Drawn
) -> None:
    """Writes `out`. Draws are over v < `columns`, ranks over v < `vocab`; scale float64 [R]."""
    w = weights(first, second, scale, mode, columns)
    bad = w.isnan().any(-1) | (first.rows < 0)
    empty = (w <= 0).all(-1) & ~bad
    fallback = empty if mode == "residual" else torch.zeros_like(empty)
    if second is not None:
        w = torch.where(fallback[:, None], _law(first, columns), w)
    race = -torch.log1p(-uniforms_at(noise, columns).double()) / w
    race = race.masked_fill(~(w > 0), math.inf)
    bad = bad | (w <= 0).all(-1)
    # torch.argmin may return any of several equal minima
    token = (race == race.amin(-1, keepdim=True)).int().argmax(-1)
    x = _row(second if mode == "gate" else first, vocab)
    value = x.gather(-1, token[:, None])
    out.token.copy_(token.masked_fill(bad, -1))
    out.value.copy_(value[:, 0].to(out.value.dtype).masked_fill(bad, math.nan))
    out.rank.copy_((x > value).sum(-1).masked_fill(bad, -1))
    out.compared.copy_(~fallback & ~bad & (torch.zeros_like(bad) if second is None else second.rows >= 0))


def reference_mass(first: Operand, second: Operand | None, scale: Tensor | None, mode: str, columns: int, out: Tensor) -> None:
    """Writes Σ_v w_v float64 [R]; 0 where rows are −1, NaN for NaN rows."""
    out.copy_(weights(first, second, scale, mode, columns).sum(-1).masked_fill(first.rows < 0, 0.0))


def drawn(
    first: Operand, noise: Noise, columns: int, *, vocab: int | None = None, second: Operand | None = None, scale: Tensor | None = None,
    mode: str = "plain", backend: str | None = None,
) -> Drawn:  # fmt: skip
    """One draw for each of `first.rows`; see :class:`Drawn`."""
    launch = resolve("sample_rows", first.logits, None if second is None else second.logits, backend=backend)
    r, device = first.rows.shape[0], first.logits.device
    value_dtype = torch.float64 if first.logits.dtype == torch.float64 else torch.float32
    integers = [torch.empty(r, dtype=torch.int64, device=device) for _ in range(2)]
    out = Drawn(integers[0], torch.empty(r, dtype=value_dtype, device=device), integers[1], torch.empty(r, dtype=torch.bool, device=device))
    if r:
        launch(first, second, scale, mode, columns, columns if vocab is None else vocab, noise, out)
    return out


def mass(
    first: Operand, columns: int, *, second: Operand | None = None, scale: Tensor | None = None, mode: str = "plain", backend: str | None = None
) -> Tensor:
    """Σ_v w_v float64 [R]."""
    launch = resolve("weigh_rows", first.logits, None if second is None else second.logits, backend=backend)
    out = torch.empty(first.rows.shape[0], dtype=torch.float64, device=first.logits.device)
    if out.numel():
        launch(first, second, scale, mode, columns, out)
    return out
