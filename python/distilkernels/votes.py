"""Votes among sampled answers, weighted by what the model shows of its certainty."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .primitives.head import checked_number


class Vote(NamedTuple):
    """The outcome for groups of S samples: ``answer`` [...] the winning id (−1: no sample took part), ``votes`` [..., S] what
    each sample's answer got in all (0 for a sample that took no part)."""

    answer: Tensor
    votes: Tensor


def _checked_samples(name: str, values: Tensor, answers: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {getattr(values, 'dtype', type(values).__name__)}")
    if values.dim() == 0 or values.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., S] with S ≥ 1; got {tuple(values.shape)}")
    if not isinstance(answers, Tensor) or answers.is_floating_point():
        raise TypeError(f"answers must be an integer tensor; got {getattr(answers, 'dtype', type(answers).__name__)}")
    if answers.shape != values.shape:
        raise ValueError(f"answers must have the shape of {name}, {tuple(values.shape)}; got {tuple(answers.shape)}")
    if keep is not None and (not isinstance(keep, Tensor) or keep.shape != values.shape):
        got = tuple(keep.shape) if isinstance(keep, Tensor) else type(keep).__name__
        raise ValueError(f"keep must be a tensor of the shape of {name}, {tuple(values.shape)}; got {got}")
    part = answers >= 0
    return answers.long(), part if keep is None else part & (keep != 0)


def _count(weights: Tensor, answers: Tensor, part: Tensor) -> Vote:
    """Sums the weights of equal answers; a tie goes to the answer that was sampled first."""
    same = (answers.unsqueeze(-1) == answers.unsqueeze(-2)) & part.unsqueeze(-1) & part.unsqueeze(-2)
    votes = (same * weights.masked_fill(~part, 0).unsqueeze(-2)).sum(-1)
    ballot = votes.masked_fill(~part, -math.inf)
    first = (ballot == ballot.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)
    winner = answers.gather(-1, first).masked_fill(~part.any(-1, keepdim=True), -1)
    return Vote(winner.squeeze(-1), votes)


@torch.no_grad()
def borda_vote(certainty: Tensor, answers: Tensor, *, power: float = 1.0, keep: Tensor | None = None) -> Vote:
    """Borda voting by certainty (Self-Certainty, arXiv 2502.18581): the r-th most certain of n samples gives its answer (n − r + 1)^power.

    Args:
        certainty: [..., S], one number for each sample: the mean self-certainty of its tokens. Ties go to the earlier sample;
            NaN is like −inf, the least certain.
        answers: int [..., S], equal ids for equal answers; a negative one takes no part.
        power: 0 is majority voting, larger ones trust the most certain more (the paper: 0.3 at S = 8, 1.2 at 64).
        keep: [..., S], nonzero for samples that take part.

    Returns:
        :class:`Vote` with float64 votes.
    """
    answers, part = _checked_samples("certainty", certainty, answers, keep)
    power = checked_number("power", power)
    order = torch.where(certainty.isnan(), -math.inf, certainty).argsort(dim=-1, descending=True, stable=True)
    # samples that take no part come last, behind those of certainty −inf
    order = order.gather(-1, (~part).gather(-1, order).to(torch.uint8).argsort(dim=-1, stable=True))
    place = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    weights = (part.sum(-1, keepdim=True) - place).clamp(min=0).double() ** power
    return _count(weights, answers, part)


@torch.no_grad()
def perplexity_vote(logprobs: Tensor, answers: Tensor, *, lengths: Tensor | None = None, prune: str = "none", keep: Tensor | None = None) -> Vote:
    """Perplexity consistency (RPC, arXiv 2502.00511): an answer gets the summed probabilities of the paths that lead to it.

    Args:
        logprobs: [..., S], each sample's summed log-prob (nats).
        answers: int [..., S], equal ids for equal answers; a negative one takes no part.
        lengths: tokens [..., S]: probabilities become 1/perplexity, exp(logprob/length). None: of the whole path.
        prune: "mean" drops samples below the mean probability of the group, "none" drops none. The paper fits a mixture of two
            Weibull distributions to the probabilities and drops the lower component: such a fit goes into `keep`.
        keep: [..., S], nonzero for samples that take part; the same path sampled twice counts once in the paper: mark one.

    Returns:
        :class:`Vote` with float64 votes, shares of the kept probability: they add up to 1 over different answers.
    """
    answers, part = _checked_samples("logprobs", logprobs, answers, keep)
    if prune not in ("none", "mean"):
        raise ValueError(f"prune must be 'none' or 'mean'; got {prune!r}")
    if lengths is not None and (not isinstance(lengths, Tensor) or lengths.shape != logprobs.shape):
        got = tuple(lengths.shape) if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ValueError(f"lengths must be a tensor of the shape of logprobs, {tuple(logprobs.shape)}; got {got}")
    logprobs = logprobs.double() if lengths is None else logprobs.double() / lengths.clamp(min=1)
    part = part & ~logprobs.isnan()
    logprobs = logprobs.masked_fill(~part, -math.inf)
    # relative to the likeliest, or the probabilities of long paths are all 0
    p = (logprobs - logprobs.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    if prune == "mean":
        part = part & (p >= p.sum(-1, keepdim=True) / part.sum(-1, keepdim=True).clamp(min=1) * (1 - 1e-12))
        p = p.masked_fill(~part, 0)
    total = p.sum(-1, keepdim=True)
    return _count(torch.where(total > 0, p / total, 0.0), answers, part)
