"""What `decoding.verify` and `decoding.sample` must answer, one request at a time, in float64 and plain loops over numpy rows.

Only the random words come from the package (`primitives.philox`, held to published answers elsewhere): all the rest is the
rules' mathematics. Every comparison that rounding could turn records how near it was, so that a test can set such cases aside.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from distilkernels import decoding as dk
from distilkernels.decoding import Source
from distilkernels.primitives import philox as generator

DRAFT, ACCEPTANCE, RETRY_COIN, RETRY_DRAW, FALLBACK = range(5)


class Near:
    """The smallest relative distance of any decision from going the other way."""

    def __init__(self):
        self.distance = np.inf

    def compare(self, a: float, b: float) -> None:
        if a != b and np.isfinite(a) and np.isfinite(b):
            self.distance = min(self.distance, abs(a - b) / max(abs(a), abs(b)))
        elif a == b and 0 < a < np.inf:
            self.distance = 0.0


def words(seed: int, position: int, offset: int, stream: int, block) -> np.ndarray:
    """[..., 4] words of the counters at `block`."""
    seed = torch.tensor(seed if seed < 2**63 else seed - 2**64, dtype=torch.int64)
    return torch.stack(generator.philox(seed, (torch.as_tensor(block), position, offset, stream)), -1).numpy()


def coin(seed: int, position: int, offset: int, stream: int) -> float:
    high, low = (int(w) for w in words(seed, position, offset, stream, 0)[:2])
    return min((((high << 32) + low >> 11) + 0.5) * 2.0**-53, 1 - 2.0**-53)


def race_uniforms(seed: int, position: int, offset: int, stream: int, columns: int) -> np.ndarray:
    x = words(seed, position, offset, stream, np.arange((columns + 3) // 4)).reshape(-1)[:columns]
    u = (x.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    return np.minimum(u, np.float32(1 - 2.0**-24)).astype(np.float64)


def draw(weights: np.ndarray, seed: int, position: int, offset: int, stream: int, near: Near) -> int:
    """argmin of −log1p(−u)/w, the lowest id on ties."""
    u = race_uniforms(seed, position, offset, stream, len(weights))
    times = [(-np.log1p(-u[v]) / w, v) for v, w in enumerate(weights) if w > 0]
    times.sort()
    if len(times) > 1:
        near.compare(times[0][0], times[1][0])
    return times[0][1]


def bad(row: np.ndarray) -> bool:
    return bool(np.isnan(row).any() or np.isposinf(row).any() or np.isneginf(row).all())


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def law(row: np.ndarray, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None,
        near: Near | None = None) -> np.ndarray:  # fmt: skip
    """The softmax of a row after temperature, top_k, top_p of what is left, renormalised, and min_p; boundary ties kept."""
    near = near or Near()
    if temperature == 0:
        out = np.zeros(len(row))
        out[int(np.argmax(row))] = 1.0
        return out
    p = softmax(row / temperature)
    kept = np.ones(len(row), dtype=bool)
    if top_k is not None:
        kept &= np.array([(row > x).sum() < top_k for x in row])
    p = np.where(kept, p, 0.0)
    p /= p.sum()
    if top_p is not None and top_p < 1:
        above = np.array([p[row > x].sum() for x in row])
        for x in above[kept]:
            near.compare(x, top_p)
        kept &= (above < top_p) | (row == row.max())
    if min_p is not None:
        for x in p[kept]:
            near.compare(x, min_p * p.max())
        kept &= p >= min_p * p.max()
    p = np.where(kept, p, 0.0)
    return p / p.sum()


@dataclass
class Expected:
    """One request's answer; `near` is how close its nearest decision was."""

    valid: bool = True
    num_accepted: int = 0
    next_token: int = -1
    next_source: int = int(Source.NONE)
    near: float = np.inf
    labels: list = field(default_factory=list)  # per emitted token: judge logprob, proposer logprob, rank, entropy


def _of(value, b: int):
    return value[b].item() if isinstance(value, torch.Tensor) else value


def settings_of(sampling, b: int, top_k=None) -> dict:
    out = {name: _of(getattr(sampling, name), b) for name in ("temperature", "top_k", "top_p", "min_p")}
    if top_k is not None:
        out["top_k"] = top_k if out["top_k"] is None else min(top_k, out["top_k"])
    return out


class _Request:
    """One request's rows and laws, over the columns that both sides have."""

    def __init__(self, rule, b, proposals, proposer_logits, judge_logits, length, seed, position, proposer, judge, valid_vocab):
        self.rule, self.b, self.near = rule, b, Near()
        self.x, self.length, self.seed, self.position = proposals, length, seed, position
        self.raw_q = judge_logits[:, :valid_vocab]
        self.raw_p = None if proposer_logits is None else proposer_logits[:, :valid_vocab]
        self.columns = self.raw_q.shape[1] if self.raw_p is None else min(self.raw_q.shape[1], self.raw_p.shape[1])
        reverse = isinstance(rule, dk.ReverseSpeculative)
        self.judge = settings_of(judge, b)
        self.narrow = settings_of(judge, b, _of(rule.judge_top_k, b) if reverse else None)
        self.proposer = settings_of(proposer, b, _of(rule.proposer_top_k, b) if reverse else None)

    def q(self, i: int) -> np.ndarray:
        return law(self.raw_q[i, : self.columns], **self.judge, near=self.near)

    def fallback(self, i: int) -> np.ndarray:
        return law(self.raw_q[i, : self.columns], **self.narrow, near=self.near)

    def p(self, i: int) -> np.ndarray:
        return law(self.raw_p[i, : self.columns], **self.proposer, near=self.near)

    def representable(self, i: int) -> bool:
        return 0 <= self.x[i] < self.columns

    def broken(self, i: int, with_proposer: bool) -> bool:
        return bad(self.raw_q[i, : self.columns]) or (with_proposer and bad(self.raw_p[i, : self.columns]))

    def uniform(self, i: int) -> float:
        return coin(self.seed, self.position, i, ACCEPTANCE)

    def draw(self, weights: np.ndarray, i: int, stream: int = FALLBACK) -> int:
        return draw(weights, self.seed, self.position, i, stream, self.near)

    def at_least(self, a: float, b: float) -> bool:
        self.near.compare(a, b)
        return bool(a >= b)

    def below(self, a: float, b: float) -> bool:
        self.near.compare(a, b)
        return bool(a < b)


def passing(request: _Request, i: int) -> np.ndarray:
    """Which tokens RSD lets pass: Q(v) ≥ min_prob, and v in the judge's top-k where that is set; at temperature 0 all of the largest."""
    if request.judge["temperature"] == 0 and _of(request.rule.min_prob, request.b) > 0:
        raw = request.raw_q[i, : request.columns]
        return raw == raw.max()
    q, floor, narrow = request.q(i), _of(request.rule.min_prob, request.b), request.fallback(i)
    inside = narrow > 0 if request.rule.judge_top_k is not None else np.ones(len(q), dtype=bool)
    return np.array([request.at_least(q[v], floor) and inside[v] for v in range(request.columns)])


def accepts(request: _Request, i: int) -> bool:
    rule, b, x = request.rule, request.b, int(request.x[i])
    raw, q = request.raw_q[i], request.q(i)
    if isinstance(rule, dk.ReverseSpeculative):
        return bool(passing(request, i)[x])
    if isinstance(rule, dk.TopKAcceptance):
        return bool((raw > raw[x]).sum() < _of(rule.k, b) and raw[x] > -np.inf)
    if isinstance(rule, dk.TopPAcceptance):
        p = _of(rule.p, b)
        return p >= 1 or request.below(q[q > q[x]].sum(), p)
    if isinstance(rule, dk.SpeculativeSampling):
        p = request.p(i)
        if q[x] == 0:
            return False
        return p[x] == 0 or request.below(request.uniform(i), q[x] / p[x])
    if isinstance(rule, dk.TypicalAcceptance):
        entropy = -sum(w * np.log(w) for w in q if w > 0)
        return not request.at_least(min(_of(rule.epsilon, b), _of(rule.delta, b) * np.exp(-entropy)), q[x])
    if isinstance(rule, dk.ThresholdAcceptance):
        return request.at_least(q[x], _of(rule.min_prob, b))
    if isinstance(rule, dk.GreedyAcceptance):
        return x == int(np.argmax(raw[: request.columns]))
    raise AssertionError(rule)


def prefix(request: _Request, count: int) -> list[float]:
    """p_0 … p_count of block verification."""
    p = [1.0]
    for i in range(count):
        q_x, p_x = request.q(i)[request.x[i]], request.p(i)[request.x[i]]
        if p[-1] == 0 or q_x == 0:
            p.append(0.0)
        else:
            p.append(min(p[-1] * q_x / p_x, 1.0) if p_x > 0 else 1.0)
    return p


def block_length(request: _Request, count: int) -> tuple[int, float]:
    """How many of the `count` representable proposals are accepted, and p there."""
    p = prefix(request, count)
    best = 0
    for i in range(1, count + 1):
        if i == count:
            h = p[i]
        else:
            z = np.maximum(p[i] * request.q(i) - request.p(i), 0).sum()
            # by rounding Σ max(Q − P, 0) of equal laws may be 1e-17 where it is 0
            z = 0.0 if z < 1e-13 else z
            h = 1.0 if z == 0 and p[i] > 1 - 1e-13 else z / (z + 1 - p[i])
        request.near.compare(request.uniform(i - 1), h)
        if request.uniform(i - 1) <= h:
            best = i
    return best, p[best]


def residual(request: _Request, i: int, scale: float) -> np.ndarray:
    """max(c·Q − P, 0); what rounding leaves of equal laws is nothing."""
    weights = np.maximum(scale * request.q(i) - request.p(i), 0)
    weights[weights < 1e-15] = 0
    return weights


def after_rejection(request: _Request, i: int, scale: float) -> tuple[int, int]:
    """(token, source) for the rejected position i."""
    rule = request.rule
    if getattr(rule, "fallback", None) == "argmax" or isinstance(rule, dk.GreedyAcceptance):
        return int(np.argmax(request.raw_q[i, : request.columns])), int(Source.FALLBACK)
    if isinstance(rule, (dk.SpeculativeSampling, dk.BlockVerification)) and request.representable(i):
        weights = residual(request, i, scale)
        if weights.any():
            return request.draw(weights, i), int(Source.RESIDUAL)
    if isinstance(rule, dk.ReverseSpeculative) and rule.trials > 1 and request.representable(i):
        pool = np.where(passing(request, i), request.p(i), 0.0)
        a = pool.sum()
        u = coin(request.seed, request.position, i, RETRY_COIN)
        if a > 0 and request.below(u, -np.expm1((rule.trials - 1) * np.log1p(-min(a, 1.0))) if a < 1 else 1.0):
            return request.draw(pool, i, RETRY_DRAW), int(Source.ACCEPTED)
    return request.draw(request.fallback(i), i), int(Source.FALLBACK)


def answer(request: _Request) -> Expected:
    rule, out = request.rule, Expected()
    lossless = isinstance(rule, (dk.SpeculativeSampling, dk.BlockVerification))
    with_proposer = lossless or (isinstance(rule, dk.ReverseSpeculative) and rule.trials > 1)
    present = 0
    while present < request.length and request.representable(present) and not request.broken(present, with_proposer):
        present += 1
    scale = 1.0
    if isinstance(rule, dk.BlockVerification):
        out.num_accepted, scale = block_length(request, present)
    else:
        while out.num_accepted < present and accepts(request, out.num_accepted):
            out.num_accepted += 1
    n = out.num_accepted
    if n < request.length:
        if request.broken(n, with_proposer and request.representable(n)):
            out.valid = False
        else:
            out.next_token, out.next_source = after_rejection(request, n, scale)
    elif rule.bonus is not None and n < len(request.raw_q):
        if request.broken(n, False):
            out.valid = False
        elif rule.bonus == "argmax":
            out.next_token, out.next_source = int(np.argmax(request.raw_q[n, : request.columns])), int(Source.BONUS)
        else:
            out.next_token, out.next_source = request.draw(request.fallback(n), n), int(Source.BONUS)
    out.near = request.near.distance
    emitted = [int(x) for x in request.x[:n]] + [out.next_token] * (out.next_token >= 0)
    for i, token in enumerate(emitted):
        q, logp = softmax(request.raw_q[i]) if not bad(request.raw_q[i]) else np.full(len(request.raw_q[i]), np.nan), np.nan
        if request.raw_p is not None and i < request.length and not bad(request.raw_p[i]):
            logp = np.log(softmax(request.raw_p[i])[token]) if token < request.raw_p.shape[1] else np.nan
        entropy = -sum(w * np.log(w) for w in q if not w <= 0)
        out.labels.append((np.log(q[token]), logp, int((request.raw_q[i] > request.raw_q[i][token]).sum()), entropy))
    return out


def verify(rule, proposals, *, proposer_logits=None, judge_logits, lengths=None, seeds, positions, proposer=None, judge=None,
           valid_vocab=None) -> list[Expected]:  # fmt: skip
    """`decoding.verify`'s arguments, its answer as a list of requests."""
    proposer, judge = proposer or dk.Sampling(), judge or dk.Sampling()
    judged = judge_logits.double().cpu().numpy()
    proposed = None if proposer_logits is None else proposer_logits.double().cpu().numpy()
    out = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for b, x in enumerate(proposals.cpu().numpy()):
            length = len(x) if lengths is None else int(lengths[b])
            rows = None if proposed is None else proposed[b]
            place = _of(seeds, b), int(positions[b])
            out.append(answer(_Request(rule, b, x, rows, judged[b], length, *place, proposer, judge, valid_vocab)))
    return out
