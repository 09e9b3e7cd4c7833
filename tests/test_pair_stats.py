"""The contract of ``pair_stats``: every backend × case × dtype against the fp64 reference, and that against plain formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from benchmarks.cases import CONTRACT
from servers import servers

from distilkernels import BackendError, backends
from distilkernels.backends import cpp
from distilkernels.primitives.boundary import rows_of
from distilkernels.primitives.head import Head
from distilkernels.primitives.pair_stats import PairStats, Sides, pair_stats

F64 = torch.float64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, F64)
CASES = [c for c in CONTRACT if c.name not in ("k1", "k_is_v", "k_large", "random_ids", "empty_slots", "repeated_ids")]
ISAS = cpp.available_isas() if cpp._cpp is not None else []


def sides_of(case) -> Sides:
    student = Head.checked(case.v, **case.head)
    theirs = {"logit_scale": 0.9, "softcap": 7.0 if "softcap" in case.head else None}
    return Sides(student, Head.checked(case.v, temperature=student.temperature, **theirs), with_t1=student.temperature != 1)


def inputs(case, dtype):
    logits, teacher = case.logits(dtype), case.logits(dtype, seed=5)
    n = logits.numel() // case.v
    g = torch.Generator().manual_seed(3)
    labels = torch.randint(-1, case.v, (n,), generator=g)
    return logits, teacher, labels, torch.rand(n, generator=g, dtype=F64) * 0.9 + 0.05


def near_ties(logits, teacher, sides):
    """Entries [N, V] where p and q are so close that float32 may take either for the larger."""
    z, t = (head._replace(valid_vocab=None).apply(x.double().reshape(-1, x.shape[-1])) for head, x in zip(sides, (logits, teacher)))
    columns = sides.student.columns(z.shape[1])
    gap = z[:, :columns].log_softmax(-1) - t[:, :columns].log_softmax(-1)
    return torch.nn.functional.pad(gap.abs() < 2e-6 * (1 + z[:, :columns].abs()), (0, z.shape[1] - columns))


def run(logits, teacher, labels, mixture, sides, backend):
    """(statistics [N, 10], d logits) for an upstream gradient on whatever is finite."""
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    stats = pair_stats(leaf, teacher, labels, mixture, sides, backend=backend)
    weight = torch.randn(stats.shape, generator=torch.Generator().manual_seed(8), dtype=F64).to(stats.device)
    (grad,) = torch.autograd.grad(torch.where(stats.isfinite(), stats * weight, 0.0).sum(), leaf)
    return stats.detach(), grad


def close(name, got, same_dtype, exact, slack, size=None):
    """|got − exact| ≤ |same_dtype − exact| + slack·size, by the worst entry; infinities and NaN in place."""
    got, same_dtype, exact = (t.detach().double().cpu() for t in (got, same_dtype, exact))
    assert torch.equal(got.isnan(), exact.isnan()), name
    plain = exact.isfinite()
    assert torch.equal(got[~plain & ~exact.isnan()], exact[~plain & ~exact.isnan()]), name
    if plain.any():
        error = (got - exact)[plain].abs().max()
        allowed = (same_dtype - exact)[plain].nan_to_num(0, 0, 0).abs().max() + slack * (exact[plain].abs().max() if size is None else size).clamp(min=1e-3)
        assert error <= allowed, f"{name}: error {error:.3e} > allowed {allowed:.3e}"


def compare(case, dtype, backend, device, second="mixture"):
    logits, teacher, labels, mixture = inputs(case, dtype)
    sides = sides_of(case)._replace(second=second)
    exact, exact_grad = run(logits.double(), teacher.double(), labels, mixture, sides, "reference")
    same, same_grad = run(logits, teacher, labels, mixture, sides, "reference")
    got, got_grad = run(logits.to(device), teacher.to(device), labels.to(device), mixture.to(device), sides, backend)
    # a difference of logits is as exact as they are
    size = logits.double().nan_to_num(0, 0, 0).abs().max() + teacher.double().nan_to_num(0, 0, 0).abs().max() if case.n else None
    for i, name in enumerate(PairStats._fields):
        close(name, got[:, i], same[:, i], exact[:, i], 1e-13 if dtype == F64 else 1e-6, size)
    keep = ~exact.isnan().any(-1).view(logits.shape[:-1])
    if second == "distance" and case.n:
        # the sign of what is close has no right answer; a row's other entries have its q in their sum
        keep = keep & ~near_ties(logits, teacher, sides).any(-1).view(keep.shape)
    # the product of q with a gap of 1e4 is as exact as it
    if case.name == "wide":
        size = exact_grad[keep].abs().max() + 0.1 * size
    else:
        size = None
    steps = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, F64: 1e-12}[dtype]
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        steps = 2.0**-7  # the interpreter cuts a float32 off where a device rounds it
    assert got_grad.dtype == dtype and got_grad.shape == logits.shape
    close("gradient", got_grad.cpu()[keep], same_grad[keep], exact_grad[keep], steps, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend,device", servers("pair_stats"))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_statistics_and_gradient(case, backend, device, dtype):
    probe = rows_of(case.logits(dtype).to(device))
    if backends.module(backend).why_not("pair_stats", probe, probe):
        with pytest.raises(BackendError, match=backend):
            pair_stats(probe, probe, None, None, Sides(Head(), Head()), backend=backend)
        return
    compare(case, dtype, backend, device)


LOOKS = ("prime", "one_column", "masked", "softcap", "valid_vocab")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend,device", servers("pair_stats"))
@pytest.mark.parametrize("second", ["power", "distance", "balance"])
def test_second_look(second, backend, device, dtype):
    if backend == "triton" and dtype == F64:
        return  # refused, above
    slow = backend == "triton" and device == "cpu"
    for case in CASES:
        if case.name in (("softcap", "valid_vocab") if slow else LOOKS):
            compare(case, dtype, backend, device, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", ISAS[1:])
def test_instruction_sets(name, dtype):
    """The best one runs above; the others here."""
    best = cpp.isa()
    cpp.set_isa(name)
    try:
        for case in CASES:
            if case.name in ("prime", "one_column", "short", "masked", "wide", "ascending", "block_and_one", "temperature", "softcap", "valid_vocab"):
                compare(case, dtype, "cpp", "cpu")
            if case.name in LOOKS:
                compare(case, dtype, "cpp", "cpu", "power")
                compare(case, dtype, "cpp", "cpu", "distance")
                compare(case, dtype, "cpp", "cpu", "balance")
    finally:
        cpp.set_isa(best)


def test_the_reference_is_the_definition():
    z, t = torch.randn(5, 23, dtype=F64) * 3, torch.randn(5, 23, dtype=F64) * 3
    w, labels = torch.rand(5, dtype=F64), torch.tensor([3, -1, 0, 22, 7])
    s = PairStats(*pair_stats(z, t, labels, w, Sides(Head(), Head(), True), backend="reference").unbind(-1))
    q, p = z.softmax(-1), t.softmax(-1)
    m = w[:, None] * p + (1 - w[:, None]) * q
    want = PairStats(
        lse=z.logsumexp(-1), teacher_lse=t.logsumexp(-1), teacher_gap=(p * (t - z)).sum(-1), student_gap=(q * (z - t)).sum(-1),
        expected_logit=(q * z).sum(-1), teacher_expected_logit=(p * t).sum(-1), lse_t1=z.logsumexp(-1),
        teacher_to_mixture=(p * (p / m).log()).sum(-1), student_to_mixture=(q * (q / m).log()).sum(-1),
        label_logit=z[torch.arange(5), labels.clamp(min=0)].masked_fill(labels < 0, 0),
    )  # fmt: skip
    for name, a, b in zip(PairStats._fields, s, want):
        torch.testing.assert_close(a, b, msg=name)
    torch.testing.assert_close(s.forward_kl, (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(s.reverse_kl, (q * (q / p).log()).sum(-1))
    for share in (w, w + 1, -w):
        s = PairStats(*pair_stats(z, t, None, share, Sides(Head(), Head(), second="power"), backend="reference").unbind(-1))
        torch.testing.assert_close(s.power_gap, 1 - (p ** share[:, None] * q ** (1 - share[:, None])).sum(-1))
    s = PairStats(*pair_stats(z, t, None, w, Sides(Head(), Head(), second="distance"), backend="reference").unbind(-1))
    torch.testing.assert_close(s.distance, (p - q).abs().sum(-1))
    s = PairStats(*pair_stats(z, t, None, w, Sides(Head(), Head(), second="balance"), backend="reference").unbind(-1))
    torch.testing.assert_close(s.balance, s.forward_kl + s.reverse_kl)


@pytest.mark.parametrize("second", ["mixture", "power", "distance"])
@pytest.mark.parametrize("backend,device", servers("pair_stats"))
def test_gradcheck(backend, device, second):
    if backend == "triton" or (device == "cuda" and backend != "reference"):
        return  # float64 is the reference's there
    t = torch.randn(3, 7, dtype=F64, device=device)
    w = torch.tensor([0.01, 0.5, 0.97], dtype=F64, device=device)
    sides = Sides(Head(1.7, 0.8, 5.0, 6), Head(1.7, 1.2, 4.0), True, second)
    labels = torch.tensor([2, -1, 5], device=device)

    def differentiable(x):
        stats = pair_stats(x, t, labels, w, sides, backend=backend)
        return torch.cat([stats[:, :1], stats[:, 2:5], stats[:, 6:]], -1)

    assert torch.autograd.gradcheck(differentiable, (torch.randn(3, 7, dtype=F64, device=device) * 2).requires_grad_())


@pytest.mark.parametrize("backend,device", servers("pair_stats"))
def test_small_weights_of_a_mixture(backend, device):
    """From w = 1e-6 to 1 − 1e-6 in float32; columns that one side masks."""
    z, t = torch.randn(6, 301) * 4, torch.randn(6, 301) * 4
    z[:, 5], t[:, 9], z[:, 11], t[:, 11] = -math.inf, -math.inf, -math.inf, -math.inf
    w = torch.tensor([1e-6, 1e-3, 0.1, 0.9, 1 - 1e-3, 1 - 1e-6], dtype=F64)
    sides = Sides(Head(), Head())

    def loss(x, y, v, server):
        s = PairStats(*pair_stats(x, y, None, v, sides, backend=server).unbind(-1))
        return s.teacher_to_mixture, s.student_to_mixture

    for which in (0, 1):
        exact = z.double().requires_grad_()
        want = loss(exact, t.double(), w, "reference")[which]
        (b,) = torch.autograd.grad(want.sum(), exact)
        leaf = z.to(device).requires_grad_()
        got = loss(leaf, t.to(device), w.to(device), backend)[which]
        (a,) = torch.autograd.grad(got.sum(), leaf)
        torch.testing.assert_close(got.cpu(), want, rtol=2e-6, atol=2e-7)
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend,device", servers("pair_stats"))
def test_powers_and_distances_of_close_and_far_rows(backend, device):
    """Of rows that differ by 1e-3 the power gap is 1e-7 and right to a part in a thousand; w outside [0, 1]; columns that one side masks."""
    t = torch.randn(4, 2003, generator=torch.Generator().manual_seed(1)) * 2 + 20
    z = t + 1e-3 * torch.randn(4, 2003, generator=torch.Generator().manual_seed(2))
    w = torch.tensor([0.5, 0.1, 0.999, 0.3], dtype=F64)
    sides = Sides(Head(), Head(), second="power")

    def looked(x, y, share, second, server):
        stats = pair_stats(x.to(device), y.to(device), None, share.to(device), sides._replace(second=second), backend=server)
        return PairStats(*stats.cpu().unbind(-1)).power_gap

    exact = looked(z.double(), t.double(), w, "power", "reference")
    assert 1e-11 < exact.min() and exact.max() < 2e-7
    if backend != "reference":
        torch.testing.assert_close(looked(z, t, w, "power", backend), exact, rtol=2e-3, atol=1e-11)
        assert all((looked(z, z, w, second, backend) == 0).all() for second in ("power", "distance", "balance"))
    p, q = t.double().softmax(-1), z.double().softmax(-1)
    torch.testing.assert_close(looked(z, t, w, "distance", backend), (p - q).abs().sum(-1), rtol=3e-4, atol=0)
    torch.testing.assert_close(looked(z, t, w, "balance", backend), ((p - q) * (p / q).log()).sum(-1), rtol=1e-3, atol=0)
    # p²/q where q is e^−100 of p, and where it is 0; 0 where p is
    z, t = torch.zeros(3, 70), torch.zeros(3, 70)
    z[0, 3], t[0, 40] = 60.0, 30.0
    z[1, 5], t[2, 5] = -math.inf, -math.inf
    found = looked(z, t, torch.full((3,), 2.0, dtype=F64), "power", backend)
    p, q = t.double().softmax(-1), z.double().softmax(-1)
    torch.testing.assert_close(found, 1 - (p * p / q).sum(-1), rtol=3e-5, atol=1e-6)
    assert found[1] == -math.inf


@pytest.mark.parametrize("backend,device", servers("pair_stats"))
def test_far_rows(backend, device):
    """What one side holds likely the other may give e^−500: the gap is of the logits, whatever an exponential can hold."""
    z, t = torch.zeros(2, 70), torch.zeros(2, 70)
    z[0, 3], t[0, 40] = 500.0, 500.0
    z[1, :35], t[1, 35:] = 300.0, 200.0
    s = PairStats(*pair_stats(z.to(device), t.to(device), None, None, Sides(Head(), Head()), backend=backend).cpu().unbind(-1))
    q, p = z.double().log_softmax(-1), t.double().log_softmax(-1)
    torch.testing.assert_close(s.forward_kl, (p.exp() * (p - q)).sum(-1), rtol=3e-5, atol=0)
    torch.testing.assert_close(s.reverse_kl, (q.exp() * (q - p)).sum(-1), rtol=3e-5, atol=0)


@pytest.mark.parametrize("backend,device", servers("pair_stats"))
def test_a_late_maximum(backend, device):
    """One entry near the end of the student's row, the teacher's, both, outweighs by e^10 each before it; all of those together weigh as much.
    In the last row it is e^300, which no sum from before it can hold."""
    z, t = torch.randn(4, 9001) * 0.3, torch.randn(4, 9001) * 0.3
    z[3, 8800] += 300
    z[[0, 2], 8800] += 12.5
    t[[1, 2], 8700] += 12.5
    w = torch.tensor([0.2, 0.5, 0.9, 0.5], dtype=F64)
    sides = Sides(Head(1.25), Head(1.25), True)
    want = PairStats(*pair_stats(z.double(), t.double(), None, w, sides, backend="reference").unbind(-1))
    got = PairStats(*pair_stats(z.to(device), t.to(device), None, w.to(device), sides, backend=backend).cpu().unbind(-1))
    for name, a, b in zip(PairStats._fields, got, want):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend,device", servers("pair_stats"))
def test_batch_invariance_and_determinism(backend, device):
    """A row's numbers depend on it alone, not on its neighbours or the number of threads."""
    if backend == "reference":
        return  # PyTorch's own reductions make no such promise
    z, t, w = torch.randn(37, 5003, device=device), torch.randn(37, 5003, device=device), torch.rand(37, dtype=F64, device=device)
    sides = Sides(Head(2.0), Head(2.0), True)
    whole = run(z, t, None, w, sides, backend)
    again = run(z, t, None, w, sides, backend)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = pair_stats(z[20:21].clone(), t[20:21], None, w[20:21], sides, backend=backend)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])
    assert torch.equal(whole[0][20:21], alone)


@pytest.mark.parametrize("layout", ["row_stride", "shifted"])
@pytest.mark.parametrize("backend,device", servers("pair_stats"))
def test_in_place_backward(backend, device, layout):
    """d logits lie in the logits' memory, equal the fresh ones bit for bit, and what lies between the rows is left alone."""
    case = replace(CONTRACT[-2], layout=layout, n=6)
    z, t, labels, w = (x.to(device) for x in inputs(case, torch.bfloat16))
    z = case.logits(torch.bfloat16) if device == "cpu" else z
    sides = sides_of(case)
    want = run(z, t, labels, w, sides, backend)[1]
    leaf = z.detach().requires_grad_()
    stats = pair_stats(leaf, t, labels, w, sides, backend=backend, inplace_backward=True)
    weight = torch.randn(stats.shape, generator=torch.Generator().manual_seed(8), dtype=F64).to(device)
    (grad,) = torch.autograd.grad((stats * weight).sum(), leaf)
    assert grad.data_ptr() == leaf.data_ptr() and torch.equal(grad, want)


@pytest.mark.parametrize("backend,device", servers("pair_stats"))
def test_opcheck(backend, device):
    z, t = torch.randn(2, 3, 29, device=device, requires_grad=True), torch.randn(1, 6, 29, device=device)
    labels, w = torch.tensor([1, -1, 2, 3, 4, 5], device=device), torch.rand(6, dtype=F64, device=device)
    numbers = (2.0, 28, 1.1, 9.0, 0.9, None, True, "power", backend)
    torch.library.opcheck(torch.ops.distilkernels.pair_stats.default, (z, t, labels, w, *numbers))
    stats = torch.ops.distilkernels.pair_stats(z.detach(), t, labels, w, *numbers)
    grads = torch.randn(6, 10, dtype=F64, device=device)
    torch.library.opcheck(torch.ops.distilkernels.pair_stats_backward.default, (z.detach(), t, labels, w, stats, grads, *numbers))
