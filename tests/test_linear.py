"""The linear-fused losses: the same numbers as the losses on ``hidden Wᵀ + bias``, without those logits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import distilkernels as dk
from distilkernels.primitives import head_gemm

F64 = torch.float64
N, V, H, K = 11, 37, 8, 5
HEAD = dict(softcap=5.0, logit_scale=0.7, valid_vocab=33)


def problem(dtype=F64, v=V, h=H, n=N, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(2, n, h, generator=g, dtype=F64) * scale).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=g, dtype=F64).to(dtype).requires_grad_()
    bias = torch.randn(v, generator=g, dtype=F64).to(dtype).requires_grad_()
    teacher = dk.capture_topk(torch.randn(2, n, v, generator=g, dtype=F64)[..., : min(v, 33)] * 2, K, temperature=1.5)
    return hidden, weight, bias, teacher


def same(got, want, leaves, **tolerance):
    torch.testing.assert_close(got, want, **tolerance)
    up = torch.linspace(0.5, 1.5, got.numel(), dtype=got.dtype).view(got.shape)
    for a, b in zip(torch.autograd.grad((got * up).sum(), leaves), torch.autograd.grad((want * up).sum(), leaves)):
        torch.testing.assert_close(a, b, **tolerance)


SERVED = [(d, t) for d, t in itertools.product(dk.divergences.NAMES, ("bucket", "renormalize", "renormalize_teacher", "drop"))
          if t in ("bucket", "renormalize") or d not in ("reverse_kl", "skew_reverse_kl", "adaptive_kl")]  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence,tail", SERVED)
def test_equals_the_loss_on_logits(divergence, tail, reduction):
    h, w, b, teacher = problem()
    labels = torch.arange(2 * N).view(2, N)
    labels[0, 0] = -100
    weights = torch.linspace(0, 1, 2 * N).view(2, N)
    weights[1, 2] = 0
    for options in ({}, dict(labels=labels, ce_weight=0.4, token_weights=weights, return_stats=True)):
        options = dict(divergence=divergence, tail=tail, temperature=1.5, reduction=reduction, **HEAD, **options)
        want = dk.topk_distill_loss(h @ w.t() + b, teacher, **options)
        got = dk.linear_topk_distill_loss(h, w, teacher, bias=b, chunk_size=4, **options)
        if isinstance(want, tuple):
            for x, y in zip(got[1], want[1]):
                torch.testing.assert_close(x, y)
            got, want = got[0], want[0]
        same(got, want, (h, w, b))


@pytest.mark.parametrize("chunk_size", [1, 3, 22, 1000, None])
def test_chunks_do_not_matter(chunk_size):
    h, w, b, teacher = problem()
    same(dk.linear_topk_distill_loss(h, w, teacher, bias=b, temperature=1.5, chunk_size=chunk_size),
         dk.topk_distill_loss(h @ w.t() + b, teacher, temperature=1.5), (h, w, b))  # fmt: skip


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_gradcheck(tail):
    h, w, b, teacher = problem(n=3)
    assert torch.autograd.gradcheck(
        lambda h, w, b: dk.linear_topk_distill_loss(h, w, teacher, bias=b, divergence="jsd", tail=tail, temperature=1.5, chunk_size=4, **HEAD), (h, w, b)
    )
    assert torch.autograd.gradcheck(
        lambda h, w, b: dk.linear_token_logprobs(h, w, teacher.ids, bias=b, entropy=True, chunk_size=4, softcap=5.0), (h, w, b)
    )


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_parts_get_no_gradient_and_no_product(frozen, tail, reduction, monkeypatch):
    tensors = [*problem()[:3]]
    teacher = problem()[3]
    want = dk.topk_distill_loss(tensors[0] @ tensors[1].t() + tensors[2], teacher, temperature=1.5, tail=tail, reduction=reduction)
    expected = torch.autograd.grad(want.sum(), tensors)
    tensors = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    calls = []
    for name in ("hidden_grad", "add_weight_grad"):
        original = getattr(head_gemm.HeadGemm, name)
        monkeypatch.setattr(head_gemm.HeadGemm, name, lambda self, *a, name=name, original=original, **k: (calls.append(name), original(self, *a, **k))[1])
    got = dk.linear_topk_distill_loss(tensors[0], tensors[1], teacher, bias=tensors[2], temperature=1.5, tail=tail, chunk_size=4, reduction=reduction)
    torch.testing.assert_close(got, want)
    assert got.requires_grad == (len(frozen) < 3)
    if got.requires_grad:
        got.sum().backward()
    for i, t in enumerate(tensors):
        if i in frozen:
            assert t.grad is None
        else:
            torch.testing.assert_close(t.grad, expected[i])
    assert not (0 in frozen and "hidden_grad" in calls) and not (1 in frozen and "add_weight_grad" in calls)


def test_no_grad_runs_one_product(monkeypatch):
    h, w, b, teacher = problem()
    monkeypatch.setattr(head_gemm.HeadGemm, "hidden_grad", None)
    monkeypatch.setattr(head_gemm.HeadGemm, "add_weight_grad", None)
    with torch.no_grad():
        loss = dk.linear_topk_distill_loss(h, w, teacher, bias=b, temperature=1.5)
    torch.testing.assert_close(loss, dk.topk_distill_loss(h @ w.t() + b, teacher, temperature=1.5))


def test_renormalize_has_no_vocabulary_product(monkeypatch):
    h, w, b, teacher = problem()
    monkeypatch.setattr(head_gemm.HeadGemm, "logits", None)
    same(dk.linear_topk_distill_loss(h, w, teacher, bias=b, temperature=1.5, tail="renormalize", **HEAD),
         dk.topk_distill_loss(h @ w.t() + b, teacher, temperature=1.5, tail="renormalize", **HEAD), (h, w, b))  # fmt: skip


def test_rows_of_weight_zero_cost_no_product(monkeypatch):
    h, w, b, teacher = problem()
    weights = torch.zeros(2, N)
    weights[0, ::3] = 1.5
    seen = []
    original = head_gemm.HeadGemm.logits
    monkeypatch.setattr(head_gemm.HeadGemm, "logits", lambda self, h, z: (seen.append(h.shape[0]), original(self, h, z))[1])
    poisoned = h.detach().clone()
    poisoned[1] = math.nan
    poisoned.requires_grad_()
    got, stats = dk.linear_topk_distill_loss(poisoned, w, teacher, bias=b, temperature=1.5, token_weights=weights, return_stats=True)
    want, expected = dk.topk_distill_loss(h @ w.t() + b, teacher, temperature=1.5, token_weights=weights, return_stats=True)
    assert sum(seen) == 4
    torch.testing.assert_close(got, want)
    for a, b_ in zip(stats, expected):
        torch.testing.assert_close(a, b_)
    got.backward()
    (clean,) = torch.autograd.grad(want, h)
    torch.testing.assert_close(poisoned.grad, clean)
    seen.clear()
    same(dk.linear_topk_distill_loss(h, w, teacher, bias=b, temperature=1.5, token_weights=weights, num_active=4),
         dk.topk_distill_loss(h @ w.t() + b, teacher, temperature=1.5, token_weights=weights), (h, w, b))  # fmt: skip
    with pytest.raises(ValueError, match="num_active must be an int in"):
        dk.linear_topk_distill_loss(h, w, teacher, bias=b, temperature=1.5, num_active=99)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_num_active_on_a_gpu():
    """The device-side sort keeps rows in order and takes what it is told, without a sync."""
    from distilkernels import linear

    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 3.0], dtype=F64, device="cuda")
    assert linear.active_rows(weights, 5, 3).tolist() == [1, 3, 4]


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_nan_row_of_weight_zero_reaches_no_gradient(tail, reduction):
    h, w, b, teacher = problem()
    weights = torch.ones(2, N)
    weights[0, 3] = 0
    poisoned = h.detach().clone()
    poisoned[0, 3] = math.nan
    poisoned.requires_grad_()
    loss = dk.linear_topk_distill_loss(poisoned, w, teacher, bias=b, temperature=1.5, tail=tail, token_weights=weights, reduction=reduction)
    want = dk.topk_distill_loss(h @ w.t() + b, teacher, temperature=1.5, tail=tail, token_weights=weights, reduction=reduction)
    for a, e in zip(torch.autograd.grad(loss.sum(), (poisoned, w, b)), torch.autograd.grad(want.sum(), (h, w, b))):
        torch.testing.assert_close(a, e)


def test_nothing_counts():
    h, w, b, teacher = problem()
    for tail in ("bucket", "renormalize"):
        for hidden, t, weights in ((h, teacher, torch.zeros(2, N)), (h[:, :0], teacher[:, :0], None)):
            loss, stats = dk.linear_topk_distill_loss(hidden, w, t, bias=b, temperature=1.5, token_weights=weights, tail=tail, return_stats=True)
            assert loss == 0 and stats.entropy.shape == t.shape
            for grad, like in zip(torch.autograd.grad(loss, (h, w, b)), (h, w, b)):
                assert torch.equal(grad, torch.zeros_like(like))


def test_statistics():
    h, w, b, teacher = problem()
    want = ("lse", "gathered", "tail_lse", "expected_logit", "logit_sum", "lse_t1", "max", "argmax", "second", "rank", "mass_above")
    got = dk.linear_vocab_stats(h, w, teacher.ids, want=want, bias=b, chunk_size=4, temperature=1.5, **HEAD)
    exact = dk.vocab_stats(h @ w.t() + b, teacher.ids, want=want, temperature=1.5, **HEAD)
    for name in want:
        torch.testing.assert_close(getattr(got, name), getattr(exact, name))
    same(got.entropy, exact.entropy, (h, w, b)) if got.entropy.requires_grad else pytest.fail("detached")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tiled", [False, True])
def test_errors_are_no_worse_than_eager_with_float32_logits(dtype, tiled, monkeypatch):
    """dX and dW against fp64 on the same rounded operands."""
    if tiled and dtype == torch.float32:
        return
    monkeypatch.setattr(head_gemm, "converts_weight_tiles", lambda d: tiled)
    h, w, b, teacher = problem(dtype, v=1201, h=64, n=40, scale=0.3)
    exact = [t.detach().double().requires_grad_() for t in (h, w, b)]
    want = dk.topk_distill_loss(exact[0] @ exact[1].t() + exact[2], teacher, temperature=1.5)
    truth = torch.autograd.grad(want, exact)
    eager = [t.detach().float().requires_grad_() for t in (h, w, b)]
    same_logits = (eager[0].to(dtype) @ eager[1].to(dtype).t()).float() + eager[2]
    reference = torch.autograd.grad(dk.topk_distill_loss(same_logits, teacher, temperature=1.5), eager)
    got = dk.linear_topk_distill_loss(h, w, teacher, bias=b, temperature=1.5, chunk_size=32)
    grads = torch.autograd.grad(got, (h, w, b))
    assert (got - want).abs() <= (2e-3 if dtype != torch.float32 else 1e-6) * want
    ulp = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    for grad, eager_grad, exact_grad in zip(grads, reference, truth):
        assert grad.dtype == dtype
        error, allowed = (grad - exact_grad).norm(), (eager_grad - exact_grad).norm()
        assert error <= allowed + ulp * exact_grad.norm()


def test_a_half_precision_scratch():
    h, w, b, teacher = problem(torch.bfloat16, v=501, h=32)
    got = dk.linear_topk_distill_loss(h, w, teacher, bias=b, temperature=1.5, logits_dtype=torch.bfloat16)
    want = dk.linear_topk_distill_loss(h, w, teacher, bias=b, temperature=1.5)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=0)
    with pytest.raises(ValueError, match="logits_dtype must be None, float32 or the dtype of the GEMMs"):
        dk.linear_topk_distill_loss(h, w, teacher, bias=b, temperature=1.5, logits_dtype=torch.float16)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_autocast_with_float32_master_weights(tail):
    h, w, b, teacher = problem(torch.float32, v=301, h=32)
    hidden = h.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = dk.linear_topk_distill_loss(hidden, w, teacher, bias=b, temperature=1.5, tail=tail, logits_dtype=torch.float32)
    want = dk.topk_distill_loss(hidden.float() @ w.bfloat16().float().t() + b, teacher, temperature=1.5, tail=tail)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(got, (hidden, w, b))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    for a, e in zip(grads, torch.autograd.grad(want, (hidden, w, b))):
        assert (a.float() - e.float()).norm() <= 1e-2 * e.float().norm()


def test_upstream_factors_and_repeated_backwards():
    h, w, b, teacher = problem()
    loss = dk.linear_topk_distill_loss(h, w, teacher, bias=b, temperature=1.5)
    once = torch.autograd.grad(loss, (h, w, b), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (h, w, b))
    for a, c in zip(once, thrice):
        torch.testing.assert_close(3 * a, c)
    with pytest.raises(RuntimeError, match="retain_graph=True in the first"):
        torch.autograd.grad(loss, (h, w, b))


def test_a_factor_of_a_gradient_scaler():
    """fp16: the denominator follows the GEMMs, so that a small share of a large batch does not underflow."""
    h, w, _b, teacher = problem(torch.float16, v=101, h=16)
    got = dk.linear_topk_distill_loss(h, w, teacher, temperature=1.5, num_items_in_batch=10**6)
    (grad,) = torch.autograd.grad(got * 2.0**16, w)
    e = w.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(dk.linear_topk_distill_loss(h.double(), e, teacher, temperature=1.5, num_items_in_batch=10**6), e)
    assert (grad.double() / 2**16 - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_compile_fullgraph(tail):
    h, w, b, teacher = problem(torch.float32)

    def step(h, w, b):
        return dk.linear_topk_distill_loss(h * 1.5, w, teacher, bias=b, temperature=1.5, chunk_size=8, tail=tail)

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(h, w, b)
    same(got, step(h, w, b), (h, w, b), rtol=1e-5, atol=1e-6)


def grpo_kdrl(stats, old_logp, teacher_logp, advantage, clip=0.2, beta=5e-3, bonus=1e-3):
    """GRPO's clipped objective, KDRL's k2 estimate of the reverse KL, and an entropy bonus."""
    logp = stats.logprobs[:, 0]
    ratio = (logp - old_logp).exp()
    policy = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    kd = 0.5 * (teacher_logp - logp) ** 2
    return policy + beta * kd - bonus * stats.entropy


def test_any_function_of_the_statistics():
    h, w, b, _ = problem()
    tokens = torch.arange(2 * N).view(2, N)
    per_token = [torch.randn(2, N, dtype=F64) - 3, torch.randn(2, N, dtype=F64) - 3, torch.randn(2, N, dtype=F64).requires_grad_()]
    want = ("lse", "gathered", "expected_logit")
    got = dk.linear_row_loss(h, w, tokens[..., None], grpo_kdrl, per_token=per_token, want=want, bias=b, chunk_size=4)
    logq = (h @ w.t() + b).log_softmax(-1)
    logp = logq.gather(-1, tokens[..., None])[..., 0]
    ratio = (logp - per_token[0]).exp()
    eager = -torch.minimum(ratio * per_token[2], ratio.clamp(0.8, 1.2) * per_token[2]) + 5e-3 * 0.5 * (per_token[1] - logp) ** 2
    eager = (eager + 1e-3 * (logq.exp() * logq).sum(-1)).mean()
    same(got, eager, (h, w, b, per_token[2]))


@pytest.mark.parametrize("call,error,message", [
    (lambda h, w, t: dk.linear_topk_distill_loss(h, w[:, :3], t), ValueError, r"hidden must have shape \[..., 3\] to match weight's \(37, 3\)"),
    (lambda h, w, t: dk.linear_topk_distill_loss(h, w[0], t), ValueError, r"weight must have shape \[V, H\]"),
    (lambda h, w, t: dk.linear_topk_distill_loss(h, w.long(), t), TypeError, "weight must be float32, bfloat16"),
    (lambda h, w, t: dk.linear_topk_distill_loss(h, w, t, bias=w[0]), ValueError, r"bias must have shape \(37,\)"),
    (lambda h, w, t: dk.linear_topk_distill_loss(h, w, t, chunk_size=0), ValueError, "chunk_size must be at least 1"),
    (lambda h, w, t: dk.linear_topk_distill_loss(h, w, t, chunk_size=2.5), TypeError, "chunk_size must be an int"),
    (lambda h, w, t: dk.linear_topk_distill_loss(h, w, t[0]), ValueError, "teacher must have the student's token shape"),
    (lambda h, w, t: dk.linear_row_loss(h, w, None, lambda s: s.lse.sum(), want="lse"), ValueError, "one loss per row"),
    (lambda h, w, t: dk.linear_vocab_stats("h", w), TypeError, "hidden must be a tensor; got str"),
])  # fmt: skip
def test_named_errors(call, error, message):
    h, w, _, teacher = problem()
    teacher = dk.TeacherTopK(teacher.ids, teacher.logprobs, teacher.tail_logprob)
    with pytest.raises(error, match=message):
        call(h, w, teacher)


def test_inside_a_checkpoint_and_saved_tensor_hooks():
    """The epilogue's own small graph is no business of a surrounding checkpoint or offloading."""
    from torch.utils.checkpoint import checkpoint

    h, w, b, teacher = problem()

    def loss(h, w, b):
        return dk.linear_topk_distill_loss(h, w, teacher, bias=b, temperature=1.5, chunk_size=4)

    same(checkpoint(loss, h, w, b, use_reentrant=False), loss(h, w, b), (h, w, b))
    with torch.autograd.graph.save_on_cpu():
        offloaded = loss(h, w, b)
    same(offloaded, loss(h, w, b), (h, w, b))


def test_a_closed_over_parameter_is_refused():
    h, w, _, teacher = problem()
    p = torch.tensor(0.7, dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match="hand it in by per_token"):
        dk.linear_row_loss(h, w, None, lambda s: s.lse * (p * 2), want="lse")
    with pytest.raises(ValueError, match="hand it in by per_token"):
        dk.linear_topk_distill_loss(h, w, teacher, temperature=1.5, divergence=dk.divergences.JSD(p))
    scale = torch.rand(2, N, dtype=F64, requires_grad=True)
    got = dk.linear_row_loss(h, w, None, lambda s, x: s.lse * x, want="lse", per_token=[scale], chunk_size=4)
    same(got, ((h @ w.t()).logsumexp(-1) * scale).mean(), (h, w, scale))
    constant = dk.linear_row_loss(h, w, None, lambda s: torch.ones_like(s.lse), want="lse")
    assert torch.equal(torch.autograd.grad(constant, h)[0], torch.zeros_like(h))


def test_half_precision_sums_do_not_overflow():
    """fp16, one chunk: Σ dz·h is past 65,504 before the denominator."""
    h = torch.full((256, 16), 100.0, dtype=torch.float16).requires_grad_()
    w = torch.zeros(33, 16, dtype=torch.float16).requires_grad_()
    teacher = dk.TeacherTopK(torch.zeros(256, 1, dtype=torch.int64), torch.zeros(256, 1), temperature=4.0)
    (grad,) = torch.autograd.grad(dk.linear_topk_distill_loss(h, w, teacher, temperature=4.0), w)
    assert grad.isfinite().all() and 380 < grad.abs().max() < 400


def test_a_second_derivative_is_refused_by_name():
    h, w, _, teacher = problem()
    for reduction in ("mean", "none"):
        for factor in (1.0, 2.0):
            loss = dk.linear_topk_distill_loss(h, w, teacher, temperature=1.5, reduction=reduction).sum() * factor
            (g,) = torch.autograd.grad(loss, h, create_graph=True)
            with pytest.raises(RuntimeError, match="a linear-fused loss has no second derivative"):
                torch.autograd.grad(g.sum(), h)
    with pytest.raises(RuntimeError, match=r"does not run under torch\.func"):
        torch.func.grad(lambda x: dk.linear_topk_distill_loss(x, w, teacher, temperature=1.5))(h.detach())


def test_names_of_the_package():
    assert dk.nn.DistillHead and dk.integrations.transformers.hidden_and_head
