"""Objectives: KDRL's facts by exact sums, each loss against its equation in loops, gradients by numerical differentiation."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import grad, gradcheck

from distilkernels import objectives as obj


def f64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# ------------------------------------------------------------------------- KL estimates: exact sums over V = 7


def on_policy_gradient(kind):
    """E_π[∇ k(token)] by summing over the vocabulary, the sampling probabilities held fixed; and the two KLs' gradients."""
    z = f64(7).requires_grad_()
    teacher = f64(7).log_softmax(-1)
    log_pi = z.log_softmax(-1)
    pi = log_pi.exp()
    (estimate,) = grad((pi.detach() * obj.reverse_kl_estimate(log_pi, teacher, kind)).sum(), z, retain_graph=True)
    (reverse,) = grad((pi * (log_pi - teacher)).sum(), z, retain_graph=True)
    (forward,) = grad((teacher.exp() * (teacher - log_pi)).sum(), z)
    return estimate, reverse, forward


def test_k2_as_a_loss_has_the_gradient_of_reverse_kl():
    estimate, reverse, forward = on_policy_gradient("k2")
    torch.testing.assert_close(estimate, reverse, rtol=1e-12, atol=1e-14)
    assert (estimate - forward).norm() > 0.1 * forward.norm()


def test_k3_as_a_loss_has_the_gradient_of_forward_kl():
    estimate, reverse, forward = on_policy_gradient("k3")
    torch.testing.assert_close(estimate, forward, rtol=1e-12, atol=1e-14)
    assert (estimate - reverse).norm() > 0.1 * reverse.norm()


def test_k1_as_a_loss_has_no_gradient():
    estimate, reverse, _ = on_policy_gradient("k1")
    assert estimate.abs().max() < 1e-15 < reverse.norm()


def test_the_estimates_values():
    """k1 and k3 are unbiased for KL(π ‖ π_T), k2 is not; k3 ≥ 0 everywhere."""
    log_pi, teacher = f64(9).log_softmax(-1), f64(9).log_softmax(-1)
    kl = (log_pi.exp() * (log_pi - teacher)).sum()
    mean = {kind: (log_pi.exp() * obj.reverse_kl_estimate(log_pi, teacher, kind)).sum() for kind in ("k1", "k2", "k3")}
    torch.testing.assert_close(mean["k1"], kl, rtol=1e-12, atol=0)
    torch.testing.assert_close(mean["k3"], kl, rtol=1e-12, atol=0)
    assert abs(mean["k2"] - kl) > 1e-3 and (obj.reverse_kl_estimate(log_pi, teacher, "k3") >= 0).all()
    with pytest.raises(ValueError, match="kind must be one of k1, k2, k3"):
        obj.reverse_kl_estimate(log_pi, teacher, "k4")


# ----------------------------------------------------------------------------------------- policy objectives


def tokens(b=3, length=5):
    """(log-probs, old ones, teacher's, advantages by sequence, mask): ratios on both sides of the clip, NaN outside the mask."""
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    new = (-f64(b, length).abs()).masked_fill(mask == 0, math.nan).requires_grad_()
    old = (new.detach() + 0.5 * f64(b, length)).masked_fill(mask == 0, math.nan)
    return new, old, -f64(b, length).abs(), torch.tensor([1.3, -0.7, 2.0], dtype=torch.float64), mask


def test_aggregate():
    values, mask = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.nan, math.nan]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert obj.aggregate(values, mask) == 7 / 3 and obj.aggregate(values, mask, reduction="sequence_mean") == 2.75
    assert obj.aggregate(values, mask, reduction="sum") == 7 and obj.aggregate(values, mask, num_items_in_batch=14) == 0.5
    assert obj.aggregate(values, mask, reduction="none").tolist() == [[1, 2, 0], [4, 0, 0]]
    assert obj.aggregate(values, mask * torch.tensor([[2.0, 1, 1], [1, 1, 1]])) == 2.0
    for reduction in ("token_mean", "sequence_mean"):
        nothing = obj.aggregate(values.requires_grad_(), mask * 0, reduction=reduction)
        assert nothing == 0 and grad(nothing, values)[0].eq(0).all()


def surrogate(new, old, a, low, high, dual, preserve):
    """One token's objective and its derivative with respect to the log-prob, by cases."""
    r = math.exp(new - old)
    clipped = min(max(r, 1 - low), 1 + high)
    inside = clipped == r
    value, slope = (r * a, r * a) if r * a <= clipped * a else (clipped * a, clipped * a if preserve or inside else 0.0)
    if dual and a < 0 and value < dual * a:
        value, slope = dual * a, dual * a if preserve else 0.0
    return value, slope


@pytest.mark.parametrize("preserve", [False, True])
@pytest.mark.parametrize("dual", [None, 1.5])
def test_clipped_surrogate(preserve, dual):
    new = torch.linspace(-3, 0, 61, dtype=torch.float64).repeat(2).requires_grad_()
    old = torch.full_like(new, -1.5).detach()
    a = torch.tensor([0.8, -0.6], dtype=torch.float64).repeat_interleave(61)
    got = obj.clipped_surrogate(new, old, a, clip_low=0.3, clip_high=0.4, dual_clip=dual, preserve_gradient=preserve)
    (slope,) = grad(got.sum(), new)
    want = [surrogate(n, o, x, 0.3, 0.4, dual, preserve) for n, o, x in zip(new.tolist(), old.tolist(), a.tolist())]
    torch.testing.assert_close(torch.stack([got.detach(), slope], -1), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("preserve", [False, True])
def test_a_ratio_that_overflows(preserve):
    """A token that the old policy gave e^−200, in float32: where the clip or the dual clip decides, or nothing is at stake, all is finite."""
    new, old = torch.full((3,), -1.0, requires_grad=True), torch.full((3,), -200.0)
    got = obj.clipped_surrogate(new, old, torch.tensor([2.0, -2.0, 0.0]), dual_clip=3.0, preserve_gradient=preserve)
    torch.testing.assert_close(got, torch.tensor([2.4, -6.0, 0.0]))
    torch.testing.assert_close(grad(got.sum(), new)[0], got.detach() if preserve else torch.zeros(3))


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kdrl_where_the_teacher_was_not_run(kind):
    """Correct responses need no teacher: its log-probs there may be NaN, and the gradient is that of the rest."""
    new, old = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]]).double().requires_grad_(), torch.full((2, 2), -1.5).double()
    teacher, a, kd = torch.tensor([[math.nan, -math.inf], [-2.0, -1.0]]).double(), torch.tensor([1.0, -1.0]).double(), torch.tensor([0, 1])
    got = obj.kdrl(new, old, teacher, a, beta=0.5, kind=kind, kd_mask=kd)
    d = obj.reverse_kl_estimate(new[1], teacher[1], kind)
    want = (0.5 * d.sum() - obj.clipped_surrogate(new, old, a).sum()) / 4
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad(got, new)[0], grad(want, new)[0])
    with pytest.raises(TypeError, match="kd_mask must be a tensor; got list"):
        obj.kdrl(new, old, teacher, a, beta=0.5, kd_mask=[0, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_reduced_in_float32(dtype):
    """Their counts end at 256 and 65,504 tokens."""
    mask = torch.ones(1, 70_000)
    mask[:, 257:300] = 0
    x = torch.full((1, 70_000), -0.5, dtype=dtype).masked_fill(mask == 0, math.nan).requires_grad_()
    for loss in (obj.aggregate(x, mask), obj.aggregate(x, mask, reduction="sequence_mean"), -obj.redi(x, torch.ones(1), mask)):
        assert loss == -0.5 and loss.dtype == torch.float32
    old = torch.zeros_like(x)
    assert obj.gppo(x, old, torch.ones(1), mask).item() == pytest.approx(-math.exp(-0.5), rel=1e-6)
    assert obj.kdrl(x, x.detach(), old, torch.zeros(1), mask, beta=1.0) == 0.125
    dpo = obj.token_dpo(x, old, old, old, chosen_mask=mask, rejected_mask=mask, beta=1e-4)
    assert dpo.item() == pytest.approx(math.log1p(math.exp(0.5e-4 * mask.sum().item())), rel=1e-5)
    (g,) = grad(dpo, x)
    assert g.dtype == dtype and g.isfinite().all()
    scores = torch.zeros(300, dtype=dtype)  # 44,850 pairs
    assert obj.ranknet(scores, torch.arange(300)).item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_gppo_and_kdrl(reduction):
    new, old, teacher, a, mask = tokens()
    kd = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    by_sequence_gppo, by_sequence_kdrl = [], []
    for b in range(2):
        rows = range(int(mask[b].sum()))
        gppo_terms, kdrl_terms = [], []
        for t in rows:
            x = new[b, t]
            r = (x - old[b, t]).exp()
            c = r * (r.detach().clamp(0.8, 1.2) / r.detach())
            gppo_terms.append(-torch.minimum(r * a[b], c * a[b]))
            big = (teacher[b, t] - x).square() / 2
            kdrl_terms.append(-torch.minimum(r * a[b], r.clamp(0.8, 1.2) * a[b]) + 0.3 * kd[b] * big)
        by_sequence_gppo.append(torch.stack(gppo_terms))
        by_sequence_kdrl.append(torch.stack(kdrl_terms))

    def combined(parts):
        return torch.cat(parts).mean() if reduction == "token_mean" else torch.stack([p.mean() for p in parts]).mean()

    for got, want in (
        (obj.gppo(new, old, a, mask, reduction=reduction), combined(by_sequence_gppo)),
        (obj.kdrl(new, old, teacher, a, mask, beta=0.3, kd_mask=kd, reduction=reduction), combined(by_sequence_kdrl)),
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        dgot, dwant = grad(got, new)[0], grad(want, new, retain_graph=True)[0]
        torch.testing.assert_close(dgot, dwant, rtol=1e-12, atol=0)
        assert dgot[mask == 0].eq(0).all()
    with pytest.raises(ValueError, match="kind='k1' is no loss"):
        obj.kdrl(new, old, teacher, a, mask, beta=0.3, kind="k1")
    with pytest.raises(ValueError, match="advantages must have shape"):
        obj.gppo(new, old, a[:2], mask)


def test_annealing():
    assert obj.annealed(0) == 5e-3 and obj.annealed(10**6) == 1e-3 and obj.annealed(40) == pytest.approx(3e-3)
    upwards = [obj.annealed(step, 0.0, 1.0, -0.25) for step in (0, 2, 9)]
    assert upwards == [0.0, 0.5, 1.0]


def test_groups():
    rewards, groups = torch.tensor([1.0, 0.0, 0.3, 1.0, 0.3, 5.0]), torch.tensor([4, 4, 9, 4, 9, 7])
    got = obj.group_advantages(rewards, groups)
    want = torch.zeros(6)
    for g in (4, 9):
        inside = groups == g
        want[inside] = (rewards[inside] - rewards[inside].mean()) / (rewards[inside].std() + 1e-6)
    torch.testing.assert_close(got, want)
    assert got[5] == 0 and got[[2, 4]].eq(0).all()
    # three tenths over three are not a tenth, and an std of nothing makes much of it
    alike = torch.full((3,), 0.1, dtype=torch.float64)
    assert obj.group_advantages(alike, torch.zeros(3), epsilon=1e-17).eq(0).all()
    torch.testing.assert_close(obj.group_advantages(rewards, groups, scale=False)[:2], torch.tensor([1 / 3, -2 / 3]))
    # a reward that a verifier failed to give is its own group's affair
    broken = obj.group_advantages(rewards.masked_fill(torch.arange(6) == 2, math.nan), groups)
    torch.testing.assert_close(broken[groups == 4], want[groups == 4])
    assert broken[groups == 9].isnan().all() and broken[5] == 0
    correct = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    assert obj.distill_mask(correct, groups, "response").tolist() == [0, 1, 1, 0, 1, 0]
    assert obj.distill_mask(correct, groups, "group").tolist() == [0, 0, 1, 0, 1, 0]


# --------------------------------------------------------------------------------------- preference objectives


def test_redi():
    x, mask = f64(4, 5).requires_grad_(), (torch.rand(4, 5) < 0.7).long()
    mask[:, 0] = 1
    positive, w, tw = torch.tensor([1, 0, 1, 0]), torch.tensor([1.0, 2.0, 0.5, 0.25]).double(), torch.rand(4, 5).double()
    nll = [-sum(x[b, t] * tw[b, t] for t in range(5) if mask[b, t]) / mask[b].sum() for b in range(4)]
    want = (nll[0] + 0.5 * nll[2]) / 1.5 - 0.7 * (2 * nll[1] + 0.25 * nll[3]) / 2.25
    got = obj.redi(x.masked_fill(mask == 0, math.nan), positive, mask, alpha=0.7, sequence_weights=w, token_weights=tw)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad(got, x)[0], grad(want, x)[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(obj.redi(x, torch.ones(4)), -x.mean())
    # |y| = Σ mask, whatever it comes to; a trace of weight 0 may hold anything, and is no part of the other side
    torch.testing.assert_close(obj.redi(x[:1], torch.ones(1), torch.full((1, 5), 0.1).double()), -x[0].mean())
    broken = x.detach().clone()
    broken[1, 2], broken[2] = -math.inf, math.nan
    broken.requires_grad_()
    got = obj.redi(broken, positive, sequence_weights=torch.tensor([1.0, 1.0, 0.0, 1.0]).double())
    assert got == -math.inf and (grad(got, broken)[0][2] == 0).all()


@pytest.mark.parametrize("length_normalize", [False, True])
def test_token_dpo(length_normalize):
    parts = [f64(3, 4).requires_grad_(), f64(3, 4), f64(3, 6).requires_grad_(), f64(3, 6)]
    masks = [(torch.rand(3, 4) < 0.6), (torch.rand(3, 6) < 0.6)]
    weights = [torch.rand(3, 4).double(), torch.rand(3, 6).double()]
    sums = []
    for b in range(3):
        both = []
        for side in range(2):
            inside = masks[side][b]
            total = (weights[side][b] * (parts[2 * side][b] - parts[2 * side + 1][b]))[inside].sum()
            both.append(total / max(int(inside.sum()), 1) if length_normalize else total)
        sums.append(torch.nn.functional.softplus(-0.4 * (both[0] - both[1])))
    options = dict(chosen_mask=masks[0], rejected_mask=masks[1], chosen_weights=weights[0], rejected_weights=weights[1], beta=0.4)
    got = obj.token_dpo(*parts, length_normalize=length_normalize, **options)
    torch.testing.assert_close(got, torch.stack(sums).mean(), rtol=1e-12, atol=0)
    each = obj.token_dpo(*parts, length_normalize=length_normalize, reduction="none", **options)
    torch.testing.assert_close(each, torch.stack(sums), rtol=1e-12, atol=0)
    assert gradcheck(lambda c, r: obj.token_dpo(c, parts[1], r, parts[3], **options), (parts[0], parts[2]))
    # a mask that weighs: |y| is its sum; the reference is a constant; no pair is a loss of 0
    half = torch.full((3, 4), 0.5).double()
    weighed = obj.token_dpo(parts[0], parts[1].requires_grad_(), parts[0], parts[0], chosen_mask=half, length_normalize=True, beta=1.0)
    torch.testing.assert_close(weighed, torch.nn.functional.softplus(-(parts[0] - parts[1]).mean(-1)).mean())
    assert grad(weighed, parts[1], allow_unused=True)[0] is None
    assert obj.token_dpo(*(t[:0] for t in parts), reduction="mean") == 0
    with pytest.raises(ValueError, match="chosen_reference must have the shape of chosen_logprobs"):
        obj.token_dpo(parts[0], parts[3], parts[2], parts[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_contrastive_token_weights(dtype, monkeypatch):
    from distilkernels.objectives import preference

    monkeypatch.setattr(preference, "_BLOCK_BYTES", 3 * 101 * 4)
    good, bad = (torch.randn(2, 5, 101) * 0.3).to(dtype), (torch.randn(2, 5, 101) * 0.3).to(dtype)
    good[..., 3], bad[..., 5] = -math.inf, -math.inf
    ids = torch.randint(6, 101, (2, 5))
    got = obj.contrastive_token_weights(good, bad, ids, contrast=1.5)
    z = 2.5 * good.double() - 1.5 * bad.double()
    z[..., [3, 5]] = -math.inf
    torch.testing.assert_close(got.double(), z.softmax(-1).gather(-1, ids[..., None])[..., 0], rtol=1e-4, atol=0)
    released = obj.contrastive_token_weights(good, good, ids)
    torch.testing.assert_close(released.double(), good.double().softmax(-1).gather(-1, ids[..., None])[..., 0], rtol=1e-4, atol=0)


# --------------------------------------------------------------------------------- scores, latents, spans


def test_ranknet():
    scores, relevance = f64(2, 5).requires_grad_(), torch.tensor([[3, 1, 2, 2, 9], [0, 0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    pairs = [math.log1p(math.exp(-(scores[0, i] - scores[0, j]).item() / 0.5)) for i, j in ((0, 1), (0, 2), (0, 3), (2, 1), (3, 1))]
    for reduction, want in (("pair_mean", sum(pairs) / 5), ("list_mean", sum(pairs) / 5), ("sum", sum(pairs))):
        got = obj.ranknet(scores, relevance, mask, temperature=0.5, reduction=reduction)
        assert got.item() == pytest.approx(want, rel=1e-12)
    assert obj.ranknet(scores, relevance, mask, reduction="none")[1] == 0
    # a candidate that does not exist wins no pair and loses none
    relevance[0, 4] = -9
    assert obj.ranknet(scores, relevance, mask, temperature=0.5).item() == pytest.approx(sum(pairs) / 5, rel=1e-12)
    assert gradcheck(lambda s: obj.ranknet(s, relevance, mask), scores)


@pytest.mark.parametrize("negatives", [None, "own", "shared"])
@pytest.mark.parametrize("in_batch", [False, True])
def test_info_nce(negatives, in_batch):
    a, p = f64(4, 3).requires_grad_(), f64(4, 3).requires_grad_()
    n = None if negatives is None else f64(4, 2, 3) if negatives == "own" else f64(2, 3)
    cos = lambda x, y: (x @ y) / (x.norm() * y.norm())
    losses = []
    for i in range(4):
        logits = [cos(a[i], p[i])]
        logits += [cos(a[i], p[j]) for j in range(4) if in_batch and j != i]
        logits += [] if n is None else [cos(a[i], x) for x in (n[i] if n.dim() == 3 else n)]
        losses.append(torch.nn.functional.cross_entropy(torch.stack(logits)[None] / 0.2, torch.tensor([0])))
    got = obj.info_nce(a, p, n, in_batch=in_batch, temperature=0.2)
    torch.testing.assert_close(got, torch.stack(losses).mean(), rtol=1e-12, atol=1e-14)
    w = torch.tensor([0.0, 1.0, 3.0, 0.5]).double()
    weighted = obj.info_nce(a, p, n, in_batch=in_batch, temperature=0.2, weights=w)
    torch.testing.assert_close(weighted, (w * torch.stack(losses)).sum() / w.sum(), rtol=1e-12, atol=1e-14)
    if not in_batch:
        broken = a.detach().clone()
        broken[0] = math.nan
        torch.testing.assert_close(obj.info_nce(broken, p, n, in_batch=False, temperature=0.2, weights=w), weighted)
    if negatives or in_batch:
        assert gradcheck(lambda x, y: obj.info_nce(x, y, n, in_batch=in_batch, temperature=0.2, normalize=False), (a, p))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_latent_kl(direction):
    s, t = f64(2, 3, 6).requires_grad_(), f64(2, 3, 6).requires_grad_()
    mask = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]]).double()
    broken = s.masked_fill((mask == 0)[..., None], math.nan)
    p, q = (t.detach() / 2).softmax(-1), (s / 2).softmax(-1)
    kl = (p * (p / q).log()).sum(-1) if direction == "forward" else (q * (q / p).log()).sum(-1)
    got = obj.latent_kl(broken, t, mask, temperature=2.0, direction=direction)
    torch.testing.assert_close(got, (kl * mask).sum() / mask.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad(got, s)[0], grad((kl * mask).sum() / mask.sum(), s)[0], rtol=1e-10, atol=1e-14)
    assert not obj.latent_kl(s.detach(), t).requires_grad
    assert obj.latent_kl(s, s).abs() < 1e-15


def test_span_weights():
    ids = torch.tensor([[0, 0, 1, -1], [1, 1, 1, 0]])
    assert obj.span_weights(ids, torch.tensor([0.5, 2.0])).tolist() == [[0.5, 0.5, 2, 0], [2, 2, 2, 0.5]]
    with pytest.raises(ValueError, match="span_ids must be below 1, the entries of table; got 1"):
        obj.span_weights(ids, torch.tensor([0.5]))


def test_gradients_of_what_is_left():
    new, old, teacher, a, _ = tokens()
    old, start = old.nan_to_num(-1.0), new.detach().nan_to_num(-1.0).requires_grad_()
    mask = torch.tensor([[1.0, 0.3, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).double()
    for kind in ("k2", "k3"):
        assert gradcheck(lambda x, kind=kind: obj.kdrl(x, old, teacher, a, mask, beta=0.4, kind=kind), start)
    assert gradcheck(lambda x: obj.redi(x, torch.tensor([1, 0, 0]), mask), start)
