"""`decoding.verify` and `decoding.sample` against a float64 oracle under the same random words, and every edge that has a defined answer."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import oracle_decoding as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import servers
from torch.utils._python_dispatch import TorchDispatchMode

from distilkernels import backends
from distilkernels import decoding as dk
from distilkernels.decoding import Sampling, Source
from distilkernels.primitives import sample_rows

NAN, INF = math.nan, math.inf
KINDS = ("reverse", "reverse_retry", "top_k", "top_p", "speculative", "block", "typical", "threshold", "greedy")
BACKENDS = pytest.mark.parametrize("backend,device", servers("sample_rows"))
EPSILON = 1e-5  # a decision nearer than this (relative) may go either way in float32


def a_rule(kind: str, b: int, g: torch.Generator, per_request: bool) -> dk.Rule:
    def value(low: float, high: float):
        x = low + (high - low) * torch.rand(b, generator=g, dtype=torch.float64)
        return x if per_request and b else float(x[0]) if b else high

    def count(low: int, high: int):
        x = torch.randint(low, high + 1, (max(b, 1),), generator=g)
        return x[:b] if per_request and b else int(x[0])

    coin = bool(torch.randint(2, (), generator=g))
    end = (None, "draw", "argmax")[int(torch.randint(3, (), generator=g))]
    return {
        "reverse": lambda: dk.ReverseSpeculative(value(0.02, 0.3), judge_top_k=count(1, 5) if coin else None, bonus=end),
        "reverse_retry": lambda: dk.ReverseSpeculative(
            value(0.02, 0.5), trials=2 + 3 * coin, proposer_top_k=count(1, 5), judge_top_k=count(1, 5) if coin else None, bonus=end
        ),
        "top_k": lambda: dk.TopKAcceptance(count(1, 4), bonus=end),
        "top_p": lambda: dk.TopPAcceptance(value(0.0, 1.2), bonus=end),
        "speculative": lambda: dk.SpeculativeSampling(bonus=end),
        "block": lambda: dk.BlockVerification(bonus=end),
        "typical": lambda: dk.TypicalAcceptance(value(0.02, 0.3), value(0.05, 0.9), fallback="argmax" if coin else "draw", bonus=end),
        "threshold": lambda: dk.ThresholdAcceptance(value(0.02, 0.4), fallback="argmax" if coin else "draw", bonus=end),
        "greedy": lambda: dk.GreedyAcceptance(bonus=end),
    }[kind]()


def some_sampling(b: int, g: torch.Generator, per_request: bool) -> Sampling:
    def on() -> bool:
        return bool(torch.rand((), generator=g) < 0.4)

    def value(low: float, high: float):
        x = low + (high - low) * torch.rand(max(b, 1), generator=g, dtype=torch.float64)
        return x[:b] if per_request and b else float(x[0])

    temperature = value(0.4, 1.8) if on() else 1.0
    if on() and per_request and b:
        temperature = torch.where(torch.rand(b, generator=g) < 0.3, 0.0, torch.as_tensor(temperature).expand(b).double())
    top_k = torch.randint(1, 8, (max(b, 1),), generator=g)
    return Sampling(temperature, (top_k[:b] if per_request and b else int(top_k[0])) if on() else None, value(0.0, 1.1) if on() else None,
                    value(0.0, 0.5) if on() else None)  # fmt: skip


def some_block(b: int, g: int, vp: int, vj: int, bonus_row: bool, content: str, r: torch.Generator) -> dict:
    """Proposals, rows, lengths and places; proposals mostly from both sides' likely ids, some −1 or beyond the judge's columns."""
    judge = torch.randn(b, g + bonus_row, vj, generator=r) * 2
    proposer = torch.randn(b, g, vp, generator=r) * 2
    common = min(vp, vj)
    if content == "alike":
        proposer[..., :common] = judge[:, :g, :common] + 0.3 * torch.randn(b, g, common, generator=r)
    elif content == "masked":
        judge[..., 1:] = judge[..., 1:].masked_fill(torch.rand(judge[..., 1:].shape, generator=r) < 0.4, -INF)
        proposer[..., 1:] = proposer[..., 1:].masked_fill(torch.rand(proposer[..., 1:].shape, generator=r) < 0.4, -INF)
    elif content == "broken" and judge.numel():
        for rows in (judge, proposer):
            spoiled = torch.rand(rows.shape[:2], generator=r) < 0.15
            rows[..., 0] = torch.where(spoiled, torch.tensor([NAN, INF])[torch.randint(2, spoiled.shape, generator=r)], rows[..., 0])
            rows[torch.rand(rows.shape[:2], generator=r) < 0.08] = -INF
    noise = -torch.log(-torch.log(torch.rand(b, g, vp, generator=r).clamp(1e-6, 1 - 1e-6)))
    proposals = (proposer.nan_to_num(0, 9, -99) + noise).argmax(-1) if vp else torch.zeros(b, g, dtype=torch.int64)
    proposals[torch.rand(b, g, generator=r) < 0.06] = -1
    return {
        "proposals": proposals, "proposer_logits": proposer, "judge_logits": judge,
        "lengths": torch.randint(0, g + 1, (b,), generator=r) if torch.rand((), generator=r) < 0.6 else None,
        "seeds": torch.randint(-(2**62), 2**62, (b,), generator=r), "positions": torch.randint(0, 10**6, (b,), generator=r),
    }  # fmt: skip


def on(device: str, value):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (Sampling, dk.Rule)):
        moved = {f.name: on(device, getattr(value, f.name)) for f in fields(value)} if hasattr(value, "__dataclass_fields__") else {}
        return replace(value, **moved)
    return value


def compare(rule: dk.Rule, block: dict, backend: str, device: str = "cpu", **more) -> tuple[int, int]:
    """Asserts the oracle's answer for every request that is not a near tie; (requests, near ties)."""
    want = oracle.verify(rule, **block, **more)
    got = dk.verify(on(device, rule), **{k: on(device, v) for k, v in (block | more).items()}, backend=backend)
    g = block["proposals"].shape[1]
    labels = [t.double().cpu() for t in (got.judge_logprobs, got.proposer_logprobs, got.judge_rank, got.judge_entropy)]
    near = 0
    for b, w in enumerate(want):
        if w.near < EPSILON:
            near += 1
            continue
        mine = tuple(int(t[b]) for t in (got.valid, got.num_accepted, got.next_token, got.next_source))
        assert mine == (w.valid, w.num_accepted, w.next_token, w.next_source), f"request {b} of {rule}: {mine}, not {w}"
        assert got.accepted[b].tolist() == [i < w.num_accepted for i in range(g)]
        emitted = block["proposals"][b, : w.num_accepted].tolist() + [w.next_token] * (w.num_accepted <= g)
        assert got.tokens(block["proposals"].to(device))[b].tolist() == emitted + [-1] * (g + 1 - len(emitted))
        nothing = (NAN, NAN, -1, NAN)
        want_labels = torch.tensor(w.labels + [nothing] * (g + 1 - len(w.labels)), dtype=torch.float64).view(g + 1, 4)
        for column, mine in enumerate(labels):
            torch.testing.assert_close(mine[b], want_labels[:, column], rtol=2e-5, atol=2e-5, equal_nan=True)
    return len(want), near


@BACKENDS
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_on_generated_blocks(kind, backend, device):
    total = [0, 0]

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        st.integers(0, 2**31), st.integers(0, 7), st.integers(0, 3), st.sampled_from([(13, 13), (13, 9), (7, 18), (1, 1), (4, 4)]),
        st.booleans(), st.booleans(), st.sampled_from(["normal", "alike", "masked", "broken"]),
    )  # fmt: skip
    def generated(seed, b, g, widths, per_request, bonus_row, content):
        r = torch.Generator().manual_seed(seed)
        rule = a_rule(kind, b, r, per_request)
        block = some_block(b, g, *widths, bonus_row, content, r)
        sides = {"proposer": some_sampling(b, r, per_request), "judge": some_sampling(b, r, per_request)}
        counted = compare(rule, block, backend, device, **sides, valid_vocab=5 if seed % 3 == 0 and min(widths) > 5 else None)
        total[0], total[1] = total[0] + counted[0], total[1] + counted[1]

    generated()
    assert total[0] > 60 and total[1] <= 2 + total[0] // 300


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_in_other_dtypes(kind, dtype, backend, device):
    if backends.module(backend).why_not("sample_rows", torch.empty(1, 1, 8, dtype=dtype, device=device)):
        pytest.skip(f"{backend} does not take {dtype}")
    r = torch.Generator().manual_seed(5)
    block = some_block(9, 3, 21, 19, True, "alike", r)
    for name in ("proposer_logits", "judge_logits"):
        block[name] = block[name].to(dtype)
    requests, near = compare(a_rule(kind, 9, r, True), block, backend, device, judge=some_sampling(9, r, True), proposer=Sampling(0.9, top_p=0.93))
    assert near <= 2 < requests


@BACKENDS
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_on_grids(kind, backend, device):
    """Integer logits, so that ranks, filters and laws have ties everywhere, and a judge that is the proposer in every third request."""
    r = torch.Generator().manual_seed(11)
    counts = [0, 0]
    for _ in range(4):
        block = some_block(12, 3, 8, 8, True, "normal", r)
        block["judge_logits"] = block["judge_logits"].round()
        block["proposer_logits"] = block["proposer_logits"].round()
        block["proposer_logits"][::3] = block["judge_logits"][::3, :3]
        judge = (Sampling(), Sampling(top_k=3), Sampling(0.7, min_p=0.11), Sampling(0.0))[_]
        found = compare(a_rule(kind, 12, r, True), block, backend, device, judge=judge, proposer=Sampling(top_k=4))
        counts = [counts[0] + found[0], counts[1] + found[1]]
    assert counts[1] < counts[0] // 4


def request(rule, q, p=None, x=(0,), backend="reference", **more) -> dk.Verdict:
    """One request from rows of probabilities."""
    rows = {"judge_logits": torch.tensor(q, dtype=torch.float64).log()[None]}
    if p is not None:
        rows["proposer_logits"] = torch.tensor(p, dtype=torch.float64).log()[None]
    places = {"seeds": 3, "positions": torch.zeros(1, dtype=torch.int64)}
    return dk.verify(rule, torch.tensor([list(x)], dtype=torch.int64), **(rows | places | more), backend=backend)


def answer(verdict: dk.Verdict) -> tuple:
    return bool(verdict.valid), int(verdict.num_accepted), int(verdict.next_token), Source(int(verdict.next_source))


def repeated(rule, q, p, x, times=400, **more) -> list[tuple]:
    """The same request under many seeds."""
    rows = {"judge_logits": torch.tensor(q).log().expand(times, -1, -1)}
    if p is not None:
        rows["proposer_logits"] = torch.tensor(p).log().expand(times, -1, -1)
    v = dk.verify(rule, torch.tensor(x).expand(times, -1), **(rows | more), seeds=torch.arange(times), positions=torch.zeros(times, dtype=torch.int64))
    return list(zip(v.valid.tolist(), v.num_accepted.tolist(), v.next_token.tolist(), map(Source, v.next_source.tolist())))


LOSSLESS = [dk.SpeculativeSampling(), dk.BlockVerification()]
EVERY = [
    dk.ReverseSpeculative(0.2), dk.ReverseSpeculative(0.2, trials=3, proposer_top_k=2), dk.TopKAcceptance(1), dk.TopPAcceptance(0.5), *LOSSLESS,
    dk.TypicalAcceptance(), dk.ThresholdAcceptance(0.3), dk.GreedyAcceptance(),
]  # fmt: skip


@pytest.mark.parametrize("rule", LOSSLESS)
def test_equal_laws_accept_everything(rule):
    rows = torch.randn(300, 4, 11) * 3
    ids = torch.distributions.Categorical(logits=rows[:, :3]).sample()
    for side in (Sampling(), Sampling(0.7, top_p=0.9)):
        if not side.plain:
            ids = torch.stack([dk.sample(rows[:, i], seeds=torch.arange(300), positions=torch.full((300,), i), sampling=side)[0] for i in range(3)], 1)
        v = dk.verify(rule, ids, proposer_logits=rows[:, :3], judge_logits=rows, seeds=1, positions=torch.arange(300), proposer=side, judge=side)
        assert (v.num_accepted == 3).all() and (v.next_source == Source.BONUS).all()


@pytest.mark.parametrize("rule", LOSSLESS)
def test_residual_without_mass_is_a_draw_from_the_judge(rule):
    """A proposal that neither side could have made, where both laws are one: nothing is left of max(Q − P, 0)."""
    law = [0.5, 0.5, 0.0]
    seen = repeated(rule, [law], [law], [2])
    assert {s[2] for s in seen} == {0, 1} and {(s[0], s[1], s[3]) for s in seen} == {(True, 0, Source.FALLBACK)}


@pytest.mark.parametrize("rule", LOSSLESS)
def test_neither_side_has_the_token(rule):
    """P = Q = 0 rejects; P = 0 < Q accepts; the residual is over what the judge has more of."""
    q, p = [0.5, 0.25, 0.25, 0.0], [0.25, 0.75, 0.0, 0.0]
    assert {s[1:] for s in repeated(rule, [q], [p], [3])} == {(0, 0, Source.RESIDUAL), (0, 2, Source.RESIDUAL)}
    assert {s[1] for s in repeated(rule, [q], [p], [2])} == {1}


@pytest.mark.parametrize("rule", EVERY, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("spoil", [NAN, INF, "masked"])
def test_broken_row_stops_its_request_alone(rule, spoil):
    rows = torch.tensor([0.9, 0.05, 0.05]).log().expand(3, 3, 3).clone()
    sound = {"proposer_logits": rows[:, :2], "judge_logits": rows.clone(), "seeds": 4, "positions": torch.arange(3)}
    ids = torch.zeros(3, 2, dtype=torch.int64)
    before = dk.verify(rule, ids, **sound)
    assert before.num_accepted.tolist() == [2, 2, 2] and before.valid.all()
    broken = sound["judge_logits"].clone()
    if spoil == "masked":
        broken[1, 1] = -INF
    else:
        broken[1, 1, 2] = spoil
    after = dk.verify(rule, ids, **sound | {"judge_logits": broken})
    assert after.valid.tolist() == [True, False, True] and after.num_accepted.tolist() == [2, 1, 2]
    assert after.next_token[1] == -1 and after.next_source[1] == Source.NONE and after.tokens(ids)[1].tolist() == [0, -1, -1]
    for name in ("next_token", "next_source", "judge_logprobs", "proposer_logprobs", "judge_rank", "judge_entropy"):
        mine, theirs = getattr(after, name)[::2], getattr(before, name)[::2]
        assert torch.equal(mine.nan_to_num(-7.0), theirs.nan_to_num(-7.0)), name
    assert after.judge_logprobs[1, 1:].isnan().all()
    # a proposer without a law stops the rules that compare with it, and no others
    lame = rows[:, :2].clone()
    lame[1, 1] = NAN
    other = dk.verify(rule, ids, **sound | {"proposer_logits": lame})
    assert other.valid.tolist() == [True, not rule.needs_proposer, True]
    assert other.proposer_logprobs[1, 1].isnan() and not other.proposer_logprobs[::2, :2].isnan().any()


@pytest.mark.parametrize("rule", EVERY, ids=lambda r: type(r).__name__)
def test_a_missing_proposal_is_a_draw_from_the_judge(rule):
    """−1 and ids that the judge lacks: Q, not the residual (which here has only token 1), not the retry's pool; argmax rules the argmax."""
    q, p = [0.6, 0.4], [0.7, 0.2, 0.1]
    for x in (-1, 2, 5):
        seen = repeated(rule, [q, q], [p], [x])
        draws = {0} if rule.at_rejection == "argmax" else {0, 1}
        assert {s[2] for s in seen} == draws and {(s[0], s[1], s[3]) for s in seen} == {(True, 0, Source.FALLBACK)}
    # an id that the proposer lacks, likely as the judge finds it, nor can it be drawn
    seen = repeated(rule, [[0.3, 0.2, 0.5]] * 2, [p[:2]], [2])
    draws = {0} if rule.at_rejection == "argmax" else {0, 1}
    assert {s[2] for s in seen} == draws and {(s[0], s[1], s[3]) for s in seen} == {(True, 0, Source.FALLBACK)}
    # the proposer's row is not asked for
    assert {s[0] for s in repeated(rule, [q, q], [[NAN] * 3], [-1])} == {True}


@pytest.mark.parametrize("rule", EVERY, ids=lambda r: type(r).__name__)
def test_length_zero(rule):
    """A bonus from row 0 where the rule has one; what stands behind the length is not read."""
    q = [[0.6, 0.4], [NAN, NAN], [NAN, NAN]]
    seen = repeated(rule, q, [[NAN, 1.0]] * 2, [0, 0], lengths=torch.zeros(400, dtype=torch.int64))
    if rule.bonus is None:
        assert set(seen) == {(True, 0, -1, Source.NONE)}
        # nor is the row of a bonus that is not drawn
        assert set(repeated(rule, q[1:], [[NAN, 1.0]], [0], lengths=torch.zeros(400, dtype=torch.int64))) == {(True, 0, -1, Source.NONE)}
    else:
        assert {s[2] for s in seen} == ({0} if rule.bonus == "argmax" else {0, 1})
        assert {(s[0], s[1], s[3]) for s in seen} == {(True, 0, Source.BONUS)}


@pytest.mark.parametrize("rule", EVERY, ids=lambda r: type(r).__name__)
def test_no_requests_no_proposals_no_rows(rule):
    def shapes(b, g, r):
        v = dk.verify(rule, torch.zeros(b, g, dtype=torch.int64), proposer_logits=torch.zeros(b, g, 5), judge_logits=torch.zeros(b, r, 5), seeds=1,
                      positions=torch.zeros(b, dtype=torch.int64))  # fmt: skip
        assert v.accepted.shape == (b, g) and v.judge_logprobs.shape == v.judge_rank.shape == v.judge_entropy.shape == v.proposer_logprobs.shape == (b, g + 1)
        assert v.valid.shape == v.num_accepted.shape == v.next_token.shape == (b,) and v.tokens(torch.zeros(b, g, dtype=torch.int64)).shape == (b, g + 1)
        return v

    shapes(0, 3, 4), shapes(0, 0, 1), shapes(0, 0, 0)
    none = shapes(2, 0, 0)
    assert none.valid.all() and none.next_token.tolist() == [-1, -1] and none.next_source.tolist() == [Source.NONE] * 2
    bonus = shapes(2, 0, 1)
    assert bonus.valid.all() and (bonus.next_token >= 0).tolist() == [rule.bonus is not None] * 2


@pytest.mark.parametrize("rule", EVERY, ids=lambda r: type(r).__name__)
def test_bonus_needs_its_row(rule):
    one = [[0.9, 0.1]]
    accepted = answer(request(rule, one, one))
    assert accepted == (True, 1, -1, Source.NONE)
    follows = answer(request(rule, one * 2, one))
    assert follows[1] == 1 and follows[3] == (Source.NONE if rule.bonus is None else Source.BONUS)


@pytest.mark.parametrize("low", [True, False], ids=["all_zero", "all_ones"])
def test_uniforms_at_their_ends(monkeypatch, low):
    """u is 2⁻⁵⁴ or 1 − 2⁻⁵³ in the coin, 2⁻³³ or 1 − 2⁻²⁴ in a race: never 0 or 1, no infinities, and Q = 0 is never drawn."""
    word = 0 if low else 2**32 - 1

    def constant(seeds, counter):
        return tuple(torch.full(torch.broadcast_shapes(seeds.shape, *(torch.as_tensor(c).shape for c in counter)), word) for _ in range(4))

    monkeypatch.setattr(sample_rows, "philox", constant)
    monkeypatch.setattr(oracle.generator, "philox", constant)
    u = sample_rows.coin(*(torch.zeros(1, dtype=torch.int64) for _ in range(3)), 1, backend="reference")
    assert float(u) == (2.0**-54 if low else 1 - 2.0**-53)
    race = sample_rows.uniforms_at(sample_rows.Noise(*(torch.zeros(1, dtype=torch.int64) for _ in range(3)), 0), 5)
    assert (race == (2.0**-33 if low else 1 - 2.0**-24)).all()
    r = torch.Generator().manual_seed(3)
    for kind in KINDS:
        block = some_block(8, 3, 9, 9, True, "masked", r)
        block["proposer_logits"][::2] = block["judge_logits"][::2, :3]
        compare(a_rule(kind, 8, r, True), block, "reference", judge=Sampling(0.8))
    q, p = [[0.3, 0.7, 0.0]], [[0.6, 0.2, 0.2]]
    for rule in LOSSLESS:
        assert answer(request(rule, q, p))[1] == low  # Q/P = ½
        assert answer(request(rule, q, p, x=(1,)))[1] == 1  # Q/P > 1, whatever u
        assert answer(request(rule, q, p, x=(2,)))[:3] == (True, 0, 1)  # Q = 0, whatever u
    # the largest weight wins a race of equal uniforms
    assert int(dk.sample(torch.tensor([[0.0, -INF, 2.0, 1.0]]), seeds=1, positions=torch.zeros(1, dtype=torch.int64), backend="reference")[0]) == 2


def test_reverse_speculative_limits():
    """min_prob = 0 passes what the judge filtered; judge_top_k does not; min_prob is of Q before the top-k renormalises it."""
    q = [[0.5, 0.3, 0.2]]
    assert answer(request(dk.ReverseSpeculative(0.0), q, x=(2,), judge=Sampling(top_k=1)))[1] == 1
    assert answer(request(dk.ReverseSpeculative(0.0, judge_top_k=2), q, x=(2,)))[1] == 0
    assert answer(request(dk.ReverseSpeculative(0.35, judge_top_k=2), q, x=(1,)))[1] == 0  # 0.3 / 0.8 = 0.375
    assert answer(request(dk.ThresholdAcceptance(0.0), q, x=(2,), judge=Sampling(top_k=1)))[1] == 1
    # equal largest logits at temperature 0: Q is the lower id
    assert [answer(request(dk.ThresholdAcceptance(0.1), [[0.4, 0.4, 0.2]], x=(v,), judge=Sampling(0.0)))[1] for v in range(3)] == [1, 0, 0]


@BACKENDS
@pytest.mark.parametrize("kind", KINDS)
def test_bitwise_invariance(kind, backend, device):
    """To the batch's order, to chunks, to padding behind the lengths and to columns behind valid_vocab."""
    r = torch.Generator().manual_seed(17)
    b = 17
    block = {k: on(device, v) for k, v in some_block(b, 3, 23, 23, True, "normal", r).items()}
    block["lengths"] = torch.randint(0, 4, (b,), generator=r).to(device)
    rule = on(device, a_rule(kind, b, r, True))
    sides = {"proposer": on(device, some_sampling(b, r, True)), "judge": on(device, some_sampling(b, r, True))}

    def take(value, index):
        if isinstance(value, torch.Tensor):
            return value[index] if value.dim() else value
        return replace(value, **{f.name: take(getattr(value, f.name), index) for f in fields(value)}) if hasattr(value, "__dataclass_fields__") else value

    def run(index, **changed) -> dict[str, torch.Tensor]:
        chosen = {k: take(v, index) for k, v in (block | sides).items()} | changed
        v = dk.verify(take(rule, index), **chosen, backend=backend)
        return {f.name: getattr(v, f.name) for f in fields(v)}

    def same(mine, theirs, bitwise=True):
        for name, y in theirs.items():
            x = mine[name][:, : y.shape[1]] if y.dim() > 1 else mine[name]
            if y.is_floating_point() and not bitwise:
                torch.testing.assert_close(x, y, equal_nan=True)
            else:
                assert torch.equal(x.nan_to_num(-7) if x.is_floating_point() else x, y.nan_to_num(-7) if y.is_floating_point() else y), name

    everyone = torch.arange(b, device=device)
    whole = run(everyone)
    order = torch.randperm(b, generator=r).to(device)
    same(run(order), {name: t[order] for name, t in whole.items()})
    for chunk in everyone.split(5):
        same(run(chunk), {name: t[chunk] for name, t in whole.items()})
    padded = {
        "proposals": torch.cat([block["proposals"], torch.full((b, 2), 3, device=device)], 1),
        "proposer_logits": torch.cat([block["proposer_logits"], torch.full((b, 2, 23), NAN, device=device)], 1),
        "judge_logits": torch.cat([block["judge_logits"], torch.full((b, 2, 23), NAN, device=device)], 1),
    }
    behind = torch.arange(5, device=device) >= block["lengths"][:, None]
    padded["proposer_logits"][behind] = INF
    same(run(everyone, **padded), whole)
    wide = {name: torch.cat([block[name], torch.full((*block[name].shape[:2], 6), fill, device=device)], 2)
            for name, fill in (("judge_logits", -INF), ("proposer_logits", -INF))}  # fmt: skip
    # PyTorch sums a row of 23 in another order where 29 follow each other in memory
    same(run(everyone, **wide, valid_vocab=23), whole, backend != "reference")
    noisy = {name: x.clone() for name, x in wide.items()}
    for x in noisy.values():
        x[..., 23:] = 50.0
    same(run(everyone, **noisy, valid_vocab=23), whole, backend != "reference")


@pytest.mark.parametrize("kind", KINDS)
def test_views_are_read_in_place(kind):
    """Rows out of a longer and wider tensor, and int32 proposals, give what their contiguous copies give."""
    r = torch.Generator().manual_seed(23)
    block = some_block(6, 3, 21, 17, True, "normal", r)
    rule = a_rule(kind, 6, r, True)
    views = dict(block, proposals=block["proposals"].int())
    for name in ("judge_logits", "proposer_logits"):
        x = block[name]
        longer = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2] + 3), NAN)
        longer[:, 1:-1, :-3] = x
        views[name] = longer[:, 1:-1, :-3]
    one, other = dk.verify(rule, **block, judge=Sampling(0.8)), dk.verify(rule, **views, judge=Sampling(0.8))
    for name in ("valid", "num_accepted", "next_token", "next_source", "judge_rank"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    torch.testing.assert_close(one.judge_logprobs, other.judge_logprobs, equal_nan=True)


@pytest.mark.parametrize("rule", EVERY, ids=lambda r: type(r).__name__)
def test_launches_do_not_depend_on_the_block(monkeypatch, rule):
    reference, calls = backends.module("reference"), []

    def counted(name, honest):
        return lambda *a: (calls.append(name), honest(*a))[1]

    for name in ("filter_rows", "sample_rows", "weigh_rows", "vocab_stats"):
        monkeypatch.setattr(reference, name, counted(name, getattr(reference, name)))
    counts = []
    for b, g in ((1, 1), (1, 6), (9, 6)):
        calls.clear()
        dk.verify(rule, torch.zeros(b, g, dtype=torch.int64), proposer_logits=torch.randn(b, g, 7), judge_logits=torch.randn(b, g + 1, 7), seeds=1,
                  positions=torch.arange(b), judge=Sampling(0.7, top_p=0.9), proposer=Sampling(top_k=3), backend="reference")  # fmt: skip
        counts.append(sorted(calls))
    assert counts[0] == counts[1] == counts[2] and 3 <= len(counts[0]) <= 8


class HostTraffic(TorchDispatchMode):
    """The operations that, on a device, would wait for it: a number made a tensor on the host, one read back, a mask turned to indices."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        mask = name in ("index", "index_put_") and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1])
        if mask or name in ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"):
            self.seen.append(name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", EVERY, ids=lambda r: type(r).__name__)
def test_nothing_waits_for_the_device(monkeypatch, rule):
    settings = Sampling(torch.tensor([0.7, 1.0, 0.0]), torch.tensor([3, 9, 2]), 0.9, 0.01)
    # looks at tensors on a CPU alone
    monkeypatch.setattr(Sampling, "__post_init__", lambda self: None)
    rows, positions = torch.randn(3, 5, 11), torch.arange(3)
    with HostTraffic() as traffic:
        dk.verify(rule, torch.zeros(3, 4, dtype=torch.int64), proposer_logits=rows[:, :4], judge_logits=rows, seeds=2**63, positions=positions, judge=settings,
                  proposer=settings)  # fmt: skip
        dk.sample(rows[:, 0], seeds=1, positions=positions, sampling=settings)
        dk.combine([rows, rows], [1.5, -0.5], plausibility=0.1)
    assert not traffic.seen
    with HostTraffic() as traffic:
        torch.tensor(0.5)
        rows[rows > 0].amax().item()
    assert traffic.seen == ["lift_fresh", "index", "_local_scalar_dense"]


def test_a_masked_token_has_no_rank_to_be_accepted_by():
    rows = torch.tensor([0.0, 1.0, -INF, -INF]).view(1, 1, -1)
    for token, accepted in ((0, 1), (1, 1), (2, 0), (3, 0)):
        verdict = dk.verify(dk.TopKAcceptance(3), torch.tensor([[token]]), judge_logits=rows, seeds=1, positions=torch.zeros(1, dtype=torch.int64))
        assert int(verdict.num_accepted) == accepted


@pytest.mark.parametrize("probability", [0.3, 0.1, 0.7])
def test_a_rules_number_is_not_rounded(probability):
    """Q(x) is a little less than min_prob in float64 and more than min_prob in float32, or the other way round."""
    nearest = float(torch.tensor(probability))
    between = (probability + nearest) / 2
    rows = torch.tensor([between, 1 - between], dtype=torch.float64).log().view(1, 1, -1)
    block = {"judge_logits": rows, "seeds": 1, "positions": torch.zeros(1, dtype=torch.int64)}
    for rule in (dk.ReverseSpeculative(probability), dk.ThresholdAcceptance(probability), dk.TypicalAcceptance(probability, 9.0)):
        assert int(dk.verify(rule, torch.tensor([[0]]), **block).num_accepted) == (between > probability)
