"""``verify``: one block of proposals against a judge's rows, under any rule, with the labels a trainer needs.

Whatever the block length and the batch: one read of each side's rows for the labels, the ranks and (unfiltered) the laws; one more of a
filtered side where the rule judges by its law; one row per request for the draw. Block verification compares the rows once more. Nothing
waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from ..primitives.boundary import rows_of
from ..primitives.filter_rows import Filtered
from ..primitives.head import Head
from ..primitives.philox import Stream, checked_per_row
from ..primitives.sample_rows import Drawn, Noise, coin, drawn, mass
from ..primitives.vocab_stats import checked_logits, presented
from .block import Block, Side, among_all
from .rules import Rule
from .sampling import PLAIN_LAW, Sampling, checked_sampling, plain_law, raw_statistics


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
    lengths = None if lengths is None else _checked_lengths(lengths, b, g, device)

    if not r:
        return _nothing(b, device, judge_logits.dtype)

    place = torch.arange(g + 1, device=device)
    gone = (ids < 0) | (ids >= columns)
    if lengths is not None:
        gone = gone | (place[:g] >= lengths[:, None])
    gone = gone.cumsum(1) > 0
    asked = ids.masked_fill(gone, -1)

    rows, own = rows_of(judge_logits), judge.plain and columns == judged_columns
    wanted = ("gathered", "rank", *PLAIN_LAW, *(("mass_above",) if rule.needs_mass and own else ()))
    raw = raw_statistics(rows, asked if r == g else torch.nn.functional.pad(asked, (0, 1), value=-1), judged_columns, wanted, backend)
    side = Side(rows, raw["gathered"][:, :g], plain_law(raw, rows) if own else None, judge, columns, (b, r), backend)
    drawing = rule.judge_sampling(judge)
    fallback = side if drawing is judge else replace(side, plain=None, sampling=drawing)
    p_raw = proposed = None
    if proposer_logits is not None:
        p_rows, proposing, p_shared = rows_of(proposer_logits), rule.proposer_sampling(proposer), columns == proposed_columns
        p_own = rule.needs_proposer and proposing.plain and p_shared
        p_raw = raw_statistics(p_rows, asked, proposed_columns, ("gathered", *(PLAIN_LAW if p_own else ("lse",))), backend)
        if rule.needs_proposer:
            proposed = Side(p_rows, p_raw["gathered"], plain_law(p_raw, p_rows) if p_own else None, proposing, columns, (b, g), backend)

    # a row without a law ends its request before it: nothing there can be accepted or drawn. Filters leave something of every row, but
    # of the columns that both sides have there may be none
    broken = (raw["lse"] if columns == judged_columns else side.law.lse).isnan()
    unproposed = None if proposed is None else (p_raw["lse"] if p_shared else proposed.law.lse).isnan()
    stopped = gone | broken[:, :g]
    stopped = (stopped if unproposed is None else stopped | unproposed).cumsum(1) > 0
    block = Block(
        ids=asked.clamp(min=0), present=~stopped, rank=raw["rank"][:, :g], mass_above=raw["mass_above"][:, :g] if "mass_above" in raw else None,
        judge=side, proposer=proposed, fallback=fallback, columns=columns, seeds=seeds, positions=positions, backend=backend,
    )  # fmt: skip
    accepted = rule.length(block)

    # neither finished nor rejected: the next proposal is one that cannot be judged, which gives a draw from Q, not the residual
    finished, rejected = accepted == (g if lengths is None else lengths), accepted < g - gone.sum(1)
    row = among_all(accepted if r > g else accepted.clamp(max=r - 1), r)
    p_row = among_all(accepted.clamp(max=g - 1), g) if g and p_raw is not None else None
    draws = ~finished if rule.bonus is None else accepted < r
    # P is not asked for behind the last proposal, nor where there is none to compare
    needed = broken.take(row) if unproposed is None or not g else broken.take(row) | (unproposed.take(p_row) & rejected)
    valid = ~(draws & needed)
    after = After(row, p_row, draws & valid, finished, rejected, Noise(seeds, positions, accepted, int(Stream.FALLBACK)))
    found, source = drawn_after(rule, block, after, judged_columns)

    token = found.token
    none = token < 0
    entropy = raw["lse"] - raw["expected_logit"]
    labels = torch.full((3, b, g + 1), math.nan, dtype=entropy.dtype, device=device)
    at_next = labels.new_full((3, b), math.nan)
    # without a token found.value is NaN
    labels[0, :, :r], at_next[0] = raw["gathered"] - raw["lse"], found.value - raw["lse"].take(row)
    labels[1, :, :r], at_next[1] = entropy, entropy.take(row).masked_fill(none, math.nan)
    if p_raw is not None and g:
        labels[2, :, :g] = p_raw["gathered"] - p_raw["lse"]
        z = proposer_logits[torch.arange(b, device=device), accepted.clamp(max=g - 1), token.clamp(0, proposer_logits.shape[2] - 1)]
        at_next[2] = (z - p_raw["lse"].take(p_row)).masked_fill(finished | none | (token >= proposed_columns), math.nan)
    behind = place >= accepted[:, None]
    rank = torch.where(behind, -1, raw["rank"] if r > g else torch.nn.functional.pad(raw["rank"], (0, 1)))
    labels = labels.masked_fill_(behind, math.nan).scatter_(2, accepted.expand(3, b)[..., None], at_next[..., None])
    labels = presented(labels, judge_logits.dtype)
    return Verdict(
        valid=valid, num_accepted=accepted, next_token=token, next_source=source.masked_fill(none, int(Source.NONE)), accepted=~behind[:, :g],
        judge_logprobs=labels[0], proposer_logprobs=labels[2], judge_rank=rank.scatter_(1, accepted[:, None], found.rank[:, None]),
        judge_entropy=labels[1],
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


class After(NamedTuple):
    """The row after the accepted proposals, [B]: ``row`` among all of the judge's rows and ``p_row`` of the proposer's, whether a token is
    drawn from it, whether all proposals were accepted or one rejected, and the draw's noise."""

    row: Tensor
    p_row: Tensor | None
    draws: Tensor
    finished: Tensor
    rejected: Tensor
    noise: Noise


def drawn_after(rule: Rule, block: Block, after: After, vocab: int) -> tuple[Drawn, Tensor]:
    """(the token after the accepted ones, its source) for every request that draws one."""
    noise, finished = after.noise, after.finished
    at_rejection = rule.at_rejection if block.ids.shape[1] else "draw"
    law = block.fallback.law_at(after.row)
    # an argmax is a draw at temperature 0
    if "argmax" in (at_rejection, rule.bonus):
        cold = torch.where(finished, rule.bonus == "argmax", at_rejection == "argmax")
        law = Filtered(*law)._replace(temperature=law.temperature.masked_fill(cold, 0))
    source = torch.full_like(after.row, int(Source.FALLBACK))
    if rule.bonus is not None:
        source.masked_fill_(finished, int(Source.BONUS))
    options = {"vocab": vocab, "backend": block.backend}
    first = block.judge.operand(after.row, ~after.draws, law)
    if at_rejection == "residual":
        second = block.proposer.operand(after.p_row, ~(after.draws & after.rejected), block.proposer.law_at(after.p_row))
        found = drawn(first, noise, block.columns, second=second, scale=rule.scale(block, noise.offsets), mode="residual", **options)
        return found, source.masked_fill_(found.compared, int(Source.RESIDUAL))
    if at_rejection != "retry":
        return drawn(first, noise, block.columns, **options), source

    # trials 2 … T at once: a coin against their joint failure, and one draw from the part of the pool that passes
    untried = ~(after.draws & after.rejected)
    pool = block.proposer.operand(after.p_row, untried, block.proposer.law_at(after.p_row))
    judged = block.judge.law_at(after.row)
    bar = rule.bar(block, judged, None if rule.judge_top_k is None else law)
    gate = block.judge.operand(after.row, untried, Filtered(*judged)._replace(bar=bar))
    share = mass(pool, block.columns, second=gate, mode="gate", backend=block.backend).clamp(0, 1)
    success = -torch.expm1((rule.trials - 1) * torch.log1p(-share))
    won = ~untried & (coin(noise.seeds, noise.positions, noise.offsets, int(Stream.RETRY_COIN), block.backend) < success)
    pool, gate = (o._replace(rows=o.rows.masked_fill(~won, -1)) for o in (pool, gate))
    retried = drawn(pool, noise._replace(stream=int(Stream.RETRY_DRAW)), block.columns, second=gate, mode="gate", **options)
    found = drawn(first._replace(rows=first.rows.masked_fill(won, -1)), noise, block.columns, **options)
    both = Drawn(*(torch.where(won, theirs.to(mine.dtype), mine) for mine, theirs in zip(found, retried)))
    return both, source.masked_fill_(won, int(Source.ACCEPTED))


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
