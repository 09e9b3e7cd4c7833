"""The contract of ``vocab_stats``: every backend × case × dtype against the reference in fp64.

A backend passes when its error against fp64 truth is no worse than same-dtype PyTorch's (the reference backend's) plus
1e-6 of the value's size (fp32), or one unit in the last place of a 16-bit gradient.
"""

from __future__ import annotations

import math

import pytest
import torch
from benchmarks.cases import CONTRACT
from servers import servers

from distilkernels import BackendError, backends, row_loss, vocab_stats
from distilkernels.primitives.boundary import rows_of

DIFFERENTIABLE = ("lse", "gathered", "tail_lse", "expected_logit", "logit_sum", "lse_t1", "max")
EVERYTHING = (*DIFFERENTIABLE, "argmax", "second", "rank", "mass_above")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def upstream(stats, names):
    """A fixed gradient for every differentiable statistic, zero where the statistic is not finite."""
    total = 0.0
    for index, name in enumerate(names):
        value = getattr(stats, name)
        generator = torch.Generator().manual_seed(100 + index)
        weight = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        total = total + torch.where(value.isfinite(), value.double() * weight, 0.0).sum()
    return total


def run(logits, ids, want, backend, head, inplace=False):
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    stats = vocab_stats(leaf, ids, want=want, backend=backend, **head)
    (grad,) = torch.autograd.grad(upstream(stats, [n for n in DIFFERENTIABLE if n in want]), leaf)
    return stats, grad


def close(name, got, same_dtype, exact, slack, size=None):
    """|got − exact| ≤ |same_dtype − exact| + slack·size, by the worst entry; infinities and NaN in place."""
    got, same_dtype, exact = (t.detach().double().cpu() for t in (got, same_dtype, exact))
    assert torch.equal(got.isnan(), exact.isnan()), name
    infinite = exact.isinf()
    assert torch.equal(torch.where(infinite, exact, 0.0), torch.where(got.isinf(), got, 0.0)), name
    plain = ~(exact.isnan() | infinite)
    if not plain.any():
        return
    error = (got - exact)[plain].abs().max()
    allowed = (same_dtype - exact)[plain].nan_to_num(0, 0, 0).abs().max() + slack * (exact[plain].abs().max() if size is None else size).clamp(min=1e-3)
    assert error <= allowed, f"{name}: error {error:.3e} > allowed {allowed:.3e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend,device", servers("vocab_stats"))
@pytest.mark.parametrize("case", CONTRACT, ids=lambda c: c.name)
def test_statistics_and_gradient(case, backend, device, dtype):
    logits = case.logits(dtype)
    ids = case.make_ids(logits)
    if backends.module(backend).why_not("vocab_stats", rows_of(logits.to(device))):
        with pytest.raises(BackendError, match=backend):
            vocab_stats(logits.to(device), ids.to(device), backend=backend)
        return
    exact, exact_grad = run(logits.double(), ids, EVERYTHING, "reference", case.head)
    same, same_grad = run(logits, ids, EVERYTHING, "reference", case.head)
    got, got_grad = run(logits.to(device), ids.to(device), EVERYTHING, backend, case.head)
    slack = {torch.float64: 1e-13}.get(dtype, 1e-6)
    for name in EVERYTHING:
        value = getattr(got, name)
        if name in ("argmax", "rank"):
            assert torch.equal(value.cpu(), getattr(exact, name)) or case.head.get("softcap"), name
        else:
            # a sum whose terms cancel is as exact as the terms
            size = logits.double().nan_to_num(0, 0, 0).abs().sum(-1).max() if name == "logit_sum" and case.n else None
            close(name, value, getattr(same, name), getattr(exact, name), slack, size)
    # rows with opposite infinities have NaN gradients in no defined places; NaN rows are compared as rows
    nan_rows = exact.lse.isnan()
    assert got_grad.dtype == dtype and got_grad.shape == logits.shape
    assert not got_grad.cpu()[~nan_rows].isnan().any()
    ulp = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 1e-12}[dtype]
    if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16):
        ulp = 2.0**-7  # the interpreter cuts a float32 off where a device rounds it
    close("gradient", got_grad.cpu()[~nan_rows], same_grad[~nan_rows], exact_grad[~nan_rows], ulp)


SUBSETS = [("lse",), ("gathered",), ("lse", "gathered", "tail_lse"), ("expected_logit",), ("logit_sum",), ("lse_t1",), ("max",), ("argmax",), ("second",),
           ("rank",), ("tail_lse", "max")]  # fmt: skip


@pytest.mark.parametrize("want", SUBSETS, ids="+".join)
@pytest.mark.parametrize("backend,device", servers("vocab_stats"))
def test_only_what_is_asked_for(backend, device, want):
    """A subset gives the same numbers as everything together, and nothing else."""
    case = CONTRACT[0]
    logits, ids = case.logits().to(device), case.make_ids(case.logits()).to(device)
    everything = vocab_stats(logits, ids, want=EVERYTHING, backend=backend, temperature=1.5)
    got = vocab_stats(logits, ids, want=want, backend=backend, temperature=1.5)
    for name in EVERYTHING:
        if name in want:
            torch.testing.assert_close(getattr(got, name), getattr(everything, name), rtol=1e-6, atol=1e-6)
        else:
            assert getattr(got, name) is None
    if want[0] in DIFFERENTIABLE:
        _, grad = run(logits, ids, want, backend, {"temperature": 1.5})
        _, exact = run(logits.double().cpu(), ids.cpu(), want, "reference", {"temperature": 1.5})
        torch.testing.assert_close(grad.double().cpu(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "row_stride", "shifted"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("backend,device", servers("vocab_stats"))
def test_in_place_backward(backend, device, dtype, layout):
    """d logits lie in the logits' memory, equal the fresh ones bit for bit, and a second backward is refused."""
    from dataclasses import replace

    case = replace(CONTRACT[-2], layout=layout, n=6)
    source = case.logits(dtype)
    ids = case.make_ids(source).to(device)

    def loss(x, inplace):
        return row_loss(x, ids, lambda s: s.lse - s.tail_lse + s.gathered[:, 1] * 0.3 + s.expected_logit, want=DIFFERENTIABLE[:4],
                        inplace_backward=inplace, backend=backend, **case.head)  # fmt: skip

    base = source.to(device).detach()
    fresh = base.clone(memory_format=torch.preserve_format).requires_grad_()
    (grad,) = torch.autograd.grad(loss(fresh, False), fresh)
    storage = case.logits(dtype).to(device) if device == "cpu" else base
    leaf = storage.detach().requires_grad_()
    value = loss(leaf, True)
    (written,) = torch.autograd.grad(value, leaf, retain_graph=True)
    assert written.data_ptr() == leaf.data_ptr()
    assert torch.equal(written, grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, leaf)


@pytest.mark.parametrize("backend,device", servers("vocab_stats"))
def test_thresholds_replace_the_gathered_logits(backend, device):
    """Vocabulary-parallel ranks know the threshold before they read their own columns."""
    from distilkernels.primitives.head import Head
    from distilkernels.primitives.vocab_stats import row_stats

    case = CONTRACT[0]
    logits = case.logits().to(device)
    ids = case.make_ids(logits)
    thresholds = torch.randn(case.n, case.k, device=device) * 3
    got = row_stats(logits, ids, ("rank", "mass_above"), Head(), thresholds=thresholds, backend=backend)
    higher = logits[:, None, :] > thresholds[..., None]
    assert torch.equal(got.rank, higher.sum(-1))
    mass = (logits.softmax(-1)[:, None, :] * higher).sum(-1)
    torch.testing.assert_close(got.mass_above.float(), mass, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend,device", servers("vocab_stats"))
def test_tail_to_a_mass_of_1e_8(backend, device):
    """log q_tail within 1e-5 nats where 1 − Σ would have lost it all."""
    v, k = 20_011, 8
    for mass in (1e-2, 1e-4, 1e-6, 1e-8):
        x = torch.randn(4, v, generator=torch.Generator().manual_seed(3)).double()
        ids = torch.arange(k).expand(4, k) * 2003
        inside = torch.zeros(4, v, dtype=torch.bool).scatter_(1, ids, True)
        shift = math.log(mass) + x.masked_fill(~inside, -math.inf).logsumexp(1) - x.masked_fill(inside, -math.inf).logsumexp(1)
        x = torch.where(inside, x, x + shift[:, None]).float()
        stats = vocab_stats(x.to(device), ids.to(device), want=("lse", "tail_lse"), backend=backend)
        exact = vocab_stats(x.double(), ids, want=("lse", "tail_lse"), backend="reference")
        got = (stats.tail_lse.double() - stats.lse.double()).cpu()
        assert (got - (exact.tail_lse - exact.lse)).abs().max() <= 1e-5, mass


@pytest.mark.parametrize("backend,device", servers("vocab_stats"))
def test_batch_invariance_and_determinism(backend, device):
    """How a row is split depends on V and dtype, never on its neighbours or the number of threads."""
    if backend == "reference":
        return  # PyTorch's own reductions make no such promise
    logits = torch.randn(37, 5003, device=device)
    ids = torch.rand(37, 5003).argsort(1)[:, :9].to(device)
    whole = vocab_stats(logits, ids, want=EVERYTHING, backend=backend)
    again = vocab_stats(logits, ids, want=EVERYTHING, backend=backend)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = vocab_stats(logits[20:21].clone(), ids[20:21], want=EVERYTHING, backend=backend)
    finally:
        torch.set_num_threads(threads)
    for name in EVERYTHING:
        assert torch.equal(getattr(whole, name), getattr(again, name)), name
        assert torch.equal(getattr(whole, name)[20:21], getattr(alone, name)), name


@pytest.mark.parametrize("backend,device", servers("vocab_stats"))
@pytest.mark.parametrize("case", [c for c in CONTRACT if c.name in ("prime", "softcap", "no_rows", "shifted")], ids=lambda c: c.name)
def test_opcheck(case, backend, device):
    """Schema, fake tensors, autograd registration and AOT dispatch of both registered ops."""
    from distilkernels.primitives.head import Head

    logits = case.logits().to(device)
    ids = case.make_ids(logits).reshape(-1, case.k)
    head = Head.checked(case.v, **case.head)
    rows = rows_of(logits).detach().requires_grad_()
    names = "lse,gathered,tail_lse,expected_logit,logit_sum,finite_count,lse_t1"
    torch.library.opcheck(torch.ops.distilkernels.vocab_stats.default, (rows, ids, None, names, *head, backend))
    n = ids.shape[0]
    coef = torch.randn(n, 6, dtype=torch.float64, device=device)
    entries = torch.randn(n, case.k, device=device)
    backward = torch.ops.distilkernels.vocab_stats_backward.default
    torch.library.opcheck(backward, (rows.detach(), ids, entries, coef, "linear,constant,t1", False, *head, backend))


@pytest.mark.parametrize("want", [("logit_sum",), ("lse", "logit_sum"), ("lse_t1",), ("max",)], ids="+".join)
@pytest.mark.parametrize("backend,device", servers("vocab_stats"))
def test_large_logits_without_their_lse(backend, device, want):
    """A term that is not asked for does not overflow at z = 1e4, where e^z would."""
    x = torch.linspace(-1e4, 1e4, 133, device=device).expand(2, 133).contiguous()
    _, grad = run(x, None, want, backend, {"temperature": 0.5})
    _, exact = run(x.double().cpu(), None, want, "reference", {"temperature": 0.5})
    torch.testing.assert_close(grad.double().cpu(), exact, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("backend,device", servers("vocab_stats"))
def test_gradient_of_the_maximum(backend, device):
    """By numerical differentiation: the argmax among the ids, outside them (where the tail has it too), and without ids."""
    if backends.module(backend).why_not("vocab_stats", torch.empty(1, 1, 1, dtype=torch.float64, device=device)):
        return  # no fp64
    x = (torch.randn(3, 7, dtype=torch.float64, device=device) * 2).requires_grad_()
    best = x.argmax(-1, keepdim=True)
    for ids in (None, torch.cat([(best + 1) % 7, best], 1), torch.cat([(best + 2) % 7, best.new_full(best.shape, -1)], 1)):
        names = ("lse", "max", "logit_sum") if ids is None else ("lse", "max", "gathered", "tail_lse", "expected_logit", "lse_t1")

        def weighed(x, ids=ids, names=names):
            stats = vocab_stats(x, ids, want=names, temperature=0.8, softcap=9.0, backend=backend)
            return sum((i + 1.5) * getattr(stats, name).masked_fill(getattr(stats, name) == -math.inf, 0).sum() for i, name in enumerate(names))

        assert torch.autograd.gradcheck(weighed, x)
