"""Objectives on scores, on latent and hidden vectors, and weights by spans."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..primitives.head import checked_positive
from .shapes import checked_floats, checked_mask, over


def ranknet(scores: Tensor, relevance: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0, reduction: str = "pair_mean") -> Tensor:
    """RankNet over lists of candidates (DeAR, arXiv 2508.16998): Σ over pairs with rel_i > rel_j of log(1 + e^{−(s_i − s_j)/T}).

    Args:
        scores: [..., C], differentiable. relevance: [..., C], the teacher's scores, or minus its ranks; equal ones make no pair.
        mask: [..., C], nonzero for candidates that exist.
        reduction: "pair_mean" over all pairs of the batch, "list_mean" the mean over lists (those with a pair) of their pairs' mean,
            "sum", or "none": [...] sums by list.
    """
    scores = checked_floats("scores", scores)
    checked_positive("temperature", temperature)
    if not isinstance(relevance, Tensor) or relevance.shape != scores.shape:
        raise ValueError(f"relevance must be a tensor of the shape of scores, {tuple(scores.shape)}; got {getattr(relevance, 'shape', type(relevance))}")
    real = checked_mask("mask", mask, scores, "scores") != 0
    ordered = (relevance.unsqueeze(-1) > relevance.unsqueeze(-2)) & real.unsqueeze(-1) & real.unsqueeze(-2)
    scores = scores.masked_fill(~real, 0) / temperature
    pairs = torch.nn.functional.softplus(scores.unsqueeze(-2) - scores.unsqueeze(-1)).masked_fill(~ordered, 0)
    by_list, count = pairs.sum((-2, -1)), ordered.sum((-2, -1)).to(scores.dtype)
    if reduction == "none":
        return by_list
    if reduction == "sum":
        return by_list.sum()
    if reduction == "pair_mean":
        return over(by_list.sum(), count.sum())
    if reduction == "list_mean":
        return over(over(by_list, count).sum(), (count > 0).sum().to(scores.dtype))
    raise ValueError(f"reduction must be 'pair_mean', 'list_mean', 'sum' or 'none'; got {reduction!r}")


def info_nce(
    anchors: Tensor, positives: Tensor, negatives: Tensor | None = None, *, in_batch: bool = True, temperature: float = 0.07, normalize: bool = True,
    weights: Tensor | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """InfoNCE on pooled states with hard negatives (SoftCoT++, arXiv 2505.11484; CARFT, arXiv 2508.15868).

        loss_i = −log [ e^{s(a_i, p_i)/τ} / ( e^{s(a_i, p_i)/τ} + Σ_j e^{s(a_i, n_ij)/τ} + Σ_{j≠i} e^{s(a_i, p_j)/τ} ) ]

    Args:
        anchors, positives: [N, D]. negatives: [N, M, D] of each anchor's own, or [M, D] for all.
        in_batch: the other anchors' positives are negatives too (the last sum).
        temperature: τ. normalize: s is the cosine, else the inner product.
        weights: [N], Σ w·loss / Σ w. reduction: "mean", "sum" or "none" ([N]).

    Returns:
        A scalar; float32 or better inside. With no negative at all the loss is 0.
    """
    anchors = checked_floats("anchors", anchors)
    if anchors.dim() != 2:
        raise ValueError(f"anchors must have shape [N, D]; got {tuple(anchors.shape)}")
    positives = checked_floats("positives", positives, anchors.shape, "anchors")
    checked_positive("temperature", temperature)
    a, p = (torch.nn.functional.normalize(t, dim=-1) if normalize else t for t in (anchors, positives))
    own = (a * p).sum(-1, keepdim=True)
    columns = [own]
    if in_batch:
        columns.append((a @ p.t()).masked_fill(torch.eye(a.shape[0], dtype=torch.bool, device=a.device), -math.inf))
    if negatives is not None:
        checked_floats("negatives", negatives)
        if negatives.shape[-1] != a.shape[1] or negatives.dim() not in (2, 3) or (negatives.dim() == 3 and negatives.shape[0] != a.shape[0]):
            raise ValueError(f"negatives must have shape [M, {a.shape[1]}] or [{a.shape[0]}, M, {a.shape[1]}]; got {tuple(negatives.shape)}")
        n = negatives.to(a.dtype)
        n = torch.nn.functional.normalize(n, dim=-1) if normalize else n
        columns.append(a @ n.t() if n.dim() == 2 else (n @ a.unsqueeze(-1)).squeeze(-1))
    scores = torch.cat(columns, -1) / temperature
    loss = scores.logsumexp(-1) - scores[:, 0]
    return _vectors_reduced(loss, weights, reduction, "anchors")


def latent_kl(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0, direction: str = "forward", reduction: str = "mean"
) -> Tensor:
    """KL between hidden vectors made distributions over their D entries (LTA-Thinker, arXiv 2509.12875).

        forward: KL(softmax(t/T) ‖ softmax(s/T)); reverse: KL(softmax(s/T) ‖ softmax(t/T)); Σ over D, gradient to the student only

    Args:
        student, teacher: [..., D] of equal shapes. mask: [...], vectors that count (values weigh them).
        reduction: "mean" is Σ m·KL / Σ m, "sum", or "none" ([...]). The value is not multiplied by T².
    """
    s = checked_floats("student", student)
    t = checked_floats("teacher", teacher, student.shape, "student").detach()
    if student.dim() == 0:
        raise ValueError("student must have shape [..., D]; got a scalar")
    checked_positive("temperature", temperature)
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse'; got {direction!r}")
    if mask is not None and isinstance(mask, Tensor) and mask.shape == s.shape[:-1]:
        # what is masked out may hold anything
        s, t = (x.masked_fill((mask == 0).unsqueeze(-1), 0) for x in (s, t))
    log_s, log_t = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    a, b = (log_t, log_s) if direction == "forward" else (log_s, log_t)
    return _vectors_reduced((a.exp() * (a - b)).sum(-1), mask, reduction, "student's vectors")


def _vectors_reduced(loss: Tensor, weights: Tensor | None, reduction: str, like: str) -> Tensor:
    weights = checked_mask("weights", weights, loss, like)
    loss = loss.masked_fill(weights == 0, 0) * weights
    if reduction == "none":
        return loss
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")
    return loss.sum() if reduction == "sum" else over(loss.sum(), weights.sum())


def span_weights(span_ids: Tensor, table: Tensor) -> Tensor:
    """Token weights by kind of span: w_t = table[span_ids_t], 0 where the id is negative (Structured Agent Distillation, arXiv 2505.13820).

    Args:
        span_ids: int [...], say 0 in REASON spans, 1 in ACT spans, −1 elsewhere. table: [S] weights.

    Returns:
        [...] in the table's dtype, for `token_weights`. ``segments.mean(per_token, span_ids, S)`` reports each kind's loss.
    """
    checked_floats("table", table)
    if table.dim() != 1 or table.shape[0] == 0:
        raise ValueError(f"table must have shape [S] with S ≥ 1; got {tuple(table.shape)}")
    if not isinstance(span_ids, Tensor) or span_ids.is_floating_point() or span_ids.dtype == torch.bool:
        raise TypeError(f"span_ids must be an integer tensor; got {getattr(span_ids, 'dtype', type(span_ids).__name__)}")
    if span_ids.device.type == "cpu" and span_ids.numel() and not torch.compiler.is_compiling() and int(span_ids.max()) >= table.shape[0]:
        raise ValueError(f"span_ids must be below {table.shape[0]}, the entries of table; got {int(span_ids.max())}")
    return torch.where(span_ids < 0, 0.0, table[span_ids.clamp(min=0).long()])
