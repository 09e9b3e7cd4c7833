"""Each divergence against its formula written naively, and its gradient by finite differences, at the awkward points."""

from __future__ import annotations

import math

import pytest
import torch

from distilkernels import divergences as dv

F64 = torch.float64


def log_rows(rows, *, zeros=(), seed=0):
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(rows, 6, generator=g, dtype=F64) + 0.05
    for column in zeros:
        p[:, column] = 0
    return (p / p.sum(-1, keepdim=True)).log()


def kl(p, q):
    return torch.where(p == 0, 0.0, p * (p / q).log()).sum(-1)


def adaptive(p, q, head_mass=0.5):
    out = []
    for a, b in zip(p, q):
        order = sorted(range(len(a)), key=lambda i: -a[i].item())
        head, mass = [order[0]], a[order[0]].item()
        for i in order[1:]:
            mass += a[i].item()
            if mass > head_mass:
                break
            head.append(i)
        gap = (a - b).abs()
        g_head = gap[head].sum()
        g_tail = gap.sum() - g_head
        out.append((g_head * kl(a, b) + g_tail * kl(b, a)) / (g_head + g_tail))
    return torch.stack(out)


def todi(p, q):
    w = torch.sigmoid((p / q).log())
    return (w * p * (p / q).log() + (1 - w) * q * (q / p).log()).sum(-1)


def jsd(p, q, beta=0.5):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


FORMULAS = {
    "forward_kl": (dv.ForwardKL(), kl),
    "reverse_kl": (dv.ReverseKL(), lambda p, q: kl(q, p)),
    "jsd": (dv.JSD(), jsd),
    "jsd_0.9": (dv.JSD(0.9), lambda p, q: jsd(p, q, 0.9)),
    "jsd_0": (dv.JSD(0), kl),
    "jsd_1": (dv.JSD(1.0), lambda p, q: kl(q, p)),
    "skew_forward_kl": (dv.SkewForwardKL(), lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    "skew_reverse_kl": (dv.SkewReverseKL(0.3), lambda p, q: kl(q, 0.7 * p + 0.3 * q)),
    "total_variation": (dv.TotalVariation(), lambda p, q: 0.5 * (p - q).abs().sum(-1)),
    "alpha_beta": (dv.AlphaBeta(), lambda p, q: -4 * (p.sqrt() * q.sqrt() - 0.5 * p - 0.5 * q).sum(-1)),
    "alpha_beta_2": (dv.AlphaBeta(2.0), lambda p, q: 0.5 * (p**2 / q - 2 * p + q).sum(-1)),
    "alpha_beta_-0.5": (dv.AlphaBeta(-0.5, beta=1.5), lambda p, q: (p**-0.5 * q**1.5 + 0.5 * p - 1.5 * q).sum(-1) / 0.75),
    "adaptive_kl": (dv.AdaptiveKL(), adaptive),
    "adaptive_kl_0.8": (dv.AdaptiveKL(0.8), lambda p, q: adaptive(p, q, 0.8)),
    "todi": (dv.ToDi(), todi),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name):
    divergence, formula = FORMULAS[name]
    log_p, log_q = log_rows(7), log_rows(7, seed=1)
    torch.testing.assert_close(divergence(log_p, log_q), formula(log_p.exp(), log_q.exp()), rtol=1e-12, atol=1e-14)


def frozen(name, log_p, log_q):
    """todi and adaptive_kl with their detached weights held at one point: what their gradient is the gradient of."""
    p, q = log_p.exp(), log_q.detach().exp()
    if name == "todi":
        w = torch.sigmoid(log_p - log_q.detach())
        return lambda lp, lq: (w * lp.exp() * (lp - lq) + (1 - w) * lq.exp() * (lq - lp)).sum(-1)
    weighted = adaptive(p, q)
    forward, reverse = kl(p, q), kl(q, p)
    share = (weighted - reverse) / (forward - reverse)  # g_h/(g_h + g_t)
    return lambda lp, lq: share * (lp.exp() * (lp - lq)).sum(-1) + (1 - share) * (lq.exp() * (lq - lp)).sum(-1)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradient(name):
    divergence, _ = FORMULAS[name]
    log_p, log_q = log_rows(3), log_rows(3, seed=1).requires_grad_()
    if name in ("todi", "adaptive_kl"):
        fixed = frozen(name, log_p, log_q)
        (got,) = torch.autograd.grad(divergence(log_p, log_q).sum(), log_q)
        (want,) = torch.autograd.grad(fixed(log_p, log_q).sum(), log_q)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        divergence = fixed
    elif name.startswith("adaptive"):
        return
    assert torch.autograd.gradcheck(lambda lq: divergence(log_p, lq), log_q)


@pytest.mark.parametrize("name", FORMULAS)
def test_zero_at_equality(name):
    divergence, _ = FORMULAS[name]
    log_p = log_rows(4)
    log_q = log_p.clone().requires_grad_()
    value = divergence(log_p, log_q)
    assert value.abs().max() < 1e-12
    (grad,) = torch.autograd.grad(value.sum(), log_q)
    # a divergence is stationary at q = p along the simplex: the gradient is proportional to q
    ratio = grad / log_q.exp()
    assert (ratio - ratio.mean(-1, keepdim=True)).abs().max() < 1e-9 or name == "total_variation"


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("p_zeros,q_zeros", [((1,), ()), ((), (2,)), ((3,), (3,)), ((1, 3), (3, 5))], ids=str)
def test_zeros_have_their_limits(name, p_zeros, q_zeros):
    """0·log 0 = 0; one-sided zeros are finite or +inf as the mathematics says, and gradients are never NaN where finite."""
    divergence, _ = FORMULAS[name]
    log_p, log_q = log_rows(3, zeros=p_zeros), log_rows(3, zeros=q_zeros, seed=1).requires_grad_()
    value = divergence(log_p, log_q)
    p_only, q_only = bool(set(p_zeros) - set(q_zeros)), bool(set(q_zeros) - set(p_zeros))
    forward = name in ("forward_kl", "jsd_0", "alpha_beta_2")  # +inf where q = 0 < p
    reverse = name in ("reverse_kl", "jsd_1", "alpha_beta_-0.5")  # +inf where p = 0 < q
    both = name.startswith(("adaptive", "todi"))
    infinite = (q_only and (forward or both)) or (p_only and (reverse or both))
    assert value.isinf().all() == infinite and not value.isnan().any()
    if not infinite:
        nearly_p = log_p.masked_fill(log_p == -math.inf, -80.0)
        nearly_q = log_q.detach().masked_fill(log_q == -math.inf, -80.0)
        if not name.startswith(("adaptive", "todi", "alpha")):
            torch.testing.assert_close(value, divergence(nearly_p, nearly_q), rtol=1e-6, atol=1e-9)
        (grad,) = torch.autograd.grad(value.sum(), log_q)
        assert grad.isfinite().all()


@pytest.mark.parametrize("make", [dv.JSD, dv.SkewForwardKL, dv.SkewReverseKL, dv.AlphaBeta], ids=lambda m: m.__name__)
def test_a_parameter_per_token(make):
    values = torch.tensor([0.2, 0.5, 0.7], dtype=F64)
    if make is dv.JSD:
        values = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    log_p, log_q = log_rows(3, zeros=(2,)), log_rows(3, zeros=(2,), seed=1).requires_grad_()
    got = make(values)(log_p, log_q)
    want = torch.stack([make(v.item())(log_p[i], log_q[i]) for i, v in enumerate(values)])
    torch.testing.assert_close(got, want)
    (a,) = torch.autograd.grad(got.sum(), log_q, retain_graph=True)
    (b,) = torch.autograd.grad(want.sum(), log_q)
    torch.testing.assert_close(a, b)
    part = make(values.view(1, 3)).rows(torch.tensor([2, 0]))
    torch.testing.assert_close(part(log_p[[2, 0]], log_q[[2, 0]]), got[[2, 0]])


def test_jsd_per_token_keeps_infinite_branches_apart():
    """A row of β = 0 with p = 0 < q must not meet the infinite reverse KL of a row it is not."""
    log_p, log_q = log_rows(2, zeros=(1,)), log_rows(2, seed=1).requires_grad_()
    value = dv.JSD(torch.tensor([0.0, 0.5], dtype=F64))(log_p, log_q)
    (grad,) = torch.autograd.grad(value.sum(), log_q)
    assert value.isfinite().all() and grad.isfinite().all()


def test_the_tail_bucket_is_never_head():
    """With p_tail = 0.45 the most probable bucket is the tail; the head must then be the best listed id."""
    log_p = torch.tensor([[0.3, 0.25, 0.45]], dtype=F64).log()
    log_q = torch.tensor([[0.2, 0.5, 0.3]], dtype=F64).log()
    p, q = log_p.exp(), log_q.exp()
    gap = (p - q).abs()
    g_head, g_tail = gap[0, 0], gap[0, 1:].sum()
    want = (g_head * kl(p, q) + g_tail * kl(q, p)) / (g_head + g_tail)
    torch.testing.assert_close(dv.AdaptiveKL().buckets(True)(log_p, log_q), want)
    assert not torch.allclose(dv.AdaptiveKL()(log_p, log_q), want)


@pytest.mark.parametrize("bad", [
    lambda: dv.JSD(1.5), lambda: dv.SkewForwardKL(-0.1), lambda: dv.SkewReverseKL(2), lambda: dv.AlphaBeta(1), lambda: dv.AlphaBeta(0.0),
    lambda: dv.AlphaBeta(0.5, 0.6), lambda: dv.AdaptiveKL(1.1), lambda: dv.resolve("kl"),
])  # fmt: skip
def test_bad_parameters(bad):
    with pytest.raises(ValueError):
        bad()


def test_resolve_takes_callables():
    def mine(log_p, log_q):
        return (log_p - log_q).sum(-1)

    assert dv.resolve(mine) is mine
    with pytest.raises(TypeError, match="callable"):
        dv.resolve(3)
    assert set(dv.NAMES) == {"forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation", "alpha_beta", "adaptive_kl", "todi"}
