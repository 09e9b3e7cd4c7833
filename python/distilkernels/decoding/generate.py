"""``generate``: two causal LMs write together, under an acceptance rule or a gate, and every token is labelled by both.

A round: each request's writer drafts a block, the other model reads it in one forward, the rule keeps a prefix and draws the token after
it, both caches take back the rest. Requests are independent of each other: all noise is a function of a request's seed and of the position
its block starts at, and that position grows with every round, so that no noise is used twice.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..primitives.philox import Stream, checked_per_row
from ..primitives.sample_rows import coin
from .gates import Gate
from .pace import Pace, cost_ratio
from .remote import RemoteProposer, RemoteSession
from .rounds import Request, Rounds
from .rules import Rule
from .sampling import Sampling, checked_sampling
from .session import Session
from .traces import Traces
from .verify import Source


@torch.no_grad()
def generate(
    proposer_model: nn.Module | RemoteProposer, judge_model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, *, rule: Rule | None,
    block_size: int | str = 8, max_new_tokens: int | Sequence[int] | Tensor, seeds: int | Tensor, gate: Gate | None = None,
    eos_token_id: int | Sequence[int] | None, pad_token_id: int | None = None, proposer: Sampling | None = None, judge: Sampling | None = None,
    proposer_input_ids: Tensor | None = None, proposer_attention_mask: Tensor | None = None, valid_vocab: int | None = None,
    callback: Callable[[int, list[int], list[int]], None] | None = None, progress: bool = False, backend: str | None = None,
) -> Traces:  # fmt: skip
    """Continues every prompt with tokens that the proposer suggests and the judge keeps or replaces, or as a gate says.

    Args:
        proposer_model, judge_model: transformers causal LMs in evaluation mode, of any two sizes (one object may be both); their
            vocabularies may differ by padding. Models whose cache cannot be rolled back (recurrent states, sliding windows shorter than the
            run) are refused. The proposer may be a :class:`~.remote.RemoteProposer`, for rules that read the judge alone.
        input_ids, attention_mask: int64 [B, T], left-padded prompts of the judge; None: no padding.
        rule: one of :mod:`.rules`; its tensors, and those of the samplings, have one entry a request. None: a `gate` decides alone.
        block_size: proposals a round, γ. "auto": as many as pay for themselves, at most 16, from the models' sizes and the request's own
            acceptance so far (:class:`.pace.Pace`); the proposer must be local.
        max_new_tokens: an int, or one for each request.
        seeds: 64 bits each: an int, shared by all requests (equal prompts then get equal traces), or int64 [B]. A request's tokens depend
            on its prompt, seed and settings, not on the batch around it, up to the models' own rounding.
        gate: who writes next; see :mod:`.gates`.
        eos_token_id: an id or several; None: only the length ends a request. pad_token_id: default the first of these, or 0.
        proposer, judge: temperature and filters of the two sides.
        proposer_input_ids, proposer_attention_mask: the proposer's own prompts [B, T′] (a privileged teacher, another chat template).
        valid_vocab: ids from it on are never written.
        callback: called after each round as callback(request, new tokens, their sources).
        progress: shows a bar with tokens, tokens a second and the acceptance rate.

    Returns:
        Traces, on the CPU.

    Raises:
        ValueError, TypeError: naming the argument. RemoteError: a server failed. RuntimeError: a gate asks again for what it refused.
    """
    ids, mask = _checked_prompts("input_ids", "attention_mask", input_ids, attention_mask, None)
    b = ids.shape[0]
    if proposer_input_ids is None:
        if proposer_attention_mask is not None:
            raise ValueError("proposer_attention_mask needs proposer_input_ids; got None")
        own_ids, own_mask = ids, mask
    else:
        own_ids, own_mask = _checked_prompts("proposer_input_ids", "proposer_attention_mask", proposer_input_ids, proposer_attention_mask, b)
    limits, eos = _checked_limits(max_new_tokens, b), _checked_eos(eos_token_id)
    seeds = checked_per_row("seeds", seeds.cpu() if isinstance(seeds, Tensor) else seeds, (b,), torch.device("cpu"))
    proposer, judge = checked_sampling("proposer", proposer), checked_sampling("judge", judge)
    if rule is not None and not isinstance(rule, Rule):
        raise TypeError(f"rule must be one of distilkernels.decoding's rules or a subclass of Rule; got {type(rule).__name__}")
    if gate is not None and not hasattr(gate, "lead"):
        raise TypeError(f"gate must be a Gate or None; got {type(gate).__name__}")
    if rule is None and gate is None:
        raise ValueError("rule must be given where no gate decides who writes; got None")
    adapts, remote = block_size == "auto", hasattr(proposer_model, "propose")
    if not adapts and (isinstance(block_size, bool) or not isinstance(block_size, numbers.Integral) or block_size < 1):
        raise ValueError(f'block_size must be an int of at least 1 or "auto"; got {block_size!r}')
    if adapts and remote:
        raise ValueError('block_size must be an int where the proposer is a server, whose cost is not known; got "auto"')
    pad = pad_token_id if pad_token_id is not None else eos[0] if eos else 0
    if not b:
        return _traces([], pad)

    room = max(limits)
    # a round feeds at most two pending tokens and the block; with a gate a model may draft for some requests and read for others
    per_round = (Pace.most if adapts else block_size) + 2 if gate is None else 2 * (room + 2)
    judging = Session("judge_model", judge_model, ids, mask, room, per_round)
    if remote:
        RemoteSession.checked(rule, gate)
        proposing = RemoteSession(proposer_model, own_ids, own_mask)
    else:
        proposing = Session("proposer_model", proposer_model, own_ids, own_mask, room, per_round)
    ratio = cost_ratio(proposer_model, judge_model) if adapts else math.nan
    rounds = Rounds(judging, proposing, rule, gate, seeds, proposer, judge, eos, valid_vocab, backend)

    def lead(i: int) -> Any:
        return gate.lead(lambda position: coin(seeds[i], torch.tensor(position), torch.tensor(0), int(Stream.GATE)).item())

    def block() -> int | Pace:
        return Pace(ratio, rule is not None and rule.bonus is not None) if adapts else block_size

    requests = [Request(i, limit, None if gate is None else lead(i), block()) for i, limit in enumerate(limits)]
    live = requests
    with _Bar(sum(limits)) if progress else contextlib.nullcontext() as bar:
        while live:
            turns = [request.turn() for request in live]
            planes, valid, accepted = rounds.play(live, turns)
            emitted = [request.take(*brought, eos) for request, *brought in zip(live, turns, planes.unbind(1), planes[0].long().tolist(), valid, accepted)]
            if callback is not None or bar is not None:
                for request, tokens in zip(live, emitted):
                    sources = request.labels[-1][1].long().tolist()
                    if callback is not None and sources:
                        callback(request.index, tokens, sources)
                    if bar is not None:
                        bar.add(sources)
            stay = [i for i, request in enumerate(live) if not request.finished]
            rounds.end(emitted, stay)
            live = [live[i] for i in stay]
    return _traces(requests, pad)


def _traces(requests: list[Request], pad: int) -> Traces:
    """Pads what the requests gathered."""
    b, width = len(requests), max((request.position for request in requests), default=0)
    planes = torch.full((6, b, width), math.nan, dtype=torch.float64)
    mask = torch.arange(width) < torch.tensor([request.position for request in requests], dtype=torch.int64)[:, None]
    for i, request in enumerate(requests):
        planes[:, i, : request.position] = torch.cat(request.labels, 1)
    tokens, source, rank = (planes[k].masked_fill(~mask, value).long() for k, value in ((0, pad), (1, int(Source.NONE)), (4, -1)))
    return Traces(tokens, mask, source, planes[2], planes[3], rank, planes[5], tuple(request.finished for request in requests))


class _Bar:
    """Tokens, tokens a second and the acceptance rate."""

    def __init__(self, total: int):
        from tqdm.auto import tqdm

        self.bar, self.counts = tqdm(total=total, unit="tok"), Counter()

    def add(self, sources: list[int]) -> None:
        self.counts.update(sources)
        judged = self.counts[Source.ACCEPTED] + self.counts[Source.FALLBACK] + self.counts[Source.RESIDUAL]
        if judged:
            self.bar.set_postfix(accepted=f"{self.counts[Source.ACCEPTED] / judged:.1%}", refresh=False)
        self.bar.update(len(sources))

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()


def _checked_prompts(ids_name: str, mask_name: str, ids: Any, mask: Any, requests: int | None) -> tuple[Tensor, Tensor]:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{ids_name} must be an int32 or int64 tensor; got {ids.dtype if isinstance(ids, Tensor) else type(ids).__name__}")
    if ids.dim() != 2 or ids.shape[1] == 0 or (requests is not None and ids.shape[0] != requests):
        raise ValueError(f"{ids_name} must have shape [{'B' if requests is None else requests}, T], T ≥ 1; got {tuple(ids.shape)}")
    if mask is None:
        mask = torch.ones_like(ids)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise ValueError(f"{mask_name} must have the shape of {ids_name}, {tuple(ids.shape)}; got {tuple(mask.shape) if isinstance(mask, Tensor) else mask}")
    kept = mask.bool()
    wrong = ~kept[:, -1] | (kept[:, :-1] & ~kept[:, 1:]).any(1)
    if wrong.any():
        raise ValueError(f"{mask_name} must be left-padded, 0 … 0 1 … 1 with a 1 at the end; row {int(wrong.int().argmax())} is not")
    return ids.long(), kept


def _checked_limits(value: Any, requests: int) -> list[int]:
    limits = value.tolist() if isinstance(value, Tensor) else value
    limits = [limits] * requests if isinstance(limits, numbers.Number) else list(limits)
    if len(limits) != requests:
        raise ValueError(f"max_new_tokens must be an int or have one entry a request, {requests}; got {len(limits)}")
    if not all(isinstance(limit, numbers.Integral) and not isinstance(limit, bool) and limit >= 1 for limit in limits):
        raise ValueError(f"max_new_tokens must be at least 1, ints; got {value}")
    return [int(limit) for limit in limits]


def _checked_eos(value: Any) -> list[int]:
    listed = value.tolist() if isinstance(value, Tensor) else value
    listed = [] if listed is None else [listed] if isinstance(listed, numbers.Number) else list(listed)
    if not all(isinstance(token, numbers.Integral) and not isinstance(token, bool) and token >= 0 for token in listed):
        raise ValueError(f"eos_token_id must be a token id, several, or None; got {value}")
    return [int(token) for token in listed]
