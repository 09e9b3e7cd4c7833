"""What a model shows of its certainty, token by token: log-prob, entropy, confidence, margin, self-certainty and rank from one
read of the row; and what methods make of them over sequences and groups of samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .linear import checked_linear, checked_plan, statistics_of
from .primitives.boundary import checked_ids, rows_of
from .primitives.head import Head, checked_number, checked_positive
from .primitives.linear_vocab_stats import Chunks
from .primitives.shard import VocabShard, vocabulary
from .primitives.vocab_stats import VocabStats, checked_logits, presented, row_stats, statistics, statistics_op
from .votes import Vote, borda_vote, perplexity_vote

__all__ = [
    "TokenSignals", "Vote", "borda_vote", "forking_mask", "from_hidden", "from_logits", "last_token_reward", "perplexity_vote",
    "sequence_confidence", "windowed_entropy",
]  # fmt: skip

_WITHOUT_IDS = ("lse", "expected_logit", "logit_sum", "max", "second")
_WITH_IDS = ("gathered", "rank")


class TokenSignals(NamedTuple):
    """Signals of rows of logits, p = softmax(z); [...] in the token shape, float32 (float64 for float64 inputs).

    ======================= =====================================================================================
    ``logprob`` [...]        log p at the id (nats; [..., K] for ids [..., K]); −inf at an empty slot; None without ids
    ``entropy`` [...]        H(p) = lse − Σ p z, in [0, log V] nats
    ``confidence`` [...]     max p
    ``margin`` [...]         p₁ − p₂, the two largest probabilities (0 on a tie); not differentiable
    ``self_certainty`` [...] KL(u ‖ p) = lse − mean z − log n ≥ 0 nats, u uniform on the n columns with a finite logit
    ``rank`` [...]           int64, #{v : z_v > z_id}, −1 at an empty slot; not differentiable; None without ids
    ======================= =====================================================================================

    Columns at −inf (masked vocabulary) have no part in the uniform distribution, or self-certainty would be infinite. A
    row with a NaN, or without a finite logit, is NaN throughout (rank −1 for a NaN).
    """

    logprob: Tensor | None
    entropy: Tensor
    confidence: Tensor
    margin: Tensor
    self_certainty: Tensor
    rank: Tensor | None


def from_logits(
    logits: Tensor, ids: Tensor | None = None, *, temperature: float = 1.0, temperatures: Sequence[float] | None = None,
    logit_scale: float = 1.0, softcap: float | None = None, valid_vocab: int | None = None, shard: VocabShard | None = None,
    inplace_backward: bool = False, backend: str | None = None,
) -> TokenSignals:  # fmt: skip
    """All signals of every row from one read of the logits, differentiable but for margin and rank.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64.
        ids: int32 or int64, [...] (one per token) or [..., K]; −1 for an empty slot.
        temperature, logit_scale, softcap, valid_vocab, shard, backend: see :func:`vocab_stats`.
        temperatures: several at once: every field gets a last axis with one entry for each, and none is differentiable.
            Rows are taken a cacheful at a time, so memory is still read once. Not together with `temperature` or `shard`.
        inplace_backward: d logits overwrite the logits' memory.

    Returns:
        TokenSignals.

    Raises:
        ValueError, TypeError: naming the argument. BackendError: `backend` cannot serve these tensors.
    """
    checked_logits(logits)
    lead, vocab = tuple(logits.shape[:-1]), vocabulary(logits.shape[-1], shard)
    head = Head.checked(vocab, temperature, logit_scale, softcap, valid_vocab)
    ids, single = _checked_targets(ids, lead, vocab, logits.device)
    want = _WITHOUT_IDS if ids is None else (*_WITHOUT_IDS, *_WITH_IDS)
    if temperatures is not None:
        heads = _heads(head, temperatures, shard)
        with torch.no_grad():
            return _stacked(_tempered_rows(rows_of(logits), ids, want, heads, backend), lead, single, logits.dtype)
    stats = row_stats(logits, ids, want, head, backend=backend, inplace_backward=inplace_backward, shard=shard)
    return _signals(stats, lead, single, logits.dtype)


def from_hidden(
    hidden: Tensor, weight: Tensor, ids: Tensor | None = None, *, bias: Tensor | None = None, temperature: float = 1.0,
    temperatures: Sequence[float] | None = None, logit_scale: float = 1.0, softcap: float | None = None, valid_vocab: int | None = None,
    shard: VocabShard | None = None, chunk_size: int | None = None, logits_dtype: torch.dtype | None = None, backend: str | None = None,
) -> TokenSignals:  # fmt: skip
    """:func:`from_logits` of ``hidden Wᵀ + bias``: logits of one chunk at a time, recomputed in the backward (four GEMMs in all).

    Args:
        hidden: [..., H]; weight: [V, H], the lm_head; bias: [V] or None.
        temperatures: see :func:`from_logits`; all of them from one GEMM.
        chunk_size, logits_dtype: see :func:`linear_row_loss`.
        The others: see :func:`from_logits`.
    """
    lead, flat, vocab, head = checked_linear(hidden, weight, bias, temperature, logit_scale, softcap, valid_vocab, shard)
    ids, single = _checked_targets(ids, lead, vocab, hidden.device)
    want = _WITHOUT_IDS if ids is None else (*_WITHOUT_IDS, *_WITH_IDS)
    plan = checked_plan(want, ids, head, flat, weight, chunk_size, logits_dtype, backend, shard)
    if temperatures is not None:
        heads = _heads(plan.local, temperatures, shard)
        with torch.no_grad():
            chunks = Chunks(flat, weight, bias, ids, plan)
            parts = [_at_heads(z.unsqueeze(0), chunks.ids_of(rows), want, heads, backend) for rows, _, z in chunks]
            return _stacked(parts, lead, single, plan.dtype)
    return _signals(statistics_of(flat, weight, bias, ids, want, plan), lead, single, plan.dtype)


def _checked_targets(ids, lead: tuple[int, ...], vocab: int, device: torch.device) -> tuple[Tensor | None, bool]:
    """Ids as [N, K], and whether they came as one per token."""
    single = isinstance(ids, Tensor) and ids.dim() == len(lead)
    return (None if ids is None else checked_ids(ids.unsqueeze(-1) if single else ids, lead, vocab, device)), single


def _heads(head: Head, temperatures: Iterable[float], shard: VocabShard | None) -> list[Head]:
    if head.temperature != 1:
        raise ValueError(f"temperatures replaces temperature; got both, temperature={head.temperature}")
    if shard is not None:
        raise ValueError("temperatures has no vocabulary-parallel form: call once for each temperature with shard")
    if not isinstance(temperatures, Iterable):
        raise TypeError(f"temperatures must be several numbers; got {type(temperatures).__name__}")
    heads = [head._replace(temperature=checked_positive("temperatures", t)) for t in temperatures]
    if not heads:
        raise ValueError("temperatures must have at least one; got none")
    return heads


def _at_heads(rows: Tensor, ids: Tensor | None, want: tuple[str, ...], heads: list[Head], backend: str | None) -> list[VocabStats]:
    """The statistics of rows [1, I, V] under each head."""
    names = (*(name for name in VocabStats._fields if name in want or name in ("argmax", "finite_count")),)
    run = statistics_op if torch.compiler.is_compiling() else statistics
    return [VocabStats(**run(rows, ids, None, names, head, backend)) for head in heads]


def _block_rows(rows: Tensor) -> int:
    """How many rows [O, I, V] all temperatures are taken of before the next: 8 MB stay in a GPU's second-level cache and in a CPU's
    last one, where every thread also needs some rows."""
    fitting = (8 << 20) // (rows.shape[2] * rows.element_size())
    return max(fitting, 4 * torch.get_num_threads() if rows.device.type == "cpu" else 1)


def _tempered_rows(rows: Tensor, ids: Tensor | None, want: tuple[str, ...], heads: list[Head], backend: str | None) -> list[list[VocabStats]]:
    step, parts = _block_rows(rows), []
    for outer in range(rows.shape[0]):
        # no rows make one empty block, so that every result has its shape
        for start in range(0, max(rows.shape[1], 1), step):
            block = rows[outer : outer + 1, start : start + step]
            first = outer * rows.shape[1] + start
            parts.append(_at_heads(block, None if ids is None else ids[first : first + block.shape[1]], want, heads, backend))
    return parts or [_at_heads(rows, ids, want, heads, backend)]


def _stacked(parts: list[list[VocabStats]], lead: tuple[int, ...], single: bool, dtype: torch.dtype) -> TokenSignals:
    """Blocks of rows by temperature as signals [..., T]."""
    each = [
        _signals(VocabStats(*(None if f[0] is None else torch.cat(f) for f in zip(*of_one))), lead, single, dtype) for of_one in zip(*parts)
    ]
    return TokenSignals(*(None if f[0] is None else torch.stack(f, -1) for f in zip(*each)))


def _signals(stats: VocabStats, lead: tuple[int, ...], single: bool, dtype: torch.dtype) -> TokenSignals:
    n = stats.finite_count
    spread = n.double().log()
    # rounding may step over a bound by 1e-9; at a bound the gradient is zero, so nothing is lost by cutting
    entropy = _within(stats.entropy, torch.zeros_like(spread), spread)
    confidence = (stats.max - stats.lse).exp()
    with torch.no_grad():
        margin = (confidence - (stats.second - stats.lse).exp()).clamp(0, 1)
    self_certainty = _within(stats.lse - stats.logit_sum / n - spread, torch.zeros_like(spread), torch.full_like(spread, math.inf))
    found = [entropy, _within(confidence, torch.zeros_like(spread), torch.ones_like(spread)), margin, self_certainty]
    nothing = n == 0
    found = [presented(t.masked_fill(nothing, math.nan), dtype).view(lead) for t in found]
    if stats.rank is None:
        return TokenSignals(None, *found, None)
    shape = lead if single else (*lead, stats.rank.shape[1])
    return TokenSignals(presented(stats.logprobs, dtype).view(shape), *found, stats.rank.view(shape))


def _within(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x cut to [low, high]; NaN stays NaN."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def checked_signal(name: str, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values [..., L] with 0 where the mask has no token, and the mask as bool."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {getattr(values, 'dtype', type(values).__name__)}")
    if values.dim() == 0:
        raise ValueError(f"{name} must have shape [..., L]; got a scalar")
    if mask is None:
        return values, torch.ones_like(values, dtype=torch.bool)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor; got {type(mask).__name__}")
    if mask.shape != values.shape:
        raise ValueError(f"mask must have the shape of {name}, {tuple(values.shape)}; got {tuple(mask.shape)}")
    mask = mask != 0
    return values.masked_fill(~mask, 0), mask


@torch.no_grad()
def forking_mask(entropy: Tensor, mask: Tensor | None = None, fraction: float = 0.2, *, across: str = "batch") -> Tensor:
    """The forking tokens: those whose entropy is among the highest `fraction` (80/20 rule, arXiv 2506.01939).

    A token is kept if H ≥ τ, τ the ⌈fraction·n⌉-th highest entropy of the n tokens of the mask: tokens that tie with τ are
    all kept, and one with a NaN never is.

    Args:
        entropy: [..., L] nats. mask: [..., L], nonzero for a token that counts; None for all.
        fraction: in [0, 1].
        across: "batch" takes one threshold for all tokens, as the paper does; "sequence" one for each sequence.

    Returns:
        bool [..., L], False outside the mask.
    """
    entropy, mask = checked_signal("entropy", entropy, mask)
    if not 0 <= checked_number("fraction", fraction) <= 1:
        raise ValueError(f"fraction must be in [0, 1]; got {fraction}")
    if across not in ("batch", "sequence"):
        raise ValueError(f"across must be 'batch' or 'sequence'; got {across!r}")
    rows = (1, -1) if across == "batch" else (-1, entropy.shape[-1])
    if entropy.numel() == 0:
        return mask
    ordered = entropy.masked_fill(~mask | entropy.isnan(), -math.inf).reshape(rows).sort(dim=-1, descending=True).values
    # 0.07·100 is 7 and a rounding error
    kept = (fraction * mask.reshape(rows).sum(-1, keepdim=True).double() * (1 - 1e-12)).ceil().long()
    threshold = ordered.gather(-1, (kept - 1).clamp(min=0)).masked_fill(kept == 0, math.inf)
    return ((entropy.reshape(rows) >= threshold) & mask.reshape(rows)).view(mask.shape)


def windowed_entropy(entropy: Tensor, mask: Tensor | None, window: int, *, align: str = "following") -> Tensor:
    """The mean entropy over a window of tokens (ARES, arXiv 2510.08457), differentiable.

    W_t = mean of H_τ over τ ∈ {t, …, t + window − 1} that are in the mask; a window is cut off at the end of the sequence.

    Args:
        entropy: [..., L] nats. mask: [..., L] or None.
        window: tokens, at least 1.
        align: "following" as in the paper; "preceding" ends the window at t, "centered" puts t at its middle (the later of two).

    Returns:
        [..., L] nats, 0 at tokens outside the mask.
    """
    entropy, mask = checked_signal("entropy", entropy, mask)
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window must be an int; got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"window must be at least 1; got {window}")
    if align not in ("following", "preceding", "centered"):
        raise ValueError(f"align must be 'following', 'preceding' or 'centered'; got {align!r}")
    before = {"following": 0, "preceding": window - 1, "centered": window // 2}[align]
    length = entropy.shape[-1]
    at = torch.arange(length, device=entropy.device)
    start, stop = (at - before).clamp(min=0), (at - before + window).clamp(max=length)

    def over_window(x: Tensor) -> Tensor:
        sums = torch.nn.functional.pad(x.double().cumsum(-1), (1, 0))
        return sums[..., stop] - sums[..., start]

    # a difference of sums would carry what is not finite to every later window
    total = over_window(entropy.nan_to_num(0, 0, 0))
    for value in (math.nan, math.inf, -math.inf):
        held = entropy.isnan() if math.isnan(value) else entropy == value
        total = total + torch.where(over_window(held) > 0, value, 0.0)
    return torch.where(mask, total / over_window(mask).clamp(min=1), 0.0).to(entropy.dtype)


def sequence_confidence(values: Tensor, mask: Tensor | None = None, *, reduction: str = "mean", window: int | None = None) -> Tensor:
    """One number for a span of tokens from a signal of each (CRew, arXiv 2510.13501: mean max p over the answer's tokens).

    Args:
        values: [..., L], any signal: confidence, self-certainty, log-prob.
        mask: [..., L], nonzero on the span; None for all.
        reduction: "mean", "min", "sum", or "lowest_window", the lowest mean over `window` consecutive tokens of the span.

    Returns:
        [...]; a span without tokens gives NaN ("sum": 0). Differentiable.
    """
    values, mask = checked_signal("values", values, mask)
    none = ~mask.any(-1)
    if (window is not None) != (reduction == "lowest_window"):
        raise ValueError(f"window belongs to reduction='lowest_window'; got reduction={reduction!r} and window={window}")
    if reduction == "sum":
        return values.sum(-1)
    if reduction == "mean":
        return (values.sum(-1) / mask.sum(-1).clamp(min=1)).masked_fill(none, math.nan)
    if values.shape[-1] == 0 and reduction in ("min", "lowest_window"):
        return values.sum(-1) * math.nan
    if reduction == "lowest_window":
        values = windowed_entropy(values, mask, window)
        # windows that the end of the span cuts off say less than whole ones, unless there is none
        whole = mask & (mask.flip(-1).cumsum(-1).flip(-1) >= torch.minimum(mask.sum(-1, keepdim=True), torch.tensor(window, device=mask.device)))
        return values.masked_fill(~whole, math.inf).amin(-1).masked_fill(none, math.nan)
    if reduction == "min":
        return values.masked_fill(~mask, math.inf).amin(-1).masked_fill(none, math.nan)
    raise ValueError(f"reduction must be 'mean', 'min', 'sum' or 'lowest_window'; got {reduction!r}")


def last_token_reward(logprobs: Tensor, mask: Tensor | None = None, *, constant: float = -23.0, scale: float = 0.1) -> Tensor:
    """LaSeR's self-reward (arXiv 2510.14943): r = scale·(log π(z_c | x, y) − constant), z_c a reserved id behind the last token.

    The constant stands for the reference model's log-prob of z_c, which hardly varies. Train it by ``(r − verifier)²``.

    Args:
        logprobs: log-prob of z_c, [...]; or [..., L] at every position with `mask` [..., L], whose last token is the one that counts.
        constant: nats. scale: β_v.

    Returns:
        [...], differentiable; NaN where a mask has no token.
    """
    constant, scale = checked_number("constant", constant), checked_number("scale", scale)
    if mask is not None:
        logprobs, mask = checked_signal("logprobs", logprobs, mask)
        if mask.shape[-1] == 0:
            return logprobs.sum(-1) * math.nan
        at = torch.where(mask, torch.arange(mask.shape[-1], device=mask.device), -1).amax(-1, keepdim=True)
        logprobs = logprobs.gather(-1, at.clamp(min=0)).masked_fill(at < 0, math.nan).squeeze(-1)
    return scale * (logprobs - constant)
