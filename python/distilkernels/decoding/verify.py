"""``verify``: one block of proposals against a judge's rows, under any rule, with the labels a trainer needs.

Whatever the rule, the block length and the batch: one read of the judge's rows for the labels, the ranks and (unfiltered) the
law; one more per side that is filtered; one read of the proposer's rows; one row per request for the draw. Nothing waits for
the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from ..primitives.boundary import rows_of
from ..primitives.head import Head
from ..primitives.philox import Stream, checked_per_row
from ..primitives.sample_rows import Drawn, Noise, coin, drawn, mass
from ..primitives.vocab_stats import checked_logits, presented, statistics
from .block import Block, Side
from .rules import Rule
from .sampling import Sampling, checked_sampling, law_of, plain_law


class Source(IntEnum):
    """Where an emitted token comes from."""

    NONE = -1
    ACCEPTED = 0
    FALLBACK = 1
    RESIDUAL = 2
    BONUS = 3


@dataclass(frozen=True, eq=False)
class Verdict:
    """What became of a block. A request emits its first `num_accepted` proposals, then `next_token` where that is not −1.

    ``valid`` bool [B]: False where a row it needed held NaN, +inf or nothing but −inf; it then emits what was accepted before.
    ``num_accepted`` int64 [B]. ``next_token`` int64 [B], −1 = none. ``next_source`` int64 [B]: a :class:`Source`. ``accepted`` bool [B, G].
    Labels of the token emitted at i, [B, G + 1], NaN or −1 where none is: ``judge_logprobs`` and ``proposer_logprobs`` (raw, at
    temperature 1; float32, float64 for float64 logits; a bonus has no proposer's), ``judge_rank`` int64 (raw), ``judge_entropy`` of the
    judge's raw row.
    """

    valid: Tensor
    num_accepted: Tensor
    next_token: Tensor
    next_source: Tensor
    accepted: Tensor
    judge_logprobs: Tensor
    proposer_logprobs: Tensor
    judge_rank: Tensor
    judge_entropy: Tensor

    def tokens(self, proposals: Tensor) -> Tensor:
        """What is emitted, int64 [B, G + 1], −1 behind it."""
        g = proposals.shape[1]
        place = torch.arange(g + 1, device=proposals.device)
        kept = torch.nn.functional.pad(proposals.long(), (0, 1), value=-1).masked_fill(place >= self.num_accepted[:, None], -1)
        return torch.where(place == self.num_accepted[:, None], self.next_token[:, None], kept)


@torch.no_grad()
def verify(
    rule: Rule,
    proposals: Tensor,
    *,
    proposer_logits: Tensor | None = None,
    judge_logits: Tensor,
    lengths: Tensor | None = None,
    seeds: int | Tensor,
    positions: Tensor,
    proposer: Sampling | None = None,
    judge: Sampling | None = None,
    valid_vocab: int | None = None,
    backend: str | None = None,
) -> Verdict:
    """Accepts a prefix of each request's proposals under `rule` and draws the token that follows it.

    Args:
        rule: one of :mod:`.rules`, or a :class:`Rule` of one's own.
        proposals: int32 or int64 [B, G]; −1, and ids that one side lacks, are rejected and followed by a draw from Q.
        proposer_logits: [B, G, Vp], the rows the proposals were drawn from. Needed by rules that compare with P, and for
            `proposer_logprobs`.
        judge_logits: [B, G, V], or [B, G + 1, V] for rules with a bonus; row i is conditioned on the prompt and proposals before i.
            A bonus comes from row lengths[b], so with G rows only shorter requests have one.
        lengths: int64 [B], how many proposals each request has; default G. Rows and proposals behind them may hold anything. Out of
            [0, G] is an error on a CPU, and the nearest bound elsewhere.
        seeds: 64 bits each: an int or int64 [B]. positions: int64 [B], where the block starts in its sequence: the same block with
            the same seed and position has the same outcome in any batch.
        proposer, judge: temperature and filters of the two sides: P and Q are the laws after them. The proposals must have been drawn
            with ``rule.proposer_sampling(proposer)``.
        valid_vocab: columns from it on do not exist, on either side.

    Returns:
        Verdict. Where the sides' widths differ, P, Q and all draws are over the ids that both have, renormalised; labels are under
        each side's whole row.

    Raises:
        ValueError, TypeError: naming the argument. BackendError: `backend` cannot serve these tensors.
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be one of distilkernels.decoding's rules or a subclass of Rule; got {type(rule).__name__}")
    proposer, judge = checked_sampling("proposer", proposer), checked_sampling("judge", judge)
    ids, b, g = _checked_shapes(rule, proposals, proposer_logits, judge_logits)
    device, r = judge_logits.device, judge_logits.shape[1]
    widths = [t.shape[2] for t in (judge_logits, proposer_logits) if t is not None]
    Head.checked(max(widths), valid_vocab=valid_vocab)
    # each side's own columns, then those that both have
    judged_columns, proposed_columns = (min(width, valid_vocab or width) for width in (widths[0], widths[-1]))
    columns = min(judged_columns, proposed_columns)
    seeds, positions = (checked_per_row(name, value, (b,), device) for name, value in (("seeds", seeds), ("positions", positions)))
    lengths = torch.full((b,), g, device=device) if lengths is None else _checked_lengths(lengths, b, g, device)

    if not r:
        return _nothing(b, device, judge_logits.dtype)

    place = torch.arange(g, device=device)
    known = (place < lengths[:, None]) & (ids >= 0) & (ids < columns)
    present = known.long().cumprod(1).bool()
    count = present.sum(1)
    asked = torch.where(present, ids, -1)

    rows = rows_of(judge_logits)
    raw = _raw_statistics(rows, torch.nn.functional.pad(asked, (0, r - g), value=-1), judged_columns, backend)
    law = plain_law(raw, rows) if judge.plain and columns == judged_columns else law_of(rows, columns, judge, b, backend)
    law = law.view(b, r)
    drawing = rule.judge_sampling(judge)
    fallback = law if drawing is judge else law_of(rows, columns, drawing, b, backend).view(b, r)
    proposed = y = proposer_lse = None
    if proposer_logits is not None:
        p_rows = rows_of(proposer_logits)
        p_raw = _raw_statistics(p_rows, asked, proposed_columns, backend, ranks=False)
        y, proposer_lse = p_raw["gathered"].view(b, g), p_raw["lse"].view(b, g)
        if rule.needs_proposer:
            proposed = Side(p_rows, law_of(p_rows, columns, rule.proposer_sampling(proposer), b, backend).view(b, g))

    # a row without a law ends its request before it: nothing there can be accepted or drawn
    broken = law.lse.isnan() | fallback.lse.isnan()
    unproposed = torch.zeros_like(broken) if proposed is None else torch.nn.functional.pad(proposed.law.lse.isnan(), (0, r - g))
    present = present & (~(broken | unproposed)[:, :g]).long().cumprod(1).bool()
    sound = present.sum(1)

    x = raw["gathered"].view(b, r)[:, :g]
    here = law.at((slice(None), slice(0, g)))
    block = Block(
        ids=asked.clamp(min=0), present=present, lengths=sound, logits=x, rank=raw["rank"].view(b, r)[:, :g], log_q=here.logprob(x, asked),
        log_p=None if proposed is None else proposed.law.logprob(y, asked),
        uniforms=coin(seeds[:, None], positions[:, None], place, int(Stream.ACCEPTANCE)),
        judge=Side(rows, law), proposer=proposed, fallback=fallback, columns=columns, backend=backend,
    )  # fmt: skip
    accepted = rule.length(block)

    finished = (accepted == count) & (count == lengths)
    absent = (accepted == count) & ~finished  # the next proposal is one that cannot be judged: a draw from Q, not the residual
    has_row = accepted < r
    drawn_here = has_row & (~finished if rule.bonus is None else torch.ones_like(finished))
    row = accepted.clamp(max=r - 1)
    # P is not asked for behind the last proposal, nor where there is none to compare
    needed = broken | (unproposed & (~finished & ~absent)[:, None])
    valid = ~(drawn_here & needed.gather(1, row[:, None])[:, 0])
    draws = drawn_here & valid
    found, source = _next(rule, block, fallback, row, draws, finished, absent, Noise(seeds, positions, accepted, int(Stream.FALLBACK)), judged_columns)

    token = found.token
    next_rows = row[:, None]
    next_logprob = found.value.double() - raw["lse"].view(b, r).gather(1, next_rows)[:, 0]
    entropy = (raw["lse"] - raw["expected_logit"]).view(b, r)
    kept = torch.arange(g + 1, device=device) < accepted[:, None]
    at_next = (torch.arange(g + 1, device=device) == accepted[:, None]) & (token >= 0)[:, None]
    dtype = judge_logits.dtype

    def label(accepted_values: Tensor, next_values: Tensor, nothing) -> Tensor:
        wide = torch.nn.functional.pad(accepted_values, (0, g + 1 - accepted_values.shape[1]), value=nothing)
        return torch.where(at_next, next_values[:, None], wide.masked_fill(~kept, nothing))

    proposer_labels = torch.full((b, g + 1), math.nan, dtype=torch.float64, device=device)
    if proposer_logits is not None and g:
        safe = accepted.clamp(max=g - 1)
        z = proposer_logits[torch.arange(b, device=device), safe, token.clamp(0, proposer_logits.shape[2] - 1)].double()
        missing = finished | (token < 0) | (token >= proposed_columns)
        after = (z - proposer_lse.gather(1, safe[:, None])[:, 0]).masked_fill(missing, math.nan)
        proposer_labels = label(y.double() - proposer_lse, after, math.nan)
    return Verdict(
        valid=valid, num_accepted=accepted, next_token=token, next_source=torch.where(token < 0, int(Source.NONE), source), accepted=kept[:, :g],
        judge_logprobs=presented(label(x.double() - raw["lse"].view(b, r)[:, :g], next_logprob, math.nan), dtype),
        proposer_logprobs=presented(proposer_labels, dtype),
        judge_rank=label(block.rank, found.rank, -1),
        judge_entropy=presented(label(entropy[:, :g], entropy.gather(1, next_rows)[:, 0], math.nan), dtype),
    )  # fmt: skip


def _nothing(b: int, device: torch.device, dtype: torch.dtype) -> Verdict:
    """No proposals and no row to draw from."""
    none = torch.full((b,), -1, device=device)
    labels = presented(torch.full((b, 1), math.nan, dtype=torch.float64, device=device), dtype)
    return Verdict(
        valid=none < 0, num_accepted=torch.zeros_like(none), next_token=none, next_source=torch.full_like(none, int(Source.NONE)),
        accepted=torch.zeros(b, 0, dtype=torch.bool, device=device), judge_logprobs=labels, proposer_logprobs=labels.clone(),
        judge_rank=none[:, None].clone(), judge_entropy=labels.clone(),
    )  # fmt: skip


def _next(
    rule: Rule, block: Block, fallback, row: Tensor, draws: Tensor, finished: Tensor, absent: Tensor, noise: Noise, vocab: int
) -> tuple[Drawn, Tensor]:
    """(the token after the accepted ones, its source) for every request of `draws`."""
    rejected = ~finished & ~absent
    at_rejection = rule.at_rejection if block.ids.shape[1] else "draw"
    place = torch.arange(row.shape[0], device=row.device), row
    law = fallback.at(place)
    # an argmax is a draw at temperature 0
    cold = torch.where(finished, rule.bonus == "argmax", at_rejection == "argmax")
    law = law._replace(temperature=torch.where(cold, 0.0, law.temperature))
    source = torch.where(finished, int(Source.BONUS), int(Source.FALLBACK))
    options = {"vocab": vocab, "backend": block.backend}
    rows = torch.where(draws, row, -1)
    if at_rejection == "residual":
        compared = torch.where(draws & rejected, row, -1)
        found = drawn(
            block.judge.operand(rows, law), noise, block.columns, second=block.proposer.operand(compared), scale=rule.scale(block, noise.offsets),
            mode="residual", **options,
        )  # fmt: skip
        return found, torch.where(found.compared, int(Source.RESIDUAL), source)
    if at_rejection != "retry":
        return drawn(block.judge.operand(rows, law), noise, block.columns, **options), source

    # trials 2 … T at once: a coin against their joint failure, and one draw from the part of the pool that passes
    tried = torch.where(draws & rejected, row, -1)
    pool, gate = block.proposer.operand(tried), block.judge.operand(tried)
    gate = gate._replace(law=gate.law._replace(bar=rule.passing(block)[place]))
    share = mass(pool, block.columns, second=gate, mode="gate", backend=block.backend).clamp(0, 1)
    success = -torch.expm1((rule.trials - 1) * torch.log1p(-share))
    won = (tried >= 0) & (coin(noise.seeds, noise.positions, noise.offsets, int(Stream.RETRY_COIN)) < success)
    pool, gate = (o._replace(rows=torch.where(won, o.rows, -1)) for o in (pool, gate))
    retried = drawn(pool, noise._replace(stream=int(Stream.RETRY_DRAW)), block.columns, second=gate, mode="gate", **options)
    found = drawn(block.judge.operand(torch.where(won, -1, rows), law), noise, block.columns, **options)
    both = Drawn(*(torch.where(won, theirs.to(mine.dtype), mine) for mine, theirs in zip(found, retried)))
    return both, torch.where(won, int(Source.ACCEPTED), source)


def _raw_statistics(rows: Tensor, ids: Tensor, columns: int, backend: str | None, ranks: bool = True) -> dict[str, Tensor]:
    """Labels at temperature 1 from one read: of rows [O, I, V] at ids [B, R]."""
    names = ("lse", "gathered", "expected_logit", "argmax", "rank") if ranks else ("lse", "gathered")
    head = Head(valid_vocab=None if columns == rows.shape[2] else columns)
    found = statistics(rows, ids.reshape(-1, 1).contiguous(), None, names, head, backend)
    return found | {"lse": found["lse"].masked_fill(~found["lse"].isfinite(), math.nan)}


def _checked_lengths(lengths, b: int, g: int, device: torch.device) -> Tensor:
    lengths = checked_per_row("lengths", lengths, (b,), device)
    if device.type == "cpu" and b:
        low, high = (int(v) for v in lengths.aminmax())
        if low < 0 or high > g:
            raise ValueError(f"lengths must be in [0, {g}], the number of proposals; got {low if low < 0 else high}")
    return lengths.clamp(0, g)


def _checked_shapes(rule: Rule, proposals: Tensor, proposer_logits: Tensor | None, judge_logits: Tensor) -> tuple[Tensor, int, int]:
    if not isinstance(proposals, Tensor) or proposals.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"proposals must be an int32 or int64 tensor; got {proposals.dtype if isinstance(proposals, Tensor) else type(proposals).__name__}")
    if proposals.dim() != 2:
        raise ValueError(f"proposals must have shape [B, G]; got {tuple(proposals.shape)}")
    b, g = proposals.shape
    checked_logits(judge_logits, "judge_logits")
    if judge_logits.dim() != 3 or judge_logits.shape[0] != b or judge_logits.shape[1] not in (g, g + 1):
        raise ValueError(f"judge_logits must have shape ({b}, {g} or {g + 1}, V) to match proposals; got {tuple(judge_logits.shape)}")
    if proposer_logits is not None:
        checked_logits(proposer_logits, "proposer_logits")
        if proposer_logits.dim() != 3 or tuple(proposer_logits.shape[:2]) != (b, g):
            raise ValueError(f"proposer_logits must have shape ({b}, {g}, V) to match proposals; got {tuple(proposer_logits.shape)}")
    elif rule.needs_proposer:
        raise ValueError(f"{type(rule).__name__} compares with the proposer's law: proposer_logits is needed; got None")
    for name, t in (("proposals", proposals), ("proposer_logits", proposer_logits)):
        if t is not None and t.device != judge_logits.device:
            raise ValueError(f"{name} must be on {judge_logits.device}, where judge_logits is; got {t.device}")
    return proposals.long(), b, g
