"""Segment reductions against loops, by numerical differentiation, and their refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilkernels import segments

LOOPS = {
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(),
    "minimum": lambda x: x.min() if x.numel() else x.new_tensor(math.inf),
    "maximum": lambda x: x.max() if x.numel() else x.new_tensor(-math.inf),
    "logsumexp": lambda x: x.logsumexp(0),
}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(0, 12), st.integers(1, 5), st.integers(0, 2**31))
def test_against_loops(n, length, spans, seed):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(2, n, length, generator=g, dtype=torch.float64)
    ids = torch.randint(-1, spans, (2, n, length), generator=g)  # interleaved, some empty
    for name, one in [*LOOPS.items(), *((q, q) for q in (0.0, 0.3, 0.5, 1.0))]:
        got = segments.quantile(values, ids, spans, name) if isinstance(name, float) else getattr(segments, name)(values, ids, spans)
        assert got.shape == (2, n, spans)
        for a in range(2):
            for b in range(n):
                for s in range(spans):
                    x = values[a, b][ids[a, b] == s]
                    want = one(x) if callable(one) else x.quantile(one) if x.numel() else x.new_tensor(math.nan)
                    torch.testing.assert_close(got[a, b, s], want, rtol=1e-12, atol=1e-12, equal_nan=True)
    suffix = segments.suffix_min(values, ids, spans)
    for a in range(2):
        for b in range(n):
            for t in range(length):
                rest = values[a, b, t:][ids[a, b, t:] == ids[a, b, t]]
                assert suffix[a, b, t] == (rest.min() if ids[a, b, t] >= 0 else math.inf)


def test_gradients():
    values = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 0, 2, 1, -1, 2, 2, 0, 1], [1, 1, 1, 1, 0, 0, -1, -1, 3]])
    for name in ("sum", "minimum", "maximum", "logsumexp"):
        reduce = getattr(segments, name)
        assert torch.autograd.gradcheck(lambda v, reduce=reduce: reduce(v, ids, 4).masked_fill(torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0]]).bool(), 0), values)
    empty = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0]]).bool()
    assert torch.autograd.gradcheck(lambda v: segments.mean(v, ids, 4).masked_fill(empty, 0), values)
    assert torch.autograd.gradcheck(lambda v: segments.quantile(v, ids, 4, 0.3).masked_fill(empty, 0), values)
    assert torch.autograd.gradcheck(lambda v: segments.suffix_min(v, ids, 4).masked_fill(ids < 0, 0), values)
    ties = torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0], requires_grad=True)
    (first,) = torch.autograd.grad(segments.suffix_min(ties, torch.zeros(5, dtype=torch.int64), 1).sum(), ties)
    assert first.tolist() == [0, 2, 0, 2, 1]


def test_infinite_values():
    values = torch.tensor([-math.inf, -math.inf, 0.0, -math.inf, math.inf], requires_grad=True)
    ids = torch.tensor([0, 0, 1, 1, 2])
    assert segments.logsumexp(values, ids, 3).tolist()[:2] == [-math.inf, 0.0]
    assert segments.quantile(values, ids, 3, 0.5).tolist() == [-math.inf, -math.inf, math.inf]
    (grad,) = torch.autograd.grad(segments.logsumexp(values[:4], ids[:4], 2)[1], values)
    assert grad.tolist() == [0, 0, 1, 0, 0]
    assert segments.logsumexp(values, ids, 3)[2] == math.inf


def test_nan_stays_in_its_span():
    values, ids = torch.tensor([1.0, 5.0, math.nan, 2.0, 7.0, 4.0]), torch.tensor([0, 1, 0, 0, 1, 2])
    for reduce in (segments.sum, segments.mean, segments.minimum, segments.maximum, segments.logsumexp, lambda *a: segments.quantile(*a, 0.5)):
        got = reduce(values, ids, 3)
        assert got[0].isnan() and got[1:].isfinite().all()
    # from the NaN on backwards the least value is not known
    torch.testing.assert_close(segments.suffix_min(values, ids, 3), torch.tensor([math.nan, 5, math.nan, 2, 7, 4]), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_reduced_in_float32(dtype):
    """3000 ones: a running sum in bfloat16 stops at 256, one in float16 at 2048."""
    ones, ids = torch.ones(3000, dtype=dtype), torch.zeros(3000, dtype=torch.int64)
    assert segments.sum(ones, ids, 1).dtype == dtype and segments.sum(ones, ids, 1) == torch.tensor(3000.0, dtype=dtype)
    assert segments.mean(ones, ids, 1) == 1
    assert segments.logsumexp(ones, ids, 1) == torch.tensor(1 + math.log(3000), dtype=dtype)


def test_span_ids():
    ids = segments.from_lengths(torch.tensor([[2, 0, 3], [1, 1, 1]]), 6)
    assert ids.tolist() == [[0, 0, 2, 2, 2, -1], [0, 1, 2, -1, -1, -1]]
    ends, mask = torch.tensor([0, 1, 0, 0, 1, 0]), torch.tensor([0, 1, 1, 1, 1, 1])
    assert segments.from_delimiters(ends).tolist() == [0, 0, 1, 1, 1, 2]
    assert segments.from_delimiters(ends, mask).tolist() == [-1, 0, 1, 1, 1, 2]


def test_refusals():
    x, ids = torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="span_ids must be below num_spans=1; got 4"):
        segments.sum(x, ids + 4, 1)
    with pytest.raises(ValueError, match="span_ids must have the shape of values"):
        segments.mean(x, ids[0], 1)
    with pytest.raises(TypeError, match="span_ids must be an integer tensor"):
        segments.maximum(x, x, 1)
    with pytest.raises(TypeError, match="lengths must be an integer tensor"):
        segments.from_lengths(torch.tensor([2.5, 1.0]), 4)
    with pytest.raises(ValueError, match=r"q must be in \[0, 1\]"):
        segments.quantile(x, ids, 1, 1.5)
