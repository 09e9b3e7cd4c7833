"""Policy-gradient objectives with a teacher: KL estimates, clipped surrogates, KDRL, GPPO."""

from __future__ import annotations

import torch
from torch import Tensor

from ..primitives.head import checked_number, checked_positive
from .shapes import checked_floats, checked_mask, inside, over, per_token, wide

KINDS = ("k1", "k2", "k3")

# of a log-ratio: e^80 is a float32
_LARGEST = 80.0


def aggregate(values: Tensor, mask: Tensor | None = None, *, reduction: str = "token_mean", num_items_in_batch: float | Tensor | None = None) -> Tensor:
    """Values of tokens [..., L] as one loss.

    "token_mean" is Σ m·v / Σ m over all tokens (or / num_items_in_batch, for gradient accumulation or a constant length);
    "sequence_mean" the mean over sequences of Σ_t m·v / Σ_t m, over those with a token (or their sum / num_items_in_batch);
    "sum" Σ m·v; "none" m·v. A token of mask 0 contributes nothing, even if it holds NaN; nothing at all gives 0.
    """
    values = checked_floats("values", values)
    mask = checked_mask("mask", mask, values, "values")
    weighed = values.masked_fill(mask == 0, 0) * mask
    if reduction == "none":
        return weighed
    if reduction == "sum":
        return weighed.sum()
    if reduction == "token_mean":
        total, count = weighed.sum(), mask.sum()
    elif reduction == "sequence_mean":
        total, count = over(weighed.sum(-1), mask.sum(-1)).sum(), (mask.sum(-1) != 0).sum().to(values.dtype)
    else:
        raise ValueError(f"reduction must be 'token_mean', 'sequence_mean', 'sum' or 'none'; got {reduction!r}")
    return over(total, count if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, dtype=values.dtype, device=values.device))


def reverse_kl_estimate(student_logprobs: Tensor, teacher_logprobs: Tensor, kind: str = "k2", mask: Tensor | None = None) -> Tensor:
    """Estimates of KL(π ‖ π_T) from tokens of the student's own, with R = log π_T − log π at the token.

        k1 = −R        k2 = R²/2        k3 = e^R − R − 1

    k1 and k3 are unbiased as *values*. As *losses*, differentiated on policy: k2 has the gradient of KL(π ‖ π_T); k3 that of
    KL(π_T ‖ π); the expectation of k1's is zero, so k1 belongs into the reward (KDRL, arXiv 2506.02208).

    Args:
        student_logprobs, teacher_logprobs: [...], log-probs of the same tokens; the teacher's get no gradient.
        mask: [...], nonzero on tokens that count; the others may hold NaN (:func:`aggregate` alone comes too late for the gradient).

    Returns:
        [...] nats, one per token; 0 outside the mask.
    """
    student_logprobs = checked_floats("student_logprobs", student_logprobs)
    teacher_logprobs = checked_floats("teacher_logprobs", teacher_logprobs, student_logprobs.shape, "student_logprobs")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    student_logprobs, teacher_logprobs = inside(mask, student_logprobs, teacher_logprobs)
    ratio = teacher_logprobs.detach() - student_logprobs
    if kind == "k1":
        return -ratio
    return ratio.square() / 2 if kind == "k2" else ratio.expm1() - ratio


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float = 0.2, clip_high: float = 0.2,
    preserve_gradient: bool = False, dual_clip: float | None = None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """J = min(r·A, c·A) per token, r = π/π_old, to be maximised (PPO, GRPO; clip_high > clip_low is DAPO's).

    c = clip(r, 1 − clip_low, 1 + clip_high), which passes no gradient where it clips; with `preserve_gradient`
    c = r·clip(sg r)/sg r, of the same value and with the gradient clip(sg r)·A·∇log π (GPPO, arXiv 2508.07629).
    `dual_clip` > 1 bounds J from below by dual_clip·A where A < 0, with the same choice about the gradient.

    Args:
        logprobs, old_logprobs: [..., L]; the old ones get no gradient. advantages: [..., L], or [...] one per sequence.
        mask: [..., L], nonzero on tokens that count; the others may hold NaN (:func:`aggregate` alone comes too late for the gradient).

    Returns:
        [..., L]; 0 outside the mask.
    """
    logprobs = checked_floats("logprobs", logprobs)
    old_logprobs = checked_floats("old_logprobs", old_logprobs, logprobs.shape, "logprobs")
    advantages = per_token("advantages", advantages, logprobs).detach()
    logprobs, old_logprobs, advantages = inside(mask, logprobs, old_logprobs, advantages)
    if not 0 <= checked_number("clip_low", clip_low) <= 1:
        raise ValueError(f"clip_low must be in [0, 1]; got {clip_low}")
    if checked_number("clip_high", clip_high) < 0:
        raise ValueError(f"clip_high must not be negative; got {clip_high}")
    if dual_clip is not None and checked_number("dual_clip", dual_clip) <= 1:
        raise ValueError(f"dual_clip must be above 1; got {dual_clip}")
    # a ratio that overflows would give the branch that is not taken a gradient of 0·inf
    ratio = (logprobs - old_logprobs.detach()).clamp(max=_LARGEST).exp()
    # one with the gradient of log π; 0/0 where a ratio underflows
    unit = (logprobs - logprobs.detach()).exp() if preserve_gradient else 1.0
    clipped = (ratio.detach().clamp(1 - clip_low, 1 + clip_high) * unit) if preserve_gradient else ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * unit * advantages), objective)
    return objective


def gppo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor | None = None, *, clip_low: float = 0.2, clip_high: float = 0.2,
    dual_clip: float | None = None, reduction: str = "token_mean", num_items_in_batch: float | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Gradient-preserving clipping (Klear-Reasoner, arXiv 2508.07629): −aggregate(J), J = :func:`clipped_surrogate` with its gradient kept.

    Clipped tokens still learn, with a bounded step: their gradient is −clip(sg r)·A·∇log π instead of 0.

    Args:
        logprobs, old_logprobs, mask: [..., L]. advantages: [..., L] or [...].
        clip_low, clip_high, dual_clip: see :func:`clipped_surrogate`. reduction, num_items_in_batch: see :func:`aggregate`.
    """
    objective = clipped_surrogate(
        logprobs, old_logprobs, advantages, clip_low=clip_low, clip_high=clip_high, preserve_gradient=True, dual_clip=dual_clip, mask=mask
    )
    return aggregate(-objective, mask, reduction=reduction, num_items_in_batch=num_items_in_batch)


def kdrl(
    logprobs: Tensor, old_logprobs: Tensor, teacher_logprobs: Tensor, advantages: Tensor, mask: Tensor | None = None, *, beta: float,
    kind: str = "k2", kd_mask: Tensor | None = None, clip_low: float = 0.2, clip_high: float = 0.2, reduction: str = "token_mean",
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Distillation and reinforcement in one loss (KDRL, arXiv 2506.02208): −J_GRPO + β·D(π ‖ π_T), D by k2 or k3.

        loss = aggregate(−min(r·A, clip(r)·A) + β·kd_mask·D)

    Both terms have the same denominator, so a KD mask makes the teacher's term smaller, not the rest larger. β is annealed
    in the paper from 5e-3 to 1e-3 by 5e-5 a step (:func:`annealed`), the masks are those of :func:`distill_mask`.

    Args:
        logprobs, old_logprobs, teacher_logprobs, mask: [..., L], of the student's own tokens; gradient to the first.
        advantages: [..., L], or [...] one per response.
        beta: β ≥ 0. kind: "k2" (the gradient of reverse KL) or "k3" (of forward KL).
        kd_mask: [...] or [..., L], where the teacher's term counts (its log-probs elsewhere may be NaN); None is everywhere.
        clip_low, clip_high: see :func:`clipped_surrogate`. reduction, num_items_in_batch: see :func:`aggregate`.
    """
    if kind == "k1":
        raise ValueError("kind='k1' is no loss: the expectation of its gradient is zero. Add −β·k1 to the rewards or advantages instead")
    if checked_number("beta", beta) < 0:
        raise ValueError(f"beta must not be negative; got {beta}")
    logprobs = checked_floats("logprobs", logprobs)
    if kd_mask is not None:
        if not isinstance(kd_mask, Tensor):
            raise TypeError(f"kd_mask must be a tensor; got {type(kd_mask).__name__}")
        kd_mask = per_token("kd_mask", kd_mask.detach().to(logprobs.dtype), logprobs)
        # where the teacher is not asked it may not have been run: a distance of 0, with the gradient of one
        teacher_logprobs = checked_floats("teacher_logprobs", teacher_logprobs, logprobs.shape, "logprobs")
        teacher_logprobs = torch.where(kd_mask == 0, logprobs.detach(), teacher_logprobs)
    distance = reverse_kl_estimate(logprobs, teacher_logprobs, kind, mask)
    if kd_mask is not None:
        distance = distance * kd_mask
    objective = clipped_surrogate(logprobs, old_logprobs, advantages, clip_low=clip_low, clip_high=clip_high, mask=mask)
    return aggregate(beta * distance - objective, mask, reduction=reduction, num_items_in_batch=num_items_in_batch)


def annealed(step: int, start: float = 5e-3, stop: float = 1e-3, rate: float = 5e-5) -> float:
    """β at a step: start − rate·step, never beyond stop (KDRL's schedule by default)."""
    value = start - rate * step
    return max(value, stop) if stop <= start else min(value, stop)


def _same_group(rewards: Tensor, group_ids: Tensor) -> Tensor:
    checked_floats("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape [B]; got {tuple(rewards.shape)}")
    if not isinstance(group_ids, Tensor) or group_ids.shape != rewards.shape:
        raise ValueError(f"group_ids must be a tensor of the shape of rewards, {tuple(rewards.shape)}; got {getattr(group_ids, 'shape', type(group_ids))}")
    return group_ids[:, None] == group_ids[None, :]


@torch.no_grad()
def group_advantages(rewards: Tensor, group_ids: Tensor, *, scale: bool = True, epsilon: float = 1e-6) -> Tensor:
    """GRPO's advantages: A_i = (R_i − mean) / (std + ε) over the responses to the same prompt (arXiv 2402.03300).

    Args:
        rewards: [B]. group_ids: [B], equal for the responses to one prompt, in any order.
        scale: divide by the unbiased std; without, A = R − mean (Dr. GRPO).

    Returns:
        [B]; 0 for a response alone in its group, NaN in a group with a NaN. O(B²) memory.
    """
    same, values = _same_group(rewards, group_ids), rewards.double()
    checked_positive("epsilon", epsilon)
    count = same.sum(-1)

    def over_group(x: Tensor) -> Tensor:
        # no product with a matrix of 0 and 1: a NaN would reach every group
        return torch.where(same, x, 0.0).sum(-1)

    centered = values - over_group(values) / count
    # the mean of equal rewards may miss them by a rounding error, which a std of nothing would blow up
    centered = centered.masked_fill(centered.abs() < 1e-12 * values.abs().clamp(min=1), 0)
    if scale:
        centered = centered / ((over_group(centered.square()) / (count - 1).clamp(min=1)).sqrt() + epsilon)
    return centered.to(wide(rewards).dtype)


@torch.no_grad()
def distill_mask(rewards: Tensor, group_ids: Tensor, rule: str = "response", *, threshold: float = 0.0) -> Tensor:
    """KDRL's reward-guided masks [B], 1 where the teacher's term counts; a response is correct if its reward exceeds `threshold`.

    rule "response": on incorrect responses; "group": on groups without a correct response.
    """
    same = _same_group(rewards, group_ids)
    correct = rewards > checked_number("threshold", threshold)
    if rule not in ("response", "group"):
        raise ValueError(f"rule must be 'response' or 'group'; got {rule!r}")
    return (~correct if rule == "response" else ~(same & correct).any(-1)).to(wide(rewards).dtype)
