"""The benchmark of `verify` at a small vocabulary: its gate passes, and fails for an answer that is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

bench = pytest.importorskip("benchmarks.verify")


class Silent:
    def __getattr__(self, name):
        return lambda *a, **k: None


def test_rows_of_the_table(monkeypatch):
    monkeypatch.setattr(bench, "VOCAB", 257)
    rows = list(bench.bench("cpu", 1, True, Silent()))
    named = {(r["rule"], r["dtype"]) for r in rows}
    assert named == {(w.name, d) for w in bench.WORK for d in ("float32", "bfloat16")}
    assert {r["contender"] for r in rows} == {"ours", "PyTorch", "PyTorch + labels", "transformers", "copy"}


@pytest.mark.parametrize("work", bench.WORK, ids=lambda w: w.name)
def test_the_gate_sees_wrong_answers(monkeypatch, work):
    w = bench.rows_for(6, 257, torch.float32, "cpu", work.sampling)
    honest = bench.decoding.verify

    def wrong(change):
        def changed(*args, **named):
            verdict = honest(*args, **named)
            return dataclasses.replace(verdict, **change(verdict))

        monkeypatch.setattr(bench.decoding, "verify", changed)

    for change in (
        lambda v: {"num_accepted": (v.num_accepted + 1) % 9},
        lambda v: {"next_token": torch.where(v.next_token < 0, v.next_token, (v.next_token + 1) % 257)},
        lambda v: {"judge_logprobs": v.judge_logprobs + 1e-3},
        lambda v: {"judge_rank": v.judge_rank + 1},
        lambda v: {"judge_entropy": v.judge_entropy * 1.01},
    ):
        wrong(change)
        with pytest.raises(AssertionError):
            bench.contenders(work, w)
    monkeypatch.setattr(bench.decoding, "verify", honest)
    bench.contenders(work, w)
