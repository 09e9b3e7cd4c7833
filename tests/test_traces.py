"""Traces: statistics by hand, filters, export."""

from __future__ import annotations

import json
import math
import sys
import types

import pytest
import torch

from distilkernels.decoding import Source, Traces, rsd_filter
from distilkernels.decoding import traces as module

A, F, R, B, N = (int(s) for s in (Source.ACCEPTED, Source.FALLBACK, Source.RESIDUAL, Source.BONUS, Source.NONE))
NAN = math.nan


def traces_of(tokens, sources, judge=None, proposer=None, finished=None):
    """Right-padded, with log-probabilities of −1 where none are given."""
    width = max((len(row) for row in tokens), default=0)
    pad = lambda rows, value: torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.float64).view(len(tokens), width)
    ones = [[-1.0] * len(row) for row in tokens]
    return Traces(
        tokens=pad(tokens, 0).long(), mask=pad([[True] * len(row) for row in tokens], False).bool(), source=pad(sources, N).long(),
        judge_logprobs=pad(judge or ones, NAN), proposer_logprobs=pad(proposer or ones, NAN),
        judge_rank=pad([[3] * len(row) for row in tokens], -1).long(), judge_entropy=pad(ones, NAN),
        finished=tuple(finished or ["eos"] * len(tokens)),
    )  # fmt: skip


class Letters:
    """Token i is the i-th letter; "/" is 0."""

    def decode(self, ids):
        return "".join("/abcdefghijklmnopqrstuvwxyz"[i] for i in ids)


def test_statistics_by_hand():
    rare = math.log(0.0099)
    traces = traces_of(
        [[1, 2, 3, 4], [5, 6], []],
        [[A, A, F, B], [N, R], []],
        # exactly 1 % is not below it
        judge=[[math.log(0.5), rare, math.log(0.01), math.log(0.25)], [NAN, rare], []],
        finished=["length", "eos", "invalid"],
    )
    found = traces.statistics()
    nan = lambda values: torch.tensor(values, dtype=torch.float64)
    close = lambda a, b: torch.testing.assert_close(a, nan(b), equal_nan=True)
    first = -(math.log(0.5) + rare + math.log(0.01) + math.log(0.25)) / 4
    assert traces.lengths.tolist() == found.tokens.tolist() == [4, 2, 0]
    close(found.surprisal, [first, -rare, NAN])
    close(found.perplexity, [math.exp(first), 1 / 0.0099, NAN])
    close(found.unlikely, [0.25, 1.0, NAN])
    close(found.acceptance_rate, [2 / 3, 0.0, NAN])
    close(found.fallback_rate, [0.25, 0.5, NAN])
    assert found.total["tokens"] == 6
    assert found.total["surprisal"] == pytest.approx((4 * first - rare) / 5)
    assert found.total["unlikely"] == pytest.approx(2 / 5)
    assert traces.acceptance_rate == found.total["acceptance_rate"] == 2 / 4
    assert traces.fallback_rate == 2 / 6
    assert traces.statistics(threshold=0.3).total["unlikely"] == pytest.approx(4 / 5)


def test_padding_is_in_no_statistic():
    traces = traces_of([[1], [1, 2, 3]], [[A], [A, F, A]])
    spoiled = Traces(**{**vars(traces), "judge_logprobs": traces.judge_logprobs.nan_to_num(-99.0), "source": traces.source.masked_fill(~traces.mask, F)})
    assert spoiled.statistics().total == traces.statistics().total


def test_select():
    traces = traces_of([[1], [1, 2, 3], [4, 5]], [[A], [A, F, A], [F, A]], finished=["eos", "length", "invalid"])
    kept = traces.select([2, 0])
    assert kept.tokens.tolist() == [[4, 5], [1, 0]] and kept.mask.tolist() == [[True, True], [True, False]]
    assert kept.source.tolist() == [[F, A], [A, N]] and kept.finished == ("invalid", "eos")
    assert traces.select([]).tokens.shape == (0, 0) and len(traces.select([])) == 0
    with pytest.raises(TypeError, match=r"indices must be a sequence of ints; got torch.bool"):
        traces.select(torch.tensor([True, False, True]))


def test_rows_and_jsonl(tmp_path):
    traces = traces_of([[1, 2, 3], [4]], [[A, F, B], [R]], proposer=[[-0.5, -2.0, NAN], [-1.0]], finished=["length", "eos"])
    prompts = [torch.tensor([9, 8]), torch.tensor([7])]
    rows = traces.rows(Letters(), prompts)
    assert rows[0] == {
        "prompt": [9, 8], "text": "abc", "tokens": [1, 2, 3], "source": ["accepted", "fallback", "bonus"], "judge_logprobs": [-1.0] * 3,
        "proposer_logprobs": [-0.5, -2.0, None], "judge_rank": [3, 3, 3], "judge_entropy": [-1.0] * 3, "finished": "length",
        "acceptance_rate": 0.5, "fallback_rate": 1 / 3, "surprisal": 1.0, "unlikely": 0.0,
    }  # fmt: skip
    assert rows[1]["text"] == "d" and rows[1]["source"] == ["residual"] and rows[1]["prompt"] == [7]
    assert "text" not in traces.rows()[0] and "prompt" not in traces.rows()[0]
    traces.to_jsonl(tmp_path / "traces.jsonl", Letters(), prompts)
    assert [json.loads(line) for line in (tmp_path / "traces.jsonl").read_text().splitlines()] == rows
    with pytest.raises(ValueError, match="prompts must have one entry a request, 2; got 1"):
        traces.rows(prompts=prompts[:1])


def test_to_dataset(monkeypatch):
    traces = traces_of([[1, 2], [4]], [[A, F], [R]])
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert traces.to_dataset(Letters()) == traces.rows(Letters())
    # where the package is there, its own constructor for lists is what is called
    stand_in = types.ModuleType("datasets")
    stand_in.Dataset = types.SimpleNamespace(from_list=lambda rows: ("dataset", rows))
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name == "datasets")
    assert traces.to_dataset() == ("dataset", traces.rows())


def test_the_published_filters():
    end = 26  # "z"
    rows = {
        "kept": ([1, end, 2], [A, A, A]),
        "half fallback is allowed": ([1, end, 2, 3], [F, F, A, A]),
        "too much fallback": ([1, end, 2], [F, F, A]),
        "residual counts as well": ([1, end, 2], [F, R, A]),
        "no marker": ([1, 2, 3], [A, A, A]),
        "two markers": ([1, end, end, 2], [A, A, A, A]),
        "wrong answer": ([1, end, 3], [A, A, A]),
        "empty": ([], []),
        "bonus is no fallback": ([1, end, 2], [B, B, A]),
    }
    traces = traces_of([tokens for tokens, _ in rows.values()], [source for _, source in rows.values()])
    kept = lambda **options: [list(rows)[i] for i in rsd_filter(traces, end_of_thinking=end, **options)]
    good = ["kept", "half fallback is allowed", "bonus is no fallback"]
    assert kept(checker=lambda b, answer: answer[0] == 2) == good
    assert kept() == ["kept", "half fallback is allowed", "wrong answer", "bonus is no fallback"]
    assert kept(checker=lambda b, answer: answer.startswith("b"), tokenizer=Letters()) == good
    assert kept(max_fallback_rate=0.7, checker=lambda b, answer: answer[0] == 2) == [*good[:2], "too much fallback", "residual counts as well", good[2]]
    # the shortest of each prompt, the first of the shortest
    groups = ["p", "p", "q", "q", "q", "q", "q", "q", "p"]
    assert kept(groups=groups) == ["kept", "wrong answer"]
    assert kept(groups=[*groups[:-1], "q"], checker=lambda b, answer: b not in (0, 6)) == ["half fallback is allowed", "bonus is no fallback"]
    assert [list(rows)[i] for i in rsd_filter(traces, end_of_thinking="z", tokenizer=Letters(), checker=lambda b, answer: answer[:1] == "b")] == good


def test_markers_of_several_tokens():
    traces = traces_of([[7, 8, 1], [7, 7, 8], [7, 8, 7, 8], [8, 7], [8]], [[A] * 3, [A] * 3, [A] * 4, [A] * 2, [A]])
    assert rsd_filter(traces, end_of_thinking=(7, 8)) == [0, 1]
    seen = {}
    rsd_filter(traces, end_of_thinking=(7, 8), checker=lambda b, answer: seen.setdefault(b, answer))
    assert seen == {0: [1], 1: []}
    for bad, message in (("gh", "tokenizer is needed"), ((), "end_of_thinking must not be empty")):
        with pytest.raises(ValueError, match=message):
            rsd_filter(traces, end_of_thinking=bad)
    with pytest.raises(ValueError, match="groups must have one entry a request, 5; got 1"):
        rsd_filter(traces, end_of_thinking=7, groups=[1])
