"""Dense losses: memory, repeated backward passes, and what PyTorch's transforms make of them."""

from __future__ import annotations

import pytest
import torch
from benchmarks.measure import peak_extra_bytes
from dense_rows import WAYS, rows, value_and_grad

import distilkernels as dk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", WAYS)
def test_in_place(divergence, dtype):
    z, t = rows(3, 4, 37).to(dtype), rows(3, 4, 37, seed=1).to(dtype)
    options = dict(divergence=divergence, temperature=2.0, labels=torch.randint(37, (3, 3)), ce_weight=0.5)
    fresh = z.clone().requires_grad_()
    want, (b,) = value_and_grad(dk.distill_loss(fresh[:, :-1], t[:, :-1], **options), fresh)
    leaf = z.clone()[:, :-1].requires_grad_()
    loss = dk.distill_loss(leaf, t[:, :-1], inplace_backward=True, **options)
    assert torch.equal(leaf, z[:, :-1]), "the logits stay as they are until the backward"
    (a,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(loss, want) and a.data_ptr() == leaf.data_ptr()
    torch.testing.assert_close(a, b[:, :-1], rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)


@pytest.mark.parametrize("divergence", WAYS)
def test_backward_twice(divergence):
    z, t = rows(3, 11).requires_grad_(), rows(3, 11, seed=1)
    hidden, weight = rows(3, 5).requires_grad_(), rows(11, 5, seed=2)
    linear = dk.linear_distill_loss(hidden, weight, hidden.flip(0), weight, divergence=divergence)
    for loss, leaf in ((dk.distill_loss(z, t, divergence=divergence), z), (linear, hidden)):
        (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        (scaled,) = torch.autograd.grad(3 * loss, leaf, retain_graph=True)
        torch.testing.assert_close(scaled, 3 * once)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
            torch.autograd.grad(grad.sum(), leaf)


def test_the_gradient_is_given_away():
    z, t = rows(3, 11).requires_grad_(), rows(3, 11, seed=1)
    hidden, weight = rows(3, 5).requires_grad_(), rows(11, 5, seed=2)
    for loss in (dk.distill_loss(z, t, divergence="adaptive_kl"), dk.linear_distill_loss(hidden, weight, hidden.detach(), weight)):
        loss.backward()
        with pytest.raises(RuntimeError, match="needs retain_graph=True in the first"):
            loss.backward()


def test_no_gradient_reaches_the_teacher():
    z, t = rows(3, 11).requires_grad_(), rows(3, 11, seed=1).requires_grad_()
    for name in WAYS:
        dk.distill_loss(z, t, divergence=name).backward()
    w = rows(11, 4).requires_grad_()
    h = rows(3, 4).requires_grad_()
    dk.linear_distill_loss(rows(3, 4, seed=4).requires_grad_(), w.detach(), h, w).backward()
    assert t.grad is None and h.grad is None and w.grad is None
    assert not dk.distill_loss(z.detach(), t).requires_grad


@pytest.mark.parametrize("divergence,slack", [("jsd", 15e6), ("alpha_beta", 15e6), ("todi", 15e6), ("adaptive_kl", 100e6)])
def test_memory_is_flat(divergence, slack):
    """In place nothing of [N, V] is made, and otherwise the gradient alone: the log-softmaxes of the larger case are 2 × 26 MB, and
    an eager adaptive KL holds ten such."""
    v = 50_021
    for n in (32, 128):
        z, t = torch.randn(n, v).requires_grad_(), torch.randn(n, v)
        extra = {inplace: peak_extra_bytes(lambda inplace=inplace, z=z, t=t: torch.autograd.grad(
            dk.distill_loss(z, t, divergence=divergence, inplace_backward=inplace), z), "cpu") for inplace in (False, True)}  # fmt: skip
        if extra[True] is None:
            pytest.skip("this system does not tell a process its peak memory")
        assert extra[True] < slack, extra
        assert extra[False] < slack + 4 * n * v, extra


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_compiles(divergence):
    z, t, labels = rows(3, 31).float().requires_grad_(), rows(3, 31, seed=1).float(), torch.tensor([4, -100, 2])

    def loss(x):
        return dk.distill_loss(x * 1.5, t, divergence=divergence, temperature=2.0, labels=labels, ce_weight=0.2)

    want, (b,) = value_and_grad(loss(z), z)
    got, (a,) = value_and_grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(z), z)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(a, b)


def test_compiles_around_blocks():
    z, t = rows(3, 31).float().requires_grad_(), rows(3, 31, seed=1).float()
    hidden, weight = rows(3, 5).float().requires_grad_(), rows(31, 5).float()

    def loss(x, h):
        return dk.distill_loss(x * 1.5, t, divergence="adaptive_kl") + dk.linear_distill_loss(h * 2, weight, h, weight, divergence="jsd")

    want, grads = value_and_grad(loss(z, hidden), z, hidden)
    got, found = value_and_grad(torch.compile(loss, backend="aot_eager")(z, hidden), z, hidden)
    torch.testing.assert_close(got, want)
    for a, b in zip(found, grads):
        torch.testing.assert_close(a, b)


def test_torch_func_is_refused():
    t = rows(3, 11, seed=1)
    for name in WAYS:
        with pytest.raises(RuntimeError, match="does not run under torch"):
            torch.func.grad(lambda x, name=name: dk.distill_loss(x, t, divergence=name))(rows(3, 11))
