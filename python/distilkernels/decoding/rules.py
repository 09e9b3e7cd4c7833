"""Acceptance rules: which proposals a judge keeps, and what it draws where it keeps no more.

A rule is a small dataclass. It sees a :class:`~.block.Block`, the few numbers a position has, and says yes or no per proposal;
:func:`~.verify.verify` turns that into a prefix and makes the draw that the rule names. Q is the judge's law at a position, P the
proposer's, each after its own temperature and filters. Parameters may be tensors [B], one entry a request.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from ..primitives.filter_rows import Filtered
from .block import Block
from .sampling import Sampling

Number = float | int | Tensor


class Rule:
    """A rule of one's own subclasses this and defines :meth:`accept`.

    ``needs_proposer``: whether P is read. ``needs_mass``: whether :attr:`.block.Block.mass_above` is. ``at_rejection``: "draw" from Q,
    "residual" (from max(c·Q − P, 0), c = :meth:`scale`), "retry" (see :class:`ReverseSpeculative`) or "argmax". ``bonus``: after the last
    proposal None, "draw" or "argmax".
    """

    needs_proposer: bool = False
    needs_mass: bool = False
    at_rejection: str = "draw"
    bonus: str | None = None

    def accept(self, block: Block) -> Tensor:
        """bool [B, G]: would each proposal be accepted; the accepted ones are the longest prefix of True."""
        raise TypeError(f"{type(self).__name__} must define accept(block)")

    def length(self, block: Block) -> Tensor:
        """int64 [B]: how many proposals are accepted."""
        return (self.accept(block) & block.present).cumprod(1).sum(1)

    def scale(self, block: Block, accepted: Tensor) -> Tensor:
        """c of the residual, float64 [B]."""
        return torch.ones(accepted.shape, dtype=torch.float64, device=accepted.device)

    def judge_sampling(self, judge: Sampling) -> Sampling:
        """What the judge's own tokens are drawn with."""
        return judge

    def proposer_sampling(self, proposer: Sampling) -> Sampling:
        """What the proposals must have been drawn with."""
        return proposer


def _checked(rule: Rule, **limits: tuple[float, float, str]) -> None:
    for name, (low, high, words) in limits.items():
        value = getattr(rule, name)
        if value is None or isinstance(value, Tensor):
            continue
        integer = "int" in words
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if integer else numbers.Real):
            raise TypeError(f"{name} of {type(rule).__name__} must be {words}; got {type(value).__name__}")
        if not low <= value <= high:
            raise ValueError(f"{name} of {type(rule).__name__} must be {words}; got {value}")
    if rule.bonus not in (None, "draw", "argmax"):
        raise ValueError(f"bonus of {type(rule).__name__} must be None, 'draw' or 'argmax'; got {rule.bonus!r}")
    if getattr(rule, "fallback", "draw") not in ("draw", "argmax"):
        raise ValueError(f"fallback of {type(rule).__name__} must be 'draw' or 'argmax'; got {rule.fallback!r}")


_PROBABILITY = (0, 1, "in [0, 1]")
_COUNT = (1, math.inf, "an int of at least 1")


@dataclass(frozen=True, eq=False)
class ReverseSpeculative(Rule):
    """RSD (arXiv 2509.22230): the teacher proposes, the student accepts what it might have said itself, Q(x) ≥ min_prob.

    Args:
        min_prob: compared with Q before judge_top_k renormalises it (at temperature 0 every token of the largest logit passes). The
            published setting is 0.01, trials=5, both top-k 20.
        trials: T. A rejected proposal is followed by up to T − 1 further draws from the proposer's pool, in closed form: with
            a = Σ P̃ over the pool's tokens that pass, one of them succeeds with probability 1 − (1 − a)^{T−1} and is then a draw from P̃
            restricted to those (source ACCEPTED); else the token is a draw from Q (FALLBACK).
        proposer_top_k: the pool, P̃ = P renormalised on it; the proposals must be drawn from it.
        judge_top_k: a token must be among these to pass, and the fallback is drawn from Q renormalised on them. Both top-k come where the
            side's own top_k would: before its top_p and min_p.
        bonus: None, "draw" or "argmax" after the last proposal.
    """

    min_prob: Number = 0.01
    trials: int = 1
    proposer_top_k: int | Tensor | None = None
    judge_top_k: int | Tensor | None = None
    bonus: str | None = None

    def __post_init__(self):
        if isinstance(self.trials, Tensor):
            raise TypeError("trials of ReverseSpeculative must be an int of at least 1; got a tensor")
        _checked(self, min_prob=_PROBABILITY, trials=_COUNT, proposer_top_k=_COUNT, judge_top_k=_COUNT)

    @property
    def needs_proposer(self) -> bool:
        return self.trials > 1

    @property
    def at_rejection(self) -> str:
        return "retry" if self.trials > 1 else "draw"

    def judge_sampling(self, judge: Sampling) -> Sampling:
        return judge.limited(self.judge_top_k)

    def proposer_sampling(self, proposer: Sampling) -> Sampling:
        return proposer.limited(self.proposer_top_k)

    def bar(self, block: Block, law: Filtered, narrow: Filtered | None) -> Tensor:
        """The raw logits [B, R] or [B] from which a token passes, by laws of the judge before and after judge_top_k: one threshold for
        proposals and for the pool."""
        min_prob = block.per_request(self.min_prob)
        bar = law.bar_of(min_prob if law.lse.dim() == 2 else min_prob[:, 0])
        return bar if narrow is None else torch.maximum(bar, narrow.bar)

    def passing(self, block: Block) -> Tensor:
        """:meth:`bar` at every row [B, R]."""
        return self.bar(block, block.judge.law, None if self.judge_top_k is None else block.fallback.law)

    def accept(self, block: Block) -> Tensor:
        if self.judge_top_k is not None and block.judge.plain is not None:
            # what top_k alone leaves is known from the rank: no row is filtered
            return (block.logits >= self.bar(block, block.judge_law, None)) & (block.rank < block.per_request(self.judge_top_k))
        return block.logits >= self.passing(block)[:, : block.ids.shape[1]]


@dataclass(frozen=True, eq=False)
class TopKAcceptance(Rule):
    """SKD (arXiv 2410.11325): the student proposes, the teacher accepts a token of rank below k in its raw logits, −inf aside; else
    a draw from Q."""

    k: int | Tensor = 25
    bonus: str | None = None

    def __post_init__(self):
        _checked(self, k=_COUNT)

    def accept(self, block: Block) -> Tensor:
        return (block.rank >= 0) & (block.rank < block.per_request(self.k)) & (block.logits > -math.inf)


@dataclass(frozen=True, eq=False)
class TopPAcceptance(Rule):
    """Accepts a token with less than p of the judge's mass above it (p ≥ 1: every token); else a draw from Q."""

    p: Number = 0.9
    bonus: str | None = None
    needs_mass = True

    def __post_init__(self):
        _checked(self, p=(0, math.inf, "at least 0"))

    def accept(self, block: Block) -> Tensor:
        p = block.per_request(self.p)
        likely = block.logits >= block.bar_of_mass(p) if block.mass_above is None else block.mass_above < p
        inside = (block.log_q > -math.inf) & likely & (p > 0)
        return inside | (p >= 1)


@dataclass(frozen=True, eq=False)
class SpeculativeSampling(Rule):
    """Accepts with probability min(1, Q/P); else a draw from norm(max(Q − P, 0)): the emitted law is Q (arXiv 2211.17192, 2302.01318)."""

    bonus: str | None = "draw"
    needs_proposer = True
    at_rejection = "residual"

    def __post_init__(self):
        _checked(self)

    def accept(self, block: Block) -> Tensor:
        # Q = P = 0 rejects; −inf + inf is NaN, and NaN compares False
        return block.uniforms.log() < block.log_q - block.log_p


@dataclass(frozen=True, eq=False)
class BlockVerification(Rule):
    """Accepts the longest prefix that all its extensions can pay for: the emitted law is Q, never with fewer accepted tokens than
    speculative sampling (arXiv 2403.10444).

    p_0 = 1, p_i = min(p_{i−1}·Q(x_i)/P(x_i), 1); i proposals are kept where u_i ≤ h_i, h_i = Z_i/(Z_i + 1 − p_i) with
    Z_i = Σ_v max(p_i·Q(v) − P(v), 0) on the rows after them, and h = p at the last; the longest such i wins, then norm(max(p_i·Q − P, 0)).
    """

    bonus: str | None = "draw"
    needs_proposer = True
    at_rejection = "residual"

    def __post_init__(self):
        _checked(self)

    def length(self, block: Block) -> Tensor:
        g = block.ids.shape[1]
        if not g:
            return torch.zeros_like(block.lengths)
        p = block.prefix[:, 1:]
        count = torch.arange(1, g + 1, device=p.device)
        # rows g and beyond the present proposals have no P: their h is not asked for
        last, behind = count == block.lengths[:, None], count >= block.lengths[:, None]
        z = block.residual_mass(p, count.clamp(max=g - 1).expand(p.shape), behind)
        h = (z / (z + 1 - p)).masked_fill((z == 0) & (p == 1), 1.0)
        kept = block.present & (block.uniforms <= torch.where(last, p, h))
        return (kept * count).amax(1)

    def scale(self, block: Block, accepted: Tensor) -> Tensor:
        return block.prefix.gather(1, accepted[:, None])[:, 0]


@dataclass(frozen=True, eq=False)
class TypicalAcceptance(Rule):
    """Accepts Q(x) > min(ε, δ·e^{−H(Q)}) (Medusa, arXiv 2401.10774); else the `fallback`, "draw" from Q or "argmax"."""

    epsilon: Number = 0.09
    delta: Number = 0.3
    fallback: str = "draw"
    bonus: str | None = "draw"

    def __post_init__(self):
        _checked(self, epsilon=_PROBABILITY, delta=(0, math.inf, "at least 0"))

    @property
    def at_rejection(self) -> str:
        return self.fallback

    def accept(self, block: Block) -> Tensor:
        floor = block.per_request(self.delta) * (-block.judge_law.entropy).exp()
        return block.log_q.exp() > torch.minimum(block.per_request(self.epsilon), floor)


@dataclass(frozen=True, eq=False)
class ThresholdAcceptance(Rule):
    """Accepts Q(x) ≥ min_prob; else the `fallback` (Sirius, arXiv 2409.03856: judge temperature 0.6, min_prob 0.05–0.1, "argmax")."""

    min_prob: Number = 0.1
    fallback: str = "argmax"
    bonus: str | None = None

    def __post_init__(self):
        _checked(self, min_prob=_PROBABILITY)

    @property
    def at_rejection(self) -> str:
        return self.fallback

    def accept(self, block: Block) -> Tensor:
        return block.log_q >= block.per_request(self.min_prob).log()


@dataclass(frozen=True, eq=False)
class GreedyAcceptance(Rule):
    """Accepts the judge's argmax, and emits it where it was not proposed: greedy decoding of the judge, token for token."""

    bonus: str | None = "argmax"
    at_rejection = "argmax"

    def __post_init__(self):
        _checked(self)

    def accept(self, block: Block) -> Tensor:
        return block.ids == block.judge_law.argmax
