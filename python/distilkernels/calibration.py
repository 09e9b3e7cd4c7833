"""Calibration of top-k teachers as FIRST does it (arXiv 2408.12168).

FIRST keeps the teacher's top 5, replaces their probabilities by softmax(p/c), a softmax over *probabilities*
(:meth:`TeacherTopK.recalibrate`), with c chosen on a validation set, and minimises forward KL on the five ids. Its text
compares them with the student's own probabilities (``tail="renormalize_teacher"``); its released code passes the student's five through
the same softmax first (:class:`RecalibratedStudent`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import Divergence, ForwardKL
from .primitives.head import checked_positive
from .teacher import TeacherTopK


def ece(confidence: Tensor, correct: Tensor, *, bins: int = 10, token_weights: Tensor | None = None) -> Tensor:
    """Expected calibration error, Σ_b (n_b/n)·|accuracy_b − confidence_b|, over equally wide bins (lower, upper] of confidence.

    Args:
        confidence: [...] floating point in [0, 1], the probability of the predicted token.
        correct: [...] bool, whether it was right.
        bins: how many; a confidence of 0 is in the first.
        token_weights: [...] counts of the tokens, or None for 1 each; tokens of weight 0 are left out.

    Returns:
        A float64 scalar in [0, 1]; 0 where nothing counts.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    for name, t in (("confidence", confidence), ("correct", correct)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
    if not confidence.is_floating_point() or correct.dtype != torch.bool:
        raise TypeError(f"confidence must be floating point and correct bool; got {confidence.dtype} and {correct.dtype}")
    if confidence.shape != correct.shape or (token_weights is not None and token_weights.shape != correct.shape):
        shapes = [tuple(t.shape) for t in (confidence, correct, token_weights) if t is not None]
        raise ValueError(f"confidence, correct and token_weights must share a shape; got {' and '.join(map(str, shapes))}")
    if isinstance(bins, bool) or not isinstance(bins, int):
        raise TypeError(f"bins must be an int; got {type(bins).__name__}")
    if bins < 1:
        raise ValueError(f"bins must be at least 1; got {bins}")
    weight = torch.ones_like(confidence, dtype=torch.float64) if token_weights is None else token_weights.detach().double()
    weight, confidence = weight.flatten(), confidence.detach().double().flatten()
    # the gap of a bin is |Σ w·(correct − confidence)| over all of n: the bin's own count cancels
    gap = torch.where(weight == 0, 0.0, weight * (correct.flatten().double() - confidence))
    index = ((confidence * bins).ceil() - 1).nan_to_num(0).clamp(0, bins - 1).long()
    # no atomics, whose order on a GPU would show in the last bit
    sums = torch.stack([torch.where(index == b, gap, 0.0).sum() for b in range(bins)])
    total = weight.sum()
    return sums.abs().sum() / torch.where(total == 0, 1.0, total)


class FittedTemperature(NamedTuple):
    """The `c` of the smallest error, that `ece`, and every (c, error) of the search in the order tried."""

    c: float
    ece: float
    tried: list[tuple[float, float]]


@torch.no_grad()
def fit_temperature(
    teacher: TeacherTopK, labels: Tensor, *, bins: int = 10, ignore_index: int = -100, coarse: float = 0.1, fine: float = 0.02
) -> FittedTemperature:
    """FIRST's c for :meth:`TeacherTopK.recalibrate`: the smallest :func:`ece` of the recalibrated teacher on validation tokens.

    A grid in (0, 1] by steps of `coarse`, then one by `fine` within a coarse step of its best; ties go to the smaller c.
    The prediction is the teacher's most probable id (whatever c is) and its confidence the recalibrated probability.

    Args:
        teacher: [..., K], the teacher on validation text (FIRST: K = 5).
        labels: int [...], the tokens that followed; those equal to `ignore_index`, and rows without a teacher, are left out.
        bins: of the error.

    Returns:
        FittedTemperature. Reads values: on a GPU it waits for them.

    Raises:
        ValueError, TypeError: naming the argument, or where no token counts.
    """
    if not isinstance(teacher, TeacherTopK):
        raise TypeError(f"teacher must be a TeacherTopK; got {type(teacher).__name__}")
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"labels must be an int32 or int64 tensor; got {getattr(labels, 'dtype', type(labels).__name__)}")
    if labels.shape != teacher.shape:
        raise ValueError(f"labels must have the teacher's token shape {tuple(teacher.shape)}; got {tuple(labels.shape)}")
    coarse, fine = checked_positive("coarse", coarse), checked_positive("fine", fine)
    if coarse > 1:
        raise ValueError(f"coarse must be at most 1, where the grid ends; got {coarse}")
    counts = (labels != ignore_index) & (teacher.ids >= 0).any(-1)
    if not counts.any():
        raise ValueError("labels must have at least one token to calibrate on; got none that counts")
    teacher, labels = teacher[counts], labels[counts]
    best = teacher.log_p().argmax(-1, keepdim=True)
    correct = teacher.ids.gather(-1, best)[:, 0] == labels

    def error(c: float) -> float:
        confidence = teacher.recalibrate(c).log_p().gather(-1, best)[:, 0].exp()
        return float(ece(confidence, correct, bins=bins))

    tried = [(c, error(c)) for c in _grid(0, 1, coarse)]
    c, _ = min(tried, key=lambda pair: (pair[1], pair[0]))
    tried += [(near, error(near)) for near in _grid(max(0, c - coarse), min(1, c + coarse), fine)]
    c, least = min(tried, key=lambda pair: (pair[1], pair[0]))
    return FittedTemperature(c, least, tried)


def _grid(low: float, high: float, step: float) -> list[float]:
    """low + step, low + 2·step … up to high; rounded, so that 0.3 is 0.3 and 0 is never a point."""
    return [round(low + i * step, 6) for i in range(1, int((high - low) / step + 1e-6) + 1)]


def recalibrate_linear(teacher: TeacherTopK, epsilon: float = 1e-6) -> TeacherTopK:
    """FIRST's linear variant, (p + ε)/Σ(p + ε) over the ids, tail 0."""
    epsilon = checked_positive("epsilon", epsilon)
    log_p = (teacher.log_p().exp() + epsilon).log().masked_fill(teacher.ids < 0, -math.inf)
    return replace(teacher, logprobs=log_p.to(teacher.logprobs.dtype)).renormalize()


@dataclass(frozen=True, eq=False)
class RecalibratedStudent(Divergence):
    """D(p ‖ softmax(q/c)) over the ids, q the student's probabilities under its full softmax: FIRST's released code.

    For ``tail="drop"`` with a teacher that went through ``recalibrate(c)`` at the same c:
    ``topk_distill_loss(logits, teacher.recalibrate(c), divergence=RecalibratedStudent(c), tail="drop")``.
    """

    c: float
    divergence: Divergence = field(default_factory=ForwardKL)

    def __post_init__(self):
        checked_positive("c", self.c)

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        # empty slots must not get the mass that softmax gives a probability of 0
        scaled = (log_q.exp() / self.c).masked_fill(log_p == -math.inf, -math.inf)
        return self.divergence(log_p, scaled.log_softmax(-1))
