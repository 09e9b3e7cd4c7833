"""The losses. Each is a caller of :func:`row_loss`: checks, one primitive call, a few lines on [N, K], a reduction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import Divergence
from .divergences import resolve as resolve_divergence
from .primitives.boundary import check_range, distinct_ids, plain_eager
from .primitives.head import Head, checked_number
from .primitives.shard import VocabShard, vocabulary
from .primitives.vocab_stats import VocabStats, checked_logits
from .row_loss import checked_reduction, checked_weights, row_loss, weighted
from .teacher import TeacherTopK

TAILS = ("bucket", "renormalize", "renormalize_teacher", "drop")


class DistillStats(NamedTuple):
    """Detached per-token diagnostics of :func:`topk_distill_loss`, each in the token shape.

    ``per_token`` the distillation loss before weights and cross-entropy (nats, × T² if scaled), ``entropy`` of the
    student (nats, at the loss's temperature), ``teacher_mass`` and ``student_mass`` on the teacher's ids, ``agreement``
    whether the student's argmax is the teacher's most probable id. Rows of weight 0 hold 0 and False.
    """

    per_token: Tensor
    entropy: Tensor
    teacher_mass: Tensor
    student_mass: Tensor
    agreement: Tensor


class TopKDistillation:
    """The epilogue of the top-k losses: what :func:`row_loss` needs to know of teacher, divergence, tail and labels.

    One object serves the loss on logits and the one fused with the lm_head, so the two cannot differ.
    """

    def __init__(
        self, teacher: TeacherTopK, lead: tuple[int, ...], vocab_size: int, device: torch.device, *, divergence, tail: str, temperature: float,
        scale_by_t2: bool, token_weights: Tensor | None, labels: Tensor | None, ce_weight: float, ignore_index: int, return_stats: bool,
        reduction: str, num_items_in_batch,
    ):  # fmt: skip
        checked_reduction(reduction)
        _checked_teacher(teacher, lead, vocab_size, device, temperature)
        self.divergence = checked_pair(divergence, tail)
        if hasattr(self.divergence, "buckets"):
            self.divergence = self.divergence.buckets(tail == "bucket")
        self.tail, self.temperature, self.k = tail, temperature, teacher.k
        self.scale = temperature**2 if scale_by_t2 else 1.0
        labels = checked_cross_entropy(labels, ce_weight, ignore_index, lead, vocab_size, device)
        self.with_labels = labels is not None
        self.return_stats = return_stats

        n = math.prod(lead)
        checked_parameters(self.divergence, n)
        teacher = teacher.reshape(n)
        ids = teacher.ids
        if device.type == "cpu" and ids.numel() and plain_eager(ids):
            check_range(ids, vocab_size, "teacher.ids")
        ids = distinct_ids(ids.contiguous(), vocab_size)
        teacher = replace(teacher, ids=ids)
        weights = checked_weights(token_weights, lead, device)
        present = (ids >= 0).any(-1)
        kd = present.double() if weights is None else torch.where(present, weights, 0.0)
        self.per_token: list[Tensor] = [ids, teacher.logprobs, teacher.log_tail() if tail == "bucket" else present, torch.arange(n, device=device)]
        if not self.with_labels:
            self.ids, self.weights, self.denominator = ids, kd, num_items_in_batch
            return
        counted = labels != ignore_index
        kd, ce, self.denominator = two_terms(kd, counted, weights, reduction, num_items_in_batch)
        # a label among the ids is one of their slots; else it is a slot of its own, and its mass returns to the tail below
        match = (ids == labels[:, None]) & counted[:, None]
        extra = torch.where(counted & ~match.any(-1), labels, -1)
        self.ids = torch.cat([ids.long(), extra[:, None]], -1)
        self.weights = ((kd != 0) | (ce != 0)).double()
        self.per_token += [match, kd, ce * ce_weight]

    @property
    def want(self) -> tuple[str, ...]:
        want = {"bucket": {"lse", "gathered", "tail_lse"}, "renormalize": {"gathered"}}.get(self.tail, {"lse", "gathered"})
        if self.with_labels:
            want = want | {"lse" if self.temperature == 1 else "lse_t1"}
        if self.return_stats:
            want = want | {"lse", "expected_logit", "argmax"}
        return tuple(want)

    def __call__(self, stats: VocabStats, ids: Tensor, logprobs: Tensor, tail: Tensor, index: Tensor, *labelled: Tensor):
        gathered, tail_lse = stats.gathered, stats.tail_lse
        if self.with_labels:
            match, kd_weight, ce_weight = labelled
            extra = gathered[:, self.k]
            gathered = gathered[:, : self.k]
            label = torch.where(match.any(-1), gathered.masked_fill(~match, 0).sum(-1), extra)
            if tail_lse is not None:
                tail_lse = _log_add(tail_lse, extra)
        # rows without a teacher compare a constant with itself
        present = (ids >= 0).any(-1, keepdim=True)
        log_p = logprobs.double().masked_fill(ids < 0, -math.inf)
        log_p, log_q = self._buckets(log_p, tail, gathered.masked_fill(~present, 0.0), stats.lse, tail_lse)
        log_p = torch.where(present, log_p, log_q.detach())
        divergence = self.divergence.rows(index) if hasattr(self.divergence, "rows") else self.divergence
        rows = divergence(log_p, log_q)
        if not isinstance(rows, Tensor) or rows.shape != log_q.shape[:-1]:
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"divergence must return one value per row, shape {tuple(log_q.shape[:-1])}; got {got}")
        rows = rows * self.scale
        rows = torch.where(present[:, 0], rows, 0.0)
        aux = (rows, *self._statistics(stats, ids, logprobs, gathered)) if self.return_stats else ()
        if self.with_labels:
            ce = (stats.lse if self.temperature == 1 else stats.lse_t1) - label * self.temperature
            rows = weighted(rows, kd_weight) + weighted(ce, ce_weight)
        return (rows, aux) if self.return_stats else rows

    def _buckets(self, log_p: Tensor, log_tail: Tensor, gathered: Tensor, lse: Tensor | None, tail_lse: Tensor | None):
        if self.tail == "renormalize":
            return log_p - log_p.logsumexp(-1, keepdim=True), gathered - gathered.logsumexp(-1, keepdim=True)
        log_q = gathered - lse[:, None]
        if self.tail == "renormalize_teacher":
            return log_p - log_p.logsumexp(-1, keepdim=True), log_q
        if self.tail == "drop":
            return log_p, log_q
        # where the ids cover every valid column there is no tail bucket, on either side
        covered = tail_lse == -math.inf
        log_q_tail = (tail_lse - lse).masked_fill(covered, -math.inf)
        log_p_tail = log_tail.masked_fill(covered, -math.inf)
        return torch.cat([log_p, log_p_tail[:, None]], -1), torch.cat([log_q, log_q_tail[:, None]], -1)

    def _statistics(self, stats: VocabStats, ids: Tensor, logprobs: Tensor, gathered: Tensor):
        with torch.no_grad():
            log_p = logprobs.double().masked_fill(ids < 0, -math.inf)
            best = ids.gather(-1, log_p.argmax(-1, keepdim=True))[:, 0]
            student = (gathered - stats.lse[:, None]).masked_fill(ids < 0, -math.inf)
            return stats.entropy, log_p.exp().sum(-1), student.exp().sum(-1), (best >= 0) & (best == stats.argmax)

    def ids_in(self, lead: tuple[int, ...]) -> Tensor:
        """The ids whose logits ``__call__`` reads, in the token shape."""
        return self.ids.view((*lead, self.ids.shape[-1]))

    def per_token_in(self, lead: tuple[int, ...]) -> list[Tensor]:
        """The tensors of ``__call__`` in the token shape."""
        return [t.view((*lead, *t.shape[1:])) for t in self.per_token]

    def finish(self, result):
        """The loss alone, or (loss, DistillStats)."""
        if not self.return_stats:
            return result
        loss, (*numbers, agreement) = result
        unused = (self.weights == 0).view(agreement.shape)
        dtype = loss.dtype
        return loss, DistillStats(*(t.masked_fill(unused, 0).to(dtype) for t in numbers), agreement & ~unused)


def two_terms(kd: Tensor, counted: Tensor, weights: Tensor | None, reduction: str, num_items_in_batch):
    """(weights of the divergence, weights of the cross-entropy, denominator): each term is a mean over its own rows."""
    ce = counted.double() if weights is None else torch.where(counted, weights, 0.0)
    if reduction != "mean" or num_items_in_batch is not None:
        return kd, ce, num_items_in_batch
    # both are brought to one denominator
    kd_sum, ce_sum = kd.sum(), ce.sum()
    denominator = torch.where(kd_sum > 0, kd_sum, ce_sum)
    return kd * _ratio(denominator, kd_sum), ce * _ratio(denominator, ce_sum), denominator


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0.0, a / b)


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """logaddexp whose gradient is 0 where both are −inf."""
    nothing = (a == -math.inf) & (b == -math.inf)
    return torch.logaddexp(a.masked_fill(nothing, 0), b.masked_fill(nothing, 0)).masked_fill(nothing, -math.inf)


def checked_pair(divergence, tail: str):
    """The divergence's callable, or ValueError for an unknown name and for a pair whose minimiser is no match."""
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}; got {tail!r}")
    found = resolve_divergence(divergence)
    if isinstance(found, type):
        raise TypeError(f"divergence must be an instance, {found.__name__}(), not the class")
    if tail in ("renormalize_teacher", "drop") and isinstance(found, Divergence) and found.mode_seeking:
        what = (
            "its minimiser is not a match of the student to the teacher (reverse KL leaves a student mass of 1/e on the ids)"
            if tail == "renormalize_teacher"
            else "without a tail it is lowered by pushing the student's mass out of the teacher's ids"
        )
        raise ValueError(f"divergence {divergence!r} with tail={tail!r} is refused: {what}. Use tail='bucket' or 'renormalize'")
    return found


def _checked_teacher(teacher: TeacherTopK, lead: tuple[int, ...], vocab_size: int, device: torch.device, temperature: float) -> None:
    if not isinstance(teacher, TeacherTopK):
        raise TypeError(f"teacher must be a TeacherTopK; got {type(teacher).__name__}")
    if tuple(teacher.shape) != tuple(lead):
        raise ValueError(f"teacher must have the student's token shape {tuple(lead)}; got {tuple(teacher.shape)}")
    if teacher.device != device:
        raise ValueError(f"teacher must be on {device}, where the student is; got {teacher.device}")
    if not 0 < teacher.k <= vocab_size:
        raise ValueError(f"teacher must have K in [1, {vocab_size}], the columns of the logits; got K = {teacher.k}")
    if teacher.temperature != temperature:
        raise ValueError(
            f"temperature is {temperature} but the teacher's log-probs were taken at {teacher.temperature}: capture them at the loss's "
            "temperature, or use teacher.retemper(T) with tail='renormalize'"
        )


def checked_cross_entropy(labels, ce_weight, ignore_index, lead: tuple[int, ...], vocab_size: int, device: torch.device) -> Tensor | None:
    """The flat labels, or None where the cross-entropy has no weight."""
    ce_weight = checked_number("ce_weight", ce_weight)
    if labels is None and ce_weight != 0:
        raise ValueError(f"ce_weight={ce_weight} needs labels; got labels=None")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int; got {type(ignore_index).__name__}")
    if labels is None:
        return None
    labels = _checked_labels(labels, lead, vocab_size, device, ignore_index)
    return labels if ce_weight != 0 else None


def checked_parameters(divergence, n: int) -> None:
    """ValueError where a per-token parameter of the divergence has not one value for each of n tokens."""
    if isinstance(divergence, Divergence):
        for name, value in divergence.per_token().items():
            if value.numel() != n:
                raise ValueError(f"{name} of the divergence must have one value per token, {n}; got shape {tuple(value.shape)}")


def _checked_labels(labels: Tensor, lead: tuple[int, ...], vocab_size: int, device: torch.device, ignore_index: int) -> Tensor:
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"labels must be an int32 or int64 tensor; got {getattr(labels, 'dtype', type(labels).__name__)}")
    if tuple(labels.shape) != tuple(lead):
        raise ValueError(f"labels must have the token shape {tuple(lead)}; got {tuple(labels.shape)}")
    if labels.device != device:
        raise ValueError(f"labels must be on {device}, where the student is; got {labels.device}")
    if device.type == "cpu" and labels.numel() and plain_eager(labels):
        check_range(labels, vocab_size, "labels", ignore_index)
    return labels.reshape(-1).long()


def topk_distill_loss(
    student_logits: Tensor,
    teacher: TeacherTopK,
    *,
    divergence: str | Callable[[Tensor, Tensor], Tensor] = "forward_kl",
    tail: str = "bucket",
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | float | Tensor | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
    backend: str | None = None,
):
    """Divergence between a teacher's top-k and the student, ``reduce(w · T² · D(p ‖ q))`` in nats.

    Teacher row i and student row i predict the same next token; nothing is shifted inside. ∂L/∂z_v is
    c·q_v + [v∈S]·q_v·(φ_v − φ_τ) whatever D is, so one read of the logits forward and one read and write backward
    serve every divergence.

    Args:
        student_logits: [..., V] float32, bfloat16, float16 or float64.
        teacher: ids and log-probs [..., K] at the same `temperature`.
        divergence: "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation",
            "alpha_beta", "adaptive_kl", "todi", an object of :mod:`distilkernels.divergences`, or any callable
            ``(log_p, log_q) -> rows``.
        tail: "bucket" compares K + 1 masses, the last being everything off the ids (a lower bound of the full
            divergence); "renormalize" p/m against q/s, which never touches the vocabulary axis; "renormalize_teacher"
            p/m against q; "drop" p against q on the ids, unnormalised. The last two are refused where their minimiser
            would be no match.
        temperature, scale_by_t2: softmax temperature of the student; value and gradient times T² unless switched off.
        token_weights, reduction, num_items_in_batch: see :func:`row_loss`. Rows whose slots are all empty count as
            weight 0.
        labels, ce_weight, ignore_index: adds ce_weight × cross-entropy of `labels` [...] at temperature 1, from the
            same read of the row, reduced over its own rows (those not `ignore_index`).
        logit_scale, softcap, valid_vocab, shard: see :func:`vocab_stats`.
        inplace_backward: d logits overwrite the logits' memory.
        return_stats: also return :class:`DistillStats`.
        backend: see :func:`vocab_stats`.

    Returns:
        The loss, a float32 scalar (float64 for float64 logits), or [...] with reduction="none"; or (loss, DistillStats).

    Raises:
        ValueError, TypeError: naming the argument, among them a teacher at another temperature and a refused pair of
        divergence and tail. BackendError: `backend` cannot serve these tensors.
    """
    checked_logits(student_logits, "student_logits")
    lead, vocab = tuple(student_logits.shape[:-1]), vocabulary(student_logits.shape[-1], shard)
    head = Head.checked(vocab, temperature, logit_scale, softcap, valid_vocab)
    epilogue = TopKDistillation(
        teacher, lead, vocab, student_logits.device, divergence=divergence, tail=tail, temperature=head.temperature, scale_by_t2=scale_by_t2,
        token_weights=token_weights, labels=labels, ce_weight=ce_weight, ignore_index=ignore_index, return_stats=return_stats,
        reduction=reduction, num_items_in_batch=num_items_in_batch,
    )  # fmt: skip
    result = row_loss(
        student_logits, epilogue.ids_in(lead), epilogue, per_token=epilogue.per_token_in(lead), want=epilogue.want,
        token_weights=epilogue.weights.view(lead), reduction=reduction, num_items_in_batch=epilogue.denominator,
        has_aux=return_stats, shard=shard, inplace_backward=inplace_backward, backend=backend, **head._asdict(),
    )  # fmt: skip
    return epilogue.finish(result)


def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    entropy: bool = False,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    shard: VocabShard | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
):
    """log q at given ids, and on request the entropy of q, from one read of the row. Both differentiable.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64.
        ids: int32 or int64, [...] (one per token) or [..., K]; −1 (an empty slot) and an id that its row already has give
            −inf.
        entropy: also return H(q) = lse − μ.
        temperature, logit_scale, softcap, valid_vocab, shard, backend: see :func:`vocab_stats`.
        inplace_backward: d logits overwrite the logits' memory.

    Returns:
        log-probs in nats in the shape of `ids`, or (log-probs, entropy [...]); float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: naming the argument. BackendError: `backend` cannot serve these tensors.
    """
    checked_logits(logits)
    ids, want, epilogue = logprob_epilogue(ids, logits.dim(), entropy)
    return row_loss(
        logits, ids, epilogue, want=want, reduction="none", temperature=temperature, logit_scale=logit_scale, softcap=softcap,
        valid_vocab=valid_vocab, shard=shard, inplace_backward=inplace_backward, backend=backend,
    )  # fmt: skip


def logprob_epilogue(ids: Tensor, dim: int, entropy: bool):
    """(ids [..., K], want, epilogue) of the token log-probs for inputs of `dim` dimensions."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a tensor; got {type(ids).__name__}")
    single = ids.dim() == dim - 1

    def epilogue(stats: VocabStats):
        logprobs = stats.logprobs[:, 0] if single else stats.logprobs
        return (logprobs, stats.entropy) if entropy else logprobs

    want = ("lse", "gathered", "expected_logit") if entropy else ("lse", "gathered")
    return ids.unsqueeze(-1) if single else ids, want, epilogue
