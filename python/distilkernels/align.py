"""Rows captured under one prompt, used at another prompt's answer positions: the offset gather of VOLD and SSB."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from .primitives.boundary import plain_eager
from .teacher import TeacherTopK

Rows = TypeVar("Rows", Tensor, TeacherTopK)


def align_tokens(rows: Rows, student_mask: Tensor, teacher_mask: Tensor, *, fill: float = 0.0, strict: bool = True) -> Rows:
    """Teacher rows at the student's positions: the j-th marked row of the teacher goes to the j-th marked one of the student.

    Both answered with the same tokens after prompts of different length (another chat template, a privileged prompt), so
    that rows match by their place in the answer. Row i predicts token i + 1: mark the rows, that is the positions *before*
    the answer's tokens, on both sides.

    Args:
        rows: a tensor [B, T_teacher, ...], gradients flow back to it; or a TeacherTopK of token shape [B, T_teacher].
            B may be left out everywhere.
        student_mask: bool [B, T_student], on the same device.
        teacher_mask: bool [B, T_teacher].
        fill: what a tensor holds at the other positions. A TeacherTopK has empty slots there, so that losses give them weight 0.
        strict: every row must mark as many positions on both sides. It is checked on a CPU; on a GPU looking would wait for
            the device, and the shorter of the two is taken, as with ``strict=False``.

    Returns:
        The same type, [B, T_student, ...].

    Raises:
        ValueError: shapes or devices differ, or the counts do (naming the row). TypeError: masks are not bool.
    """
    if not isinstance(rows, (Tensor, TeacherTopK)):
        raise TypeError(f"rows must be a tensor or a TeacherTopK; got {type(rows).__name__}")
    for name, mask in (("student_mask", student_mask), ("teacher_mask", teacher_mask)):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"{name} must be a bool tensor; got {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}")
        if mask.device != rows.device:
            raise ValueError(f"{name} must be on {rows.device}, where the rows are; got {mask.device}")
    dims = teacher_mask.dim()
    lead = tuple(rows.shape[:dims]) if isinstance(rows, Tensor) else tuple(rows.shape)
    if dims not in (1, 2) or tuple(teacher_mask.shape) != lead:
        raise ValueError(f"teacher_mask must have the shape of the teacher's tokens, [T] or [B, T]; got {tuple(teacher_mask.shape)} for {lead}")
    if student_mask.dim() != dims or student_mask.shape[:-1] != teacher_mask.shape[:-1]:
        raise ValueError(f"student_mask must have shape {(*lead[:-1], 'T_student')}; got {tuple(student_mask.shape)}")
    if dims == 1:
        out = align_tokens(_map(rows, lambda t: t.unsqueeze(0)), student_mask[None], teacher_mask[None], fill=fill, strict=strict)
        return _map(out, lambda t: t.squeeze(0))

    counts, wanted = teacher_mask.sum(-1), student_mask.sum(-1)
    if strict and rows.device.type == "cpu" and plain_eager(student_mask, teacher_mask) and not torch.equal(counts, wanted):
        row = int((counts != wanted).nonzero()[0])
        raise ValueError(
            f"row {row}: student_mask marks {int(wanted[row])} positions and teacher_mask {int(counts[row])}; "
            "they must be as many (strict=False takes the shorter)"
        )
    place = student_mask.cumsum(-1) - 1
    partner = student_mask & (place < counts[:, None])
    # the marked positions in their order, then the others; one more row than there is, so that T_teacher may be 0
    order = torch.nn.functional.pad(~teacher_mask, (0, 1), value=True).to(torch.uint8).argsort(dim=-1, stable=True)
    source = order.gather(1, place.clamp(0, lead[1])).clamp(max=max(lead[1] - 1, 0))
    batch = torch.arange(lead[0], device=rows.device)[:, None]

    def gathered(tensor: Tensor, value: float) -> Tensor:
        if lead[1] == 0:
            return tensor.new_full((*student_mask.shape, *tensor.shape[2:]), value)
        found = tensor[batch, source]
        return found.masked_fill(~partner.view(*partner.shape, *(1,) * (found.dim() - 2)), value)

    if isinstance(rows, Tensor):
        return gathered(rows, fill)
    tail = None if rows.tail_logprob is None else gathered(rows.tail_logprob, 0.0)
    return replace(rows, ids=gathered(rows.ids, -1), logprobs=gathered(rows.logprobs, -math.inf), tail_logprob=tail)


def _map(rows: Rows, fn) -> Rows:
    if isinstance(rows, Tensor):
        return fn(rows)
    return replace(rows, **{name: fn(tensor) for name, tensor in rows.tensors().items()})
