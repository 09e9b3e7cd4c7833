"""``row_loss``: any PyTorch function of the row statistics as a loss. Every built-in loss on logits is a caller of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .primitives.boundary import checked_ids
from .primitives.head import Head, checked_number
from .primitives.shard import VocabShard, vocabulary
from .primitives.vocab_stats import DEFAULT_WANT, VocabStats, checked_logits, checked_want, row_stats

REDUCTIONS = ("mean", "sum", "none")


def row_loss(
    logits: Tensor,
    ids: Tensor | None,
    fn: Callable[..., Tensor],
    *,
    per_token: Sequence[Tensor] = (),
    want: Iterable[str] = DEFAULT_WANT,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | float | Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    shard: VocabShard | None = None,
    has_aux: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Any loss that depends on a row of logits through its statistics: ``reduce(w · fn(stats, *per_token))``.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64.
        ids: int32 or int64 [..., K], or None; −1 for an empty slot.
        fn: ``fn(stats, *per_token) -> [N]``, any PyTorch function. `stats` is a :class:`VocabStats` of flat, float64
            tensors ([N] and [N, K]); `per_token` arrive flattened to [N, ...]. With reduction="none" it may return a
            tuple of [N, ...] tensors; with `has_aux` it returns ``(rows, aux)``, aux a tuple of [N, ...] tensors.
        want: the statistics that `fn` reads.
        token_weights: [...], w. A row of weight 0 contributes nothing, even if it holds NaN.
        reduction: "mean" is Σ w·loss / Σ w (0, attached to the graph, where all weights are 0), "sum", or "none".
        num_items_in_batch: replaces Σ w in "mean", for gradient accumulation.
        temperature, logit_scale, softcap, valid_vocab, shard: see :func:`vocab_stats`.
        inplace_backward: write d logits over the logits' memory; a second backward through them raises. Ignored under
            torch.compile.
        backend: see :func:`vocab_stats`.

    Returns:
        A float32 scalar (float64 for float64 logits), or [...] with reduction="none"; with `has_aux` ``(loss, aux)``,
        aux detached and in the token shape.

    Raises:
        ValueError, TypeError: naming the argument. BackendError: `backend` cannot serve these tensors.
    """
    checked_logits(logits)
    if not callable(fn):
        raise TypeError(f"fn must be a function of the statistics; got {type(fn).__name__}")
    vocab = vocabulary(logits.shape[-1], shard)
    head = Head.checked(vocab, temperature, logit_scale, softcap, valid_vocab)
    lead = tuple(logits.shape[:-1])
    if ids is not None:
        ids = checked_ids(ids, lead, vocab, logits.device)
    want = checked_want(want, ids is not None)
    weights = checked_weights(token_weights, lead, logits.device)
    per_token = [flat_per_token("per_token", t, lead, logits.device) for t in per_token]
    checked_reduction(reduction)

    stats = row_stats(logits, ids, want, head, backend=backend, inplace_backward=inplace_backward, shard=shard)
    return reduced(stats, fn, per_token, weights, lead, reduction, num_items_in_batch, has_aux, logits.dtype)


def reduced(stats: VocabStats, fn, per_token, weights, lead, reduction, num_items_in_batch, has_aux: bool, dtype: torch.dtype):
    """fn of flat statistics, weighted and reduced: everything of a row loss after its statistics are known."""
    rows = fn(for_epilogue(stats, weights), *per_token)
    rows, aux = rows if has_aux else (rows, ())
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if reduction == "none":
        many = isinstance(rows, tuple)
        found = [checked_rows(r, None, math.prod(lead), more=True) for r in (rows if many else (rows,))]
        found = tuple(weighted(r, weights).to(dtype).view((*lead, *r.shape[1:])) for r in found)
        loss = found if many else found[0]
    else:
        count = denominator(weights, math.prod(lead), reduction, num_items_in_batch)
        loss = (checked_rows(rows, weights, math.prod(lead)).sum() / count).to(dtype)
    return (loss, in_token_shape(aux, lead)) if has_aux else loss


def in_token_shape(aux: Sequence[Tensor], lead: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(a.detach().view((*lead, *a.shape[1:])) for a in aux)


def checked_weights(weights: Tensor | None, lead: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Token weights as a flat, detached float64 [N]."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        raise TypeError(f"token_weights must be a tensor; got {type(weights).__name__}")
    if tuple(weights.shape) != tuple(lead):
        raise ValueError(f"token_weights must have the token shape {tuple(lead)}; got {tuple(weights.shape)}")
    if weights.device != device:
        raise ValueError(f"token_weights must be on {device}, where the logits are; got {weights.device}")
    return weights.detach().reshape(-1).double()


def flat_per_token(name: str, tensor: Tensor, lead: tuple[int, ...], device: torch.device) -> Tensor:
    """[..., *] as [N, *]."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must hold tensors; got {type(tensor).__name__}")
    if tuple(tensor.shape[: len(lead)]) != tuple(lead):
        raise ValueError(f"{name} tensors must start with the token shape {tuple(lead)}; got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} tensors must be on {device}, where the logits are; got {tensor.device}")
    return tensor.reshape(math.prod(lead), *tensor.shape[len(lead) :])


def checked_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")


def checked_rows(rows: Tensor, weights: Tensor | None, n: int, more: bool = False) -> Tensor:
    """The rows [N] that `fn` returned ([N, ...] where `more` is allowed), times their weights."""
    if not isinstance(rows, Tensor) or tuple(rows.shape[: 1 if more else None]) != (n,):
        got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"fn must return one loss per row, shape ({n},); got {got}")
    return weighted(rows, weights)


def weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return rows
    w = weights.view(-1, *(1,) * (rows.dim() - 1))
    return torch.where(w == 0, 0.0, rows * w)


def for_epilogue(stats: VocabStats, weights: Tensor | None) -> VocabStats:
    """Statistics in float64, and constants in the rows of weight 0, so that whatever those hold meets no arithmetic."""
    values = []
    for t in stats:
        if t is not None and t.is_floating_point():
            t = t.double()
            if weights is not None:
                t = t.masked_fill((weights == 0).view(-1, *(1,) * (t.dim() - 1)), 0.0)
        values.append(t)
    return VocabStats(*values)


def denominator(weights: Tensor | None, n: int, reduction: str, num_items_in_batch) -> float | Tensor:
    """What the weighted sum is divided by; 1 in place of 0, so that nothing counted gives a 0 attached to the graph."""
    if reduction == "sum":
        return 1.0
    if num_items_in_batch is None:
        num_items_in_batch = n if weights is None else weights.sum()
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(f"num_items_in_batch must be one number; got a tensor of shape {tuple(num_items_in_batch.shape)}")
        count = num_items_in_batch.reshape(())
        return torch.where(count == 0, 1, count)
    if checked_number("num_items_in_batch", num_items_in_batch) < 0:
        raise ValueError(f"num_items_in_batch must not be negative; got {num_items_in_batch}")
    return num_items_in_batch or 1.0
