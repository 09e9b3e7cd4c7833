"""``distill_loss`` and ``linear_distill_loss``: a dense teacher, against plain PyTorch in fp64, the top-k losses and other libraries."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from dense_rows import F64, WAYS, plain, rows, value_and_grad

import distilkernels as dk
from distilkernels.divergences import JSD, AlphaBeta, SkewForwardKL, SkewReverseKL

DIVERGENCES = tuple(dk.divergences.NAMES)
REFUSED = {(d, t) for d in ("reverse_kl", "skew_reverse_kl", "adaptive_kl") for t in ("renormalize_teacher", "drop")}


# ---------------------------------------------------------------------------------------- value and gradient


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", [*DIVERGENCES, JSD(0.1), JSD(0), JSD(1.0), SkewForwardKL(0.9), SkewReverseKL(0.0), AlphaBeta(1.7)], ids=str)
def test_value_and_gradient(divergence, temperature):
    z, t = rows(2, 3, 29).requires_grad_(), rows(2, 3, 29, seed=1)
    want, (b,) = value_and_grad(plain(z, t, divergence, temperature), z)
    for reduction in ("none", "mean"):
        got, (a,) = value_and_grad(dk.distill_loss(z, t, divergence=divergence, temperature=temperature, reduction=reduction), z)
        torch.testing.assert_close(got, want if reduction == "none" else want.mean(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(a, b if reduction == "none" else b / 6, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence,tail", [p for p in itertools.product(DIVERGENCES, ("bucket", "renormalize", "renormalize_teacher", "drop"))
                                             if p not in REFUSED])  # fmt: skip
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_agrees_with_the_top_k_loss_at_k_is_v(divergence, tail, temperature):
    """With every id listed there is no tail, and all tail modes are the dense loss: with weights, labels and all."""
    z, t, labels = rows(2, 4, 23).requires_grad_(), rows(2, 4, 23, seed=1), torch.randint(23, (2, 4))
    labels[0, 1], labels[1, 2] = -100, -100
    weights = torch.tensor([[1.0, 0.0, 2.0, 0.5], [0.0, 1.0, 1.0, 3.0]])
    options = dict(divergence=divergence, temperature=temperature, labels=labels, ce_weight=0.3, token_weights=weights, softcap=20.0, logit_scale=1.1)
    teacher = dk.capture_topk(t, 23, temperature=temperature, softcap=9.0)
    for extra in ({}, {"num_items_in_batch": 5}, {"reduction": "sum"}, {"scale_by_t2": False}):
        want, (b,) = value_and_grad(dk.topk_distill_loss(z, teacher, tail=tail, **options, **extra), z)
        got, (a,) = value_and_grad(dk.distill_loss(z, t, teacher_softcap=9.0, **options, **extra), z)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d not in ("todi", "adaptive_kl")])
def test_gradcheck(divergence):
    t = rows(3, 9, seed=1)

    def loss(x):
        return dk.distill_loss(
            x, t, divergence=divergence, temperature=1.5, softcap=4.0, logit_scale=0.8, teacher_logit_scale=0.7, teacher_softcap=6.0,
            valid_vocab=8, token_weights=torch.tensor([0.5, 0.0, 2.0]), labels=torch.tensor([3, 1, -100]), ce_weight=0.4,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, rows(3, 9).requires_grad_())


@pytest.mark.parametrize("make", [JSD, SkewForwardKL, SkewReverseKL, AlphaBeta])
def test_a_parameter_for_each_token(make):
    """Among them the ends of [0, 1], where JSD is a KL."""
    values = torch.tensor([[0.0, 0.3, 1.0], [0.5, 1.0, 0.0]], dtype=F64)
    values = values.clamp(0.2, 0.9) if make is AlphaBeta else values
    z, t = rows(2, 3, 19).requires_grad_(), rows(2, 3, 19, seed=1)
    flat = [plain(z.view(6, 19)[i], t.view(6, 19)[i], make(float(v))) for i, v in enumerate(values.flatten())]
    want, (b,) = value_and_grad(torch.stack(flat).mean(), z)
    got, (a,) = value_and_grad(dk.distill_loss(z, t, divergence=make(values)), z)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    hidden, weight = rows(2, 3, 7, seed=3), rows(19, 7, seed=4)
    linear = dk.linear_distill_loss(hidden, weight, hidden.flip(0), weight, divergence=make(values), chunk_size=2)
    torch.testing.assert_close(linear, dk.distill_loss(hidden @ weight.T, hidden.flip(0) @ weight.T, divergence=make(values)))


def test_any_callable():
    def squared(log_p, log_q):
        return (log_p.exp() - log_q.exp()).square().sum(-1)

    z, t = rows(5, 19).requires_grad_(), rows(5, 19, seed=1)
    want, (b,) = value_and_grad((t.softmax(-1) - z.softmax(-1)).square().sum(-1).mean(), z)
    got, (a,) = value_and_grad(dk.distill_loss(z, t, divergence=squared), z)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(a, b)
    # one that asks nothing of the student gives it nothing
    (zero,) = torch.autograd.grad(dk.distill_loss(z, t, divergence=lambda p, q: p.sum(-1)), z)
    assert (zero == 0).all()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16), (F64, torch.float32)])
@pytest.mark.parametrize("divergence", WAYS)
def test_dtypes_differ(divergence, dtypes):
    z, t = rows(4, 517).to(dtypes[0]).requires_grad_(), rows(4, 517, seed=1).to(dtypes[1])
    exact = z.detach().double().requires_grad_()
    want, (b,) = value_and_grad(plain(exact, t.double(), divergence).mean(), exact)
    got, (a,) = value_and_grad(dk.distill_loss(z, t, divergence=divergence), z)
    assert got.dtype == (F64 if dtypes[0] == F64 else torch.float32) and a.dtype == dtypes[0]
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)
    step = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, F64: 2e-6}[dtypes[0]]
    assert (a.double() - b).abs().max() <= step * b.abs().max()


@pytest.mark.parametrize("theirs", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", WAYS)
def test_float64_beside_another_dtype(divergence, theirs):
    """float64 logits are float64 throughout, whatever the teacher's; far from 0, where a float32 softmax adds up to 1 + 1e-5."""
    z, t = (rows(4, 517) + 300).requires_grad_(), rows(4, 517, seed=1).to(theirs)
    want, (b,) = value_and_grad(plain(z, t.double(), divergence).mean(), z)
    got, (a,) = value_and_grad(dk.distill_loss(z, t, divergence=divergence), z)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("divergence", WAYS)
def test_layouts(divergence):
    """logits[:, :-1] on both sides, split differently; the teacher's vocabulary padded to another width."""
    z, t = rows(3, 6, 21).requires_grad_(), rows(5, 3, 24, seed=1).transpose(0, 1)
    with torch.no_grad():
        z[..., 20:] = t[..., 20:] = math.nan  # what is not valid may be anything
    want, (b,) = value_and_grad(plain(z[:, :-1, :20], t[..., :20], divergence), z)
    got, (a,) = value_and_grad(dk.distill_loss(z[:, :-1], t, divergence=divergence, valid_vocab=20, reduction="none"), z)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(a, b)
    mean, (c,) = value_and_grad(dk.distill_loss(z[:, :-1], t, divergence=divergence, valid_vocab=20), z)
    torch.testing.assert_close(mean, want.mean())
    torch.testing.assert_close(c, b / 15)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_of_weight_0_may_hold_anything(divergence):
    z, t = rows(4, 11), rows(4, 11, seed=1)
    clean = z.clone().requires_grad_()
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0])
    want, (b,) = value_and_grad(dk.distill_loss(clean, t, divergence=divergence, token_weights=weights), clean)
    z[1], z[3, 2], t[3], t[1, 0] = math.nan, math.inf, math.nan, -math.inf
    z.requires_grad_()
    for reduction, backend in (("mean", None), ("none", None), ("mean", "reference")):
        options = dict(token_weights=weights, reduction=reduction, backend=backend)
        got, (a,) = value_and_grad(dk.distill_loss(z, t, divergence=divergence, **options), z)
        got, a = (got.sum() / 1.5, a / 1.5) if reduction == "none" else (got, a)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(a, b)
    nothing = dk.distill_loss(z, t, divergence=divergence, token_weights=torch.zeros(4))
    assert nothing == 0 and (torch.autograd.grad(nothing, z)[0] == 0).all()


@pytest.mark.parametrize("divergence", WAYS)
def test_labels_beside_the_divergence(divergence):
    labels = torch.tensor([2, -100])
    z, t = rows(2, 7).requires_grad_(), rows(2, 7, seed=1)
    got, (a,) = value_and_grad(dk.distill_loss(z, t, divergence=divergence, labels=labels, ce_weight=2.0, reduction="sum"), z)
    want, (b,) = value_and_grad(plain(z, t, divergence).sum() - 2 * z.log_softmax(-1)[0, 2], z)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("divergence", WAYS)
def test_a_label_beyond_the_valid_columns(divergence):
    """Its probability is 0 on logits and behind the lm_head; rows without one are as they were."""
    hidden, weight = rows(2, 5), rows(9, 5, seed=1)
    z, t, labels = hidden @ weight.T, rows(2, 9, seed=2), torch.tensor([7, -100])
    options = dict(divergence=divergence, labels=labels, ce_weight=0.5, valid_vocab=7, reduction="none")
    linear = dk.linear_distill_loss(hidden, weight, t, torch.eye(9, dtype=F64), **options)
    for found in (dk.distill_loss(z, t, **options), linear):
        assert found[0] == math.inf
        torch.testing.assert_close(found[1], plain(z[1, :7], t[1, :7], divergence))


@pytest.mark.parametrize("divergence", WAYS)
def test_float16_with_a_large_denominator(divergence):
    """A gradient scaler multiplies what num_items_in_batch divides: in between lies nothing that float16 cannot hold."""
    n = 2.0**20
    z, t = rows(4, 31).half().requires_grad_(), rows(4, 31, seed=1).half()
    hidden, weight = rows(4, 5).half().requires_grad_(), rows(31, 5, seed=2).half().requires_grad_()
    for leaves, loss in (
        ((z,), lambda **o: dk.distill_loss(z, t, divergence=divergence, **o)),
        ((hidden, weight), lambda **o: dk.linear_distill_loss(hidden, weight, rows(4, 5, seed=3).half(), weight.detach(), divergence=divergence, **o)),
    ):
        want = torch.autograd.grad(loss(reduction="sum"), leaves)
        got = torch.autograd.grad(loss(num_items_in_batch=n) * n, leaves)
        for a, b in zip(got, want):
            assert (a - b).abs().max() <= 2e-3 * b.abs().max()


def test_masked_columns():
    """−inf on the teacher's side alone: forward KL, JSD and the forward skew stay finite, reverse KL is infinite."""
    z, t = rows(2, 13).float().requires_grad_(), rows(2, 13, seed=1).float()
    t[:, 4] = -math.inf
    exact = z.detach().double().requires_grad_()
    for name in ("forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"):
        got, (a,) = value_and_grad(dk.distill_loss(z, t, divergence=name), z)
        want, (b,) = value_and_grad(plain(exact, t.double(), name).mean(), exact)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)
    assert dk.distill_loss(z, t, divergence="reverse_kl") == math.inf
    # and on both sides: the column is not there
    both = z.detach().clone()
    both[:, 4] = -math.inf
    keep = [i for i in range(13) if i != 4]
    for name in DIVERGENCES:
        leaf = both.clone().requires_grad_()
        got, (a,) = value_and_grad(dk.distill_loss(leaf, t, divergence=name), leaf)
        torch.testing.assert_close(got.double(), plain(both[:, keep].double(), t[:, keep].double(), name).mean(), rtol=1e-5, atol=1e-6)
        assert a.isfinite().all() and (a[:, 4] == 0).all()
    assert dk.distill_loss(both, rows(2, 13).float(), divergence="forward_kl") == math.inf


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_close_rows(name):
    """Divergences of 1e-7 nats from float32 logits around 20: differences are summed; sums subtracted would be off by 1e-6."""
    t = (rows(8, 5003) + 20).float()
    z = (t + 1e-3 * torch.randn(8, 5003)).requires_grad_()
    exact = z.detach().double().requires_grad_()
    got = dk.distill_loss(z, t, divergence=name, reduction="none")
    want, (b,) = value_and_grad(plain(exact, t.double(), name), exact)
    assert want.max() < 7e-7
    assert (got.detach() - want).abs().max() < 2e-7
    (a,) = torch.autograd.grad(got.sum(), z)
    assert (a - b).abs().max() <= 1e-6 * exact.softmax(-1).max()


def test_empty():
    for name in WAYS:
        z = torch.zeros(0, 5, requires_grad=True)
        loss = dk.distill_loss(z, torch.zeros(0, 5), divergence=name)
        assert loss == 0 and torch.autograd.grad(loss, z)[0].shape == (0, 5)
        assert dk.distill_loss(z, torch.zeros(0, 5), divergence=name, reduction="none").shape == (0,)
        h, w = torch.zeros(0, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
        a, b = torch.autograd.grad(dk.linear_distill_loss(h, w, h.detach(), w.detach(), divergence=name), (h, w))
        assert a.shape == (0, 3) and (b == 0).all()


@pytest.mark.parametrize("divergence", WAYS)
@pytest.mark.parametrize("linear", [False, True])
def test_statistics(divergence, linear):
    hidden, weight = rows(2, 3, 5), rows(17, 5, seed=1)
    theirs, their_weight = rows(2, 3, 4, seed=2), rows(17, 4, seed=3)
    z, t = hidden @ weight.T, theirs @ their_weight.T
    weights = torch.tensor([[1.0, 0.0, 0.5], [2.0, 1.0, 0.0]])
    options = dict(divergence=divergence, temperature=1.5, token_weights=weights, return_stats=True)
    if linear:
        loss, stats = dk.linear_distill_loss(hidden, weight, theirs, their_weight, chunk_size=2, **options)
    else:
        loss, stats = dk.distill_loss(z, t, **options)
    used = weights != 0
    q = (z / 1.5).softmax(-1)
    torch.testing.assert_close(stats.per_token, plain(z, t, divergence, 1.5) * used)
    torch.testing.assert_close(stats.entropy, -(q * q.log()).sum(-1) * used)
    assert torch.equal(stats.agreement, (z.argmax(-1) == t.argmax(-1)) & used)
    assert torch.equal(stats.teacher_mass, used.to(F64)) and torch.equal(stats.student_mass, used.to(F64))
    torch.testing.assert_close(loss, (stats.per_token * weights).sum() / weights.sum())


# ------------------------------------------------------------------------------------------- behind lm_heads


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", WAYS)
@pytest.mark.parametrize("frozen", ["nothing", "weight", "hidden"])
def test_linear_is_the_loss_on_logits(divergence, reduction, frozen):
    hidden, weight, bias = (rows(*s, seed=i) for i, s in enumerate([(2, 5, 8), (33, 8), (33,)]))
    theirs, their_weight, their_bias = (rows(*s, seed=9 + i) for i, s in enumerate([(2, 5, 6), (40, 6), (40,)]))
    weights = torch.tensor([[1.0, 0.0, 0.5, 2.0, 1.0], [0.0, 0.0, 1.0, 1.0, 0.3]])
    hidden[0, 1], theirs[1, 0] = math.nan, math.nan
    labels = torch.randint(30, (2, 5))
    labels[1, 3] = -100
    leaves = {"nothing": (hidden, weight, bias), "weight": (hidden,), "hidden": (weight, bias)}[frozen]
    for leaf in leaves:
        leaf.requires_grad_()
    options = dict(divergence=divergence, temperature=1.7, reduction=reduction, token_weights=weights, labels=labels, ce_weight=0.3, softcap=11.0,
                   logit_scale=0.9, teacher_softcap=8.0, teacher_logit_scale=1.2, valid_vocab=31)  # fmt: skip
    clean = hidden.masked_fill((weights == 0)[..., None], 0)
    want, b = value_and_grad(dk.distill_loss(clean @ weight.T + bias, theirs @ their_weight.T + their_bias, **options), *leaves)
    got, a = value_and_grad(
        dk.linear_distill_loss(hidden, weight, theirs, their_weight, bias=bias, teacher_bias=their_bias, chunk_size=3, **options), *leaves
    )
    torch.testing.assert_close(got, want)
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "alpha_beta"])
def test_linear_in_lower_precision(divergence, dtype):
    hidden, weight = (rows(*s, seed=i, scale=0.5).to(dtype).requires_grad_() for i, s in enumerate([(7, 16), (101, 16)]))
    theirs, their_weight = (rows(*s, seed=9 + i, scale=0.5).to(dtype) for i, s in enumerate([(7, 12), (101, 12)]))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want, b = value_and_grad(plain(exact[0] @ exact[1].T, theirs.double() @ their_weight.double().T, divergence).mean(), *exact)
    got, a = value_and_grad(dk.linear_distill_loss(hidden, weight, theirs, their_weight, divergence=divergence, chunk_size=4), hidden, weight)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=3 * step, atol=0)
    for x, y in zip(a, b):
        assert x.dtype == dtype and (x.double() - y).abs().max() <= 8 * step * y.abs().max()


# ------------------------------------------------------------------------------------------- other libraries


def sibling(module: str, name: str):
    """A peer's loss, or a skip with the reason."""
    found = pytest.importorskip(module, reason=f"{module} is not installed: its loss is a second opinion", exc_type=ImportError)
    return getattr(found, name)


def generalized_jsd(z, t, beta, temperature):
    """GKD's loss (arXiv 2306.13649) by its definition, in probabilities, and d z worked out by hand: what trl and liger-kernel compute.

    D = β·KL(p‖m) + (1 − β)·KL(q‖m), m = β·p + (1 − β)·q; KL(p‖q) at β = 0 and KL(q‖p) at β = 1. For β in between ∂D/∂q = (1 − β)·log(q/m):
    the terms through m add up to a constant, which the softmax's own derivative drops.
    """
    q, p = (torch.exp(x / temperature) / torch.exp(x / temperature).sum(-1, keepdim=True) for x in (z, t))
    m = beta * p + (1 - beta) * q
    if beta == 0:
        value, slope = p * torch.log(p / q), -p / q
    elif beta == 1:
        value, slope = q * torch.log(q / p), torch.log(q / p)
    else:
        value = beta * p * torch.log(p / m) + (1 - beta) * q * torch.log(q / m)
        slope = (1 - beta) * torch.log(q / m)
    return value.sum(-1), q * (slope - (q * slope).sum(-1, keepdim=True)) / temperature


@pytest.mark.parametrize("beta", [0, 0.1, 0.3, 0.5, 0.9, 1])
def test_generalized_jsd(beta):
    """The mean over the tokens that a label marks, as trl takes it, and with a share of cross-entropy at temperature 1 as liger-kernel does."""
    z, t = rows(2, 5, 43).requires_grad_(), rows(2, 5, 43, seed=1)
    labels = torch.randint(43, (2, 5), generator=torch.Generator().manual_seed(2))
    labels[0, :2] = -100
    mask = (labels != -100).double()
    value, slope = generalized_jsd(z.detach(), t, beta, 1.5)
    options = dict(divergence=JSD(beta), temperature=1.5, scale_by_t2=False, token_weights=mask)
    got, (a,) = value_and_grad(dk.distill_loss(z, t, **options), z)
    torch.testing.assert_close(got, (value * mask).sum() / 8, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(a, slope * mask[..., None] / 8, rtol=1e-10, atol=1e-13)
    known = labels.clamp(min=0)
    hard = -torch.log(z.detach().softmax(-1).gather(-1, known[..., None])[..., 0])
    hard_slope = z.detach().softmax(-1) - torch.nn.functional.one_hot(known, 43)
    identity = torch.eye(43, dtype=F64)
    mixed = 0.75 * dk.linear_distill_loss(z, identity, t, identity, labels=labels, ce_weight=0.25 / 0.75, chunk_size=3, **options)
    got, (a,) = value_and_grad(mixed, z)
    torch.testing.assert_close(got, ((0.75 * value + 0.25 * hard) * mask).sum() / 8, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(a, (0.75 * slope + 0.25 * hard_slope) * mask[..., None] / 8, rtol=1e-10, atol=1e-13)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
def test_trl_generalized_jsd(beta):
    trainer = sibling("trl.experimental.gkd", "GKDTrainer")
    z, t = rows(2, 5, 43).requires_grad_(), rows(2, 5, 43, seed=1)
    labels = torch.randint(43, (2, 5))
    labels[0, :2] = -100
    want, (b,) = value_and_grad(trainer.generalized_jsd_loss(z, t, labels=labels, beta=beta, temperature=1.5), z)
    got, (a,) = value_and_grad(
        dk.distill_loss(z, t, divergence=JSD(beta), temperature=1.5, scale_by_t2=False, token_weights=(labels != -100).double()), z
    )
    # their beta is a tensor of the logits' dtype: all of it is float64 here
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])
def test_liger_fused_linear_jsd(beta):
    make = sibling("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    hidden, weight = (rows(*s, seed=i, scale=1.0).float().requires_grad_() for i, s in enumerate([(6, 8), (43, 8)]))
    theirs, their_weight = rows(6, 12, seed=3, scale=1.0).float(), rows(43, 12, seed=4, scale=1.0).float()
    labels = torch.randint(43, (6,))
    labels[2] = -100
    loss = make(weight_hard_loss=0.25, weight_soft_loss=0.75, beta=beta, temperature=2.0, compiled=False, chunk_size=4)
    want, b = value_and_grad(loss(hidden, weight, theirs, their_weight, labels), hidden, weight)
    mine = 0.75 * dk.linear_distill_loss(
        hidden, weight, theirs, their_weight, divergence=JSD(beta), temperature=2.0, scale_by_t2=False, labels=labels, ce_weight=0.25 / 0.75,
        token_weights=(labels != -100).float(), chunk_size=4,
    )  # fmt: skip
    got, a = value_and_grad(mine, hidden, weight)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------- errors

Z, H, W = torch.randn(2, 3, 11), torch.randn(2, 3, 4), torch.randn(11, 4)


@pytest.mark.parametrize("call,error,message", [
    (lambda: dk.distill_loss("z", Z), TypeError, "student_logits must be a tensor; got str"),
    (lambda: dk.distill_loss(Z, Z.long()), TypeError, "teacher_logits must be float32, bfloat16, float16 or float64; got torch.int64"),
    (lambda: dk.distill_loss(Z, Z[:1]), ValueError, r"teacher_logits must have the student's token shape \(2, 3\); got \(1, 3\)"),
    (lambda: dk.distill_loss(Z, Z[..., :7]), ValueError, "teacher_logits must have the student's 11 columns .*; got 7"),
    (lambda: dk.distill_loss(Z[..., :7], Z), ValueError, "teacher_logits must have the student's 7 columns .*; got 11"),
    (lambda: dk.distill_loss(Z, Z[..., :7], valid_vocab=8), ValueError, "teacher_logits must have the student's 8 columns"),
    (lambda: dk.distill_loss(Z, Z, valid_vocab=12), ValueError, r"valid_vocab must be in \[1, 11\]"),
    (lambda: dk.distill_loss(Z, Z, divergence="kl"), ValueError, "divergence must be one of forward_kl"),
    (lambda: dk.distill_loss(Z, Z, divergence=lambda p, q: p - q), ValueError, r"divergence must return one value per row, shape \(6,\)"),
    (lambda: dk.distill_loss(Z, Z, divergence=JSD(torch.rand(5))), ValueError, "beta of the divergence must have one value per token, 6"),
    (lambda: dk.distill_loss(Z, Z, temperature=0.0), ValueError, "temperature must be positive"),
    (lambda: dk.distill_loss(Z, Z, teacher_softcap=0.0), ValueError, "teacher_softcap must be positive; got 0.0"),
    (lambda: dk.distill_loss(Z, Z, teacher_logit_scale="a"), TypeError, "teacher_logit_scale must be a number"),
    (lambda: dk.distill_loss(Z, Z, reduction="avg"), ValueError, "reduction must be one of"),
    (lambda: dk.distill_loss(Z, Z, token_weights=torch.ones(2)), ValueError, "token_weights must have the token shape"),
    (lambda: dk.distill_loss(Z, Z, ce_weight=0.5), ValueError, "ce_weight=0.5 needs labels"),
    (lambda: dk.distill_loss(Z, Z, labels=torch.full((2, 3), 11), ce_weight=1.0), ValueError, r"labels\[0, 0\] is 11"),
    (lambda: dk.distill_loss(Z, Z, backend="cuda"), dk.BackendError, "backend 'cuda' cannot serve"),
    (lambda: dk.distill_loss(Z[:1].expand(2, 3, 11), Z, inplace_backward=True), ValueError, "rows do not share memory"),
    (lambda: dk.distill_loss(Z[:1].expand(2, 3, 11), Z, inplace_backward=True, divergence="adaptive_kl"), ValueError, "rows do not share memory"),
    (lambda: dk.linear_distill_loss(H, W, H[:1], W), ValueError, r"teacher_hidden must have the student's token shape \(2, 3\); got \(1, 3\)"),
    (lambda: dk.linear_distill_loss(H, W, H, W[:, :3]), ValueError, r"teacher: hidden must have shape \[..., 3\]"),
    (lambda: dk.linear_distill_loss(H, W, H, 3), TypeError, "teacher: weight must be a tensor; got int"),
    (lambda: dk.linear_distill_loss(H, W, H, W[:9]), ValueError, "teacher_weight must have the student's 11 columns"),
    (lambda: dk.linear_distill_loss(H, W, H, W, chunk_size=0), ValueError, "chunk_size must be at least 1"),
])  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
