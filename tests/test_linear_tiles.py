"""``path="tiles"``: the losses on a GEMM that never writes logits. Runs on a GPU, or under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import distilkernels as dk
from distilkernels import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFUSAL = backends.module("triton").why_not("linear_vocab_stats", torch.empty(1, 1, device=DEVICE), torch.empty(1, 1, device=DEVICE))


def problem():
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = torch.randn(2, 5, 24, generator=g), torch.randn(71, 24, generator=g) * 0.4, torch.randn(71, generator=g)
    teacher = dk.capture_topk(torch.randn(2, 5, 60, generator=g) * 2, 5, temperature=1.5).to(DEVICE)
    return *(t.to(DEVICE).requires_grad_() for t in (hidden, weight, bias)), teacher


@pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
@pytest.mark.parametrize("options", [{}, dict(divergence="jsd", softcap=6.0, valid_vocab=64), dict(reduction="none", return_stats=True)], ids=str)
def test_tiles_equal_chunks(options):
    h, w, b, teacher = problem()
    weights = torch.ones(2, 5, device=DEVICE)
    weights[0, 1] = 0
    calls = [dk.linear_topk_distill_loss(h, w, teacher, bias=b, temperature=1.5, token_weights=weights, path=path, **options) for path in ("tiles", "chunked")]
    if "return_stats" in options:
        for a, c in zip(calls[0][1], calls[1][1]):
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)
        calls = [loss for loss, _ in calls]
    torch.testing.assert_close(calls[0], calls[1], rtol=1e-4, atol=1e-5)
    for a, c in zip(*(torch.autograd.grad((loss * 1.5).sum(), (h, w, b)) for loss in calls)):
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(REFUSAL is None, reason="the tiles are served here")
def test_the_refusal_says_why():
    h, w, b, teacher = problem()
    with pytest.raises(dk.BackendError, match="path='tiles' cannot serve this call: Triton kernels run on CUDA tensors"):
        dk.linear_topk_distill_loss(h, w, teacher, bias=b, temperature=1.5, path="tiles")


def test_bad_paths():
    h, w, _, teacher = problem()
    with pytest.raises(ValueError, match="path must be 'chunked' or 'tiles'; got 'fast'"):
        dk.linear_topk_distill_loss(h, w, teacher, temperature=1.5, path="fast")
