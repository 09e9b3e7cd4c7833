"""``topk_distill_loss``, ``row_loss`` and ``token_logprobs`` against plain PyTorch in fp64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import distilkernels as dk

F64 = torch.float64
DIVERGENCES = tuple(dk.divergences.NAMES)
TAILS = ("bucket", "renormalize", "renormalize_teacher", "drop")
REFUSED = {(d, t) for d in ("reverse_kl", "skew_reverse_kl", "adaptive_kl") for t in TAILS[2:]}
SERVED = [pair for pair in itertools.product(DIVERGENCES, TAILS) if pair not in REFUSED]


def rows(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * scale


def plain(z, teacher, divergence, tail, temperature=1.0):
    """The per-row loss from a full softmax and plain indexing; `teacher` has no empty slots here."""
    q = (z / temperature).softmax(-1)
    qs = q.gather(-1, teacher.ids.long())
    p = teacher.logprobs.double().exp()
    if tail == "bucket":
        inside = torch.zeros_like(z, dtype=torch.bool).scatter(-1, teacher.ids.long(), True)
        p = torch.cat([p, teacher.tail_logprob.double().exp().unsqueeze(-1)], -1)
        qs = torch.cat([qs, q.masked_fill(inside, 0).sum(-1, keepdim=True)], -1)
    elif tail == "renormalize":
        p, qs = p / p.sum(-1, keepdim=True), qs / qs.sum(-1, keepdim=True)
    elif tail == "renormalize_teacher":
        p = p / p.sum(-1, keepdim=True)
    divergence = dk.divergences.resolve(divergence)
    if isinstance(divergence, dk.divergences.AdaptiveKL):
        divergence = divergence.buckets(tail == "bucket")
    return divergence(p.log(), qs.log()) * temperature**2


@pytest.mark.parametrize("divergence,tail", SERVED)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient(divergence, tail, temperature):
    z = rows(2, 3, 29).requires_grad_()
    teacher = dk.capture_topk(rows(2, 3, 29, seed=1), 5, temperature=temperature)
    want = plain(z, teacher, divergence, tail, temperature)
    got = dk.topk_distill_loss(z, teacher, divergence=divergence, tail=tail, temperature=temperature, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    (a,) = torch.autograd.grad(got.sum(), z)
    (b,) = torch.autograd.grad(want.sum(), z)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence,tail", [p for p in SERVED if p[0] not in ("todi", "adaptive_kl")])
@pytest.mark.parametrize("kind", ["everything", "empty_slots", "k1", "k_is_v", "m_is_1"])
def test_gradcheck(divergence, tail, kind):
    """fp64 finite differences; todi and adaptive_kl detach weights, test_divergences.py holds them against frozen ones."""
    v, k = 9, {"k1": 1, "k_is_v": 9}.get(kind, 4)
    z = rows(3, v).requires_grad_()
    teacher = dk.capture_topk(rows(3, v, seed=1), k, temperature=1.5)
    options = {}
    if kind == "everything":
        options = dict(token_weights=torch.tensor([0.5, 0.0, 2.0]), labels=torch.tensor([3, 1, -100]), ce_weight=0.4, softcap=4.0, logit_scale=0.8)
    elif kind == "empty_slots":
        ids = teacher.ids.clone()
        ids[0, 1], ids[1, :] = -1, -1
        teacher = dk.TeacherTopK(ids, teacher.logprobs, None, 1.5)
    elif kind == "m_is_1":
        teacher = teacher.renormalize()

    def loss(x):
        return dk.topk_distill_loss(x, teacher, divergence=divergence, tail=tail, temperature=1.5, **options)

    if kind == "m_is_1" and tail == "bucket" and not loss(z).isfinite():
        assert divergence in ("reverse_kl", "jsd")  # p_tail = 0 < q_tail
        return
    assert torch.autograd.gradcheck(loss, z)


@pytest.mark.parametrize("divergence,tail", SERVED)
def test_nothing_to_learn_at_q_is_p(divergence, tail):
    logits = rows(4, 31)
    z = logits.clone().requires_grad_()
    teacher = dk.capture_topk(logits, 6)
    loss = dk.topk_distill_loss(z, teacher, divergence=divergence, tail=tail)
    (grad,) = torch.autograd.grad(loss, z)
    if tail in ("bucket", "renormalize"):
        assert abs(loss) < 1e-12
        assert grad.abs().max() < (1e-9 if divergence != "total_variation" else 1.0)
    assert grad.isfinite().all()


SIZES = dict(v=st.integers(2, 60), k=st.integers(1, 60), n=st.integers(0, 5), seed=st.integers(0, 99))


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from([d for d in DIVERGENCES if d != "adaptive_kl"]), **SIZES)
def test_a_lower_bound_of_the_full_divergence(v, k, n, seed, name):
    """Merging columns into the tail bucket can only lose divergence (data processing); at K = V nothing is lost."""
    z, t = rows(n, v, seed=seed), rows(n, v, seed=seed + 1)
    teacher = dk.capture_topk(t, min(k, v))
    got = dk.topk_distill_loss(z, teacher, divergence=name, reduction="none")
    full = dk.divergences.resolve(name)(t.log_softmax(-1), z.log_softmax(-1))
    if min(k, v) == v:
        torch.testing.assert_close(got, full, rtol=1e-9, atol=1e-12)
    elif name != "todi":
        assert (got <= full + 1e-12).all()
    assert (got >= -1e-12).all()


def test_bucket_theorem():
    """(A1): d loss / d z_v = c·q_v + [v∈S] q_v (φ_v − φ_τ), checked from φ of the plain formula."""
    z = rows(1, 17).requires_grad_()
    teacher = dk.capture_topk(rows(1, 17, seed=1), 4)
    q = z.detach().softmax(-1)
    ids = teacher.ids.long()
    inside = torch.zeros(1, 17, dtype=torch.bool).scatter(1, ids, True)
    buckets = torch.cat([q.gather(1, ids), q.masked_fill(inside, 0).sum(1, keepdim=True)], 1).requires_grad_()
    p = torch.cat([teacher.logprobs.exp(), teacher.tail_logprob.exp()[:, None]], 1)
    (phi,) = torch.autograd.grad((buckets * (buckets / p).log()).sum(), buckets)
    mean = (buckets * phi).sum().detach()
    want = (phi[:, -1] - mean) * q
    want = want.scatter_add(1, ids, q.gather(1, ids) * (phi[:, :-1] - phi[:, -1:]))
    (got,) = torch.autograd.grad(dk.topk_distill_loss(z, teacher, divergence="reverse_kl"), z)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_temperature_rule():
    """T² scales value and gradient; without it both are those of the tempered softmax."""
    z = rows(3, 19).requires_grad_()
    teacher = dk.capture_topk(rows(3, 19, seed=1), 4, temperature=3.0)
    scaled, bare = (dk.topk_distill_loss(z, teacher, temperature=3.0, scale_by_t2=s) for s in (True, False))
    torch.testing.assert_close(scaled, 9 * bare)
    torch.testing.assert_close(torch.autograd.grad(scaled, z)[0], 9 * torch.autograd.grad(bare, z)[0])


def test_reductions():
    z = rows(2, 3, 19).requires_grad_()
    teacher = dk.capture_topk(rows(2, 3, 19, seed=1), 4)
    w = torch.tensor([[1.0, 0.0, 0.5], [2.0, 0.0, 1.0]])
    each = dk.topk_distill_loss(z, teacher, reduction="none")
    assert each.shape == (2, 3)
    torch.testing.assert_close(dk.topk_distill_loss(z, teacher), each.mean())
    torch.testing.assert_close(dk.topk_distill_loss(z, teacher, token_weights=w, reduction="none"), w * each)
    torch.testing.assert_close(dk.topk_distill_loss(z, teacher, token_weights=w, reduction="sum"), (w * each).sum())
    torch.testing.assert_close(dk.topk_distill_loss(z, teacher, token_weights=w), (w * each).sum() / w.sum())
    for count in (7, torch.tensor(7)):
        torch.testing.assert_close(dk.topk_distill_loss(z, teacher, token_weights=w, num_items_in_batch=count), (w * each).sum() / 7)


def test_gradient_accumulation_equals_the_whole_batch():
    z = rows(6, 19).requires_grad_()
    teacher = dk.capture_topk(rows(6, 19, seed=1), 4)
    labels = torch.tensor([1, 2, -100, 4, -100, 3])
    options = dict(labels=labels, ce_weight=0.5)
    whole = torch.autograd.grad(dk.topk_distill_loss(z, teacher, num_items_in_batch=6, **options), z)[0]
    parts = torch.zeros_like(z)
    for s in (slice(0, 2), slice(2, 6)):
        loss = dk.topk_distill_loss(z[s], teacher[s], num_items_in_batch=6, labels=labels[s], ce_weight=0.5)
        parts += torch.autograd.grad(loss, z)[0]
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", TAILS)
def test_labels_add_cross_entropy_at_temperature_one(tail, temperature):
    """Each term is a mean over its own rows; labels in S, off S, ignored, and on a row without a teacher."""
    z = rows(6, 19).requires_grad_()
    teacher = dk.capture_topk(rows(6, 19, seed=1), 4, temperature=temperature)
    ids = teacher.ids.clone()
    ids[3] = -1
    teacher = dk.TeacherTopK(ids, teacher.logprobs, teacher.tail_logprob, temperature)
    labels = torch.tensor([int(ids[0, 2]), -100, 18, 5, int(ids[4, 0]), 0])
    got = dk.topk_distill_loss(z, teacher, temperature=temperature, tail=tail, labels=labels, ce_weight=0.7)
    want = dk.topk_distill_loss(z, teacher, temperature=temperature, tail=tail) + 0.7 * F.cross_entropy(z, labels)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, z)[0], torch.autograd.grad(want, z)[0])
    each = dk.topk_distill_loss(z, teacher, temperature=temperature, tail=tail, labels=labels, ce_weight=0.7, reduction="none")
    alone = dk.topk_distill_loss(z, teacher, temperature=temperature, tail=tail, reduction="none")
    torch.testing.assert_close(each, alone + 0.7 * F.cross_entropy(z, labels, reduction="none"))


def test_labels_when_every_column_is_listed():
    z = rows(3, 7).requires_grad_()
    teacher = dk.capture_topk(rows(3, 7, seed=1), 7)
    labels = torch.tensor([1, 6, 0])
    got = dk.topk_distill_loss(z, teacher, labels=labels, ce_weight=1.0)
    want = F.kl_div(z.log_softmax(-1), rows(3, 7, seed=1).log_softmax(-1), log_target=True, reduction="batchmean") + F.cross_entropy(z, labels)
    torch.testing.assert_close(got, want)


def test_a_row_of_weight_zero_may_hold_anything():
    z = rows(4, 19)
    teacher = dk.capture_topk(rows(4, 19, seed=1), 4)
    logprobs = teacher.logprobs.clone()
    w = torch.tensor([1.0, 0.0, 2.0, 0.0])
    for labels in (None, torch.tensor([1, 2, 3, -100])):
        options = dict(token_weights=w, labels=labels, ce_weight=0.0 if labels is None else 0.5, return_stats=True)
        a = z.clone().requires_grad_()
        clean, _ = dk.topk_distill_loss(a, teacher, **options)
        clean.backward()
        z[1], z[3, 2] = math.nan, math.inf
        logprobs[1] = math.nan
        b = z.clone().requires_grad_()
        dirty, stats = dk.topk_distill_loss(b, dk.TeacherTopK(teacher.ids, logprobs, teacher.tail_logprob), **options)
        dirty.backward()
        assert torch.equal(clean, dirty) and torch.equal(a.grad, b.grad)
        assert all(not s.isnan().any() for s in stats if s.is_floating_point())


def test_nothing_counts():
    """All weights 0, all slots empty, no rows: 0, still attached."""
    z = rows(3, 11).requires_grad_()
    teacher = dk.capture_topk(rows(3, 11, seed=1), 4)
    empty = dk.TeacherTopK(torch.full_like(teacher.ids, -1), teacher.logprobs)
    none = dk.TeacherTopK(teacher.ids[:0], teacher.logprobs[:0])
    for logits, t, w in ((z, teacher, torch.zeros(3)), (z, empty, None), (z[:0], none, None)):
        for tail in TAILS:
            loss = dk.topk_distill_loss(logits, t, token_weights=w, tail=tail)
            assert loss == 0 and loss.requires_grad
            (grad,) = torch.autograd.grad(loss, z)
            assert torch.equal(grad, torch.zeros_like(z))


def test_renormalize_never_reads_the_vocabulary(monkeypatch):
    """No primitive over V is called, and the gradient is exactly zero off S, even where other columns hold NaN."""
    from distilkernels.primitives import vocab_stats as module

    def refuse(*args, **kwargs):
        raise AssertionError("the vocabulary axis was touched")

    monkeypatch.setattr(module, "resolve", refuse)
    z = rows(3, 50)
    teacher = dk.TeacherTopK(torch.tensor([[1, 7, 30]] * 3), torch.tensor([[0.5, 0.2, 0.1]] * 3).log())
    z[:, 9] = math.nan
    z.requires_grad_()
    loss = dk.topk_distill_loss(z, teacher, tail="renormalize", divergence="reverse_kl")
    (grad,) = torch.autograd.grad(loss, z)
    assert loss.isfinite()
    off = torch.ones(50, dtype=torch.bool)
    off[[1, 7, 30]] = False
    assert (grad[:, off] == 0).all() and (grad[:, ~off] != 0).all()


def test_statistics():
    z = rows(2, 5, 40).requires_grad_()
    teacher = dk.capture_topk(rows(2, 5, 40, seed=1), 6, temperature=2.0)
    ids = teacher.ids.clone()
    ids[1, 2] = -1
    teacher = dk.TeacherTopK(ids, teacher.logprobs, teacher.tail_logprob, 2.0)
    loss, stats = dk.topk_distill_loss(z, teacher, temperature=2.0, return_stats=True, divergence="jsd")
    assert torch.equal(loss, dk.topk_distill_loss(z, teacher, temperature=2.0, divergence="jsd"))
    q = (z.detach() / 2).softmax(-1)
    present = torch.ones(2, 5, dtype=torch.bool)
    present[1, 2] = False
    torch.testing.assert_close(stats.entropy[present], -(q * q.log()).sum(-1)[present])
    torch.testing.assert_close(stats.teacher_mass, teacher.mass())
    torch.testing.assert_close(stats.student_mass[present], q.gather(-1, ids.clamp(min=0).long()).sum(-1)[present])
    assert torch.equal(stats.agreement, (z.argmax(-1) == ids[..., 0]) & present)
    torch.testing.assert_close(stats.per_token, dk.topk_distill_loss(z, teacher, temperature=2.0, divergence="jsd", reduction="none"))
    assert not any(s.requires_grad for s in stats)
    assert stats.entropy[1, 2] == 0 and stats.per_token.shape == (2, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence,tail", SERVED)
def test_error_is_no_worse_than_pytorch(divergence, tail, dtype):
    """Loss and gradient against fp64: PyTorch's own error in the same dtype plus 1e-6 relative, or one ulp in 16 bits."""
    z = rows(6, 1009, scale=3.0).to(dtype)
    teacher = dk.capture_topk(rows(6, 1009, seed=1, scale=3.0), 16)
    single = dk.TeacherTopK(teacher.ids, teacher.logprobs.float(), teacher.tail_logprob.float())
    exact = z.double().requires_grad_()
    want = plain(exact, dk.TeacherTopK(single.ids, single.logprobs.double(), single.tail_logprob.double()), divergence, tail).mean()
    want.backward()
    eager = z.clone().requires_grad_()
    same = plain32(eager, single, divergence, tail).mean()
    same.backward()
    leaf = z.clone().requires_grad_()
    got = dk.topk_distill_loss(leaf, single, divergence=divergence, tail=tail)
    got.backward()
    assert got.dtype == torch.float32
    assert (got - want).abs() <= (same - want).abs() + 1e-6 * want.abs()
    ulp = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    error, allowed = (leaf.grad - exact.grad).abs().max(), (eager.grad - exact.grad).abs().max()
    assert error <= allowed + ulp * exact.grad.abs().max()


def plain32(z, teacher, divergence, tail):
    """What a trainer would write: float32 log-softmax and gathers."""
    log_q = z.float().log_softmax(-1)
    log_qs = log_q.gather(-1, teacher.ids.long())
    log_p = teacher.logprobs
    if tail == "bucket":
        log_p = torch.cat([log_p, teacher.tail_logprob[:, None]], -1)
        inside = torch.zeros_like(z, dtype=torch.bool).scatter(-1, teacher.ids.long(), True)
        log_qs = torch.cat([log_qs, log_q.masked_fill(inside, -math.inf).logsumexp(-1, keepdim=True)], -1)
    elif tail != "drop":
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
        if tail == "renormalize":
            log_qs = log_qs - log_qs.logsumexp(-1, keepdim=True)
    found = dk.divergences.resolve(divergence)
    return (found.buckets(tail == "bucket") if hasattr(found, "buckets") else found)(log_p, log_qs)


def test_per_token_parameters_follow_the_tokens():
    z = rows(2, 3, 19)
    teacher = dk.capture_topk(rows(2, 3, 19, seed=1), 4)
    beta = torch.tensor([[0.0, 0.3, 1.0], [0.5, 0.9, 0.1]], dtype=F64)
    got = dk.topk_distill_loss(z, teacher, divergence=dk.divergences.JSD(beta), reduction="none")
    for i, j in itertools.product(range(2), range(3)):
        want = dk.topk_distill_loss(z[i, j : j + 1], teacher[i, j : j + 1], divergence=dk.divergences.JSD(beta[i, j].item()))
        torch.testing.assert_close(got[i, j], want)
    with pytest.raises(ValueError, match="one value per token"):
        dk.topk_distill_loss(z, teacher, divergence=dk.divergences.JSD(beta[0]))


def test_row_loss_runs_any_function():
    """A loss that the package does not have: focal cross-entropy plus an entropy bonus, against autograd on softmax."""
    z = rows(2, 4, 23).requires_grad_()
    y = torch.arange(8).view(2, 4)
    gamma = torch.rand(2, 4, dtype=F64)

    def focal(stats, gamma):
        logp = stats.logprobs[:, 0]
        return -((1 - logp.exp()) ** gamma) * logp - 0.01 * stats.entropy

    got = dk.row_loss(z, y[..., None], focal, per_token=[gamma], want=("lse", "gathered", "expected_logit"))
    logq = z.log_softmax(-1)
    logp = logq.gather(-1, y[..., None])[..., 0]
    want = (-((1 - logp.exp()) ** gamma) * logp + 0.01 * (logq.exp() * logq).sum(-1)).mean()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, z)[0], torch.autograd.grad(want, z)[0])
    z_loss = dk.row_loss(z, None, lambda stats: stats.lse**2, want="lse")
    torch.testing.assert_close(z_loss, z.logsumexp(-1).square().mean())
    _loss, (twice,) = dk.row_loss(z, None, lambda s: (s.lse, (2 * s.lse,)), want="lse", has_aux=True)
    torch.testing.assert_close(twice, 2 * z.logsumexp(-1).detach())
    with pytest.raises(ValueError, match="one loss per row"):
        dk.row_loss(z, None, lambda s: s.lse.sum(), want="lse")


@pytest.mark.parametrize("k", [None, 3])
def test_token_logprobs(k):
    z = rows(2, 4, 23).requires_grad_()
    ids = torch.randint(0, 23, (2, 4) if k is None else (2, 4, k))
    if k:
        ids = torch.arange(8).view(2, 4, 1) + torch.arange(3)
    got, entropy = dk.token_logprobs(z, ids, entropy=True, temperature=1.3)
    logq = (z / 1.3).log_softmax(-1)
    want = logq.gather(-1, ids if k else ids[..., None])
    want = want if k else want[..., 0]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(entropy, -(logq.exp() * logq).sum(-1))
    g = torch.autograd.grad((got * 0.3).sum() + (entropy**2).sum(), z)[0]
    w = torch.autograd.grad((want * 0.3).sum() + ((logq.exp() * logq).sum(-1) ** 2).sum(), z)[0]
    torch.testing.assert_close(g, w)
    assert torch.equal(dk.token_logprobs(z, ids, temperature=1.3), got)
    assert dk.token_logprobs(z, torch.full((2, 4), -1)).eq(-math.inf).all()


def test_a_repeated_id_is_an_empty_slot():
    """As the kernels count the first only, so does the loss, its statistics and the cross-entropy."""
    z = rows(1, 20).requires_grad_()
    logprobs = torch.tensor([[0.4, 0.4, 0.2]], dtype=F64).log()
    repeated = dk.TeacherTopK(torch.tensor([[5, 5, 7]]), logprobs)
    emptied = dk.TeacherTopK(torch.tensor([[5, -1, 7]]), logprobs)
    for options in (dict(divergence="jsd"), dict(tail="renormalize"), dict(labels=torch.tensor([5]), ce_weight=1.0)):
        got, want = (dk.topk_distill_loss(z, t, **options) for t in (repeated, emptied))
        assert got.isfinite() and torch.equal(got, want)
        assert torch.equal(torch.autograd.grad(got, z)[0], torch.autograd.grad(want, z)[0])


def test_one_token_without_a_batch():
    z = rows(50).requires_grad_()
    teacher = dk.capture_topk(rows(50, seed=1), 5)
    loss, stats = dk.topk_distill_loss(z, teacher, return_stats=True, labels=torch.tensor(3), ce_weight=0.1)
    assert loss.isfinite() and stats.entropy.shape == () and torch.autograd.grad(loss, z)[0].shape == (50,)
    torch.testing.assert_close(dk.token_logprobs(z, torch.tensor(3)), z.log_softmax(-1)[3])
    torch.testing.assert_close(dk.vocab_stats(z).lse, z.logsumexp(-1))
    weight = rows(50, 8)
    torch.testing.assert_close(dk.linear_token_logprobs(rows(8), weight, torch.tensor(3)), (weight @ rows(8)).log_softmax(-1)[3])


def test_a_head_mass_per_token():
    z = rows(3, 19)
    teacher = dk.capture_topk(rows(3, 19, seed=1), 6)
    mass = torch.tensor([0.2, 0.5, 0.8], dtype=F64)
    got = dk.topk_distill_loss(z, teacher, divergence=dk.divergences.AdaptiveKL(mass), reduction="none")
    for i in range(3):
        torch.testing.assert_close(got[i], dk.topk_distill_loss(z[i], teacher[i], divergence=dk.divergences.AdaptiveKL(mass[i].item())))
