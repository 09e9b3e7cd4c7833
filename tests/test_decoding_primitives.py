"""The contract of `filter_rows`, `sample_rows` and `weigh_rows`: every backend against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from benchmarks.cases import CONTRACT, Case
from servers import servers

from distilkernels import BackendError, backends
from distilkernels.primitives import sample_rows
from distilkernels.primitives.boundary import rows_of
from distilkernels.primitives.filter_rows import Filtered, Filters, allocate, filtered, reference
from distilkernels.primitives.philox import philox, uniform53
from distilkernels.primitives.sample_rows import Noise, Operand, drawn, mass, uniforms_at, weights

INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = [c for c in CONTRACT if not c.head and c.ids == "top" and c.ids_dtype == torch.int64 and c.name != "k1"] + [
    next(c for c in CONTRACT if c.name == name) for name in ("masked", "equal")
]
CASES += [
    Case("tiny_tail", 4, 515, 1, "a flat row far below 0", content="tiny_tail"),
    Case("subnormal", 3, 131, 1, "logits that are not normal numbers"),
    Case("outlier", 4, 1009, 1, "one column has all the mass"),
]
WIDE = Case("qwen", 2, 151_936, 1, "a real vocabulary")

# temperature, top_k, top_p, min_p; 0 is off for top_k and min_p, ≥ 1 for top_p
FILTERS = [
    (1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (1.0, 10**9, 1.0, 0.0),
    (1.0, 0, 0.0, 0.0), (1.0, 0, 0.5, 0.0), (1.0, 0, 0.9999, 0.0), (1.0, 0, 7.0, 0.0), (1.5, 7, 0.8, 0.02), (1.0, 0, 1.0, 1.0),
    (1.0, 0, 1.0, 0.1), (0.3, 3, 0.0, 0.5), (0.0, 2, 0.3, 0.9), (2.0, 40, 0.95, 0.0), (1.0, 0, 0.9, 1e-12),
]  # fmt: skip


def rows_for(case: Case, dtype: torch.dtype, device: str) -> torch.Tensor:
    x = case.logits(dtype, device)
    if case.name == "subnormal":
        x = x * 1e-40 if dtype in (torch.float32, torch.bfloat16) else x * 1e-6 if dtype == torch.float16 else x * 1e-310
    elif case.name == "outlier":
        x[..., 500] = 60
    return x


def filters_for(n: int, shift: int, device: str) -> Filters:
    chosen = [FILTERS[(i + shift) % len(FILTERS)] for i in range(n)]
    columns = [torch.tensor([c[j] for c in chosen], dtype=torch.int64 if j == 1 else torch.float64, device=device) for j in range(4)]
    return Filters(*columns)


def definition(x: torch.Tensor, columns: int, filters: Filters) -> Filtered:
    """In float64 on a CPU, whatever the input."""
    x, filters = x.double().cpu().reshape(1, -1, x.shape[-1]), Filters(*(t.cpu() for t in filters))
    out = allocate(x)
    if x.numel():
        reference(x, columns, filters, out)
    return Filtered(filters.temperature, **out)


def refused(backend: str, primitive: str, *rows: torch.Tensor) -> bool:
    return backends.module(backend).why_not(primitive, *rows) is not None


def slack_of(x: torch.Tensor, temperature: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Relative error per row of e^{x/T − lse} in float32, which cannot hold x/T better than 6e-8 of itself."""
    if dtype == torch.float64:
        return torch.full(temperature.shape, 1e-10, dtype=torch.float64)
    size = x.double().cpu().reshape(-1, x.shape[-1]).nan_to_num(0, 0, 0).abs().amax(-1)
    return 1e-5 + 4e-7 * size / torch.where(temperature.cpu() == 0, 1.0, temperature.cpu())


def assert_filtered(x: torch.Tensor, columns: int, filters: Filters, backend: str) -> None:
    got = Filtered(*(t.cpu() for t in filtered(rows_of(x), columns, filters, backend)))
    want = definition(x, columns, filters)
    cpu = Filters(*(t.cpu() for t in filters))
    value_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert got.bar.dtype == value_dtype and got.lse.dtype == got.expected.dtype == got.lse_all.dtype == torch.float64
    bad = want.lse.isnan()
    for name in ("bar", "lse", "lse_all", "expected"):
        assert getattr(got, name).isnan().equal(bad), name
    assert got.argmax.equal(want.argmax)

    # which columns are left: between those of slightly stricter and of slightly looser filters, and never against top_k
    wide = x.double().cpu().reshape(-1, x.shape[-1])[:, :columns]
    slack = slack_of(x, filters.temperature, x.dtype)
    strict, loose = (
        definition(x, columns, cpu._replace(top_p=torch.where(cpu.top_p < 1, cpu.top_p * (1 - s), cpu.top_p), min_p=(cpu.min_p * (1 + s)).clamp(max=1)))
        for s in (slack, -slack)
    )
    count, least, most = ((wide >= t.bar.double()[:, None]).sum(-1) for t in (got, strict, loose))
    assert ((count >= least) & (count <= most))[~bad].all()
    off = (cpu.top_k == 0) & (cpu.top_p >= 1) & (cpu.min_p == 0) & (cpu.temperature > 0) & ~bad
    assert (got.bar[off] == -INF).all()

    # the sums are those of the columns that it kept
    cold = cpu.temperature == 0
    z = wide / torch.where(cold, 1.0, cpu.temperature)[:, None]
    kept = z.masked_fill(wide < got.bar.double()[:, None], -INF)
    q = kept.softmax(-1)
    exact = {"lse": kept.logsumexp(-1), "lse_all": z.logsumexp(-1), "expected": (q * z.masked_fill(q == 0, 0)).sum(-1)}
    for name, value in exact.items():
        error = (getattr(got, name) - value.masked_fill(cold, 0)).abs()[~bad]
        assert (error <= (slack * (1 + value.abs().clamp(max=100)))[~bad]).all(), f"{name}: {error.max()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend,device", servers("filter_rows"))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_filter_rows(case, backend, device, dtype):
    x = rows_for(case, dtype, device)
    if refused(backend, "filter_rows", rows_of(x)):
        with pytest.raises(BackendError, match=backend):
            filtered(rows_of(x), case.v, filters_for(case.n, 0, device), backend)
        return
    for shift in range(0, len(FILTERS), max(case.n - 1, 1) if case.v < 2000 else 5):
        assert_filtered(x, case.v, filters_for(case.n, shift, device), backend)
    assert_filtered(x, max(case.v - 9, 1), filters_for(case.n, 7, device), backend)


@pytest.mark.parametrize("backend,device", servers("filter_rows"))
def test_filter_rows_at_a_real_vocabulary(backend, device):
    x = WIDE.logits(torch.float32, device)
    for shift in (7, 9, 15):
        assert_filtered(x, WIDE.v - 271, filters_for(2, shift, device), backend)


@pytest.mark.parametrize("backend,device", servers("filter_rows"))
def test_filter_boundary_ties_are_kept(backend, device):
    """bfloat16 and integers put many columns on one boundary; the outcome is by value, never by place."""
    x = torch.randint(-4, 5, (8, 777), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).to(device)
    for k in (1, 100, 101, 776, 777):
        one, zero = (torch.full((8,), v, dtype=torch.float64, device=device) for v in (1, 0))
        filters = Filters(one, torch.full((8,), k, device=device), one, zero)
        bar = filtered(rows_of(x), 777, filters, backend).bar.cpu()
        kth = x.float().cpu().sort(dim=-1, descending=True).values[:, k - 1]
        kept = (x.float().cpu() >= bar[:, None]).sum(-1)
        assert kept.equal((x.float().cpu() >= kth[:, None]).sum(-1))


@pytest.mark.parametrize("backend,device", servers("filter_rows"))
def test_filters_that_leave_almost_all_or_drop_almost_nothing(backend, device):
    """All columns but one; the nucleus of a row whose columns are equal, which is all of it however small top_p is."""
    descending = torch.arange(131, 0, -1).float().to(device) / 16
    rows = torch.stack([descending, descending.flip(0), torch.full_like(descending, 3.0), torch.full_like(descending, -1e4)])
    one, zero = (torch.full((4,), v, dtype=torch.float64, device=device) for v in (1, 0))
    top_p = torch.tensor([1, 1, 0.01, 1e-12], dtype=torch.float64, device=device)
    law = filtered(rows_of(rows), 131, Filters(one, torch.tensor([130, 129, 0, 0], device=device), top_p, zero), backend)
    assert (rows >= law.bar[:, None]).sum(-1).tolist() == [130, 129, 131, 131]
    torch.testing.assert_close(law.entropy[2:].cpu(), torch.full((2,), math.log(131), dtype=torch.float64), rtol=1e-5, atol=0)


def test_bar_of_a_probability_is_the_least_logit_that_has_it():
    g = torch.Generator().manual_seed(3)
    temperature = 0.3 + torch.rand(200, generator=g, dtype=torch.float64)
    off = torch.zeros_like(temperature)
    law = filtered(torch.randn(200, 1, 31, generator=g) * 3, 31, Filters(temperature, off.long(), off + 1, off), "reference")
    bar = law.bar_of(0.03)
    assert bar.dtype == torch.float32
    for x, reached in ((bar, True), (torch.nextafter(bar, torch.tensor(-INF)), False)):
        assert ((x.double() / temperature - law.lse >= math.log(0.03)) == reached).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend,device", servers("filter_rows"))
def test_filter_some_rows(backend, device, dtype):
    """Rows in no order, one twice: each is what it is among all, bit for bit, though the filters are those of its new place."""
    x = Case("some", 7, 1009, 1).logits(dtype, device)
    x[3, 5] = NAN
    x = x.view(1, 7, 1009).transpose(0, 1)
    filters, rows = filters_for(7, 4, device), torch.tensor([4, 3, 6, 0, 4], device=device)
    whole = filtered(x, 1003, filters, backend)
    some = filtered(x, 1003, Filters(*(t[rows] for t in filters)), backend, rows)
    for one, all_of in zip(some, whole):
        assert one.shape == (5,) and torch.equal(one.nan_to_num(-7), all_of[rows].nan_to_num(-7))
    assert some.lse.isnan().tolist() == [False, True, False, False, False]
    assert filtered(x, 1003, Filters(*(t[:0] for t in filters)), backend, rows[:0]).lse.shape == (0,)


@pytest.mark.parametrize("backend,device", servers("coin"))
def test_coin(backend, device):
    """The numbers of the definition, of places broadcast together: 64-bit seeds of both signs, positions past 32 bits."""
    g = torch.Generator().manual_seed(2)
    seeds = torch.randint(-(2**63), 2**63 - 1, (37, 1), generator=g)
    positions, offsets = torch.randint(0, 2**40, (37, 1), generator=g), torch.arange(9)
    words = [philox(seeds, (0, positions, offsets, stream)) for stream in (1, 2)]
    for stream, (high, low, _, _) in zip((1, 2), words):
        got = sample_rows.coin(*(t.to(device) for t in (seeds, positions, offsets)), stream, backend)
        assert got.dtype == torch.float64 and torch.equal(got.cpu(), uniform53(high, low))
    assert sample_rows.coin(seeds[:0].to(device), positions[:0].to(device), offsets.to(device), 1, backend).shape == (0, 9)


def test_mutants_of_filters(monkeypatch):
    """≤ for < in top_k, and bounds that are a little off, must fail the contract."""
    honest = backends.module("reference").filter_rows
    for change in (
        lambda f: f._replace(top_k=f.top_k + 1),
        lambda f: f._replace(top_k=torch.where(f.top_k > 1, f.top_k - 1, f.top_k)),
        lambda f: f._replace(top_p=torch.where(f.top_p < 1, f.top_p + 1e-3, f.top_p)),
        lambda f: f._replace(min_p=f.min_p * 0.99),
    ):
        monkeypatch.setattr(backends.module("reference"), "filter_rows", lambda x, v, f, out, change=change: honest(x, v, change(f), out))
        with pytest.raises(AssertionError):
            assert_filtered(torch.randn(17, 333), 333, filters_for(17, 0, "cpu"), "reference")


# Draws


def noise_for(r: int, device: str, stream=4) -> Noise:
    g = torch.Generator().manual_seed(9)
    seeds = torch.randint(-(2**63), 2**63 - 1, (r,), generator=g)
    return Noise(seeds.to(device), torch.randint(0, 2**31, (r,), generator=g).to(device), torch.arange(r, device=device) % 9, stream)


def exact_operand(operand: Operand) -> Operand:
    logits = operand.logits.double().cpu()
    law = Filtered(*(t.cpu() for t in operand.law))
    return Operand(logits.reshape(1, -1, logits.shape[-1]), operand.rows.cpu(), law._replace(bar=law.bar.double()))


def operand_of(x: torch.Tensor, rows: torch.Tensor, columns: int, shift: int) -> Operand:
    """Rows of x under FILTERS, the laws by the definition; every fifth draw is turned to an argmax as `verify` turns one."""
    device, n = x.device, x.reshape(-1, x.shape[-1]).shape[0]
    law = definition(x, columns, filters_for(n, shift, "cpu"))
    law = law._replace(bar=law.bar.to(torch.float64 if x.dtype == torch.float64 else torch.float32))
    law = law.at(rows.cpu().clamp(min=0))
    temperature = torch.where(torch.arange(rows.shape[0]) % 5 == 4, 0.0, law.temperature)
    return Operand(rows_of(x), rows.to(device), Filtered(*(t.to(device) for t in law._replace(temperature=temperature))))


def rows_drawn(n: int, device: str, shift: int = 0) -> torch.Tensor:
    """−1, repetitions, and no order."""
    rows = [(7 * i + shift) % n for i in range(2 * n)]
    return torch.tensor([rows[0], -1, rows[0], *rows[1:], -1], device=device)


def assert_drawn(first: Operand, noise: Noise, columns: int, vocab: int, backend: str, *, second=None, scale=None, mode="plain") -> None:
    got = drawn(first, noise, columns, vocab=vocab, second=second, scale=scale, mode=mode, backend=backend)
    token, value, rank, compared = (t.cpu() for t in got)
    dtype = first.logits.dtype
    one, two = exact_operand(first), None if second is None else exact_operand(second)
    c = None if scale is None else scale.cpu()
    w = weights(one, two, c, mode, columns)
    # what rounding can do to a weight: a difference keeps the error of its terms
    slack = slack_of(first.logits, first.law.temperature.new_full((one.logits.shape[1],), 1.0), dtype)[one.rows.clamp(min=0)]
    slack = slack / torch.where(one.law.temperature == 0, 1.0, one.law.temperature.clamp(max=1))
    sizes, unclear = w, torch.zeros_like(one.rows, dtype=torch.bool)
    if mode == "residual":
        slack = torch.maximum(slack, slack_of(second.logits, torch.ones(two.logits.shape[1]), dtype)[two.rows.clamp(min=0)] / 0.3)
        plain = weights(one, None, None, "plain", columns)
        alone = (two.rows < 0)[:, None]
        sizes = torch.where(alone, w, c[:, None] * plain + (c[:, None] * plain - w).abs())
        nothing = (w <= 0).all(-1) & (one.rows >= 0)
        # a residual that is no more than rounding may be taken for none, and none for one
        rounding = slack[:, None] * sizes.nan_to_num()
        unclear = (w <= rounding).all(-1) & (rounding > 0).any(-1)
        w, sizes = torch.where(nothing[:, None], plain, w), torch.where(nothing[:, None], plain, sizes)
    bad = w.isnan().any(-1) | (one.rows < 0) | (w <= 0).all(-1)
    error = slack[:, None] * sizes.nan_to_num()
    clock = -torch.log1p(-uniforms_at(Noise(*(t.cpu() if isinstance(t, torch.Tensor) else t for t in noise)), columns).double())
    assert token[bad].eq(-1).all() and value[bad].isnan().all() and rank[bad].eq(-1).all() and not compared[bad].any()
    good = ~bad & ~unclear
    assert (token >= 0)[~bad].all()
    chosen = token.clamp(min=0)[:, None]
    assert ((token >= 0) & (token < columns))[good].all()
    best = torch.where(w > error, clock / (w - error), INF).amin(-1)
    mine = (clock / (w + error)).gather(1, chosen)[:, 0]
    assert (mine <= best * (1 + 1e-6))[good].all()
    assert (w + error).gather(1, chosen)[good].gt(0).all()
    # and it is nearly always the definition's own token
    race = torch.where(w > 0, clock / w, INF)
    if good.any():
        assert (race.argmin(-1) == token)[good].float().mean() > 0.9
    judged = two if mode == "gate" else one
    x = judged.logits.reshape(-1, judged.logits.shape[-1])[judged.rows.clamp(min=0), :vocab]
    at = x.gather(1, chosen)[:, 0]
    assert torch.equal(value.double()[good], at[good]) and rank[good].equal((x > at[:, None]).sum(-1)[good])
    if second is None:
        assert not compared.any()
    elif mode == "gate":
        assert compared[good].equal((two.rows >= 0)[good])
    else:
        assert compared[good].equal(((two.rows >= 0) & ~nothing)[good])
    total = mass(first, columns, second=second, scale=scale, mode=mode, backend=backend).cpu()
    exact = weights(one, two, c, mode, columns).sum(-1)
    broken = exact.isnan() & (one.rows >= 0)
    assert total.dtype == torch.float64 and total.isnan().equal(broken)
    exact = exact.masked_fill(one.rows < 0, 0)
    assert ((total - exact).abs() <= slack * 3 + 1e-7)[~broken].all()
    assert total[one.rows < 0].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend,device", servers("sample_rows"))
@pytest.mark.parametrize("case", [c for c in CASES if c.n], ids=lambda c: c.name)
def test_sample_and_weigh_one_row(case, backend, device, dtype):
    x = rows_for(case, dtype, device)
    rows = rows_drawn(case.n, device)
    if refused(backend, "sample_rows", rows_of(x)):
        with pytest.raises(BackendError, match=backend):
            drawn(operand_of(x, rows, case.v, 0), noise_for(rows.shape[0], device), case.v, backend=backend)
        return
    for shift in (0, 6, 11):
        stream = 4 if shift else torch.arange(rows.shape[0], device=device) % 6
        columns = case.v if shift < 11 else max(case.v - 9, 1)
        assert_drawn(operand_of(x, rows, columns, shift), noise_for(rows.shape[0], device, stream), columns, case.v, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend,device", servers("sample_rows"))
@pytest.mark.parametrize("mode", ["residual", "gate"])
@pytest.mark.parametrize("name", ["prime", "one_column", "short", "block_and_one", "masked", "nan_row", "equal", "row_stride", "shifted", "outlier"])
def test_sample_and_weigh_two_rows(name, mode, backend, device, dtype):
    case = next(c for c in CASES if c.name == name)
    x = rows_for(case, dtype, device)
    g = torch.Generator().manual_seed(3)
    # of another width and number, near the first's
    y = torch.full((case.n + 2, case.v + 5), NAN)
    y[:, : case.v] = x.reshape(-1, case.v)[torch.arange(case.n + 2) % case.n].float().cpu() + torch.randn(case.n + 2, case.v, generator=g)
    y[:, case.v : case.v + 3] = 0.5
    y = y.to(dtype).to(device)
    if refused(backend, "sample_rows", rows_of(x), rows_of(y)):
        return
    for shift in (0, 6, 9):
        rows = rows_drawn(case.n, device)
        others = rows_drawn(case.n + 2, device, 1)[: rows.shape[0]]
        others[::4] = -1 if mode == "residual" else others[::4].clamp(min=0)
        others[-2] = 1 % case.n
        columns = max(case.v - (9 if shift == 9 else 0), 1)
        first, second = operand_of(x, rows, columns, shift), operand_of(y, others, columns, shift + 2)
        if mode == "gate":
            # the pool's judge: what passes is by its raw logits; without a pool there is no draw
            rows = torch.where(others < 0, -1, rows)
            first = first._replace(rows=rows)
            bar = torch.randn(rows.shape[0], generator=g).to(second.law.bar).to(device)
            second = second._replace(law=second.law._replace(bar=torch.where(second.law.lse.isnan(), NAN, bar)))
        scale = None
        if mode == "residual":
            scale = torch.rand(rows.shape[0], generator=g, dtype=torch.float64).to(device)
            scale[::2], scale[3::7] = 1.0, 0.0
        vocab = case.v if mode == "residual" else case.v + 3
        assert_drawn(first, noise_for(rows.shape[0], device), columns, vocab, backend, second=second, scale=scale, mode=mode)


@pytest.mark.parametrize("backend,device", servers("sample_rows"))
def test_residual_of_equal_rows_has_no_weight(backend, device):
    """Bit for bit: the same row and law on both sides leaves nothing, and the draw is from the first."""
    x = torch.randn(3, 5001, generator=torch.Generator().manual_seed(4)).to(device) * 3
    rows = torch.arange(3, device=device)
    for shift in (0, 7, 12):
        first = operand_of(x, rows, 5001, shift)
        scale = torch.ones(3, dtype=torch.float64, device=device)
        one = {"second": first, "scale": scale, "mode": "residual", "backend": backend}
        assert (mass(first, 5001, **one) == 0).all()
        got, alone = drawn(first, noise_for(3, device), 5001, **one), drawn(first, noise_for(3, device), 5001, backend=backend)
        assert not got.compared.any() and got.token.equal(alone.token)


@pytest.mark.parametrize("backend,device", servers("sample_rows"))
def test_sample_at_a_real_vocabulary(backend, device):
    x = WIDE.logits(torch.float32, device)
    y = (x.cpu() + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).to(device)
    rows = torch.tensor([1, -1, 0, 1], device=device)
    scale = torch.tensor([1.0, 1.0, 0.3, 0.9], dtype=torch.float64, device=device)
    v = WIDE.v - 271
    first, second = operand_of(x, rows, v, 9), operand_of(y, rows, v, 0)
    assert_drawn(first, noise_for(4, device), v, WIDE.v, backend)
    assert_drawn(first, noise_for(4, device), v, WIDE.v, backend, second=second, scale=scale, mode="residual")


@pytest.mark.parametrize("mistake", ["dropped_tile", "bar_is_strict", "no_temperature", "words_swapped", "offset_ignored", "coarse"])
def test_mutants_of_a_draw(monkeypatch, mistake):
    """Each must fail `assert_drawn` on some filter."""
    weigh, uniforms = sample_rows.weights, sample_rows.uniforms_at

    def dropped(*a):
        w = weigh(*a).clone()
        w[:, 64:128] = 0
        return w

    def strict(first, *a):
        up = torch.nextafter(first.law.bar, torch.full_like(first.law.bar, INF))
        return weigh(first._replace(law=first.law._replace(bar=up)), *a)

    def warm(first, *a):
        return weigh(first._replace(law=first.law._replace(temperature=torch.ones_like(first.law.temperature))), *a)

    def swapped(noise, columns):
        return uniforms(noise, (columns + 3) // 4 * 4).view(-1, (columns + 3) // 4, 4).flip(-1).flatten(1)[:, :columns]

    def in_place(noise, columns):
        return uniforms(noise._replace(offsets=torch.zeros_like(noise.offsets)), columns)

    def coarse(noise, columns):
        return ((uniforms(noise, columns) * 2**10).floor() + 0.5) / 2**10

    changes = {
        "dropped_tile": ("weights", dropped), "bar_is_strict": ("weights", strict), "no_temperature": ("weights", warm),
        "words_swapped": ("uniforms_at", swapped), "offset_ignored": ("uniforms_at", in_place), "coarse": ("uniforms_at", coarse),
    }  # fmt: skip
    x = torch.randn(17, 333, generator=torch.Generator().manual_seed(6)) / 5
    monkeypatch.setattr(sample_rows, *changes[mistake])
    with pytest.raises(AssertionError):
        rows = rows_drawn(17, "cpu")
        assert_drawn(operand_of(x, rows, 333, 0), noise_for(rows.shape[0], "cpu"), 333, 333, "reference")


@pytest.mark.parametrize("backend,device", servers("sample_rows"))
def test_equal_uniforms_go_to_the_lowest_id(backend, device):
    """Where the whole row has one weight, the earliest of the smallest uniforms: the race is then the uniforms' own."""
    x = torch.zeros(1, 4097, device=device).expand(40, -1)
    rows = torch.arange(40, device=device)
    token = drawn(operand_of(x, rows, 4097, 0)._replace(law=operand_of(x, rows * 0, 4097, 0).law), noise_for(40, device), 4097, backend=backend).token.cpu()
    u = uniforms_at(Noise(*(t.cpu() if isinstance(t, torch.Tensor) else t for t in noise_for(40, device))), 4097)
    warm = torch.arange(40) % 5 != 4
    assert token[warm].equal((u == u.amin(-1, keepdim=True)).int().argmax(-1)[warm]) and token[~warm].eq(0).all()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_weight_too_small_for_float32_is_drawn_where_there_is_no_other(backend):
    one, zero, row = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)

    def operand(*logits):
        x = torch.tensor(logits).view(1, 1, -1)
        return Operand(x, row, filtered(x, x.shape[2], Filters(one, row, one, zero), backend))

    gate = operand(-5.0, 2.0, -5.0)
    gate = gate._replace(law=gate.law._replace(bar=torch.tensor([1.0])))
    noise = Noise(row, row, row, 3)
    found = drawn(operand(0.0, -150.0, -1.0), noise, 3, second=gate, mode="gate", backend=backend)
    assert (found.token.item(), found.value.item(), found.rank.item()) == (1, 2.0, 0)



@pytest.mark.parametrize("backend,device", servers("sample_rows"))
def test_no_draws(backend, device):
    x = torch.randn(2, 9).to(device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert drawn(operand_of(x, none, 9, 0), noise_for(0, device), 9, backend=backend).token.shape == (0,)
    assert mass(operand_of(x, none, 9, 0), 9, backend=backend).shape == (0,)
    absent = torch.full((3,), -1, dtype=torch.int64, device=device)
    assert drawn(operand_of(x, absent, 9, 0), noise_for(3, device), 9, backend=backend).token.tolist() == [-1] * 3
    assert mass(operand_of(x, absent, 9, 0), 9, backend=backend).tolist() == [0.0] * 3
