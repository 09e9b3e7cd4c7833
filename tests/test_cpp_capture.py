"""topk_select and draw_rows in C++ on every instruction set of this machine: exact ids, tails, laws of the draws, memory."""

from __future__ import annotations

import math
import time

import pytest
import torch
from benchmarks.cases import CONTRACT
from test_capture import DTYPES, adversaries, assert_selected, truth

from distilkernels.backends import cpp
from distilkernels.primitives import draw_rows, topk_select
from distilkernels.primitives.draw_rows import Draws, uniforms
from distilkernels.primitives.head import Head
from distilkernels.primitives.topk_select import TopK

pytestmark = pytest.mark.skipif(cpp._cpp is None, reason="distilkernels._cpp is not built")
ISAS = cpp.available_isas() if cpp._cpp is not None else []
NEG = -math.inf
PLAIN = Head()


def selected(x: torch.Tensor, k: int, head: Head = PLAIN) -> TopK:
    out = topk_select.allocate(x, k)
    for t in out:
        t.fill_(-12345)
    cpp.topk_select(x, head, out)
    return out


def drawn(x: torch.Tensor, draws: int, tau: float = 1.0, head: Head = PLAIN, seed: int = 3, first: int = 0) -> Draws:
    out = draw_rows.allocate(x, draws)
    for t in out:
        t.fill_(-12345)
    n = x.shape[0] * x.shape[1]
    cpp.draw_rows(x, tau, torch.full((n,), seed), torch.arange(first, first + n), head, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_cases(isa, dtype):
    for case in CONTRACT:
        if case.n and case.ids_dtype == torch.int64:
            assert_selected(case.logits(dtype), min(case.k, case.v), "cpp", case.head)


# tiles of 512, of 64 with a bound, of 64 without one, K = V, one entry, a single tile that is shorter than a vector
@pytest.mark.parametrize("v,k", [(30_011, 64), (12_007, 700), (1531, 1024), (515, 515), (4099, 1), (13, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adversarial_rows(isa, dtype, v, k):
    rows = {name: row for name, row in adversaries(v, k, dtype).items() if not name.startswith("a NaN")}
    x = torch.stack([*rows.values()])
    got = selected(x[None], k)
    ids, values, lse, tail = truth(x, k, {})
    slack = 1e-12 if dtype == torch.float64 else 2e-6
    for i, name in enumerate(rows):
        assert torch.equal(got.ids[i].long(), ids[i]), name
        assert torch.equal(got.values[i].double(), values[i]), name
        torch.testing.assert_close(got.lse[i], lse[i], rtol=slack, atol=slack, msg=name)
        torch.testing.assert_close(got.tail_lse[i], tail[i], rtol=slack, atol=slack, msg=name)


@pytest.mark.parametrize(
    "head", [{"logit_scale": -0.5}, {"logit_scale": 0.0}, {"softcap": 0.1}, {"softcap": 4.0, "logit_scale": -2.0, "valid_vocab": 1100}], ids=str
)
def test_order_of_the_raw_logits(isa, head):
    """Also of −inf, which a softcap makes finite and a negative scale +inf, and of denormals."""
    x = torch.randn(4, 1201, generator=torch.Generator().manual_seed(4)) * 3
    x[1] *= 1e-41
    if head.get("softcap"):
        x[2, 5:] = NEG  # the tail is made of −inf
    assert_selected(x, 17, "cpp", head)


def test_infinite_logits(isa):
    """lse is +inf, and the tail finite until more entries than K are infinite: it is summed again without them."""
    x = torch.randn(1, 3, 2011, generator=torch.Generator().manual_seed(0))
    x[0, 0, 1500] = x[0, 1, [0, 700, 2010]] = math.inf
    x[0, 2, 100] = math.inf
    x[0, 2, 1900] = math.nan
    got = selected(x, 2)
    assert got.ids.tolist()[:2] == [[1500, int(x[0, 0].topk(2).indices[1])], [0, 700]] and got.ids[2].tolist() == [0, 1]
    assert got.lse[:2].tolist() == [math.inf] * 2 and got.lse[2].isnan() and got.tail_lse[2].isnan()
    torch.testing.assert_close(got.tail_lse[0], x[0, 0].double().scatter(0, got.ids[0].long(), NEG).logsumexp(0), rtol=1e-6, atol=1e-6)
    assert got.tail_lse[1] == math.inf
    nothing = drawn(x, 4)
    assert (nothing.ids == -1).all() and nothing.values.isnan().all() and nothing.lse[:2].tolist() == [math.inf] * 2


def test_spreads_of_1e4(isa):
    """The first reference is wrong by thousands of nats, and the tail thousands of nats below the selected."""
    v = 20_011
    ramp = torch.linspace(-1e4, 1e4, v)
    steps = torch.where(torch.arange(v) < 9, 1e4, ramp - 2e4)
    x = torch.stack([ramp, ramp.flip(0), ramp[torch.randperm(v, generator=torch.Generator().manual_seed(0))], steps])
    assert_selected(x, 9, "cpp", {})
    for tau in (1.0, 0.001, 7.0):
        got = drawn(x[None], 50, tau)
        torch.testing.assert_close(got.lse, x.double().logsumexp(-1), rtol=1e-6, atol=0)
        torch.testing.assert_close(got.lse_tau, (x.double() * tau).logsumexp(-1), rtol=2e-6, atol=2e-6)
        cdf = torch.nn.functional.pad((x.double() * tau).softmax(-1).cumsum(-1), (1, 0))
        u = uniforms(torch.full((4,), 3), torch.arange(4), 50)
        below, above = (cdf.gather(1, got.ids.long() + i) for i in (0, 1))
        assert ((u > below - 1e-5) & (u < above + 1e-5)).all()


def test_more_candidates_than_are_held(isa):
    """Rising blocks of equal entries: the bound is low, the buffer fills, and of equal entries the first must stay."""
    v = 16_384
    x = torch.arange(v).div(300, rounding_mode="floor").float() / 100
    noisy = x + torch.randn(v, generator=torch.Generator().manual_seed(1)) * 0.01
    for k in (1, 5, 900):
        assert_selected(torch.stack([x, x.bfloat16().float(), noisy, -x]), k, "cpp", {})
        assert_selected(torch.stack([x, noisy, x.flip(0)]), k, "cpp", {"softcap": 0.5})


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_draws_follow_the_law(isa, tau):
    """χ² over the columns of a row that spans tiles; columns of no weight are never drawn."""
    v, r = 1500, 200_000
    x = torch.randn(v, generator=torch.Generator().manual_seed(0))
    x[::3] = NEG
    x[:256] = NEG
    ids = drawn(x.view(1, 1, v), r, tau).ids[0].long()
    p = (x.double() * tau).softmax(0)
    counts = torch.bincount(ids, minlength=v).double()
    assert (counts[p == 0] == 0).all()
    some = p > 0
    statistic, freedom = ((counts - r * p)[some] ** 2 / (r * p[some])).sum(), int(some.sum()) - 1
    assert abs(statistic - freedom) / math.sqrt(2 * freedom) < 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_layout_and_threads_do_not_change_a_bit(isa, dtype, threads):
    base = (torch.randn(3, 4, 10_007, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    x = base[:, :-1, 2:10_001]  # rows at strides, off any alignment, and the last is the end of the storage's reach
    threads(1)
    one = [*selected(x, 33), *drawn(x, 21, 0.7)]
    threads(3)
    for a, b in zip(one, [*selected(x.contiguous(), 33), *drawn(x.contiguous(), 21, 0.7)]):
        assert torch.equal(a, b)
    for a, b in zip(one, [*selected(x[1:2, 1:2].contiguous(), 33), *drawn(x[1:2, 1:2].contiguous(), 21, 0.7, first=4)]):
        assert torch.equal(a[4:5], b)


def test_subnormals_elsewhere_survive():
    selected(torch.randn(1, 64, 4099), 5)
    tiny = torch.full((4,), 1e-40)
    assert ((tiny * 0.5) > 0).all()


def _fastest(call) -> float:
    times = []
    for _ in range(9):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def test_no_row_is_slow(isa, threads):
    """What a threshold filter chokes on: rising rows, thousands of ties, one value. Measured 0.8–1.1 of a random row."""
    threads(1)
    usual = (torch.randn(1, 4, 60_013, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    rows = {"ascending": usual.sort(-1).values, "ties": usual.float().round().bfloat16(), "equal": torch.zeros_like(usual), "wide": usual * 30}
    limit = 2.5 * _fastest(lambda: selected(usual, 64))
    for name, x in rows.items():
        assert _fastest(lambda x=x: selected(x, 64)) < limit, name
