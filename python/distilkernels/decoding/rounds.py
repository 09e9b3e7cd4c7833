"""One round of ``generate``: draft, read, judge; and what it means for each request."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..primitives.philox import Stream
from .gates import WRITERS, Gate, Turn
from .pace import Pace
from .remote import RemoteSession
from .rules import Rule
from .sampling import Sampling
from .session import Draw, Session
from .verify import Source, verify

# what a round brings back per token, one float64 plane each
PLANES = ("tokens", "source", "judge_logprobs", "proposer_logprobs", "judge_rank", "judge_entropy", "divergence")


class _Written(Rule):
    """Keeps what was written: verify only labels it."""

    def accept(self, block):
        return torch.ones_like(block.present)


class Request:
    """What is known of a request on the host."""

    def __init__(self, index: int, limit: int, lead: Any, block: int | Pace):
        self.index, self.limit, self.lead, self.block = index, limit, lead, block
        self.position, self.finished, self.labels = 0, "", []
        self.refused: set[str] = set()  # writers of whom the gate kept nothing at this position

    def turn(self) -> Turn:
        room = self.limit - self.position
        turn = Turn("rule") if self.lead is None else self.lead.next()
        if turn.writer == "text":
            if not turn.text:
                raise ValueError("text of a gate's turn must not be empty; got ()")
            return Turn("text", min(len(turn.text), room), tuple(turn.text)[:room])
        if turn.writer not in WRITERS:
            raise ValueError(f"writer of a gate's turn must be one of {', '.join((*WRITERS, 'text'))}; got {turn.writer!r}")
        if turn.tokens is not None:
            wanted = turn.tokens
        elif isinstance(self.block, Pace):
            wanted = self.block.size() if turn.writer == "rule" else self.block.most
        else:
            wanted = self.block
        if wanted < 1:
            raise ValueError(f"tokens of a gate's turn must be at least 1; got {wanted}")
        if turn.writer in self.refused:
            raise RuntimeError(f"the gate kept nothing of what the {turn.writer} wrote at position {self.position} and asked it again")
        return Turn(turn.writer, min(wanted, room))

    def take(self, turn: Turn, planes: Tensor, tokens: list[int], valid: int, accepted: int, eos: list[int]) -> list[int]:
        """Appends what the round brought, planes [7, G + 1] whose first is `tokens`, and how many proposals were accepted; what stays."""
        if turn.writer == "rule" and isinstance(self.block, Pace):
            self.block.saw(accepted, turn.tokens)
        tokens = [token for token in tokens if token >= 0][: self.limit - self.position]
        ends = [i for i, token in enumerate(tokens) if token in eos]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        kept = len(tokens)
        if self.lead is not None and tokens:
            kept = self.lead.wrote(tokens, planes[6, :kept].tolist())
            if not 0 <= kept <= len(tokens):
                raise ValueError(f"wrote of a gate's lead must return 0 to {len(tokens)}; got {kept}")
            self.refused = set() if kept else self.refused | {turn.writer}
        labels = planes[:6, :kept].clone()
        if turn.writer in ("judge", "text"):
            own = labels[1] == Source.ACCEPTED
            labels[1, own] = float(Source.FALLBACK if turn.writer == "judge" else Source.NONE)
        self.labels.append(labels)
        self.position += kept
        if ends and kept == len(tokens):
            self.finished = "eos"
        elif self.position >= self.limit:
            self.finished = "length"
        elif not valid and kept == len(tokens):
            self.finished = "invalid"
        elif not tokens:
            self.finished = "empty"
        return tokens[:kept]


class Rounds:
    """The two models, and the settings of the requests that are still with them."""

    def __init__(
        self, judging: Session, proposing: Session | RemoteSession, rule: Rule | None, gate: Gate | None, seeds: Tensor, proposer: Sampling,
        judge: Sampling, eos: list[int], valid_vocab: int | None, backend: str | None,
    ):  # fmt: skip
        self.judging, self.proposing, self.rule, self.gate = judging, proposing, rule, gate
        self.seeds, self.proposer, self.judge, self.valid_vocab, self.backend = seeds, proposer, judge, valid_vocab, backend
        # every token must exist for both models: one writes it, the other reads it
        self.columns = min(c for c in (judging.columns, proposing.columns, valid_vocab) if c is not None)
        self.eos = torch.tensor(eos, dtype=torch.int64, device=judging.device)

    def play(self, live: list[Request], turns: list[Turn]) -> tuple[Tensor, list[int], list[int]]:
        """One block of every request: (PLANES [7, B, G + 1] on the CPU, whether the rows it needed were sound, proposals accepted)."""
        device, counts = self.judging.device, [turn.tokens for turn in turns]
        if self.rule is None and any(turn.writer == "rule" for turn in turns):
            raise ValueError(f"rule must be given for {type(self.gate).__name__}, which asks for it; got None")
        positions = torch.tensor([request.position for request in live])
        drafted = [turn.writer in ("proposer", "rule") for turn in turns]
        written = [turn.writer == "judge" for turn in turns]
        width = max(counts)

        # each model drafts for its own requests
        tokens = torch.full((len(live), width), -1, device=device)
        logits: dict[str, Tensor | None] = {"proposer": None, "judge": None}
        said = None
        for side, session, members in (("proposer", self.proposing, drafted), ("judge", self.judging, written)):
            if not any(members):
                continue
            settings = self.judge if side == "judge" else self.proposer if self.rule is None else self.rule.proposer_sampling(self.proposer)
            stream = Stream.FALLBACK if side == "judge" else Stream.DRAFT
            draft = session.draft(members, counts, Draw(settings, self.seeds, positions, int(stream), self.columns, self.backend))
            logits[side] = draft.logits
            if side == "proposer":
                said = draft.logprobs
            rows = torch.tensor([b for b, member in enumerate(members) if member], device=device)
            tokens[rows, : draft.tokens.shape[1]] = draft.tokens.to(device)[rows]
        for b, turn in enumerate(turns):
            if turn.writer == "text":
                tokens[b, : turn.tokens] = torch.tensor(turn.text, dtype=torch.int64)
        lengths = self._lengths(tokens, counts)

        # and reads what it did not write
        extra = self.rule is not None and self.rule.bonus is not None and any(turn.writer == "rule" for turn in turns)
        for side, session, members in (("judge", self.judging, written), ("proposer", self.proposing, drafted)):
            others = [not member for member in members]
            if any(others):
                scored = session.score(others, counts, tokens, extra and side == "judge")
                logits[side] = _merged(logits[side], scored, members)
        proposer_rows = None if logits["proposer"] is None else logits["proposer"].to(device)
        return self._judged(turns, tokens, lengths, positions.to(device), proposer_rows, logits["judge"], said)

    def _lengths(self, tokens: Tensor, counts: list[int]) -> Tensor:
        """Proposals of each request [B]: its own count, and none after an end of sequence."""
        counted = torch.tensor(counts, device=tokens.device)
        if not self.eos.numel():
            return counted
        ends = torch.isin(tokens, self.eos)
        first = torch.where(ends.any(1), ends.int().argmax(1) + 1, counted)
        return torch.minimum(first, counted)

    def _judged(
        self, turns: list[Turn], tokens: Tensor, lengths: Tensor, positions: Tensor, proposer_rows: Tensor | None, judge_rows: Tensor, said: Tensor | None
    ) -> tuple[Tensor, list[int], list[int]]:
        """The rule's verdict where it was asked for, labels everywhere; one transfer to the host."""
        device, by_rule = tokens.device, [turn.writer == "rule" for turn in turns]
        given = (tokens, proposer_rows, judge_rows, lengths, self.seeds.to(device), positions, None if said is None else said.to(device))
        packed = None
        for rule, members in ((self.rule, by_rule), (_Written(), [not member for member in by_rule])):
            if all(members):
                packed = self._verdict(rule, self.proposer, self.judge, *given)
            elif any(members):
                rows = torch.tensor([b for b, member in enumerate(members) if member], device=device)
                settings = (_settings_at(s, rows) for s in (rule, self.proposer, self.judge))
                found = self._verdict(*settings, *(None if t is None else t[rows] for t in given))
                packed = found.new_empty(found.shape[0], len(turns), found.shape[2]) if packed is None else packed
                packed[:, rows] = found
        if self.gate is not None and self.gate.divergence is not None:
            packed[6, :, : tokens.shape[1]] = self.gate.divergence(proposer_rows, judge_rows[:, : tokens.shape[1]]).double()
        packed = packed.cpu()
        valid, accepted = packed[-2:, :, 0].long().tolist()
        return packed[:-2], valid, accepted

    def _verdict(
        self, rule: Rule, proposer: Sampling, judge: Sampling, tokens: Tensor, proposer_rows: Tensor | None, judge_rows: Tensor, lengths: Tensor,
        seeds: Tensor, positions: Tensor, said: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """PLANES, whether the rows were sound and proposals accepted, float64 [9, B, G + 1], which holds ids exactly."""
        verdict = verify(
            rule, tokens, proposer_logits=proposer_rows, judge_logits=judge_rows, lengths=lengths, seeds=seeds, positions=positions, proposer=proposer,
            judge=judge, valid_vocab=self.valid_vocab, backend=self.backend,
        )  # fmt: skip
        emitted, place, count = verdict.tokens(tokens), torch.arange(tokens.shape[1] + 1, device=tokens.device), verdict.num_accepted[:, None]
        source = torch.where(place == count, verdict.next_source[:, None], int(Source.ACCEPTED))
        proposer_logprobs = verdict.proposer_logprobs
        if said is not None:
            said = nn.functional.pad(said, (0, emitted.shape[1] - said.shape[1]), value=math.nan)
            proposer_logprobs = said.masked_fill(place >= count, math.nan)
        nothing = torch.full_like(emitted, math.nan, dtype=torch.float64)
        planes = (emitted, source, verdict.judge_logprobs, proposer_logprobs, verdict.judge_rank, verdict.judge_entropy, nothing)
        return torch.stack([plane.double().expand(emitted.shape) for plane in (*planes, verdict.valid[:, None], count)])

    def end(self, emitted: list[list[int]], stay: list[int]) -> None:
        """Rolls both models back to what was emitted and goes on with the requests `stay`."""
        if not stay:
            return
        for session in (self.proposing, self.judging):
            session.commit(emitted)
            session.select(stay)
        if len(stay) < len(emitted):
            rows = torch.tensor(stay)
            self.seeds = self.seeds[rows]
            self.rule, self.proposer, self.judge = (_settings_at(s, rows) for s in (self.rule, self.proposer, self.judge))


def _merged(drafted: Tensor | None, scored: Tensor | None, members: list[bool]) -> Tensor | None:
    """Rows [B, G, V] of those who drafted and of those who were read."""
    if drafted is None or scored is None:
        return scored if drafted is None else drafted
    rows = torch.tensor([b for b, member in enumerate(members) if member], device=scored.device)
    merged = scored.clone()
    merged[rows, : drafted.shape[1]] = drafted[rows]
    return merged


def _settings_at(settings: Any, rows: Tensor) -> Any:
    """A rule or sampling for some of the requests: its tensors are per request."""
    if not dataclasses.is_dataclass(settings):
        return settings
    fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    own = {name: value[rows.to(value.device)] for name, value in fields.items() if isinstance(value, Tensor) and value.dim() == 1}
    return dataclasses.replace(settings, **own) if own else settings
