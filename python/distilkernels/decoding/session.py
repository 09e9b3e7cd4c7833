"""One model's side of ``generate``: what it has read of each request, what it drafts, scores, and takes back.

All requests share one axis of cache slots; which slots count for a request is a mask. Every token lives in a slot that is masked for
the requests that did not feed it, positions are counted per request, and a rejected token is a slot whose mask is cleared. Slots that
no request uses any more are cropped, and the rest is regathered once a quarter of the longest request's axis is waste.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .caches import checked_model, crop, new_cache, regather, unwrapped
from .sampling import Sampling, sample


class Draw(NamedTuple):
    """How tokens of a block are drawn: ``seeds`` and ``positions`` (the block's start) int64 [B] on the CPU, ``columns`` of the vocabulary."""

    sampling: Sampling
    seeds: Tensor
    positions: Tensor
    stream: int
    columns: int
    backend: str | None


class Draft(NamedTuple):
    """``tokens`` int64 [B, G], −1 beyond a request's own count. ``logits`` [B, G, V], the rows they were drawn from, or None for a
    model that does not show them; then ``logprobs`` float64 [B, G] is what it says of its tokens."""

    tokens: Tensor
    logits: Tensor | None
    logprobs: Tensor | None


class Session:
    """A causal LM with a KV cache and a rollback per request.

    Args:
        name: the argument that errors are about.
        input_ids, attention_mask: int64 [B, T], left-padded prompts.
        room: tokens a request may get after its prompt. per_round: slots that one round may take.
    """

    slack = 64  # slots of waste that are never worth a copy of the cache

    def __init__(self, name: str, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, room: int, per_round: int):
        checked_model(name, model)
        self.name, self.model, self.device = name, model, model.device
        head = unwrapped(model).get_output_embeddings()
        self.columns = unwrapped(model).config.get_text_config(decoder=True).vocab_size if head is None else head.weight.shape[0]
        self.keeps_rows = "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters
        known = unwrapped(model).get_input_embeddings().weight.shape[0]
        outside = attention_mask.bool() & ((input_ids < 0) | (input_ids >= known))
        if outside.any():
            raise ValueError(f"the prompts of {name} must have ids in [0, {known}), the rows of its embedding; got {int(input_ids[outside][0])}")
        self.per_round, self.capacity = per_round, input_ids.shape[1] + room + per_round
        self.cache = new_cache(name, model, self.capacity)
        b = input_ids.shape[0]
        self.mask = torch.zeros(b, 0, dtype=torch.bool, device=self.device)
        self.last = input_ids[:, -1].tolist()
        # the tokens of each request that the cache does not hold yet, never none: the next row is read after the last of them
        self.pending = [[token] for token in self.last]
        # in this round: the slot after the pending tokens, and how many tokens of the block were fed from there
        self.start, self.fed = [0] * b, [0] * b
        if input_ids.shape[1] > 1:
            self._forward(input_ids[:, :-1].to(self.device), attention_mask[:, :-1].to(self.device).bool(), 1)

    @property
    def slots(self) -> int:
        return self.mask.shape[1]

    def _forward(self, tokens: Tensor, real: Tensor, rows: int) -> Tensor:
        """Feeds [B, n] tokens, those of `real`, into the next n slots; the logits of the last `rows`, [B, rows, V]."""
        positions = (self.mask.sum(1, keepdim=True) + real.long().cumsum(1) - 1).clamp(min=0)
        self.mask = torch.cat([self.mask, real], 1)
        wanted: dict[str, Any] = {"logits_to_keep": rows} if self.keeps_rows else {}
        out = self.model(
            input_ids=tokens.masked_fill(~real, 0), attention_mask=self.mask.long(), position_ids=positions, past_key_values=self.cache,
            use_cache=True, **wanted,
        )  # fmt: skip
        if out.past_key_values is not self.cache or out.logits.shape[2] != self.columns:
            raise ValueError(
                f"{self.name} must fill the cache it is given and have one logit per row of its output embedding, {self.columns}; "
                f"{type(unwrapped(self.model)).__name__} returned {type(out.past_key_values).__name__} and {out.logits.shape[2]}"
            )
        return out.logits[:, -rows:]

    def _pending(self, members: list[bool]) -> tuple[Tensor, Tensor]:
        """Pending tokens of the members, right-aligned [B, P], and which of the entries are real."""
        width = max(len(tokens) for tokens, member in zip(self.pending, members) if member)
        padded = [[0] * (width - len(tokens)) + tokens if member else [0] * width for tokens, member in zip(self.pending, members)]
        real = [[member and i >= width - len(tokens) for i in range(width)] for tokens, member in zip(self.pending, members)]
        return torch.tensor(padded, device=self.device), torch.tensor(real, device=self.device)

    def draft(self, members: list[bool], counts: list[int], draw: Draw) -> Draft:
        """`counts[b]` tokens of each member, drawn one after the other; the last of them is not fed."""
        width = max(count for count, member in zip(counts, members) if member)
        wanted = torch.tensor([count if member else 0 for count, member in zip(counts, members)], device=self.device)
        seeds, positions = draw.seeds.to(self.device), draw.positions.to(self.device)
        tokens, real = self._pending(members)
        drafted, rows = [], None
        for i in range(width):
            logits = self._forward(tokens, real, 1)[:, 0]
            if i == 0:
                self._started(members, [count - 1 for count in counts], self.slots)
                rows = logits[:, None] if width == 1 else logits.new_empty(logits.shape[0], width, logits.shape[1])
            if width > 1:
                rows[:, i] = logits
            token, _ = sample(
                logits, seeds=seeds, positions=positions, offsets=torch.full_like(positions, i), sampling=draw.sampling, stream=draw.stream,
                valid_vocab=draw.columns if draw.columns < self.columns else None, backend=draw.backend,
            )  # fmt: skip
            drafted.append(token.masked_fill(i >= wanted, -1))
            tokens, real = token.clamp(min=0)[:, None], (i + 1 < wanted)[:, None]
        return Draft(torch.stack(drafted, 1), rows, None)

    def score(self, members: list[bool], counts: list[int], tokens: Tensor, extra: bool) -> Tensor:
        """The rows [B, G, V] that tokens [B, G] are judged by, each conditioned on those before it; with `extra` one more after the last."""
        width = tokens.shape[1] if extra else tokens.shape[1] - 1
        fed = [min(count, width) for count in counts]
        pending, real = self._pending(members)
        wanted = torch.tensor([n if member else 0 for n, member in zip(fed, members)], device=self.device)
        block = tokens[:, :width].to(self.device).clamp(0, self.columns - 1)
        fresh = torch.arange(width, device=self.device) < wanted[:, None]
        logits = self._forward(torch.cat([pending, block], 1), torch.cat([real, fresh], 1), width + 1)
        self._started(members, fed, self.slots - width)
        return logits

    def _started(self, members: list[bool], fed: list[int], slot: int) -> None:
        for b, member in enumerate(members):
            if member:
                self.start[b], self.fed[b] = slot, fed[b]

    def commit(self, emitted: list[list[int]]) -> None:
        """Ends a round: request b goes on with `emitted[b]`, all but the last of which are its block's own; the rest is taken back."""
        ends = []
        for b, tokens in enumerate(emitted):
            # of the block, what stays in the cache; one token at least is left to feed, be it the one before the block
            valid = min(self.fed[b], len(tokens) - 1)
            ends.append(self.start[b] + valid)
            sequence = [self.last[b], *tokens]
            self.pending[b], self.last[b] = sequence[valid + 1 :], sequence[-1]
        slots = max(ends)
        if slots < self.slots:
            crop(self.cache, slots)
        end = torch.tensor(ends, device=self.device)
        self.mask = self.mask[:, :slots] & (torch.arange(slots, device=self.device) < end[:, None])

    def select(self, rows: list[int]) -> None:
        """Goes on with these requests only, and regathers the slots where too many of them are waste."""
        used = int(self.mask[rows].sum(1).max())
        everyone = len(rows) == len(self.pending)
        if everyone and self.slots <= 1.25 * used + self.slack and self.slots + self.per_round <= self.capacity:
            return
        chosen = torch.tensor(rows, device=self.device)
        mask = self.mask[chosen]
        # the used slots of each request, in order, behind as many unused ones as it takes
        index = mask.int().argsort(dim=1, stable=True)[:, self.slots - used :]
        regather(self.cache, chosen, index)
        self.mask = mask.gather(1, index)
        self.pending, self.last = [self.pending[b] for b in rows], [self.last[b] for b in rows]
        self.start, self.fed = [0] * len(rows), [0] * len(rows)
