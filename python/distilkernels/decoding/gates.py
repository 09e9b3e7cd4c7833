"""Gates: who writes next. A gate hands the pen from one model to the other by what has been written so far.

A gate makes a :class:`Lead` for every request. Before a block the lead says who writes and how many tokens at most; after it, how many
of them stay. "proposer" and "judge" write alone, "rule" is proposal and acceptance, "text" is text of the gate's own. Whoever writes, the
other model reads along, so that every token has both models' labels.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

WRITERS = ("proposer", "judge", "rule")


class Turn(NamedTuple):
    """`writer` writes at most `tokens` (None: a block); for the writer "text", `text` is what is written."""

    writer: str
    tokens: int | None = None
    text: tuple[int, ...] = ()


class Lead(Protocol):
    """A gate's state for one request."""

    def next(self) -> Turn:
        """Who writes the next block."""

    def wrote(self, tokens: Sequence[int], divergence: Sequence[float]) -> int:
        """What the turn came to, and how many of these tokens stay.

        `divergence` is what the gate's ``divergence`` made of the models' rows at each token (NaN where it was not asked, or where a
        row is missing). Tokens not kept are taken back by both models. Noise is never used twice, so a writer of whom nothing is kept
        cannot be asked again before another's tokens were: ``generate`` raises RuntimeError.
        """


class Gate(Protocol):
    """What ``generate`` needs of a gate. ``divergence(proposer_logits, judge_logits)`` maps rows [B, G, V] of either side (their own
    widths) to [B, G]; a gate that does not look has None."""

    divergence: Callable[[Tensor, Tensor], Tensor] | None

    def lead(self, coin: Callable[[int], float]) -> Lead:
        """The state of a new request. `coin(position)` is the request's own uniform number in (0, 1) for that position."""


def _checked_writers(gate: Any, *allowed: str) -> None:
    for name in ("leader", "follower"):
        if getattr(gate, name) not in allowed:
            raise ValueError(f"{name} of {type(gate).__name__} must be one of {', '.join(allowed)}; got {getattr(gate, name)!r}")
    if gate.leader == gate.follower:
        raise ValueError(f"leader and follower of {type(gate).__name__} must differ; got {gate.leader!r} twice")


class _Endings:
    """Says after which token the text ends with a delimiter. Texts need a tokenizer; a delimiter may span several tokens."""

    def __init__(self, delimiters: Sequence[str | int], tokenizer: Any):
        self.ids = {d for d in delimiters if isinstance(d, int)}
        self.texts = tuple(d for d in delimiters if isinstance(d, str))
        self.tokenizer, self.tail = tokenizer, []

    def after(self, token: int) -> bool:
        # eight tokens hold any delimiter of at most eight characters
        self.tail = [*self.tail[-7:], token]
        if token in self.ids:
            return True
        return bool(self.texts) and self.tokenizer.decode(self.tail).rstrip(" ").endswith(self.texts)


def _checked_delimiters(gate: Any, delimiters: Sequence[str | int], tokenizer: Any) -> None:
    if isinstance(delimiters, str) or not delimiters or not all(isinstance(d, (str, int)) and d != "" for d in delimiters):
        raise ValueError(f"delimiters of {type(gate).__name__} must be a sequence of texts and token ids, not empty; got {delimiters!r}")
    if tokenizer is None and any(isinstance(d, str) for d in delimiters):
        raise ValueError(f"tokenizer of {type(gate).__name__} is needed for delimiters that are texts; got None")
    if any(isinstance(d, str) and len(d) > 8 for d in delimiters):
        raise ValueError(f"delimiters of {type(gate).__name__} must have at most 8 characters; got {delimiters!r}")


@dataclass(frozen=True)
class SentenceLead:
    """FoReaL (arXiv 2506.06998): at every sentence start a coin of `probability` says whether the leader writes its first `lead_tokens`;
    the follower writes the rest, up to and with the next delimiter.

    Args:
        lead_tokens: n ≥ 1. probability: of leading a sentence. The first generated token starts a sentence.
        delimiters: texts (the text up to a token ends with one of them, spaces aside; these need the `tokenizer`) or token ids.
        tokenizer: anything with ``decode(list of ids) -> str``.
        leader, follower: "proposer", "judge" or "rule".
    """

    lead_tokens: int = 15
    probability: float = 1.0
    delimiters: Sequence[str | int] = (".", "!", "?", "\n")
    tokenizer: Any = None
    leader: str = "proposer"
    follower: str = "judge"
    divergence = None

    def __post_init__(self):
        if self.lead_tokens < 1:
            raise ValueError(f"lead_tokens of SentenceLead must be at least 1; got {self.lead_tokens}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability of SentenceLead must be in [0, 1]; got {self.probability}")
        _checked_writers(self, *WRITERS)
        _checked_delimiters(self, self.delimiters, self.tokenizer)

    def lead(self, coin: Callable[[int], float]) -> Lead:
        return _Sentences(self, coin)


class _Sentences:
    def __init__(self, gate: SentenceLead, coin: Callable[[int], float]):
        self.gate, self.coin, self.endings = gate, coin, _Endings(gate.delimiters, gate.tokenizer)
        self.position, self.starting, self.leading = 0, True, 0

    def next(self) -> Turn:
        if self.starting:
            self.starting = False
            self.leading = self.gate.lead_tokens if self.coin(self.position) < self.gate.probability else 0
        return Turn(self.gate.leader, self.leading) if self.leading else Turn(self.gate.follower)

    def wrote(self, tokens: Sequence[int], divergence: Sequence[float]) -> int:
        kept = min(len(tokens), self.leading) if self.leading else len(tokens)
        for i, token in enumerate(tokens[:kept]):
            # within the leader's tokens a delimiter does not end its turn
            if self.endings.after(token) and not self.leading:
                kept, self.starting = i + 1, True
                break
        self.leading = max(0, self.leading - kept)
        self.position += kept
        return kept


@dataclass(frozen=True)
class ReflectionHandoff:
    """Speculative Thinking (arXiv 2504.12329): where a paragraph starts, the follower's first tokens are read for words of doubt,
    verification and confidence, and the leader writes them instead where there are any.

    At every `delimiter` the follower drafts `draft_tokens`, which are classed by whole words, case aside: the class with most of them,
    "negative" where that is shared. Unclassed drafts stay, up to the next delimiter. In place of a classed one the leader writes as many of its own, and
    `verify_tokens` more where the draft had a verifying word. The `threshold`-th negative draft is replaced by the `recap` and
    `recap_tokens[0]` of the leader's (`recap_tokens[1]` more each time, at most `recap_tokens[2]`); counting starts anew with a threshold
    `threshold_growth` higher, at most `max_threshold`.

    Args:
        tokenizer: anything with ``decode(ids) -> str`` and ``encode(text, add_special_tokens=False) -> ids``.
        leader, follower: "proposer" or "judge".
    """

    tokenizer: Any
    delimiter: str = "\n\n"
    draft_tokens: int = 20
    verify_tokens: int = 125
    threshold: int = 15
    threshold_growth: int = 5
    max_threshold: int = 30
    recap_tokens: tuple[int, int, int] = (125, 25, 200)
    recap: str = "Let me recap what I have so far and see whether one of the steps is wrong."
    negative: Sequence[str] = ("wait", "alternatively", "hold on", "another")
    verifying: Sequence[str] = ("verify", "think again", "recap", "check")
    positive: Sequence[str] = ("yeah", "yes", "final answer", "confident")
    leader: str = "proposer"
    follower: str = "judge"
    divergence = None

    def __post_init__(self):
        _checked_writers(self, "proposer", "judge")
        _checked_delimiters(self, (self.delimiter,), self.tokenizer)
        for name, least in (("draft_tokens", 1), ("verify_tokens", 0), ("threshold", 1), ("threshold_growth", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} of ReflectionHandoff must be at least {least}; got {getattr(self, name)}")

    def classify(self, text: str) -> str | None:
        """The draft's class, "negative", "verifying" or "positive"; None without any of their words."""
        counts = {name: self.count(name, text) for name in ("negative", "verifying", "positive")}
        most = max(counts.values())
        if most == 0:
            return None
        winners = [name for name, count in counts.items() if count == most]
        return winners[0] if len(winners) == 1 else "negative"

    def count(self, name: str, text: str) -> int:
        """How many words of that class the text has."""
        words = "|".join(re.escape(word) for word in getattr(self, name))
        return len(re.findall(rf"\b(?:{words})\b", text, flags=re.IGNORECASE)) if words else 0

    def lead(self, coin: Callable[[int], float]) -> Lead:
        return _Reflections(self)


class _Reflections:
    def __init__(self, gate: ReflectionHandoff):
        self.gate, self.endings = gate, _Endings((gate.delimiter,), gate.tokenizer)
        self.phase, self.owed = "write", 0
        self.negatives, self.threshold, self.recaps = 0, gate.threshold, 0

    def next(self) -> Turn:
        gate = self.gate
        if self.phase == "recap":
            return Turn("text", text=tuple(gate.tokenizer.encode(gate.recap, add_special_tokens=False)))
        if self.phase == "lead":
            return Turn(gate.leader, self.owed)
        return Turn(gate.follower, gate.draft_tokens if self.phase == "draft" else None)

    def wrote(self, tokens: Sequence[int], divergence: Sequence[float]) -> int:
        if self.phase == "recap":
            self._read(tokens)
            self.phase = "lead"
            return len(tokens)
        if self.phase == "lead":
            at_end = self._read(tokens)
            self.owed -= len(tokens)
            if self.owed <= 0:
                self.phase = "draft" if at_end else "write"
            return len(tokens)
        if self.phase == "draft" and self._handed_over(self.gate.tokenizer.decode(list(tokens))):
            return 0
        self.phase = "write"
        for i, token in enumerate(tokens):
            if self.endings.after(token):
                self.phase = "draft"
                return i + 1
        return len(tokens)

    def _read(self, tokens: Sequence[int]) -> bool:
        at_end = False
        for token in tokens:
            at_end = self.endings.after(token)
        return at_end

    def _handed_over(self, draft: str) -> bool:
        """Whether the draft is replaced, and by what."""
        gate, kind = self.gate, self.gate.classify(draft)
        if kind is None:
            return False
        self.phase, self.owed = "lead", gate.draft_tokens + (gate.verify_tokens if gate.count("verifying", draft) else 0)
        self.negatives += kind == "negative"
        if self.negatives >= self.threshold:
            first, growth, most = gate.recap_tokens
            self.phase, self.owed = "recap", min(first + growth * self.recaps, most)
            self.negatives, self.recaps = 0, self.recaps + 1
            self.threshold = min(self.threshold + gate.threshold_growth, gate.max_threshold)
        return True


@dataclass(frozen=True)
class DivergenceSwitch:
    """AdaSwitch (arXiv 2510.07842): the follower writes until the models' divergence d_i exceeds `factor` × the mean of the `window`
    divergences before it (of all of them with None); from that token on the leader writes.

    d_i = KL(leader ‖ follower) in nats of the next-token laws before token i, at temperature 1 on the ids that both have; `measure`
    replaces it: a function of two log-probabilities [..., V], the leader's and the follower's, that gives [...].
    """

    factor: float
    leader: str = "proposer"
    follower: str = "judge"
    measure: Callable[[Tensor, Tensor], Tensor] | None = field(default=None, compare=False)
    window: int | None = None

    def __post_init__(self):
        if not self.factor > 0:
            raise ValueError(f"factor of DivergenceSwitch must be above 0; got {self.factor}")
        if self.window is not None and (isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1):
            raise ValueError(f"window of DivergenceSwitch must be a positive int or None; got {self.window!r}")
        _checked_writers(self, "proposer", "judge")

    def divergence(self, proposer_logits: Tensor, judge_logits: Tensor) -> Tensor:
        """d float32 [B, G] (float64 for float64 logits) of rows [B, G, Vp] and [B, G, Vj]."""
        columns = min(proposer_logits.shape[-1], judge_logits.shape[-1])
        proposer, judge = (
            (z[..., :columns] if z.dtype == torch.float64 else z[..., :columns].float()).log_softmax(-1) for z in (proposer_logits, judge_logits)
        )
        leader, follower = (proposer, judge) if self.leader == "proposer" else (judge, proposer)
        if self.measure is not None:
            return self.measure(leader, follower)
        p = leader.exp()
        # p = 0 contributes nothing, whatever the follower says
        return torch.where(p == 0, 0.0, p * (leader - follower)).sum(-1)

    def lead(self, coin: Callable[[int], float]) -> Lead:
        return _Switch(self)


class _Switch:
    def __init__(self, gate: DivergenceSwitch):
        self.gate, self.switched, self.seen = gate, False, deque(maxlen=gate.window)

    def next(self) -> Turn:
        return Turn(self.gate.leader if self.switched else self.gate.follower)

    def wrote(self, tokens: Sequence[int], divergence: Sequence[float]) -> int:
        if self.switched:
            return len(tokens)
        for i, d in enumerate(divergence[: len(tokens)]):
            if math.isnan(d):
                continue
            if self.seen and d > self.gate.factor * sum(self.seen) / len(self.seen):
                self.switched = True
                return i
            self.seen.append(d)
        return len(tokens)
