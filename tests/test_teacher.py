"""``TeacherTopK`` and ``capture_topk``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distilkernels as dk

NEG = -math.inf


def teacher(*shape, v=31, k=5, seed=0, **options):
    logits = torch.randn(*shape, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    return logits, dk.capture_topk(logits, k, **options)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 4), v=st.integers(1, 70), k=st.integers(1, 70), t=st.sampled_from([0.5, 1.0, 2.0]), seed=st.integers(0, 50))
def test_capture_is_the_sorted_softmax(n, v, k, t, seed):
    k = min(k, v)
    logits, top = teacher(n, v=v, k=k, seed=seed, temperature=t)
    want = (logits / t).log_softmax(-1).sort(-1, descending=True)
    torch.testing.assert_close(top.logprobs, want.values[:, :k])
    assert torch.equal(top.ids.long(), want.indices[:, :k])
    torch.testing.assert_close(top.tail_logprob, want.values[:, k:].logsumexp(-1))
    assert top.ids.dtype == torch.int32 and top.temperature == t
    if n:
        top.validate(v)


def test_capture_orders_ties_by_id_and_keeps_to_the_valid_vocabulary():
    logits = torch.zeros(2, 12)
    logits[:, [3, 7, 11]] = 2.0
    top = dk.capture_topk(logits, 2, valid_vocab=9)
    assert top.ids.tolist() == [[3, 7], [3, 7]]
    torch.testing.assert_close(top.tail_logprob, torch.full((2,), math.log(7 / (7 + 2 * math.e**2))))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert dk.capture_topk(logits.to(dtype), 3).logprobs.dtype == torch.float32
    with pytest.raises(ValueError, match=r"k must be in \[1, 9\]"):
        dk.capture_topk(logits, 10, valid_vocab=9)


def test_capture_is_outside_the_graph():
    assert not dk.capture_topk(torch.randn(2, 9, requires_grad=True), 3).logprobs.requires_grad


def test_mass_and_tail():
    _logits, top = teacher(6)
    torch.testing.assert_close(top.mass(), top.logprobs.exp().sum(-1))
    bare = dk.TeacherTopK(top.ids, top.logprobs)
    torch.testing.assert_close(bare.log_tail(), top.tail_logprob, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_derived_tail_survives_rounding(dtype):
    """Log-probs that add up to more than 1 after rounding leave a floor of the size of that rounding, not NaN."""
    p = torch.tensor([[0.9, 0.05, 0.03, 0.02], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    logprobs = (p.log() + 1e-7).to(dtype)
    tail = dk.TeacherTopK(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), logprobs).log_tail()
    assert tail.isfinite().all()
    assert (tail.exp() < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]).all()
    student = torch.randn(2, 20)
    loss = dk.topk_distill_loss(student, dk.TeacherTopK(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), logprobs), divergence="jsd")
    assert loss.isfinite()


def test_truncate_moves_mass_to_the_tail():
    _, top = teacher(3, k=8)
    _, want = teacher(3, k=3)
    shuffled = torch.stack([torch.randperm(8) for _ in range(3)])
    mixed = dk.TeacherTopK(top.ids.gather(1, shuffled), top.logprobs.gather(1, shuffled), top.tail_logprob)
    got = mixed.truncate(3)
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.tail_logprob, want.tail_logprob)
    torch.testing.assert_close(dk.TeacherTopK(top.ids, top.logprobs).truncate(3).log_tail(), want.tail_logprob, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="k must be in"):
        top.truncate(9)


def test_renormalize_recalibrate_retemper():
    logits, top = teacher(4)
    p = top.logprobs.exp()
    torch.testing.assert_close(top.renormalize().logprobs.exp(), p / p.sum(-1, keepdim=True))
    # FIRST: a softmax over probabilities
    torch.testing.assert_close(top.recalibrate(0.3).logprobs, (p / 0.3).log_softmax(-1))
    hot = top.retemper(2.5)
    want = (logits / 2.5).gather(1, top.ids.long()).log_softmax(-1)
    torch.testing.assert_close(hot.logprobs, want)
    assert hot.temperature == 2.5
    for changed in (top.renormalize(), top.recalibrate(0.3), hot):
        assert changed.tail_logprob.eq(NEG).all()
        torch.testing.assert_close(changed.mass(), torch.ones(4, dtype=torch.float64))
    empty = dk.TeacherTopK(torch.full((1, 3), -1), torch.zeros(1, 3))
    assert empty.renormalize().logprobs.eq(NEG).all() and empty.recalibrate(0.5).logprobs.eq(NEG).all()


def test_indexing_and_shapes():
    _, top = teacher(3, 4)
    assert top.shape == (3, 4) and top.k == 5 and len(top) == 3
    for index in (0, slice(1, 3), (slice(None), 2), torch.tensor([2, 0]), (torch.tensor([1, 1]), torch.tensor([0, 3])), (..., 1), None):
        part = top[index]
        assert torch.equal(part.tail_logprob, top.tail_logprob[index])
        assert part.ids.shape == (*part.tail_logprob.shape, 5) and part.logprobs.shape == part.ids.shape
    mask = torch.rand(3, 4) < 0.5
    assert torch.equal(top[mask].ids, top.ids[mask])
    with pytest.raises(IndexError):
        top[0, 0, 0]
    flat = top.reshape(-1)
    assert flat.shape == (12,) and torch.equal(flat.reshape(3, 4).ids, top.ids) and flat.reshape([2, 6]).shape == (2, 6)
    again = dk.TeacherTopK(**top.tensors(), temperature=top.temperature)
    assert torch.equal(again.ids, top.ids)


@pytest.mark.parametrize("side", ["right", "left"])
def test_pad_and_cat(side):
    (_, a), (_, b) = teacher(2, k=3), teacher(4, k=5, seed=1)
    b = dk.TeacherTopK(b.ids, b.logprobs)
    batch = dk.TeacherTopK.pad([a, b], side=side)
    assert batch.shape == (2, 4) and batch.k == 5
    real = slice(0, 2) if side == "right" else slice(2, 4)
    empty = slice(2, 4) if side == "right" else slice(0, 2)
    assert torch.equal(batch.ids[0, real, :3], a.ids) and batch.ids[0, real, 3:].eq(-1).all() and batch.ids[0, empty].eq(-1).all()
    student = torch.randn(2, 4, 31, dtype=torch.float64)
    loss = dk.topk_distill_loss(student, batch, reduction="sum")
    want = dk.topk_distill_loss(student[0, real], a, reduction="sum") + dk.topk_distill_loss(student[1], b, reduction="sum")
    torch.testing.assert_close(loss, want)
    both = dk.TeacherTopK.cat([a, b])
    assert both.shape == (6,) and torch.equal(both.ids[2:], b.ids) and both.tail_logprob is not None
    with pytest.raises(ValueError, match="length"):
        dk.TeacherTopK.pad([a, b], length=3)
    with pytest.raises(ValueError, match="temperature"):
        dk.TeacherTopK.cat([a, dk.TeacherTopK(a.ids, a.logprobs, temperature=2.0)])


@pytest.mark.parametrize("damage,message", [
    (lambda ids, lp: ids[1].__setitem__(2, 31), r"ids\[1, 2\] is 31"),
    (lambda ids, lp: ids[0].__setitem__(0, -2), r"ids\[0, 0\] is -2"),
    (lambda ids, lp: ids[2].__setitem__(3, ids[2, 0].item()), "repeated at token 2"),
    (lambda ids, lp: lp[1].__setitem__(1, math.nan), "NaN at token 1"),
    (lambda ids, lp: lp[2].__setitem__(0, 0.5), "positive at token 2"),
    (lambda ids, lp: lp[0].fill_(-0.1), "more than 1"),
])  # fmt: skip
def test_validate_names_the_token(damage, message):
    _, top = teacher(3)
    ids, logprobs = top.ids.clone(), top.logprobs.clone()
    assert top.validate(31) is top
    damage(ids, logprobs)
    with pytest.raises(ValueError, match=message):
        dk.TeacherTopK(ids, logprobs).validate(31)


@pytest.mark.parametrize("make,error,message", [
    (lambda: dk.TeacherTopK(torch.zeros(2, 3), torch.zeros(2, 3)), TypeError, "ids must be int32 or int64; got torch.float32"),
    (lambda: dk.TeacherTopK(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)), TypeError, "logprobs"),
    (lambda: dk.TeacherTopK(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4)), ValueError, r"\(2, 3\) and \(2, 4\)"),
    (lambda: dk.TeacherTopK(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(3)), ValueError, "tail_logprob"),
    (lambda: dk.TeacherTopK(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), temperature=0), ValueError, "temperature"),
])  # fmt: skip
def test_construction_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
