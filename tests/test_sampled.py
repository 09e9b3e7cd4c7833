"""Sampled, mixed and recalibrated teachers against plain PyTorch in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distilkernels as dk

F64 = torch.float64


def rows(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * scale


def samples_of(logits, r=5, **options):
    return dk.capture_samples(logits, r, seed=7, **options)


def plain_sampled(z, samples, temperature=1.0):
    log_q = (z / temperature).log_softmax(-1)
    at = log_q.gather(-1, samples.ids.clamp(min=0).long())
    return -(samples.weights * at).sum(-1) * temperature**2


# ------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_value_and_gradient(temperature):
    z = rows(2, 3, 29).requires_grad_()
    samples = samples_of(rows(2, 3, 29, seed=1), temperature=temperature, tau=0.7)
    assert (samples.ids < 0).any(), "a repeated draw leaves an empty slot"
    want = plain_sampled(z, samples, temperature)
    got = dk.sampled_distill_loss(z, samples, temperature=temperature, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    (a,), (b,) = torch.autograd.grad(got.sum(), z), torch.autograd.grad(want.sum(), z)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    bare = dk.sampled_distill_loss(z, samples, temperature=temperature, scale_by_t2=False)
    torch.testing.assert_close(bare, want.mean() / temperature**2)


def test_sampled_gradcheck():
    samples = samples_of(rows(3, 11, seed=1), temperature=1.5, valid_vocab=10)
    w = torch.tensor([0.5, 0.0, 2.0])
    assert torch.autograd.gradcheck(
        lambda x: dk.sampled_distill_loss(x, samples, temperature=1.5, token_weights=w, softcap=4.0, logit_scale=0.8, valid_vocab=10),
        rows(3, 11).requires_grad_(),
    )


def test_sampled_rows_without_samples_count_nothing():
    z = rows(3, 11)
    z[1] = math.nan
    z.requires_grad_()
    samples = samples_of(rows(3, 11, seed=1))
    ids = samples.ids.clone()
    ids[1] = -1
    loss = dk.sampled_distill_loss(z, dk.TeacherSamples(ids, samples.weights))
    keep = torch.tensor([0, 2])
    torch.testing.assert_close(loss, plain_sampled(z.detach(), samples)[keep].mean())
    (grad,) = torch.autograd.grad(loss, z)
    assert (grad[1] == 0).all() and grad.isfinite().all()
    # its weight is no part of the denominator either
    weighted = dk.sampled_distill_loss(z, dk.TeacherSamples(ids, samples.weights), token_weights=torch.tensor([1.0, 5.0, 3.0]))
    torch.testing.assert_close(weighted, (plain_sampled(z.detach(), samples)[keep] * torch.tensor([0.25, 0.75])).sum())


def test_sampled_minus_infinity_at_a_slot_of_weight_0():
    z = rows(1, 5)
    z[0, 3] = -math.inf
    z.requires_grad_()
    samples = dk.TeacherSamples(torch.tensor([[2, 3]]), torch.tensor([[1.0, 0.0]], dtype=F64))
    loss = dk.sampled_distill_loss(z, samples)
    torch.testing.assert_close(loss, -z.detach().log_softmax(-1)[0, 2])
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_sampled_expectation_is_forward_kl():
    """Exact, without sampling: the enumerated samples of one draw, weighted by their law, give the cross-entropy H(p, q)."""
    t, z = rows(1, 7, seed=1), rows(1, 7)
    p = t.softmax(-1)[0]
    tau = 0.5
    g = (tau * t).softmax(-1)[0]
    each = [dk.sampled_distill_loss(z, dk.TeacherSamples(torch.tensor([[v]]), (p[v] / g[v]).view(1, 1))) for v in range(7)]
    expected = -(p * z.log_softmax(-1)[0]).sum()
    torch.testing.assert_close((g * torch.stack(each)).sum(), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_sampled_is_the_same(reduction):
    hidden, weight, bias = (rows(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 5, 8), (31, 8), (31,)]))
    samples = samples_of(rows(2, 5, 31, seed=9), temperature=2.0)
    options = dict(temperature=2.0, reduction=reduction, token_weights=torch.rand(2, 5), softcap=9.0, valid_vocab=31)
    a = dk.sampled_distill_loss(hidden @ weight.t() + bias, samples, **options)
    b = dk.linear_sampled_distill_loss(hidden, weight, samples, bias=bias, chunk_size=3, **options)
    torch.testing.assert_close(a, b)
    for x, y in zip(torch.autograd.grad(a.sum(), (hidden, weight, bias)), torch.autograd.grad(b.sum(), (hidden, weight, bias))):
        torch.testing.assert_close(x, y)


Z, SAMPLES = torch.randn(2, 11), dk.capture_samples(torch.randn(2, 11), 3, seed=0)


@pytest.mark.parametrize("call,error,message", [
    (lambda: dk.sampled_distill_loss(Z, 3), TypeError, "samples must be a TeacherSamples; got int"),
    (lambda: dk.sampled_distill_loss(Z[:1], SAMPLES), ValueError, r"samples must have the student's token shape \(1,\); got \(2,\)"),
    (lambda: dk.sampled_distill_loss(Z, SAMPLES, temperature=2.0), ValueError, "temperature is 2.0 but the samples were drawn at 1.0"),
    (lambda: dk.sampled_distill_loss(Z[:, :1], dk.TeacherSamples(SAMPLES.ids.clamp(5), SAMPLES.weights)), ValueError, r"samples.ids\[0, 0\] is \d+"),
    (lambda: dk.multi_teacher([], [1.0]), ValueError, "teachers must hold at least one"),
    (lambda: dk.multi_teacher([SAMPLES], [1.0]), TypeError, "teachers must hold TeacherTopK; got TeacherSamples"),
    (lambda: dk.multi_teacher([dk.capture_topk(Z, 2), dk.capture_topk(Z[:1], 2)], [1, 1]), ValueError, "teachers must share a shape"),
    (lambda: dk.multi_teacher([dk.capture_topk(Z, 2), dk.capture_topk(Z, 2, temperature=2.0)], [1, 1]), ValueError, "must share a temperature"),
    (lambda: dk.multi_teacher([dk.capture_topk(Z, 2)], [1.0, 2.0]), ValueError, r"weights must have shape \(1,\) or \(2, 1\); got \(2,\)"),
    (lambda: dk.multi_teacher([dk.capture_topk(Z, 2)], [-1.0]), ValueError, r"weights must be finite and not negative; got \[-1.0\]"),
    (lambda: dk.multi_teacher([dk.capture_topk(Z, 2)], [math.inf]), ValueError, r"weights must be finite and not negative; got \[inf\]"),
    (lambda: dk.calibration.ece(0.5, SAMPLES.ids < 0), TypeError, "confidence must be a tensor; got float"),
    (lambda: dk.calibration.ece(torch.rand(3), torch.rand(3)), TypeError, "correct bool; got torch.float32 and torch.float32"),
    (lambda: dk.calibration.ece(torch.rand(3), torch.rand(2) > 0), ValueError, r"must share a shape; got \(3,\) and \(2,\)"),
    (lambda: dk.calibration.ece(torch.rand(3), torch.rand(3) > 0, bins=0), ValueError, "bins must be at least 1; got 0"),
    (lambda: dk.calibration.fit_temperature(Z, Z), TypeError, "teacher must be a TeacherTopK"),
    (lambda: dk.calibration.fit_temperature(dk.capture_topk(Z, 5), torch.zeros(3, dtype=torch.long)), ValueError, "labels must have the teacher's token shape"),
    (lambda: dk.calibration.fit_temperature(dk.capture_topk(Z, 5), torch.tensor([-100, -100])), ValueError, "at least one token"),
    (lambda: dk.calibration.fit_temperature(dk.capture_topk(Z, 5), torch.tensor([1, 2]), coarse=2.0), ValueError, "coarse must be at most 1"),
    (lambda: dk.calibration.recalibrate_linear(dk.capture_topk(Z, 5), 0.0), ValueError, "epsilon must be positive"),
    (lambda: dk.calibration.RecalibratedStudent(0.0), ValueError, "c must be positive"),
])  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------------------ mixtures


def mixed(teachers, weights, v):
    """Σ w_m p_m as dense rows and the tail, by plain loops."""
    dense, tail = torch.zeros(*teachers[0].shape, v, dtype=F64), torch.zeros(teachers[0].shape, dtype=F64)
    weights = weights.expand(*teachers[0].shape, len(teachers))
    present = torch.stack([(t.ids >= 0).any(-1) for t in teachers], -1)
    weights = weights * present
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    for m, t in enumerate(teachers):
        w = weights[..., m : m + 1]
        p = torch.where(t.ids >= 0, t.logprobs.double().exp() * w, 0.0)
        dense.scatter_add_(-1, t.ids.clamp(min=0).long(), p)
        tail += t.log_tail().exp() * w[..., 0]
    return dense, tail


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 4), v=st.integers(1, 30), ks=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99), per_token=st.booleans())
def test_mixture(n, v, ks, seed, per_token):
    teachers = [dk.capture_topk(rows(n, v, seed=seed + i), min(k, v)) for i, k in enumerate(ks)]
    if n > 1 and len(ks) > 1:  # a teacher that has nothing for a token
        t = teachers[0]
        teachers[0] = dk.TeacherTopK(t.ids.index_fill(0, torch.tensor([1]), -1), t.logprobs, t.tail_logprob)
    weights = torch.rand(*((n, len(ks)) if per_token else (len(ks),)), dtype=F64) + 0.1
    got = dk.multi_teacher(teachers, weights).validate(v, tolerance=1e-6)
    dense, tail = mixed(teachers, weights, v)
    assert got.k == sum(t.k for t in teachers)
    found = torch.zeros(n, v + 1, dtype=F64).scatter_(1, torch.where(got.ids < 0, v, got.ids).long(), got.logprobs.exp())[:, :v]
    torch.testing.assert_close(found, dense, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(got.tail_logprob.exp(), tail, rtol=1e-10, atol=1e-14)
    assert (got.logprobs[:, :-1] >= got.logprobs[:, 1:]).all()
    filled = got.ids >= 0
    assert torch.equal(filled, filled.sort(-1, descending=True).values), "empty slots are last"


def test_mixture_of_complete_teachers_is_the_dense_mixture():
    logits = [rows(3, 13, seed=i) for i in range(3)]
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=F64)
    mixture = dk.multi_teacher([dk.capture_topk(x, 13) for x in logits], weights)
    p = sum(w * x.softmax(-1) for w, x in zip(weights, logits))
    z = rows(3, 13, seed=7)
    want = (p * (p.log() - z.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(dk.topk_distill_loss(z, mixture.truncate(13), reduction="none"), want)


def test_mixture_leaves_out_weight_0_and_keeps_tiny_masses():
    a = dk.TeacherTopK(torch.tensor([[1, 2]]), torch.tensor([[-900.0, -0.1]], dtype=F64), torch.tensor([-3.0], dtype=F64))
    b = dk.TeacherTopK(torch.tensor([[3, 1]]), torch.tensor([[math.nan, math.nan]], dtype=F64), torch.tensor([math.nan], dtype=F64))
    got = dk.multi_teacher([a, b], [2.0, 0.0])
    assert got.ids.tolist() == [[2, 1, -1, -1]]
    torch.testing.assert_close(got.logprobs[0, :2], torch.tensor([-0.1, -900.0], dtype=F64))
    torch.testing.assert_close(got.tail_logprob, a.tail_logprob)
    # an id of probability 0 is known to be so: it does not join the tail
    c = dk.TeacherTopK(torch.tensor([[4, 0]]), torch.tensor([[-math.inf, 0.0]], dtype=F64), torch.tensor([-math.inf], dtype=F64))
    assert dk.multi_teacher([c], [1.0]).ids.tolist() == [[0, 4]]
    assert dk.multi_teacher([c, b], [0.0, 0.0]).ids.tolist() == [[-1] * 4]


# --------------------------------------------------------------------------------------------- calibration


def plain_ece(confidence, correct, bins, weight):
    total = 0.0
    for b in range(bins):
        inside = [i for i, c in enumerate(confidence) if (b / bins < c <= (b + 1) / bins) or (b == 0 and c == 0)]
        count = sum(weight[i] for i in inside)
        if count:
            accuracy = sum(weight[i] * correct[i] for i in inside) / count
            mean = sum(weight[i] * confidence[i] for i in inside) / count
            total += count / sum(weight) * abs(accuracy - mean)
    return total


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 60), bins=st.integers(1, 20), seed=st.integers(0, 99))
def test_ece(n, bins, seed):
    g = torch.Generator().manual_seed(seed)
    confidence = torch.rand(n, generator=g, dtype=F64)
    confidence[0] = 0.0 if seed % 2 else 1.0
    correct, weight = torch.rand(n, generator=g) < 0.5, torch.randint(1, 4, (n,), generator=g).double()
    want = plain_ece(confidence.tolist(), correct.tolist(), bins, weight.tolist())
    assert math.isclose(float(dk.calibration.ece(confidence, correct, bins=bins, token_weights=weight)), want, rel_tol=1e-12, abs_tol=1e-15)


def test_edges_of_calibration():
    """A bin holds its upper end and not its lower one; of equal errors the smaller c is taken."""
    half = torch.tensor([0.5, 0.45], dtype=F64)
    assert dk.calibration.ece(half, torch.tensor([True, False])).item() == pytest.approx(0.025)
    fit = dk.calibration.fit_temperature(dk.capture_topk(rows(6, 9), 1), torch.zeros(6, dtype=torch.int64))  # of one id p is 1, whatever c is
    assert fit.c == 0.02 and len({e for _, e in fit.tried}) == 1


def test_fit_temperature_finds_the_c_that_made_the_labels():
    """Labels drawn from softmax(p/c*) make c* the calibrated one; the fine grid comes within a step or two of it."""
    teacher = dk.capture_topk(rows(20_000, 40, scale=1.5), 5)
    truth = 0.34
    draw = torch.multinomial(teacher.recalibrate(truth).logprobs.exp(), 1, generator=torch.Generator().manual_seed(1))
    labels = teacher.ids.gather(-1, draw)[:, 0].long()
    labels[::7] = -100
    fit = dk.calibration.fit_temperature(teacher, labels)
    assert abs(fit.c - truth) <= 0.061 and fit.ece < 0.01
    assert fit.ece == min(e for _, e in fit.tried)
    assert [c for c, _ in fit.tried[:10]] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert len(fit.tried) == 20 and fit.tried[10][0] == pytest.approx(fit.tried[-1][0] - 0.18)
    # the error is of the tokens that count, at the teacher's first id
    kept = labels != -100
    calibrated = teacher.recalibrate(fit.c)
    assert math.isclose(float(dk.calibration.ece(calibrated.logprobs[kept, 0].exp(), teacher.ids[kept, 0] == labels[kept])), fit.ece)


def test_recalibrate_linear():
    teacher = dk.TeacherTopK(torch.tensor([[3, 1, -1]]), torch.tensor([[0.6, 0.2, 0.9]], dtype=F64).log())
    got = dk.calibration.recalibrate_linear(teacher, 0.1)
    torch.testing.assert_close(got.logprobs.exp(), torch.tensor([[0.7, 0.3, 0.0]], dtype=F64))
    assert got.tail_logprob.item() == -math.inf


def test_recalibrated_student_is_the_released_code():
    z, c = rows(4, 23).requires_grad_(), 0.3
    teacher = dk.capture_topk(rows(4, 23, seed=1), 5)
    p = (teacher.logprobs.exp() / c).softmax(-1)
    q = (z.softmax(-1).gather(-1, teacher.ids.long()) / c).softmax(-1)
    want = (p * (p / q).log()).sum(-1).mean()
    got = dk.topk_distill_loss(z, teacher.recalibrate(c), divergence=dk.calibration.RecalibratedStudent(c), tail="drop")
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, z), torch.autograd.grad(want, z)):
        torch.testing.assert_close(a, b)
    # an empty slot gets none of the student's mass
    ids = torch.cat([teacher.ids, torch.full((4, 2), -1, dtype=teacher.ids.dtype)], -1)
    wider = dk.TeacherTopK(ids, torch.cat([teacher.logprobs, torch.zeros(4, 2, dtype=F64)], -1)).recalibrate(c)
    again = dk.topk_distill_loss(z, wider, divergence=dk.calibration.RecalibratedStudent(c), tail="drop")
    torch.testing.assert_close(again, want)
