"""``align_tokens``: a teacher's answer rows at the student's answer positions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distilkernels as dk


def placed(rows, student_mask, teacher_mask, fill):
    """The definition, a row at a time; the shorter side decides."""
    out = torch.full((*student_mask.shape, *rows.shape[2:]), fill, dtype=rows.dtype)
    for b in range(len(rows)):
        there, here = teacher_mask[b].nonzero()[:, 0].tolist(), student_mask[b].nonzero()[:, 0].tolist()
        for t, s in zip(there, here):
            out[b, s] = rows[b, t]
    return out


@settings(max_examples=60, deadline=None)
@given(b=st.integers(0, 3), ts=st.integers(0, 9), tt=st.integers(0, 9), seed=st.integers(0, 10**6), width=st.sampled_from([(), (3,), (2, 2)]))
def test_the_jth_marked_position_goes_to_the_jth(b, ts, tt, seed, width):
    g = torch.Generator().manual_seed(seed)
    student, teacher = torch.rand(b, ts, generator=g) < 0.6, torch.rand(b, tt, generator=g) < 0.6
    rows = torch.randn(b, tt, *width, generator=g)
    assert torch.equal(dk.align_tokens(rows, student, teacher, fill=-7.0, strict=False), placed(rows, student, teacher, -7.0))
    numbers = torch.randint(100, (b, tt), generator=g)
    assert torch.equal(dk.align_tokens(numbers, student, teacher, fill=-100, strict=False), placed(numbers, student, teacher, -100))
    if torch.equal(student.sum(-1), teacher.sum(-1)):
        assert torch.equal(dk.align_tokens(rows, student, teacher), placed(rows, student, teacher, 0.0))
    else:
        with pytest.raises(ValueError, match=r"row \d: student_mask marks \d+ positions and teacher_mask \d+"):
            dk.align_tokens(rows, student, teacher)


def test_a_teacher_under_another_prompt():
    """Prompts of 2 and 5 tokens before the same answer of 3: rows start at the prompt's last token."""
    torch.manual_seed(1)
    captured = dk.capture_topk(torch.randn(2, 8, 31), 4)
    teacher_mask, student_mask = torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 7, dtype=torch.bool)
    teacher_mask[0, 4:7] = teacher_mask[1, 1:4] = True
    student_mask[0, 1:4] = student_mask[1, 3:6] = True
    out = dk.align_tokens(captured, student_mask, teacher_mask)
    assert out.shape == (2, 7)
    for name, tensor in captured.tensors().items():
        assert torch.equal(out.tensors()[name][student_mask], tensor[teacher_mask])
    assert (out.ids[~student_mask] == -1).all() and (out.logprobs[~student_mask] == -math.inf).all()
    z = torch.randn(2, 7, 31)
    whole = dk.topk_distill_loss(z, out, reduction="sum")
    torch.testing.assert_close(whole, dk.topk_distill_loss(z[student_mask], captured[teacher_mask], reduction="sum"))
    one = dk.align_tokens(captured[0], student_mask[0], teacher_mask[0])
    assert torch.equal(one.ids, out.ids[0]) and one.tail_logprob.shape == (7,)


def test_without_a_tail_and_at_another_temperature():
    mask = torch.tensor([[True, False]])
    teacher = dk.TeacherTopK(torch.tensor([[[3], [5]]]), torch.full((1, 2, 1), -0.5), None, 2.0)
    out = dk.align_tokens(teacher, mask.flip(-1), mask)
    assert out.tail_logprob is None and out.temperature == 2.0 and out.ids.tolist() == [[[-1], [3]]]


def test_gradients_reach_the_rows_that_were_used():
    rows = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)
    student, teacher = torch.tensor([[False, True, True]]), torch.tensor([[True, False, True, False, True]])
    assert torch.autograd.gradcheck(lambda r: dk.align_tokens(r, student, teacher, strict=False), rows)
    (grad,) = torch.autograd.grad(dk.align_tokens(rows, student, teacher, strict=False).sum(), rows)
    assert grad[0, :, 0].tolist() == [1, 0, 1, 0, 0]
    # a NaN in a row that nobody asked for reaches neither value nor gradient
    poisoned = torch.cat([rows.detach()[:, :4], torch.full((1, 1, 3), math.nan, dtype=torch.float64)], 1).requires_grad_()
    out = dk.align_tokens(poisoned, torch.tensor([[True, False, True]]), teacher, strict=False)
    assert torch.autograd.grad(out.sum(), poisoned)[0].isfinite().all() and out.isfinite().all()


def test_errors_name_the_argument():
    rows, mask = torch.randn(2, 4, 3), torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match="rows must be a tensor or a TeacherTopK; got list"):
        dk.align_tokens([1], mask, mask)
    with pytest.raises(TypeError, match=r"student_mask must be a bool tensor; got torch\.int64"):
        dk.align_tokens(rows, mask.long(), mask)
    with pytest.raises(ValueError, match="teacher_mask must have the shape of the teacher's tokens"):
        dk.align_tokens(rows, mask, mask[:, :3])
    with pytest.raises(ValueError, match=r"student_mask must have shape \(2, 'T_student'\); got \(1, 4\)"):
        dk.align_tokens(rows, mask[:1], mask)
    mask[1, 2] = False
    with pytest.raises(ValueError, match="row 1: student_mask marks 4 positions and teacher_mask 3"):
        dk.align_tokens(rows, torch.ones(2, 6, dtype=torch.bool)[:, :4], mask)
