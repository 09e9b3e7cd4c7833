"""Sampling settings, a draw from rows of logits, and weighted sums of several models' logits."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..primitives.boundary import rows_of
from ..primitives.filter_rows import Filtered, Filters, Plain, filtered
from ..primitives.head import Head
from ..primitives.philox import Stream, checked_per_row
from ..primitives.sample_rows import Noise, Operand, drawn
from ..primitives.vocab_stats import checked_logits, presented, row_dtype, statistics


@dataclass(frozen=True, eq=False)
class Sampling:
    """How one side samples: filters in the order temperature, top_k, top_p (renormalised), min_p; boundary ties are kept.

    Args:
        temperature: ≥ 0; 0 is the argmax (lowest id).
        top_k: ≥ 1, or None: columns of rank < top_k.
        top_p: ≥ 0, or None: columns with less than top_p of the mass above them; 0 keeps the argmax, ≥ 1 everything.
        min_p: in [0, 1], or None: columns with at least min_p of the largest probability.
        Each is a number or a per-request tensor [B] (values are not looked at on a GPU).

    Raises:
        ValueError, TypeError: naming the argument.
    """

    temperature: float | Tensor = 1.0
    top_k: int | Tensor | None = None
    top_p: float | Tensor | None = None
    min_p: float | Tensor | None = None

    def __post_init__(self):
        for name, low, high in (("temperature", 0, math.inf), ("top_k", 1, math.inf), ("top_p", 0, math.inf), ("min_p", 0, 1)):
            value = getattr(self, name)
            if value is None and name != "temperature":
                continue
            kinds = numbers.Integral if name == "top_k" else numbers.Real
            if isinstance(value, Tensor):
                if name == "top_k" and (value.is_floating_point() or value.dtype == torch.bool):
                    raise TypeError(f"top_k must be an int or an integer tensor; got {value.dtype}")
                if value.device.type != "cpu" or value.numel() == 0:
                    continue
                least, most = (float(v) for v in value.aminmax())
            elif isinstance(value, bool) or not isinstance(value, kinds):
                raise TypeError(f"{name} must be {'an int' if name == 'top_k' else 'a number'} or a tensor; got {type(value).__name__}")
            else:
                least = most = float(value)
            if not (low <= least and most <= high and least < math.inf):
                raise ValueError(f"{name} must be {f'at least {low}' if high == math.inf else f'in [{low}, {high}]'}; got {value}")

    @property
    def plain(self) -> bool:
        """Whether this is the model's own softmax, as far as Python can see."""
        neutral = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None}
        return all(not isinstance(getattr(self, name), Tensor) and getattr(self, name) == value for name, value in neutral.items())

    def limited(self, top_k: int | Tensor | None) -> Sampling:
        """The same with no more than `top_k` columns."""
        if top_k is None:
            return self
        if isinstance(self.top_k, Tensor):
            top_k = self.top_k.clamp(max=top_k.to(self.top_k.device) if isinstance(top_k, Tensor) else top_k)
        elif self.top_k is not None:
            top_k = top_k.clamp(max=self.top_k) if isinstance(top_k, Tensor) else min(self.top_k, top_k)
        return Sampling(self.temperature, top_k, self.top_p, self.min_p)

    def filters(self, requests: int, rows: int, device: torch.device) -> Filters:
        """Per row [requests·rows]; ValueError where a tensor is not [requests]."""

        def each(name: str, off: float, dtype: torch.dtype) -> Tensor:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                if tuple(value.shape) != (requests,):
                    raise ValueError(f"{name} must be a number or have one entry a request, ({requests},); got {tuple(value.shape)}")
                return value.to(device=device, dtype=dtype).repeat_interleave(rows)
            return torch.full((requests * rows,), off if value is None else value, dtype=dtype, device=device)

        double = row_dtype(device)
        return Filters(each("temperature", 1, double), each("top_k", 0, torch.int64), each("top_p", 1, double), each("min_p", 0, double))


PLAIN_LAW = ("lse", "expected_logit", "argmax")


def raw_statistics(rows: Tensor, ids: Tensor | None, columns: int, names: tuple[str, ...], backend: str | None) -> dict[str, Tensor]:
    """Statistics at temperature 1 over the first `columns` of rows [O, I, V], at ids [B, R] in whose shape they come; flat without.

    A row with a NaN, a +inf or nothing but −inf has lse NaN.
    """
    head = Head(valid_vocab=None if columns == rows.shape[2] else columns)
    found = statistics(rows, None if ids is None else ids.reshape(-1, 1), None, names, head, backend)
    found["lse"].nan_to_num_(math.nan, math.nan, math.nan)
    return found if ids is None else {name: t.view(ids.shape) for name, t in found.items()}


def plain_law(stats: dict[str, Tensor], logits: Tensor) -> Plain:
    """The law of an unfiltered softmax at temperature 1, from raw statistics that hold :data:`PLAIN_LAW`."""
    lse, bad = stats["lse"], stats["lse"].isnan()
    bar = torch.full_like(lse, -math.inf, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    # of a row without a law the expected logit is NaN already
    return Plain(torch.ones_like(lse), bar.masked_fill_(bad, math.nan), lse, lse, stats["expected_logit"], stats["argmax"].masked_fill(bad, -1))


def law_of(rows: Tensor, columns: int, sampling: Sampling, requests: int, backend: str | None, chosen: Tensor | None = None) -> Filtered:
    """The filtered softmax of every row of [O, I, V], `requests` of equally many rows each, over the first `columns`.

    `chosen` int64 [requests]: of one row a request, in its place among all."""
    if sampling.plain:
        law = plain_law(raw_statistics(rows, None, columns, PLAIN_LAW, backend), rows)
        return law if chosen is None else law.at(chosen)
    each = 1 if chosen is not None else rows.shape[0] * rows.shape[1] // max(requests, 1)
    return filtered(rows, columns, sampling.filters(requests, each, rows.device), backend, chosen)


@torch.no_grad()
def sample(
    logits: Tensor, *, seeds: int | Tensor, positions: Tensor, offsets: Tensor | None = None, sampling: Sampling | None = None,
    stream: int = Stream.DRAFT, valid_vocab: int | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token from each row of logits, by counter-based noise: a row's token depends on its logits, seed and place alone.

    token = argmin_v −log1p(−u_v)/Q_v, the lowest id on ties: a draw from Q, the softmax after `sampling`.

    Args:
        logits: [B, V] float32, bfloat16, float16 or float64.
        seeds: 64 bits each: an int or int64 [B].
        positions: int64 [B], where the token (or the block it belongs to) starts in its sequence.
        offsets: int64 [B], the place in the block; default 0.
        sampling: temperature and filters; default the plain softmax.
        stream: what the draw is for (:class:`~distilkernels.primitives.philox.Stream`), so that no two uses share noise.
        valid_vocab: columns from it on do not exist.

    Returns:
        (tokens int64 [B], log Q of them in float32, float64 for float64 logits). A row with a NaN, a +inf or nothing but −inf
        gives token −1 and NaN.

    Raises:
        ValueError, TypeError: naming the argument. BackendError: `backend` cannot serve these tensors.
    """
    checked_logits(logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape [B, V]; got {tuple(logits.shape)}")
    sampling = checked_sampling("sampling", sampling)
    head = Head.checked(logits.shape[1], valid_vocab=valid_vocab)
    columns, b, device = head.columns(logits.shape[1]), logits.shape[0], logits.device
    rows = rows_of(logits)
    law = law_of(rows, columns, sampling, b, backend)
    offsets = 0 if offsets is None else offsets
    places = (("seeds", seeds), ("positions", positions), ("offsets", offsets))
    noise = Noise(*(checked_per_row(name, value, (b,), device) for name, value in places), int(stream))
    found = drawn(Operand(rows, torch.arange(b, device=device), law), noise, columns, backend=backend)
    logprobs = law.logprob(found.value, found.token).masked_fill(found.token < 0, math.nan)
    return found.token, presented(logprobs, logits.dtype)


def checked_sampling(name: str, sampling: Sampling | None) -> Sampling:
    if sampling is None:
        return Sampling()
    if not isinstance(sampling, Sampling):
        raise TypeError(f"{name} must be a Sampling; got {type(sampling).__name__}")
    return sampling


def combine(logits_list: Sequence[Tensor], weights: Sequence[float | Tensor], plausibility: float | None = None) -> Tensor:
    """Σ_i w_i·z_i of several models' logits, differentiable (UniR: base + reasoner; DCD: (1 + a)·pos − a·neg; averaging).

    Args:
        logits_list: tensors [..., V] of one shape, or of several widths: the result has the columns that all of them have.
        weights: a number, or a tensor that broadcasts with [..., V], for each.
        plausibility: α in (0, 1] keeps the columns with p_v ≥ α·max p under the *first* logits; the others are −inf.

    Returns:
        [..., V] in the promoted dtype. A column that is −inf in any addend of nonzero weight is −inf.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    logits_list, weights = list(logits_list), list(weights)
    if not logits_list or len(logits_list) != len(weights):
        raise ValueError(f"logits_list and weights must have the same length, at least 1; got {len(logits_list)} and {len(weights)}")
    for i, z in enumerate(logits_list):
        checked_logits(z, f"logits_list[{i}]")
        if z.shape[:-1] != logits_list[0].shape[:-1]:
            raise ValueError(f"logits_list[{i}] must have the token shape {tuple(logits_list[0].shape[:-1])}; got {tuple(z.shape[:-1])}")
    for i, w in enumerate(weights):
        if not isinstance(w, (numbers.Real, Tensor)):
            raise TypeError(f"weights[{i}] must be a number or a tensor; got {type(w).__name__}")
    if plausibility is not None and not isinstance(plausibility, numbers.Real):
        raise TypeError(f"plausibility must be a number or None; got {type(plausibility).__name__}")
    if plausibility is not None and not 0 < plausibility <= 1:
        raise ValueError(f"plausibility must be in (0, 1]; got {plausibility}")
    columns = min(z.shape[-1] for z in logits_list)
    logits_list = [z[..., :columns] for z in logits_list]
    total, masked = 0, torch.zeros((), dtype=torch.bool, device=logits_list[0].device)
    for z, w in zip(logits_list, weights):
        if isinstance(w, numbers.Real) and w == 0:
            continue
        gone = z == -math.inf
        # a masked column stays masked whatever sign its weight has: −a·(−inf) would win
        total, masked = total + w * z.masked_fill(gone, 0.0), masked | gone
    if not isinstance(total, Tensor):
        total = torch.zeros_like(logits_list[0])
    if plausibility is not None:
        first = logits_list[0].detach()
        masked = masked | (first < first.amax(-1, keepdim=True) + math.log(plausibility))
    return total.masked_fill(masked, -math.inf)
