"""Capturing a teacher: exact selection on every backend, samples without bias, scores on given ids."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from benchmarks.cases import CONTRACT
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import servers

import distilkernels as dk
from distilkernels import BackendError, backends
from distilkernels.primitives.boundary import rows_of
from distilkernels.primitives.draw_rows import uniforms
from distilkernels.primitives.head import Head
from distilkernels.primitives.philox import Stream, philox, uniform53
from distilkernels.primitives.topk_select import TopK, top_k

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NEG = -math.inf


def truth(logits: torch.Tensor, k: int, head: dict):
    """Ids by a stable sort of the raw logits in fp64; values, lse and tail in fp64."""
    x = logits.double().reshape(-1, logits.shape[-1])
    checked = Head.checked(x.shape[1], **head)
    x = x[:, : checked.columns(x.shape[1])]
    order = x * math.copysign(1, checked.logit_scale) if checked.logit_scale else torch.zeros_like(x)
    ids = order.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    z = checked._replace(valid_vocab=None).apply(x)
    return ids, z.gather(-1, ids), z.logsumexp(-1), z.scatter(-1, ids, NEG).logsumexp(-1)


def assert_selected(logits: torch.Tensor, k: int, backend: str, head: dict, device: str = "cpu") -> None:
    assert_truth(top_k(logits.to(device), k, Head.checked(logits.shape[-1], **head), backend), logits, k, head)


def assert_truth(got: TopK, logits: torch.Tensor, k: int, head: dict) -> None:
    ids, values, lse, tail = truth(logits, k, head)
    nan = lse.isnan()
    want_ids = torch.where(nan[:, None], torch.arange(k), ids)
    assert torch.equal(got.ids.cpu().long(), want_ids)
    assert got.values.isnan().any(-1).cpu().equal(nan) and got.tail_lse.isnan().cpu().equal(nan)
    slack = {"rtol": 1e-12, "atol": 1e-12} if logits.dtype == torch.float64 else {"rtol": 2e-6, "atol": 2e-6}
    for name, mine, exact in (("values", got.values, values), ("lse", got.lse, lse), ("tail_lse", got.tail_lse, tail)):
        torch.testing.assert_close(mine.double().cpu()[~nan], exact[~nan], **slack, msg=lambda m, name=name: f"{name}: {m}")


def refuses(backend: str, primitive: str, logits: torch.Tensor) -> bool:
    return backends.module(backend).why_not(primitive, rows_of(logits)) is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend,device", servers("topk_select"))
@pytest.mark.parametrize("case", [c for c in CONTRACT if c.ids_dtype == torch.int64], ids=lambda c: c.name)
def test_selection(case, backend, device, dtype):
    logits = case.logits(dtype)
    if refuses(backend, "topk_select", logits.to(device)):
        with pytest.raises(BackendError, match=backend):
            dk.capture_topk(logits.to(device), 1, backend=backend)
        return
    assert_selected(logits, min(case.k, case.v), backend, case.head, device)


def adversaries(v: int, k: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(v + k)
    ramp = torch.arange(v).float()
    few = torch.full((v,), NEG)
    few[torch.randperm(v, generator=g)[: k - 1]] = torch.randn(k - 1, generator=g)
    threshold = torch.randn(v, generator=g).clamp(max=0.5)
    threshold[torch.randperm(v, generator=g)[: max(k // 2, 1)]] = 2.0
    spike = torch.zeros(v)
    spike[v // 3] = 1e4
    zeros = torch.zeros(v)
    zeros[1::2] = -0.0
    rows = {
        "all equal": torch.full((v,), -3.0),
        "ascending": ramp / v * 40,
        "descending": -ramp / v * 40,
        "ties at the threshold": threshold,
        "one spike": spike,
        "−inf but K − 1": few,
        "nothing but −inf": torch.full((v,), NEG),
        "thousands of ties": torch.randn(v, generator=g).mul(2).round(),
        "largest at the end": torch.cat([torch.zeros(v - 1), torch.ones(1)]),
        "plus and minus zero": zeros,
        "descending by tile": -(ramp // 512),
        "one tile holds all": torch.where((ramp >= v // 2) & (ramp < v // 2 + k), 5.0 + ramp % 7, torch.zeros(v)),
        "subnormal": ramp * 1e-42,
        "a NaN": torch.where(ramp == v // 2, math.nan, torch.randn(v, generator=g)),
        "a NaN first": torch.where(ramp == 0, math.nan, torch.randn(v, generator=g)),
        "a NaN last": torch.where(ramp == v - 1, math.nan, torch.randn(v, generator=g)),
        "negative": -torch.rand(v, generator=g) * 1e4,
    }
    return {name: row.to(dtype) for name, row in rows.items()}


@pytest.mark.parametrize("v,k", [(6007, 64), (1531, 1024), (4096, 1), (515, 515), (20_011, 1000), (70, 3)])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend,device", servers("topk_select"))
def test_adversarial_rows(backend, device, dtype, v, k):
    """The exact ids of a stable fp64 sort, whatever the row holds, among other rows."""
    rows = adversaries(v, k, dtype)
    logits = torch.stack(list(rows.values()))
    got = top_k(logits.to(device), k, Head(), backend)
    ids, values, lse, tail = truth(logits, k, {})
    for i, name in enumerate(rows):
        if name.startswith("a NaN"):
            assert got.ids[i].tolist() == list(range(k)), name
            assert got.values[i].isnan().all() and got.lse[i].isnan() and got.tail_lse[i].isnan(), name
            continue
        assert torch.equal(got.ids[i].cpu().long(), ids[i]), name
        assert torch.equal(got.values[i].cpu().double(), values[i]), name
        torch.testing.assert_close(got.lse[i].cpu(), lse[i], rtol=2e-6, atol=2e-6, msg=name)
        torch.testing.assert_close(got.tail_lse[i].cpu(), tail[i], rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("backend,device", servers("topk_select"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_vocabulary(backend, device, dtype):
    if backend == "triton" and device == "cpu":
        pytest.skip("minutes under the interpreter; smaller vocabularies take the same code")
    logits = (torch.randn(3, 151_936, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    for k in (1, 64, 1024):
        assert_selected(logits, k, backend, {}, device)


@pytest.mark.parametrize("backend,device", servers("topk_select"))
@pytest.mark.parametrize(
    "head", [{"logit_scale": -0.5}, {"logit_scale": 0.0}, {"softcap": 0.1}, {"temperature": 0.1, "valid_vocab": 300}], ids=str
)
def test_the_order_is_that_of_the_raw_logits(backend, device, head):
    """A softcap that saturates rounds unequal logits to equal z; their order stays."""
    logits = torch.randn(4, 515, generator=torch.Generator().manual_seed(4)) * 3
    assert_selected(logits, 17, backend, head, device)


@pytest.mark.parametrize("backend,device", servers("topk_select"))
def test_tail_of_a_tiny_mass(backend, device):
    x = torch.randn(4, 20_011, generator=torch.Generator().manual_seed(3)).double().sort(-1, descending=True).values
    for mass in (1e-2, 1e-4, 1e-6, 1e-8):
        shift = math.log(mass) + x[:, :8].logsumexp(1) - x[:, 8:].logsumexp(1)
        row = torch.cat([x[:, :8], x[:, 8:] + shift[:, None].clamp(max=0)], 1).float()
        got = top_k(row.to(device), 8, Head(), backend)
        *_, lse, tail = truth(row, 8, {})
        assert ((got.tail_lse - got.lse).cpu() - (tail - lse)).abs().max() <= 1e-5


@pytest.mark.parametrize("backend,device", servers("topk_select"))
def test_selection_is_batch_invariant(backend, device):
    if backend == "reference":
        return  # PyTorch's own reductions make no such promise
    logits = torch.randn(37, 5003, device=device)
    whole = top_k(logits, 9, Head(), backend)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = top_k(logits[20:21].clone(), 9, Head(), backend)
    finally:
        torch.set_num_threads(threads)
    for mine, theirs in zip(whole, alone):
        assert torch.equal(mine[20:21], theirs)


@pytest.mark.parametrize("backend,device", servers("topk_select"))
def test_opcheck(backend, device):
    for case in [c for c in CONTRACT if c.name in ("prime", "softcap", "no_rows", "shifted")]:
        rows = rows_of(case.logits().to(device))
        head = Head.checked(case.v, **case.head)
        torch.library.opcheck(torch.ops.distilkernels.topk_select.default, (rows, case.k, *head, backend))
        if refuses(backend, "draw_rows", rows):
            continue
        n = rows.shape[0] * rows.shape[1]
        seeds = torch.arange(n, device=device)
        torch.library.opcheck(torch.ops.distilkernels.draw_rows.default, (rows, 5, 0.7, seeds, seeds + 1, *head, backend))


def test_compiled_capture_is_the_eager_one():
    logits = torch.randn(6, 300)
    compiled = torch.compile(lambda x: dk.capture_topk(x, 5).tensors(), fullgraph=True)
    for name, t in dk.capture_topk(logits, 5).tensors().items():
        torch.testing.assert_close(compiled(logits)[name], t)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 4), v=st.integers(1, 1200), share=st.floats(0, 1), seed=st.integers(0, 99), coarse=st.booleans())
def test_any_shape(n, v, share, seed, coarse):
    logits = torch.randn(n, v, generator=torch.Generator().manual_seed(seed))
    k = 1 + int(share * (min(v, dk.primitives.topk_select.MAX_K) - 1))
    for backend in ("cpp", "reference"):
        if not refuses(backend, "topk_select", logits):
            assert_selected(logits.round() if coarse else logits, k, backend, {})


# ------------------------------------------------------------------------------------------ from hidden states


@pytest.mark.parametrize("head", [{}, {"softcap": 4.0, "logit_scale": 0.6, "temperature": 1.5}, {"valid_vocab": 90}], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_capture_is_capture_of_the_product(head, with_bias):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 7, 16, generator=g, dtype=torch.float64), torch.randn(131, 16, generator=g, dtype=torch.float64)
    bias = torch.randn(131, generator=g, dtype=torch.float64) if with_bias else None
    logits = torch.nn.functional.linear(hidden, weight, bias)
    ids = logits.topk(6).indices.flip(-1)
    pairs = [
        (dk.linear_capture_topk(hidden, weight, 5, bias=bias, chunk_size=4, **head), dk.capture_topk(logits, 5, **head)),
        (dk.linear_score_topk(hidden, weight, ids, bias=bias, chunk_size=4, **head), dk.score_topk(logits, ids, **head)),
    ]
    for mine, want in pairs:
        assert torch.equal(mine.ids, want.ids) and mine.temperature == want.temperature
        torch.testing.assert_close(mine.logprobs, want.logprobs)
        torch.testing.assert_close(mine.tail_logprob, want.tail_logprob)
    mine = dk.linear_capture_samples(hidden, weight, 9, tau=0.8, seed=5, bias=bias, chunk_size=4, **head)
    want = dk.capture_samples(logits, 9, tau=0.8, seed=5, **head)
    assert torch.equal(mine.ids, want.ids)
    torch.testing.assert_close(mine.weights, want.weights)


def test_linear_capture_of_nothing_and_of_bfloat16():
    weight = torch.randn(40, 8)
    assert dk.linear_capture_topk(torch.randn(0, 8), weight, 3).ids.shape == (0, 3)
    hidden = torch.randn(5, 8).bfloat16()
    top = dk.linear_capture_topk(hidden, weight.bfloat16(), 3)
    assert top.logprobs.dtype == torch.float32
    with pytest.raises(ValueError, match=r"k must be in \[1, 30\]"):
        dk.linear_capture_topk(hidden, weight.bfloat16(), 31, valid_vocab=30)


def test_scores_are_the_log_softmax_at_the_ids():
    logits = torch.randn(2, 3, 50, dtype=torch.float64)
    ids = torch.tensor([[[3, 1, -1]] * 3] * 2)
    got = dk.score_topk(logits, ids, temperature=2.0, valid_vocab=40)
    want = (logits[..., :40] / 2).log_softmax(-1)
    torch.testing.assert_close(got.logprobs[..., :2], want[..., [3, 1]])
    assert (got.logprobs[..., 2] == NEG).all() and got.temperature == 2.0
    torch.testing.assert_close(got.tail_logprob, want.index_fill(-1, torch.tensor([1, 3]), NEG).logsumexp(-1))
    got.validate(50)


# ------------------------------------------------------------------------------------------------ samples


def test_philox_known_answers():
    """The vectors that Random123 publishes for Philox4x32-10."""

    def words(key, counter):
        return [f"{int(w):08x}" for w in philox(torch.tensor([key]), counter)]

    assert words(0, (0, 0, 0, 0)) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert words(-1, (-1,) * 4) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    assert words(0x299F31D0_A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)) == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def test_uniforms_are_inside_and_their_bits_count():
    ends = torch.tensor([0, 2**32 - 1])
    u = uniform53(ends, ends)
    assert u[0] == 2.0**-54 and u[1] == 1 - 2.0**-53
    words = philox(torch.tensor([7]), (1, 9, 0, int(Stream.CAPTURE)))
    u = uniforms(torch.tensor([7]), torch.tensor([9]), 4)[0]
    assert u[2] == ((int(words[0]) << 32 | int(words[1])) // 2**11 + 0.5) * 2.0**-53 and u[3] == uniform53(words[2], words[3])
    assert not torch.equal(uniforms(torch.tensor([7]), torch.tensor([9 + 2**32]), 4)[0], u)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend,device", servers("draw_rows"))
@pytest.mark.parametrize("case", [c for c in CONTRACT if c.ids_dtype == torch.int64], ids=lambda c: c.name)
def test_draws_agree_with_the_reference(case, backend, device, dtype):
    """The same draw on every backend, but where u lies within the rounding of a partial sum, which is looked at."""
    logits = case.logits(dtype)
    if refuses(backend, "draw_rows", logits.to(device)):
        with pytest.raises(BackendError, match=backend):
            dk.capture_samples(logits.to(device), 3, seed=1, backend=backend)
        return
    from distilkernels.primitives.draw_rows import draw

    n, r, tau = case.n, 12, 0.75
    head = Head.checked(case.v, **case.head)
    seeds, positions = torch.arange(n) * 7919 - 3, torch.arange(n) + 2**33
    got = draw(logits.to(device), r, tau, seeds.to(device), positions.to(device), head, backend)
    exact = draw(logits.double(), r, tau, seeds, positions, head, "reference")
    got = type(got)(*(t.cpu() for t in got))
    bad = ~exact.lse.isfinite()
    assert torch.equal(got.ids[bad], torch.full_like(got.ids[bad], -1)) and got.values[bad].isnan().all()
    slack = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 2e-6}
    for name in ("lse", "lse_tau"):
        torch.testing.assert_close(getattr(got, name), getattr(exact, name), equal_nan=True, **slack)
    z = head.apply(logits.double().reshape(n, case.v))
    torch.testing.assert_close(got.values[~bad].double(), z.gather(1, got.ids.clamp(min=0).long())[~bad], **slack)
    differ = (got.ids != exact.ids) & ~bad[:, None]
    # u must then lie between the partial sums around the chosen column, to the rounding of a float
    g = (tau * (z - z.amax(-1, keepdim=True))).exp()
    cdf = torch.nn.functional.pad(g.cumsum(-1) / g.sum(-1, keepdim=True), (1, 0))
    u, chosen = uniforms(seeds, positions, r), got.ids.clamp(min=0).long()
    assert ((u >= cdf.gather(1, chosen) - 2e-6) & (u <= cdf.gather(1, chosen + 1) + 2e-6))[differ].all()
    assert differ.sum() <= 0.02 * differ.numel() + 1


@pytest.mark.parametrize("tau", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("backend,device", servers("draw_rows"))
def test_the_mean_gradient_over_seeds_is_q_minus_p(backend, device, tau):
    """Random-sampling KD is unbiased: a z-test of every coordinate, family-wise false alarm about 1e-6."""
    n, v, r = 4000 if backend == "triton" and device == "cpu" else 40_000, 11, 5
    g = torch.Generator().manual_seed(2)
    teacher, student = torch.randn(v, generator=g) * 1.5, torch.randn(v, generator=g)
    teacher[3] = NEG
    seeds = torch.arange(n, device=device)
    rows = teacher.expand(n, v).to(device)
    samples = dk.capture_samples(rows, r, tau=tau, seed=seeds, positions=torch.zeros_like(seeds), backend=backend)
    ids, weights = samples.ids.cpu().long(), samples.weights.cpu().double()
    assert ((ids >= 0) | (weights == 0)).all() and (ids != 3).all()
    ordered = torch.where(ids < 0, v, ids)
    assert ((ordered[:, 1:] > ordered[:, :-1]) | (ordered[:, 1:] == v)).all()
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    # d/dz of −Σ w_j log q_j
    grad = weights.sum(-1, keepdim=True) * q - torch.zeros(n, v + 1, dtype=torch.float64).scatter_add_(1, ordered, weights)[:, :v]
    score = (grad.mean(0) - (q - p)) / (grad.std(0) / math.sqrt(n)).clamp(min=1e-7)
    assert score.abs().max() < 5.5, score


def test_flat_rows_are_not_skewed():
    """At V = 150,000 a 24-bit uniform would favour some columns by a part in a hundred: every 1,000th of them holds its share."""
    v, n, r = 150_000, 40, 5000
    ids = dk.capture_samples(torch.zeros(n, v), r, seed=11).ids
    counts = torch.bincount(ids[ids >= 0].long() // 1000, minlength=150).double()
    total, expected = counts.sum(), counts.sum() / 150
    assert ids.max() < v and (((counts - expected) ** 2 / expected).sum() - 149) / math.sqrt(2 * 149) < 5
    assert total > 0.98 * n * r


def test_samples_depend_on_row_seed_and_position_alone():
    logits = torch.randn(6, 300)
    positions = torch.arange(6) * 3
    whole = dk.capture_samples(logits, 7, seed=5, positions=positions)
    order = torch.tensor([4, 0, 3])
    part = dk.capture_samples(logits[order], 7, seed=5, positions=positions[order])
    assert torch.equal(part.ids, whole[order].ids) and torch.equal(part.weights, whole[order].weights)
    assert torch.equal(dk.capture_samples(logits, 7, seed=torch.full((6,), 5), positions=positions).ids, whole.ids)
    assert not torch.equal(dk.capture_samples(logits, 7, seed=6, positions=positions).ids, whole.ids)
    both = dk.capture_samples(logits, 7, seed=2**64 - 1)
    assert torch.equal(both.ids, dk.capture_samples(logits, 7, seed=-1).ids)
    assert whole.reshape(2, 3).ids.shape == (2, 3, 7) and len(whole[1:3]) == 2


def test_a_row_without_a_distribution_makes_its_loss_nan():
    logits = torch.randn(3, 20)
    logits[1, 4] = math.nan
    samples = dk.capture_samples(logits, 4, seed=0)
    assert samples.weights[1].isnan().any() and not samples.weights[[0, 2]].isnan().any()
    loss = dk.topk_distill_loss(torch.randn(3, 20), dk.capture_topk(logits, 4), reduction="none")
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    "call,error,match",
    [
        (lambda x: dk.capture_samples(x, 0, seed=1), ValueError, "num_samples must be at least 1"),
        (lambda x: dk.capture_samples(x, 2.0, seed=1), TypeError, "num_samples must be an int"),
        (lambda x: dk.capture_samples(x, 2, seed=1.5), TypeError, "seed must be an int"),
        (lambda x: dk.capture_samples(x, 2, seed=2**64), ValueError, "seed must fit 64 bits"),
        (lambda x: dk.capture_samples(x, 2, seed=torch.zeros(3, dtype=torch.int64)), ValueError, "seed must have the token shape"),
        (lambda x: dk.capture_samples(x, 2, seed=1, tau=0), ValueError, "tau must be positive"),
        (lambda x: dk.capture_samples(x, 2, seed=1, positions=torch.zeros(4)), TypeError, "positions must be an int or an int64 tensor"),
        (lambda x: dk.capture_topk(torch.zeros(2, 2000), 1025), ValueError, r"k must be in \[1, 1024\]"),
        (lambda x: dk.score_topk(x, torch.zeros(3, 1, dtype=torch.int64)), ValueError, "ids must have shape"),
        (lambda x: dk.TeacherSamples(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2)), ValueError, "ids and weights must share a shape"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.randn(4, 9))


def test_k_is_v_has_no_tail():
    top = dk.capture_topk(torch.randn(3, 7), 7)
    assert (top.tail_logprob == NEG).all()
    assert replace(top, tail_logprob=None).mass().sub(1).abs().max() < 1e-6
