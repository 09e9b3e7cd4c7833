"""The law of what `verify` emits: χ² on the joint law of (length, tokens) for every rule, and mutants that these tests must catch."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from laws_decoding import World, accepted_tokens, block_of, chi_square, continued, counted, exact, outcomes_of, product_law, simulate
from servers import servers

from distilkernels import backends
from distilkernels import decoding as dk
from distilkernels.decoding import Sampling
from distilkernels.primitives import sample_rows
from distilkernels.primitives.philox import Stream

# the package's attribute of that name is the function
block_module, verify_module = (importlib.import_module(f"distilkernels.decoding.{name}") for name in ("block", "verify"))

# family-wise 1e-6 over at most 200 comparisons in this file
ALPHA = 1e-6 / 200
DRAWS = 40_000
CPU = [p for p in servers("sample_rows") if "triton" not in p.id]
BACKENDS = pytest.mark.parametrize("backend,device", CPU)

PLAIN = (Sampling(), Sampling())
FILTERED = (Sampling(0.8, top_p=0.95), Sampling(1.2, top_k=3, min_p=0.05))
CROSSED = (Sampling(1.3, top_k=3), Sampling(0.9, top_p=0.8))
RULES = {
    "reverse": dk.ReverseSpeculative(0.15),
    "reverse_top_k": dk.ReverseSpeculative(0.1, judge_top_k=2, bonus="draw"),
    "reverse_retry": dk.ReverseSpeculative(0.25, trials=3, proposer_top_k=3),
    "reverse_five": dk.ReverseSpeculative(0.3, trials=5, proposer_top_k=2, judge_top_k=2),
    "top_k": dk.TopKAcceptance(2),
    "top_p": dk.TopPAcceptance(0.6),
    "speculative": dk.SpeculativeSampling(),
    "block": dk.BlockVerification(),
    "typical": dk.TypicalAcceptance(0.3, 0.6),
    "typical_argmax": dk.TypicalAcceptance(0.3, 0.6, fallback="argmax", bonus="argmax"),
    "threshold": dk.ThresholdAcceptance(0.2),
    "threshold_draw": dk.ThresholdAcceptance(0.2, fallback="draw", bonus="draw"),
    "greedy": dk.GreedyAcceptance(),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Rows this short are not worth waking a thread for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def p_value(rule, world, sides=PLAIN, requests=DRAWS, outside=False, **where) -> float:
    return chi_square(simulate(rule, world, requests, *sides, outside=outside, **where), exact(rule, world, *sides, outside=outside))


@BACKENDS
@pytest.mark.parametrize("name", RULES)
def test_joint_law(name, backend, device):
    for world, sides in ((World(4, 2, seed=3), PLAIN), (World(5, 2, seed=5), FILTERED), (World(4, 3, seed=8), CROSSED)):
        assert p_value(RULES[name], world, sides, backend=backend, device=device) > ALPHA


@BACKENDS
@pytest.mark.parametrize("name", ["speculative", "block"])
@pytest.mark.parametrize("widths", [(6, 4), (4, 6)], ids=["proposer_wider", "judge_wider"])
def test_joint_law_of_unequal_vocabularies(name, widths, backend, device):
    """Proposals come from all that the proposer has; what the judge lacks is rejected."""
    world = World(widths[0], 2, seed=2, judge_vocab=widths[1])
    assert p_value(RULES[name], world, outside=True, backend=backend, device=device) > ALPHA


@pytest.mark.parametrize("sides", [PLAIN, FILTERED, CROSSED], ids=["plain", "filtered", "crossed"])
@pytest.mark.parametrize("widths", [(4, 4), (5, 3)])
@pytest.mark.parametrize("name", ["speculative", "block"])
def test_closed_form_of_lossless_rules_is_the_judge(name, widths, sides):
    """So the χ² tests above are tests of losslessness."""
    world = World(widths[0], 3, seed=4, judge_vocab=widths[1])
    mine = continued(exact(RULES[name], world, *sides, outside=sides is PLAIN), world, sides[1])
    truth = continued({(0, ()): 1.0}, world, sides[1])
    assert mine.keys() == truth.keys() and max(abs(mine[k] - truth[k]) for k in truth) < 1e-12


def test_block_verification_accepts_no_fewer():
    gaps = []
    for seed in range(20):
        world = World(4, 3, seed=seed, likeness=0.3)
        sides = (PLAIN, FILTERED, CROSSED)[seed % 3]
        gaps.append(accepted_tokens(exact(dk.BlockVerification(), world, *sides)) - accepted_tokens(exact(dk.SpeculativeSampling(), world, *sides)))
    assert min(gaps) > -1e-12 and max(gaps) > 0.02
    world = World(4, 3, seed=int(np.argmax(gaps)), likeness=0.3)
    sides = (PLAIN, FILTERED, CROSSED)[int(np.argmax(gaps)) % 3]
    means = []
    for rule in (dk.BlockVerification(), dk.SpeculativeSampling()):
        seen = simulate(rule, world, DRAWS, *sides)
        means.append(sum(n * c for (n, _), c in seen.items()) / DRAWS)
        assert abs(means[-1] - accepted_tokens(exact(rule, world, *sides))) < 6 * world.gamma / math.sqrt(DRAWS)
    assert means[0] > means[1]


@BACKENDS
@pytest.mark.parametrize("trials", [1, 2, 5])
@pytest.mark.parametrize("case", ["mixed", "nothing_passes", "all_pass", "ties"])
def test_reverse_speculative_is_its_closed_form(case, trials, backend, device):
    """[1 − (1−a)^T]·P̃(x)·[x∈S]/a + (1−a)^T·Q̃(x), Q̃ where a = 0: what one position emits."""
    world = World(5, 1, seed=6)
    pool = 3
    if case == "ties":
        world.proposer[0], pool = torch.tensor([1.0, 0.5, 0.5, 0.5, -1.0]), 2  # the pool has four
        world.judge[0] = torch.tensor([0.0, 1.0, 1.0, -2.0, 1.5])
    rule = dk.ReverseSpeculative({"mixed": 0.2, "nothing_passes": 0.99, "all_pass": 0.0, "ties": 0.2}[case], trials, pool, judge_top_k=4)
    if case == "all_pass":
        rule = dk.ReverseSpeculative(0.0, trials, pool)
    p, q = (torch.softmax(table[0].double(), 0).numpy() for table in (world.proposer, world.judge))
    kth = [np.sort(x)[-k] for x, k in ((p, pool), (q, rule.judge_top_k or 5))]
    p_pool, q_top = np.where(p >= kth[0], p, 0), np.where(q >= kth[1], q, 0)
    p_pool, q_top = p_pool / p_pool.sum(), q_top / q_top.sum()
    inside = (q >= rule.min_prob) & (q_top > 0)
    a = (p_pool * inside).sum()
    assert {"nothing_passes": a == 0, "all_pass": abs(a - 1) < 1e-15}.get(case, 0.05 < a < 0.95), a
    truth = q_top if a == 0 else (1 - (1 - a) ** trials) * p_pool * inside / a + max(1 - a, 0) ** trials * q_top

    first = np.zeros(5)
    for (_, tokens), probability in exact(rule, world).items():
        first[tokens[0]] += probability
    assert np.abs(first - truth).max() < 1e-13
    seen = np.zeros(5)
    for (_, tokens), count in simulate(rule, world, DRAWS, backend=backend, device=device).items():
        seen[tokens[0]] += count
    assert chi_square({v: int(c) for v, c in enumerate(seen) if c}, {v: w for v, w in enumerate(truth) if w > 0}) > ALPHA


def two_blocks(rule, requests=DRAWS, absolute_draft=False) -> float:
    """p-value of two consecutive blocks of context-free models against the product of their laws."""
    world = World(3, 3, seed=0, likeness=0.3, context=False)
    at = torch.zeros(requests, dtype=torch.int64)
    seen = []
    for _ in range(2):
        block = block_of(world, rule, requests, Sampling(), at, absolute=absolute_draft)
        verdict = dk.verify(rule, **block)
        seen.append(outcomes_of(verdict, block["proposals"]))
        at = at + verdict.num_accepted + (verdict.next_token >= 0)
    law = product_law(exact(rule, world))
    pairs = torch.cat(seen, 1)
    found, times = torch.unique(pairs, dim=0, return_counts=True)
    half = pairs.shape[1] // 2
    observed = {tuple(next(iter(counted(part[None]))) for part in (row[:half], row[half:])): int(t) for row, t in zip(found, times)}
    return chi_square(observed, law)


@pytest.mark.parametrize("name", ["speculative", "block", "reverse_retry", "top_k"])
def test_two_blocks_are_independent(name):
    assert two_blocks(RULES[name]) > ALPHA


# Mutants: each is a plausible mistake, and each must fail the test it would have to pass.


@pytest.mark.parametrize("stage", ["acceptance", "draft", "both"])
def test_mutant_noise_reused_across_blocks(monkeypatch, stage):
    """Noise by the place in the sequence alone: block verification has already looked at it in the block before."""
    if stage != "draft":
        honest = sample_rows.coin
        monkeypatch.setattr(block_module, "coin", lambda s, p, o, *rest: honest(s, p + o, torch.zeros_like(p + o), *rest))
    assert two_blocks(dk.BlockVerification(), absolute_draft=stage != "acceptance") < ALPHA


@pytest.mark.parametrize(
    "name,used,instead",
    [
        ("speculative", Stream.ACCEPTANCE, Stream.DRAFT),
        ("block", Stream.ACCEPTANCE, Stream.DRAFT),
        ("speculative", Stream.FALLBACK, Stream.DRAFT),
        ("speculative", Stream.FALLBACK, Stream.ACCEPTANCE),
        ("block", Stream.FALLBACK, Stream.DRAFT),
        ("reverse_retry", Stream.FALLBACK, Stream.RETRY_COIN),
        ("reverse_retry", Stream.RETRY_DRAW, Stream.RETRY_COIN),
        ("top_k", Stream.FALLBACK, Stream.DRAFT),
    ],
)
def test_mutant_shared_noise(monkeypatch, name, used, instead):
    coin, uniforms = sample_rows.coin, sample_rows.uniforms_at

    def swapped(stream):
        return int(instead) if stream == int(used) else stream

    for module in (block_module, verify_module):
        monkeypatch.setattr(module, "coin", lambda s, p, o, stream, backend: coin(s, p, o, swapped(stream), backend))
    monkeypatch.setattr(sample_rows, "uniforms_at", lambda noise, columns: uniforms(noise._replace(stream=swapped(noise.stream)), columns))
    world = World(4, 2, seed=3, likeness=0.3)
    rule = dk.ReverseSpeculative(0.3, trials=2, proposer_top_k=4) if name == "reverse_retry" else RULES[name]
    assert p_value(rule, world, backend="reference") < ALPHA


def mutated_filter(monkeypatch, change) -> None:
    """`change(logits, columns, filters, out, honest)` in place of filter_rows."""
    honest = backends.module("reference").filter_rows

    def changed(logits, columns, filters, out, *rows):
        change(logits, columns, filters, out, lambda *a: honest(*a, *rows))

    monkeypatch.setattr(backends.module("reference"), "filter_rows", changed)


@pytest.mark.parametrize("name", ["speculative", "block", "reverse_retry", "typical", "top_k"])
def test_mutant_dropped_tile_of_a_draw(monkeypatch, name):
    honest = sample_rows.weights

    def dropped(first, second, scale, mode, columns):
        w = honest(first, second, scale, mode, columns).clone()
        w[:, 4:8] = 0
        return w

    monkeypatch.setattr(sample_rows, "weights", dropped)
    assert p_value(RULES[name], World(9, 1, seed=3), backend="reference") < ALPHA


@pytest.mark.parametrize("name", ["speculative", "block", "top_p", "threshold_draw"])
def test_mutant_dropped_tile_of_a_law(monkeypatch, name):
    def dropped(logits, columns, filters, out, honest):
        x = logits.clone()
        x[..., 4:8] = -math.inf
        honest(x, columns, filters, out)

    mutated_filter(monkeypatch, dropped)
    sides = (Sampling(1.1), Sampling(1.2, top_p=0.98))
    assert p_value(RULES[name], World(9, 1, seed=3), sides, backend="reference") < ALPHA


@pytest.mark.parametrize("name", ["speculative", "block", "reverse_retry", "top_p", "threshold_draw", "typical"])
@pytest.mark.parametrize("wrong", [lambda t: t * t, lambda t: torch.ones_like(t), lambda t: 1 / t], ids=["squared", "ignored", "inverse"])
def test_mutant_wrong_temperature(monkeypatch, name, wrong):
    """In the judge alone (the proposer's temperature is 1 and the same mistake would cancel)."""
    mutated_filter(monkeypatch, lambda x, columns, filters, out, honest: honest(x, columns, filters._replace(temperature=wrong(filters.temperature)), out))
    assert p_value(RULES[name], World(4, 2, seed=3), (Sampling(), Sampling(0.6)), backend="reference") < ALPHA


@pytest.mark.parametrize("name", ["speculative", "block", "reverse_retry", "threshold_draw", "typical"])
def test_mutant_filtered_law_not_renormalised(monkeypatch, name):
    def loose(logits, columns, filters, out, honest):
        honest(logits, columns, filters, out)
        out["lse"].copy_(out["lse_all"])

    mutated_filter(monkeypatch, loose)
    sharper = {"reverse_retry": dk.ReverseSpeculative(0.35, trials=4, proposer_top_k=2), "threshold_draw": dk.ThresholdAcceptance(0.45, "draw")}
    rule = sharper.get(name, RULES[name])
    assert p_value(rule, World(4, 2, seed=3), (Sampling(), Sampling(top_k=2)), backend="reference") < ALPHA


@pytest.mark.parametrize("name", ["speculative", "block", "top_p", "top_k", "typical"])
def test_mutant_top_p_of_the_whole_row(monkeypatch, name):
    """top_p of the softmax before top_k, not of what top_k left, renormalised."""

    def early(logits, columns, filters, out, honest):
        free = {k: v.clone() for k, v in out.items()}
        honest(logits, columns, filters._replace(top_p=torch.ones_like(filters.top_p)), free)
        honest(logits, columns, filters._replace(top_p=filters.top_p * (free["lse_all"] - free["lse"]).exp()), out)

    mutated_filter(monkeypatch, early)
    assert p_value(RULES[name], World(5, 2, seed=3), (Sampling(), Sampling(top_k=3, top_p=0.7)), backend="reference") < ALPHA


def ties(rank=dk.TopKAcceptance, mass=dk.TopPAcceptance, reverse=dk.ReverseSpeculative, threshold=dk.ThresholdAcceptance, typical=dk.TypicalAcceptance):
    """Whether every rule decides its ties as defined: rank < k, mass above < p, Q ≥ min_prob, Q > min(ε, …)."""

    def accepted(rule, logits, token, judge=None):
        x, at = torch.tensor(logits, dtype=torch.float64).view(1, 1, -1), torch.zeros(1, dtype=torch.int64)
        more = {"proposer_logits": x} if rule.needs_proposer else {}
        return bool(dk.verify(rule, torch.tensor([[token]]), judge_logits=x, seeds=1, positions=at, judge=judge, backend="reference", **more).num_accepted)

    halves = [0.0, 0.0]
    quarters = [0.0, math.log(0.5), math.log(0.5)]  # Q = ½, ¼, ¼ exactly
    return (
        [accepted(rank(1), [3.0, 2.0, 2.0], v) for v in range(3)] == [True, False, False]
        and [accepted(rank(2), [3.0, 2.0, 2.0, 1.0], v) for v in range(4)] == [True, True, True, False]
        and [accepted(mass(0.5), quarters, v) for v in range(3)] == [True, False, False]
        and [accepted(mass(0.0), quarters, v) for v in range(3)] == [False, False, False]
        # at temperature 0 all mass is above the equals of the argmax
        and [accepted(mass(0.5), halves, v, Sampling(0.0)) for v in range(2)] == [True, False]
        and all(accepted(reverse(0.5), halves, v) for v in range(2))
        and all(accepted(reverse(0.25, trials=2), quarters, v) for v in range(3))
        and all(accepted(threshold(0.5), halves, v) for v in range(2))
        and not any(accepted(typical(0.5, 9.0), halves, v) for v in range(2))
    )


def test_ties_and_their_mutants():
    def mutant(rule, change):
        return type(f"Mutant{rule.__name__}", (rule,), {"accept": change})

    above = torch.nextafter
    assert ties()
    assert not ties(rank=mutant(dk.TopKAcceptance, lambda self, b: b.rank <= b.per_request(self.k)))
    assert not ties(mass=mutant(dk.TopPAcceptance, lambda self, b: b.logits >= b.bar_of_mass(above(b.per_request(self.p), torch.tensor(2.0).double()))))
    assert not ties(reverse=mutant(dk.ReverseSpeculative, lambda self, b: b.logits > self.passing(b)[:, : b.ids.shape[1]]))
    assert not ties(threshold=mutant(dk.ThresholdAcceptance, lambda self, b: b.log_q > b.per_request(self.min_prob).log()))
    assert not ties(typical=mutant(dk.TypicalAcceptance, lambda self, b: b.log_q.exp() >= b.per_request(self.epsilon)))


def binomial_p(seen: int, draws: int, probability: float) -> float:
    """Exact two-sided p-value: the mass of outcomes no likelier than `seen`."""
    k = torch.arange(draws + 1, dtype=torch.float64)
    log_p = math.lgamma(draws + 1) - torch.lgamma(k + 1) - torch.lgamma(draws - k + 1) + k * math.log(probability) + (draws - k) * math.log1p(-probability)
    return float(log_p[log_p <= log_p[seen] + 1e-9].exp().sum())


@BACKENDS
def test_heavy_tails_of_a_draw(backend, device):
    draws = 1_000_000
    tails = torch.tensor([1e-4, 1e-3, 0.0, 1e-2, 0.3, 3e-4, 2e-4], dtype=torch.float64)
    tails[2] = 1 - tails.sum()
    rows = tails.log().float().to(device).expand(draws, -1)
    tokens, logprobs = dk.sample(rows, seeds=torch.arange(draws, device=device), positions=torch.full((draws,), 3, device=device), backend=backend)
    torch.testing.assert_close(logprobs.cpu().double(), tails.log()[tokens.cpu()], rtol=0, atol=2e-6)
    for v, seen in enumerate(tokens.cpu().bincount(minlength=7).tolist()):
        assert binomial_p(seen, draws, float(tails[v])) > ALPHA


def test_a_tail_of_many_small_weights():
    """A tenth of the mass, on a million columns none of which has a millionth of it."""
    v, draws = 1_519_360, 200
    row = torch.full((v,), math.log(0.1 / (v - 1)))
    row[70_000] = math.log(0.9)
    tokens, _ = dk.sample(row.expand(draws, -1), seeds=torch.arange(draws), positions=torch.zeros(draws, dtype=torch.int64), backend="cpp")
    assert binomial_p(int((tokens != 70_000).sum()), draws, 0.1) > ALPHA



@BACKENDS
@pytest.mark.parametrize("rule", [dk.SpeculativeSampling(), dk.BlockVerification()], ids=["speculative", "block"])
def test_heavy_tails_of_an_emitted_token(rule, backend, device):
    """The first token's law is Q down to 1e-4, whichever of acceptance, residual and bonus it comes from."""
    world = World(4, 1, context=False)
    q = torch.tensor([1e-4, 0.6, 1e-3, 0.3989], dtype=torch.float64)
    world.judge[0], world.proposer[0] = q.log().float(), torch.tensor([2e-3, 0.2, 1e-4, 0.7979]).log()
    seen = torch.zeros(4, dtype=torch.int64)
    for (_, tokens), count in simulate(rule, world, 300_000, backend=backend, device=device).items():
        seen[tokens[0]] += count
    for v in range(4):
        assert binomial_p(int(seen[v]), 300_000, float(q[v])) > ALPHA
