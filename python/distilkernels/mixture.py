"""Several teachers as one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .teacher import TeacherTopK


def multi_teacher(teachers: Sequence[TeacherTopK], weights: Tensor | Sequence[float]) -> TeacherTopK:
    """The mixture Σ_m w_m p_m of M teachers as one teacher, on the union of their ids.

    An id that a teacher does not list counts 0 for it, and that teacher's mass on it stays in its tail: the mixture's tail is
    Σ_m w_m·tail_m. So the mixture is exact where every teacher lists every id of the union (:func:`score_topk` on one set of
    ids makes such teachers) and otherwise has too little mass on what only some list.

    Args:
        teachers: M ≥ 1 teachers of one token shape [...], device and temperature; their K may differ.
        weights: [M], or [..., M] per token, w_m ≥ 0; divided by their sum. A teacher whose slots at a token are all empty counts
            as weight 0 there; where no teacher is left, so does the token (its slots are empty).

    Returns:
        TeacherTopK with Σ_m K_m slots by descending log-prob, the empty ones last; ``truncate(k)`` keeps fewer.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    teachers = list(teachers)
    if not teachers:
        raise ValueError("teachers must hold at least one TeacherTopK; got none")
    first = teachers[0]
    for t in teachers:
        if not isinstance(t, TeacherTopK):
            raise TypeError(f"teachers must hold TeacherTopK; got {type(t).__name__}")
        for name in ("shape", "device", "temperature"):
            mine, its = getattr(first, name), getattr(t, name)
            if mine != its:
                raise ValueError(f"teachers must share a {name}; got {mine} and {its}")
    log_w = _log_weights(weights, teachers)

    ids = torch.cat([t.ids.masked_fill(log_w[..., m : m + 1] == -math.inf, -1) for m, t in enumerate(teachers)], -1)
    log_p = torch.cat([_plus(t.log_p(), log_w[..., m : m + 1]) for m, t in enumerate(teachers)], -1)
    # equal ids become neighbours, and each run one slot; empty slots come first and are a run too
    ids, order = ids.sort(dim=-1, stable=True)
    log_p = log_p.gather(-1, order)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[..., 1:] = ids[..., 1:] != ids[..., :-1]
    slot = new.cumsum(-1) - 1
    top = torch.full_like(log_p, -math.inf).scatter_reduce_(-1, slot, log_p, "amax")
    part = (log_p - top.gather(-1, slot)).exp().masked_fill(log_p == -math.inf, 0)
    # each run's sum comes to lie at its start, without atomics, whose order on a GPU would show in the last bit
    total = part.clone()
    for step in range(1, len(teachers)):
        total[..., :-step] += torch.where(ids[..., step:] == ids[..., :-step], part[..., step:], 0.0)
    start = torch.where(new, slot, ids.shape[-1])
    log_p = top + torch.nn.functional.pad(torch.zeros_like(total), (0, 1)).scatter_(-1, start, total)[..., :-1].log()
    ids = torch.full_like(ids, -1).scatter_(-1, slot, ids)

    log_p = log_p.masked_fill(ids < 0, -math.inf)
    log_p, order = log_p.sort(dim=-1, descending=True, stable=True)
    tail = torch.stack([_plus(t.log_tail(), log_w[..., m]) for m, t in enumerate(teachers)], -1).logsumexp(-1)
    dtype = torch.promote_types(torch.float32, _widest(t.logprobs.dtype for t in teachers))
    return TeacherTopK(ids.gather(-1, order), log_p.to(dtype), tail.to(dtype), first.temperature)


def _log_weights(weights: Tensor | Sequence[float], teachers: list[TeacherTopK]) -> Tensor:
    """log of the normalised weights, [..., M] in float64, −inf where a teacher does not count."""
    shape, count, device = teachers[0].shape, len(teachers), teachers[0].device
    if not isinstance(weights, Tensor):
        weights = torch.tensor(weights, dtype=torch.float64, device=device)
    if tuple(weights.shape) not in ((count,), (*shape, count)):
        raise ValueError(f"weights must have shape ({count},) or {(*shape, count)}; got {tuple(weights.shape)}")
    if weights.device != device:
        raise ValueError(f"weights must be on {device}, where the teachers are; got {weights.device}")
    if device.type == "cpu" and not ((weights >= 0) & (weights < math.inf)).all():
        raise ValueError(f"weights must be finite and not negative; got {weights.tolist() if weights.dim() == 1 else float(weights.min())}")
    present = torch.stack([(t.ids >= 0).any(-1) for t in teachers], -1)
    weights = weights.detach().double().expand(*shape, count).masked_fill(~present, 0)
    total = weights.sum(-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1)).log()


def _plus(log_p: Tensor, log_w: Tensor) -> Tensor:
    """log_p + log_w; a teacher of weight 0 adds nothing, even if it holds NaN."""
    return torch.where(log_w == -math.inf, -math.inf, log_p + log_w)


def _widest(dtypes) -> torch.dtype:
    found = torch.bfloat16
    for dtype in dtypes:
        found = torch.promote_types(found, dtype)
    return found
