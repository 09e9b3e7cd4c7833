"""The exact joint law of (accepted length, emitted tokens) of every rule, by enumeration over small models, and its simulation.

A world is two models over a handful of tokens: a table of logits for every prefix. The laws are written per rule from its
definition; `simulate` proposes with `decoding.sample` and verifies with `decoding.verify`, a request per seed.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import product

import numpy as np
import torch
from oracle_decoding import law

from distilkernels import decoding as dk
from distilkernels.decoding import Sampling
from distilkernels.primitives.philox import Stream

Outcome = tuple[int, tuple[int, ...]]  # (accepted proposals, emitted tokens)


class World:
    """Two random models: `proposer` [prefixes, Vp] and `judge` [prefixes, Vj]; with `context` False rows depend on nothing."""

    def __init__(self, vocab: int, gamma: int, seed: int = 0, likeness: float = 0.6, judge_vocab: int | None = None, context: bool = True):
        g = torch.Generator().manual_seed(seed)
        self.vocab, self.gamma = vocab, gamma
        prefixes = sum(vocab**d for d in range(gamma + 1)) if context else 1
        self.context = context
        self.judge_vocab = judge_vocab or vocab
        self.common = min(self.vocab, self.judge_vocab)
        shared = torch.randn(prefixes, max(vocab, self.judge_vocab), generator=g)
        own = torch.randn(2, *shared.shape, generator=g)
        self.proposer = (1.5 * (likeness * shared + (1 - likeness) * own[0]))[:, :vocab]
        self.judge = (1.5 * (likeness * shared + (1 - likeness) * own[1]))[:, : self.judge_vocab]

    def row(self, depth, code):
        """Row of the prefix that is number `code` of its depth."""
        return (self.vocab**depth - 1) // (self.vocab - 1) + code if self.context else 0 * code

    def at(self, table: torch.Tensor, prefix: tuple[int, ...]) -> np.ndarray:
        code = 0
        for x in prefix:
            code = code * self.vocab + x
        return table[self.row(len(prefix), code)].double().numpy()


def _settings(s: Sampling, top_k: int | None = None) -> dict:
    limit = s.top_k if top_k is None else top_k if s.top_k is None else min(top_k, s.top_k)
    return {"temperature": s.temperature, "top_k": limit, "top_p": s.top_p, "min_p": s.min_p}


class Position:
    """The two laws at a prefix over the common ids; `draft` is what a proposal is drawn from, over all that the proposer has."""

    def __init__(self, world: World, prefix: tuple[int, ...], rule: dk.Rule, proposer: Sampling, judge: Sampling, outside: bool):
        raw = world.at(world.judge, prefix)
        self.raw, narrow = raw[: world.common], getattr(rule, "judge_top_k", None)
        self.q = law(self.raw, **_settings(judge))
        self.narrow = law(self.raw, **_settings(judge, narrow))
        if len(prefix) < world.gamma:
            y, pool = world.at(world.proposer, prefix), getattr(rule, "proposer_top_k", None)
            self.p = law(y[: world.common], **_settings(proposer, pool))
            self.draft = law(y, **_settings(proposer, pool)) if outside else self.p

    def passing(self, rule: dk.ReverseSpeculative) -> np.ndarray:
        return (self.q >= rule.min_prob) & (self.narrow > 0)


def acceptance(rule: dk.Rule, here: Position, x: int) -> float:
    q, p = here.q, here.p
    entropy = -sum(w * np.log(w) for w in q if w > 0)
    kind = type(rule)
    for base, holds in (
        (dk.ReverseSpeculative, lambda: here.passing(rule)[x]),
        (dk.TopKAcceptance, lambda: (here.raw > here.raw[x]).sum() < rule.k),
        (dk.TopPAcceptance, lambda: rule.p >= 1 or q[q > q[x]].sum() < rule.p),
        (dk.SpeculativeSampling, lambda: min(1.0, q[x] / p[x])),
        (dk.TypicalAcceptance, lambda: q[x] > min(rule.epsilon, rule.delta * np.exp(-entropy))),
        (dk.ThresholdAcceptance, lambda: q[x] >= rule.min_prob),
        (dk.GreedyAcceptance, lambda: x == np.argmax(here.raw)),
    ):
        if issubclass(kind, base):
            return float(holds())
    raise AssertionError(rule)


def one_hot(here: Position) -> np.ndarray:
    return np.eye(len(here.raw))[np.argmax(here.raw)]


def residual(here: Position, scale: float) -> np.ndarray:
    w = np.maximum(scale * here.q - here.p, 0)
    return w / w.sum() if w.sum() > 1e-14 else here.q


def after_rejection(rule: dk.Rule, here: Position) -> np.ndarray:
    if isinstance(rule, dk.SpeculativeSampling):
        return residual(here, 1.0)
    if rule.at_rejection == "argmax":
        return one_hot(here)
    if isinstance(rule, dk.ReverseSpeculative):
        pool = here.p * here.passing(rule)
        failed = (1 - pool.sum()) ** (rule.trials - 1)
        return failed * here.narrow + ((1 - failed) * pool / pool.sum() if pool.sum() else 0)
    return here.narrow


def exact(rule: dk.Rule, world: World, proposer: Sampling | None = None, judge: Sampling | None = None, outside: bool = False) -> dict[Outcome, float]:
    """Probability of every outcome of one block. With `outside`, proposals are drawn from all ids that the proposer has."""
    proposer, judge, out = proposer or Sampling(), judge or Sampling(), defaultdict(float)

    def position(prefix):
        return Position(world, prefix, rule, proposer, judge, outside)

    def emit(prefix, weights, probability):
        for v, w in enumerate(weights):
            if w > 0:
                out[len(prefix), (*prefix, v)] += probability * w

    def end(prefix, probability):
        if rule.bonus is None:
            out[len(prefix), prefix] += probability
        else:
            emit(prefix, position(prefix).narrow if rule.bonus == "draw" else one_hot(position(prefix)), probability)

    def walk(prefix, probability):
        if len(prefix) == world.gamma:
            return end(prefix, probability)
        here = position(prefix)
        for x, draft in enumerate(here.draft):
            if draft == 0:
                continue
            if x >= world.common:
                emit(prefix, one_hot(here) if rule.at_rejection == "argmax" else here.narrow, probability * draft)
                continue
            a = acceptance(rule, here, x)
            if a > 0:
                walk((*prefix, x), probability * draft * a)
            if a < 1:
                emit(prefix, after_rejection(rule, here), probability * draft * (1 - a))

    def blocks(prefix, probability, h, p):
        """Block verification: h_i and p_i of the proposals so far."""
        ended = len(prefix) == world.gamma
        here = None if ended else position(prefix)
        count = len(prefix)
        leave = 1.0 if ended else here.draft[world.common :].sum()
        if leave > 0:
            # no proposal that can be judged follows: the last h is p itself
            chain = [1.0, *h[1:count], p[count]] if count else [1.0]
            lost = 1.0
            for tau in range(count, -1, -1):
                share = probability * leave * chain[tau] * lost
                lost *= 1 - chain[tau]
                if share > 0 and tau == count:
                    end(prefix, share) if ended else emit(prefix, here.narrow, share)
                elif share > 0:
                    emit(prefix[:tau], residual(position(prefix[:tau]), p[tau]), share)
        if ended:
            return
        z = np.maximum(p[count] * here.q - here.p, 0).sum()
        mine = 1.0 if count == 0 or (z < 1e-14 and p[count] == 1) else z / (z + 1 - p[count])
        for x in range(world.common):
            if here.draft[x] > 0:
                blocks((*prefix, x), probability * here.draft[x], [*h, mine], [*p, min(p[count] * here.q[x] / here.p[x], 1.0)])

    if isinstance(rule, dk.BlockVerification):
        blocks((), 1.0, [], [1.0])
    else:
        walk((), 1.0)
    return dict(out)


def accepted_tokens(outcomes: dict[Outcome, float]) -> float:
    """E[how many proposals are accepted]."""
    return sum(n * p for (n, _), p in outcomes.items())


def continued(outcomes: dict[Outcome, float], world: World, judge: Sampling) -> dict[tuple[int, ...], float]:
    """The law of the first γ + 1 tokens where the judge alone goes on after the block."""
    out = defaultdict(float)

    def extend(tokens, probability):
        if len(tokens) == world.gamma + 1:
            out[tokens] += probability
            return
        for v, w in enumerate(law(world.at(world.judge, tokens)[: world.common], **_settings(judge))):
            if w > 0:
                extend((*tokens, v), probability * w)

    for (_, tokens), probability in outcomes.items():
        extend(tokens, probability)
    return out


def block_of(world: World, rule: dk.Rule, requests: int, proposer: Sampling, positions: torch.Tensor, *, backend=None, outside=False,
             absolute=False, device="cpu") -> dict:  # fmt: skip
    """Arguments of `verify` for a block of drafted proposals, a request per seed. `absolute` is a mistake: noise keyed by the place in
    the sequence alone."""
    seeds = torch.arange(requests, device=device) * 7919 + 13
    tables = {name: table.to(device) for name, table in (("judge", world.judge), ("proposer", world.proposer))}
    code, rows, ids = torch.zeros(requests, dtype=torch.int64, device=device), {"judge": [], "proposer": []}, []
    for i in range(world.gamma + 1):
        where = world.row(i, code)
        rows["judge"].append(tables["judge"][where])
        if i == world.gamma:
            break
        rows["proposer"].append(tables["proposer"][where])
        at, offsets = (positions + i, torch.zeros_like(positions)) if absolute else (positions, torch.full_like(positions, i))
        drafted, _ = dk.sample(
            rows["proposer"][-1], seeds=seeds, positions=at, offsets=offsets, sampling=rule.proposer_sampling(proposer), stream=Stream.DRAFT,
            valid_vocab=None if outside else world.common, backend=backend,
        )  # fmt: skip
        ids.append(drafted)
        code = code * world.vocab + drafted
    stacked = {name: torch.stack(r, 1) for name, r in rows.items()}
    return {"proposals": torch.stack(ids, 1), "proposer_logits": stacked["proposer"], "judge_logits": stacked["judge"], "seeds": seeds,
            "positions": positions}  # fmt: skip


def outcomes_of(verdict: dk.Verdict, proposals: torch.Tensor) -> torch.Tensor:
    """[B, G + 2]: accepted, then the emitted tokens."""
    return torch.cat([verdict.num_accepted[:, None], verdict.tokens(proposals)], 1).cpu()


def counted(outcomes: torch.Tensor) -> dict[tuple, int]:
    found, times = torch.unique(outcomes, dim=0, return_counts=True)
    return {(int(row[0]), tuple(int(v) for v in row[1:] if v >= 0)): int(t) for row, t in zip(found, times)}


def simulate(rule: dk.Rule, world: World, requests: int, proposer: Sampling | None = None, judge: Sampling | None = None, *, backend=None,
             outside=False, device="cpu") -> dict[Outcome, int]:  # fmt: skip
    proposer, judge = proposer or Sampling(), judge or Sampling()
    block = block_of(world, rule, requests, proposer, torch.full((requests,), 41, device=device), backend=backend, outside=outside, device=device)
    return counted(outcomes_of(dk.verify(rule, **block, proposer=proposer, judge=judge, backend=backend), block["proposals"]))


def chi_square(observed: dict, expected: dict) -> float:
    """The p-value of Pearson's test of `observed` counts against the law `expected`; cells of fewer than 10 expected are one. 0 where
    something impossible was seen."""
    total = sum(observed.values())
    assert abs(sum(expected.values()) - 1) < 1e-9, sum(expected.values())
    if any(expected.get(cell, 0) <= 0 for cell in observed):
        return 0.0
    pairs = sorted((p * total, observed.get(cell, 0)) for cell, p in expected.items())
    cells, rest = [], [0.0, 0]
    for e, o in pairs:
        if rest[0] < 10 and (e < 10 or rest[0]):
            rest = [rest[0] + e, rest[1] + o]
        else:
            cells.append((e, o))
    cells += [tuple(rest)] if rest[0] else []
    if len(cells) < 2:
        return 1.0
    statistic = sum((o - e) ** 2 / e for e, o in cells)
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2, dtype=torch.float64), torch.tensor(statistic / 2, dtype=torch.float64)))


def product_law(first: dict[Outcome, float]) -> dict[tuple[Outcome, Outcome], float]:
    """Two blocks of context-free models, one after the other."""
    return {(a, b): p * q for (a, p), (b, q) in product(first.items(), repeat=2)}
