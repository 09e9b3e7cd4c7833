"""Losses of a teacher that is known by weighted random samples: a cross-entropy at the sampled ids."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import checked_linear, linear_row_loss
from .primitives.boundary import checked_ids
from .primitives.head import Head
from .primitives.shard import VocabShard, vocabulary
from .primitives.vocab_stats import VocabStats, checked_logits
from .row_loss import checked_weights, row_loss
from .samples import TeacherSamples


class SampledDistillation:
    """The epilogue of both losses below: ids, row weights, and −Σ w·log q · T² of the row statistics."""

    def __init__(self, samples: TeacherSamples, lead: tuple[int, ...], vocab_size: int, device: torch.device, temperature: float, scale_by_t2: bool,
                 token_weights: Tensor | None):  # fmt: skip
        if not isinstance(samples, TeacherSamples):
            raise TypeError(f"samples must be a TeacherSamples; got {type(samples).__name__}")
        if tuple(samples.shape) != tuple(lead):
            raise ValueError(f"samples must have the student's token shape {tuple(lead)}; got {tuple(samples.shape)}")
        if samples.temperature != temperature:
            raise ValueError(f"temperature is {temperature} but the samples were drawn at {samples.temperature}: draw them at the loss's temperature")
        checked_ids(samples.ids, lead, vocab_size, device, "samples.ids")
        self.samples, self.scale = samples, temperature**2 if scale_by_t2 else 1.0
        weights = checked_weights(token_weights, lead, device)
        present = (samples.ids >= 0).any(-1)
        self.weights = present.double() if weights is None else torch.where(present, weights.view(lead), 0.0)

    @property
    def per_token(self) -> list[Tensor]:
        return [self.samples.weights.detach().masked_fill(self.samples.ids < 0, 0)]

    def __call__(self, stats: VocabStats, weights: Tensor) -> Tensor:
        # a slot of weight 0 meets no log-prob of −inf
        logprobs = (stats.gathered - stats.lse[:, None]).masked_fill(weights == 0, 0)
        return (weights.double() * logprobs).sum(-1) * -self.scale


def sampled_distill_loss(
    student_logits: Tensor, samples: TeacherSamples, *, temperature: float = 1.0, scale_by_t2: bool = True, token_weights: Tensor | None = None,
    reduction: str = "mean", num_items_in_batch: int | float | Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None,
    valid_vocab: int | None = None, shard: VocabShard | None = None, inplace_backward: bool = False, backend: str | None = None,
):  # fmt: skip
    """Cross-entropy at a teacher's weighted samples, ``reduce(w · T² · −Σ_j w_j log q(id_j))`` (random-sampling KD, arXiv 2503.16870).

    Its gradient per row, T·((Σ_j w_j)·q − Σ_j w_j·1[v = id_j]), is unbiased for that of forward KL on the whole vocabulary. The
    value is a cross-entropy: forward KL plus the teacher's entropy, in expectation.

    Args:
        student_logits: [..., V] float32, bfloat16, float16 or float64.
        samples: ids and importance weights [..., R] drawn at the same `temperature`; a row of −1 counts as weight 0.
        The others: see :func:`topk_distill_loss`.

    Returns:
        A float32 scalar in nats (float64 for float64 logits), or [...] with reduction="none".

    Raises:
        ValueError, TypeError: naming the argument. BackendError: `backend` cannot serve these tensors.
    """
    checked_logits(student_logits, "student_logits")
    lead, vocab = tuple(student_logits.shape[:-1]), vocabulary(student_logits.shape[-1], shard)
    head = Head.checked(vocab, temperature, logit_scale, softcap, valid_vocab)
    epilogue = SampledDistillation(samples, lead, vocab, student_logits.device, head.temperature, scale_by_t2, token_weights)
    return row_loss(
        student_logits, samples.ids, epilogue, per_token=epilogue.per_token, token_weights=epilogue.weights, reduction=reduction,
        num_items_in_batch=num_items_in_batch, shard=shard, inplace_backward=inplace_backward, backend=backend, **head._asdict(),
    )  # fmt: skip


def linear_sampled_distill_loss(
    hidden: Tensor, weight: Tensor, samples: TeacherSamples, *, bias: Tensor | None = None, temperature: float = 1.0, scale_by_t2: bool = True,
    token_weights: Tensor | None = None, reduction: str = "mean", num_items_in_batch: int | float | Tensor | None = None,
    logit_scale: float = 1.0, softcap: float | None = None, valid_vocab: int | None = None, shard: VocabShard | None = None,
    chunk_size: int | None = None, num_active: int | None = None, logits_dtype: torch.dtype | None = None, path: str = "chunked",
    backend: str | None = None,
):  # fmt: skip
    """:func:`sampled_distill_loss` of the logits ``hidden Wᵀ + bias``, which are never kept: three GEMMs forward and backward.

    Args:
        hidden: [..., H]; weight: [V, H]; bias: [V] or None.
        chunk_size, num_active, logits_dtype, path: see :func:`linear_row_loss`.
        The others: see :func:`sampled_distill_loss`.

    Raises:
        As :func:`sampled_distill_loss` and :func:`linear_row_loss`.
    """
    lead, _, vocab, head = checked_linear(hidden, weight, bias, temperature, logit_scale, softcap, valid_vocab, shard)
    epilogue = SampledDistillation(samples, lead, vocab, hidden.device, head.temperature, scale_by_t2, token_weights)
    return linear_row_loss(
        hidden, weight, samples.ids, epilogue, per_token=epilogue.per_token, bias=bias, token_weights=epilogue.weights, reduction=reduction,
        num_items_in_batch=num_items_in_batch, shard=shard, chunk_size=chunk_size, num_active=num_active, logits_dtype=logits_dtype, path=path,
        backend=backend, **head._asdict(),
    )  # fmt: skip
