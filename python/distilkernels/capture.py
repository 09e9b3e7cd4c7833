"""What is kept of a teacher: its top-k, its log-probs on given ids, or weighted samples; from logits, or from hidden
states chunk by chunk so that [tokens, vocab] never exists. None of it is differentiable."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from .linear import checked_linear, checked_plan, linear_vocab_stats
from .primitives.draw_rows import Draws, draw
from .primitives.head import Head, checked_positive
from .primitives.linear_vocab_stats import Chunks
from .primitives.philox import checked_per_row
from .primitives.topk_select import TopK, checked_k, top_k
from .primitives.vocab_stats import checked_logits, presented, vocab_stats
from .samples import TeacherSamples
from .teacher import TeacherTopK


@torch.no_grad()
def capture_topk(
    logits: Tensor, k: int, *, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None,
    valid_vocab: int | None = None, backend: str | None = None,
) -> TeacherTopK:  # fmt: skip
    """The teacher's `k` most probable next tokens, their log-probs and the exact tail, from one read of the row.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64.
        k: in [1, min(V, valid_vocab, 1024)].
        temperature, logit_scale, softcap, valid_vocab: log-probs are those of softmax(z), z as in :func:`vocab_stats`.
        backend: "cuda", "triton", "cpp" or "reference"; None takes the first that serves the tensors.

    Returns:
        TeacherTopK with int32 ids by descending logit (equal ones by ascending id), float32 log-probs and tail (float64 for
        float64 logits). A row with a NaN has NaN log-probs at ids 0…k − 1, so that a loss of it is NaN.

    Raises:
        ValueError, TypeError: wrong k, temperature, shape or dtype. BackendError: `backend` cannot serve these tensors.
    """
    checked_logits(logits)
    head = Head.checked(logits.shape[-1], temperature, logit_scale, softcap, valid_vocab)
    k = checked_k(k, head.columns(logits.shape[-1]))
    return _teacher(top_k(logits, k, head, backend), tuple(logits.shape[:-1]), logits.dtype, head)


@torch.no_grad()
def linear_capture_topk(
    hidden: Tensor, weight: Tensor, k: int, *, bias: Tensor | None = None, temperature: float = 1.0, logit_scale: float = 1.0,
    softcap: float | None = None, valid_vocab: int | None = None, chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None, backend: str | None = None,
) -> TeacherTopK:  # fmt: skip
    """:func:`capture_topk` of the logits ``hidden Wᵀ + bias``, which exist one chunk at a time: one GEMM in all.

    Args:
        hidden: [..., H]; weight: [V, H], the lm_head; bias: [V] or None.
        chunk_size, logits_dtype: see :func:`linear_row_loss`.
        The others: see :func:`capture_topk`.
    """
    lead, flat, vocab, head = checked_linear(hidden, weight, bias, temperature, logit_scale, softcap, valid_vocab, None)
    k = checked_k(k, head.columns(vocab))
    plan = checked_plan(("lse",), None, head, flat, weight, chunk_size, logits_dtype, backend, None)
    chunks = Chunks(flat, weight, bias, None, plan, recycled=True)
    parts = [top_k(z, k, plan.local, backend) for _, _, z in chunks]
    return _teacher(TopK(*map(torch.cat, zip(*parts))), lead, plan.dtype, head)


def _teacher(top: TopK, lead: tuple[int, ...], dtype: torch.dtype, head: Head) -> TeacherTopK:
    logprobs = presented(top.values.double() - top.lse[:, None], dtype)
    tail = presented(top.tail_lse - top.lse, dtype)
    return TeacherTopK(top.ids.view(*lead, top.ids.shape[1]), logprobs.view(*lead, top.ids.shape[1]), tail.view(lead), head.temperature)


_SCORED = ("lse", "gathered", "tail_lse")


@torch.no_grad()
def score_topk(
    logits: Tensor, ids: Tensor, *, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None,
    valid_vocab: int | None = None, backend: str | None = None,
) -> TeacherTopK:  # fmt: skip
    """The teacher's exact log-probs and tail on given ids: the student's top-k, for on-policy reverse KL on its support.

    Args:
        logits: the teacher's, [..., V].
        ids: int32 or int64 [..., K], distinct within a row; −1 (an empty slot) stays one.
        temperature, logit_scale, softcap, valid_vocab, backend: see :func:`capture_topk`.

    Returns:
        TeacherTopK on `ids`, in their order; float32 (float64 for float64 logits). An id that the teacher gives no mass
        (from `valid_vocab` on, or a logit of −inf) has log-prob −inf.

    Raises:
        ValueError, TypeError: naming the argument. BackendError: `backend` cannot serve these tensors.
    """
    stats = vocab_stats(
        logits, ids, want=_SCORED, temperature=temperature, logit_scale=logit_scale, softcap=softcap, valid_vocab=valid_vocab, backend=backend
    )
    return TeacherTopK(ids, stats.logprobs, stats.tail_lse - stats.lse, float(temperature))


@torch.no_grad()
def linear_score_topk(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0, logit_scale: float = 1.0,
    softcap: float | None = None, valid_vocab: int | None = None, chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None, backend: str | None = None,
) -> TeacherTopK:  # fmt: skip
    """:func:`score_topk` of the logits ``hidden Wᵀ + bias``, which exist one chunk at a time.

    Args: see :func:`score_topk` and :func:`linear_capture_topk`.
    """
    stats = linear_vocab_stats(
        hidden, weight, ids, want=_SCORED, bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        valid_vocab=valid_vocab, chunk_size=chunk_size, logits_dtype=logits_dtype, backend=backend,
    )  # fmt: skip
    return TeacherTopK(ids, stats.logprobs, stats.tail_lse - stats.lse, float(temperature))


@torch.no_grad()
def capture_samples(
    logits: Tensor, num_samples: int, *, tau: float = 1.0, seed: int | Tensor, positions: Tensor | None = None, temperature: float = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, valid_vocab: int | None = None, backend: str | None = None,
) -> TeacherSamples:  # fmt: skip
    """`num_samples` draws from g ∝ p^τ, duplicates merged, with importance weights (random-sampling KD, arXiv 2503.16870).

    Σ_j w_j f(id_j) is unbiased for Σ_v p_v f(v), w_j = (p_j/g_j)·count_j/R; at τ = 1 the weights of a row add up to 1.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64.
        num_samples: R ≥ 1.
        tau: τ > 0; below 1 the tail is drawn more often, with smaller weights.
        seed: 64 bits; an int for all rows or an int64 tensor [...].
        positions: int64 [...], what tells rows of one seed apart; default the row's index. A row's samples depend on its
            logits, seed and position alone: give each batch of a corpus its own seeds or positions.
        temperature, logit_scale, softcap, valid_vocab, backend: see :func:`capture_topk`.

    Returns:
        TeacherSamples: ids int32 [..., R], float32 weights (float64 for float64 logits). A row with a NaN has one slot, id 0
        with a NaN weight.

    Raises:
        ValueError, TypeError: naming the argument. BackendError: `backend` cannot serve these tensors.
    """
    checked_logits(logits)
    head = Head.checked(logits.shape[-1], temperature, logit_scale, softcap, valid_vocab)
    lead = tuple(logits.shape[:-1])
    num_samples, tau, seeds, positions = _checked_draws(num_samples, tau, seed, positions, lead, logits.device)
    return _samples(draw(logits, num_samples, tau, seeds, positions, head, backend), lead, tau, logits.dtype, head)


@torch.no_grad()
def linear_capture_samples(
    hidden: Tensor, weight: Tensor, num_samples: int, *, tau: float = 1.0, seed: int | Tensor, positions: Tensor | None = None,
    bias: Tensor | None = None, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None,
    valid_vocab: int | None = None, chunk_size: int | None = None, logits_dtype: torch.dtype | None = None, backend: str | None = None,
) -> TeacherSamples:  # fmt: skip
    """:func:`capture_samples` of the logits ``hidden Wᵀ + bias``, which exist one chunk at a time.

    Args: see :func:`capture_samples` and :func:`linear_capture_topk`.
    """
    lead, flat, _, head = checked_linear(hidden, weight, bias, temperature, logit_scale, softcap, valid_vocab, None)
    num_samples, tau, seeds, positions = _checked_draws(num_samples, tau, seed, positions, lead, hidden.device)
    plan = checked_plan(("lse",), None, head, flat, weight, chunk_size, logits_dtype, backend, None)
    chunks = Chunks(flat, weight, bias, None, plan, recycled=True)
    parts = [draw(z, num_samples, tau, seeds[rows], positions[rows], plan.local, backend) for rows, _, z in chunks]
    return _samples(Draws(*map(torch.cat, zip(*parts))), lead, tau, plan.dtype, head)


def _checked_draws(num_samples, tau, seed, positions, lead, device) -> tuple[int, float, Tensor, Tensor]:
    if isinstance(num_samples, bool) or not isinstance(num_samples, numbers.Integral):
        raise TypeError(f"num_samples must be an int; got {type(num_samples).__name__}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1; got {num_samples}")
    if positions is None:
        positions = torch.arange(math.prod(lead), device=device).view(lead)
    return (
        int(num_samples),
        checked_positive("tau", tau),
        checked_per_row("seed", seed, lead, device),
        checked_per_row("positions", positions, lead, device),
    )


def _samples(draws: Draws, lead: tuple[int, ...], tau: float, dtype: torch.dtype, head: Head) -> TeacherSamples:
    """Merges equal draws: ids ascending, one slot each, and their importance weights."""
    r = draws.ids.shape[1]
    # a row without a distribution: NaN at id 0, so that a loss of it is NaN and not a row that is left out
    ids, order = draws.ids.clamp(min=0).sort(dim=-1, stable=True)
    z = draws.values.double().gather(-1, order)
    # log p − log g = (1 − τ)·z − lse + lse_τ
    weight = ((1 - tau) * z - (draws.lse - draws.lse_tau)[:, None]).exp().masked_fill_(z.isnan(), math.nan) / r
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = first.cumsum(-1) - 1
    merged = torch.zeros_like(weight).scatter_add_(1, slot, weight)
    ids = torch.full_like(ids, -1).scatter_(1, slot, ids)
    return TeacherSamples(ids.view(*lead, r), presented(merged, dtype).view(*lead, r), head.temperature)
