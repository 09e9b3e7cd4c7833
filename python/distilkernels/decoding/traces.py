"""Traces: what ``generate`` wrote, with the labels of every token, their statistics, filters and export."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .verify import Source

LABELS = ("judge_logprobs", "proposer_logprobs", "judge_rank", "judge_entropy")


@dataclass(frozen=True, eq=False)
class TraceStatistics:
    """Per request [B] float64, NaN where there is nothing to average; `total` has the same names over all tokens of all requests.

    ``tokens``: how many. ``surprisal``: mean −log of the judge's probability, nats a token. ``perplexity``: its exponential. ``unlikely``:
    the share of tokens whose judge probability is below `threshold`. ``acceptance_rate`` and ``fallback_rate`` as in :class:`Traces`.
    """

    tokens: Tensor
    surprisal: Tensor
    perplexity: Tensor
    unlikely: Tensor
    acceptance_rate: Tensor
    fallback_rate: Tensor
    total: dict[str, float]


@dataclass(frozen=True, eq=False)
class Traces:
    """New tokens of B requests, right-padded to the longest, on the CPU.

    ``tokens`` int64 [B, L], the end-of-sequence token included; ``mask`` bool [B, L]. Aligned with them: ``source`` int64, a
    :class:`~.verify.Source` (FALLBACK also for what a gate let the judge write, NONE for a gate's own text and padding);
    ``judge_logprobs`` and ``proposer_logprobs`` float64, raw log-probabilities at temperature 1 in nats, ``judge_rank`` int64 in the
    judge's raw row, ``judge_entropy`` float64 of that row. NaN and −1 stand for padding and for what no model said (a proposer has not
    read a bonus token's row). ``finished``: per request "eos", "length", "invalid" (a row that was needed held NaN, +inf or nothing but
    −inf) or "empty" (the rule emitted nothing).
    """

    tokens: Tensor
    mask: Tensor
    source: Tensor
    judge_logprobs: Tensor
    proposer_logprobs: Tensor
    judge_rank: Tensor
    judge_entropy: Tensor
    finished: tuple[str, ...]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def lengths(self) -> Tensor:
        """int64 [B], tokens of each request."""
        return self.mask.sum(1)

    def _counts(self) -> dict[Source, Tensor]:
        return {source: (self.mask & (self.source == source)).sum(1).double() for source in Source}

    @property
    def acceptance_rate(self) -> float:
        """Of the positions at which a proposal was judged, the share that kept one: accepted / (accepted + fallback + residual).

        Bonus tokens were not judged. What a gate let one model write alone counts as accepted (the proposer) or fallback (the judge).
        """
        return self.statistics().total["acceptance_rate"]

    @property
    def fallback_rate(self) -> float:
        """The share of emitted tokens that the judge wrote in the place of a proposal: (fallback + residual) / tokens."""
        return self.statistics().total["fallback_rate"]

    def statistics(self, threshold: float = 0.01) -> TraceStatistics:
        """Per request and in total; `threshold` is the judge probability under which a token is unlikely."""
        counts, tokens = self._counts(), self.lengths.double()
        known = self.mask & ~self.judge_logprobs.isnan()
        sums = {
            "tokens": tokens,
            "known": known.sum(1).double(),
            "surprisal": -self.judge_logprobs.masked_fill(~known, 0.0).sum(1),
            "unlikely": (known & (self.judge_logprobs < math.log(threshold))).sum(1).double(),
            "accepted": counts[Source.ACCEPTED],
            "replaced": counts[Source.FALLBACK] + counts[Source.RESIDUAL],
        }

        def rates(of: dict[str, Tensor]) -> dict[str, Tensor]:
            surprisal = of["surprisal"] / of["known"]
            return {
                "tokens": of["tokens"], "surprisal": surprisal, "perplexity": surprisal.exp(), "unlikely": of["unlikely"] / of["known"],
                "acceptance_rate": of["accepted"] / (of["accepted"] + of["replaced"]), "fallback_rate": of["replaced"] / of["tokens"],
            }  # fmt: skip

        total = {name: value.item() for name, value in rates({name: value.sum() for name, value in sums.items()}).items()}
        return TraceStatistics(**rates(sums), total=total)

    def select(self, indices: Sequence[int] | Tensor) -> Traces:
        """These requests, in this order, padded to the longest of them."""
        chosen = torch.as_tensor(indices)
        if chosen.numel() and (chosen.dim() != 1 or chosen.dtype == torch.bool or chosen.is_floating_point()):
            raise TypeError(f"indices must be a sequence of ints; got {chosen.dtype} of shape {tuple(chosen.shape)}")
        chosen = chosen.long()
        width = int(self.lengths[chosen].max()) if chosen.numel() else 0
        columns = {name: getattr(self, name)[chosen, :width] for name in ("tokens", "mask", "source", *LABELS)}
        return Traces(**columns, finished=tuple(self.finished[i] for i in chosen.tolist()))

    def rows(self, tokenizer: Any = None, prompts: Sequence[Any] | None = None) -> list[dict[str, Any]]:
        """One dict a request, of plain Python values without padding; unknown labels are None.

        Keys: tokens, source (names), the four labels, finished, acceptance_rate, fallback_rate, surprisal, unlikely; text with a
        tokenizer (anything with ``decode(ids) -> str``); prompt where `prompts`, one a request, is given.
        """
        if prompts is not None and len(prompts) != len(self):
            raise ValueError(f"prompts must have one entry a request, {len(self)}; got {len(prompts)}")
        statistics, found = self.statistics(), []
        for b in range(len(self)):
            keep = self.mask[b]
            tokens = self.tokens[b, keep].tolist()
            row: dict[str, Any] = {} if prompts is None else {"prompt": prompts[b].tolist() if isinstance(prompts[b], Tensor) else prompts[b]}
            if tokenizer is not None:
                row["text"] = tokenizer.decode(tokens)
            row |= {"tokens": tokens, "source": [Source(s).name.lower() for s in self.source[b, keep].tolist()]}
            row |= {name: [_known(v) for v in getattr(self, name)[b, keep].tolist()] for name in LABELS}
            row["finished"] = self.finished[b]
            row |= {name: _known(getattr(statistics, name)[b].item()) for name in ("acceptance_rate", "fallback_rate", "surprisal", "unlikely")}
            found.append(row)
        return found

    def to_dataset(self, tokenizer: Any = None, prompts: Sequence[Any] | None = None) -> Any:
        """:meth:`rows` as a ``datasets.Dataset``; without the datasets package the list itself."""
        rows = self.rows(tokenizer, prompts)
        if importlib.util.find_spec("datasets") is None:
            return rows
        import datasets

        return datasets.Dataset.from_list(rows)

    def to_jsonl(self, path: str | Path, tokenizer: Any = None, prompts: Sequence[Any] | None = None) -> None:
        """:meth:`rows`, one JSON object a line."""
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in self.rows(tokenizer, prompts)]
        Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _known(value: float | int) -> float | int | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rsd_filter(
    traces: Traces, *, end_of_thinking: int | str | Sequence[int], checker: Callable[[int, Any], bool] | None = None, groups: Sequence[Any] | None = None,
    max_fallback_rate: float = 0.5, tokenizer: Any = None,
) -> list[int]:  # fmt: skip
    """The traces that RSD (arXiv 2509.22230) trains on: indices for :meth:`Traces.select`, ascending.

    A trace stays if at most `max_fallback_rate` of its tokens were the judge's own, if it has the end-of-thinking marker exactly once,
    and if `checker(index, answer)` is true; of those with the same group the shortest stays (the first of several).

    Args:
        end_of_thinking: a token id, a sequence of ids that stand side by side, or a text (with a tokenizer).
        checker: gets the request's index and what follows the marker: a text with a tokenizer, else a list of ids (a trailing
            end-of-sequence token included). None skips the check.
        groups: one hashable a request, the prompt it answers; default every request its own.
        tokenizer: anything with ``decode(ids) -> str``.
    """
    if isinstance(end_of_thinking, str) and tokenizer is None:
        raise ValueError("tokenizer is needed for an end_of_thinking that is a text; got None")
    marker = [end_of_thinking] if isinstance(end_of_thinking, int) else end_of_thinking
    if len(marker) == 0:
        raise ValueError("end_of_thinking must not be empty")
    if groups is not None and len(groups) != len(traces):
        raise ValueError(f"groups must have one entry a request, {len(traces)}; got {len(groups)}")
    fallback, lengths, shortest = traces.statistics().fallback_rate, traces.lengths.tolist(), {}
    for b, length in enumerate(lengths):
        if length == 0 or fallback[b] > max_fallback_rate:
            continue
        tokens = traces.tokens[b, :length].tolist()
        if isinstance(marker, str):
            parts = tokenizer.decode(tokens).split(marker)
            answer = parts[-1] if len(parts) == 2 else None
        else:
            ids = list(marker)
            places = [i for i in range(length - len(ids) + 1) if tokens[i : i + len(ids)] == ids]
            answer = tokens[places[0] + len(ids) :] if len(places) == 1 else None
            answer = tokenizer.decode(answer) if answer is not None and tokenizer is not None else answer
        if answer is None or (checker is not None and not checker(b, answer)):
            continue
        group = b if groups is None else groups[b]
        if group not in shortest or length < lengths[shortest[group]]:
            shortest[group] = b
    return sorted(shortest.values())
