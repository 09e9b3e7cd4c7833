"""The suite ``generate`` of the benchmarks on tiny models: its gate, its bound, its loop, and that every contender writes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from benchmarks import generate as suite
from tiny_models import disturbed, prompts, tiny

from distilkernels import decoding


@pytest.fixture(scope="module")
def pair():
    student = tiny(seed=3, bos_token_id=0, eos_token_id=0)
    ids, _ = prompts((suite.PROMPT,) * 3, suite.PROMPT)
    return suite.Pair(disturbed(student, 0.1), student, ids, 12)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_contender_writes_after_the_gate(pair, batch):
    suite.check(pair, pair.prompts[:batch])
    everyone = suite.contenders(pair, pair.prompts[:batch])
    names = [one.name for one in everyone]
    assert len(set(names)) == len(names) and {one.peer for one in everyone} <= set(names)
    for one in everyone:
        one.run()
        assert bool(one.shares) == ("RSD" in one.name or (", γ" in one.name)) and all(0 <= share <= 1 for share in one.shares)


def test_the_gate_sees_a_wrong_label(pair, monkeypatch):
    real = suite.ours

    def shifted(*args, **options):
        traces = real(*args, **options)
        traces.judge_logprobs[0, 3] += 0.01
        return traces

    monkeypatch.setattr(suite, "ours", shifted)
    with pytest.raises(AssertionError, match=r"RSD, block_size 1: labels are 1.0e-02"):
        suite.check(pair, pair.prompts)


def test_the_loop_writes_what_rsd_writes(pair):
    """Its share of the teacher's tokens and their first acceptance are those of ``generate``, on many short texts."""
    n, new = 1500, 4
    many = pair.prompts[:1].expand(n, -1)
    torch.manual_seed(0)
    text, share = suite.one_at_a_time(pair.teacher, pair.student, many, new)
    traces = suite.ours(pair.teacher, pair.student, many, new, suite.RSD, 1, 0)
    accepted = (traces.source == decoding.Source.ACCEPTED).double().mean().item()
    # 6,000 coins of which 4 hang together: five standard deviations
    assert abs(share - accepted) < 5 * (2 * 4 * 0.25 / (n * new)) ** 0.5
    first = [torch.bincount(tokens[:, 0], minlength=97) / n for tokens in (text, traces.tokens)]
    assert (first[0] - first[1]).abs().max() < 5 * (2 * 0.25 / n) ** 0.5
    whole = torch.cat([many, text], 1)
    assert 0 < suite.first_kept(pair, whole) <= share + 0.05


def test_the_bound_of_a_block():
    assert suite.at_most(2.0, 0.5, 0.7, 1) == pytest.approx(1)
    # where everything is kept a long block saves the student's forwards, and no more
    assert suite.at_most(2.0, 0.5, 1.0, 10_000) == pytest.approx(1.25, rel=1e-3)
    # a second proposal breaks even at a = t / (t + s)
    assert suite.at_most(2.0, 0.5, 0.8, 2) == pytest.approx(1)


def test_rows_outlive_a_failed_check_and_columns_join(monkeypatch, tmp_path, capsys):
    from benchmarks import run, signals

    def some(device, repeats, quick, progress):
        yield dict.fromkeys(signals.GROUP, 1) | {"contender": "ours", "ms": 0.5, "GB/s": None if quick else 7.0}
        raise AssertionError("the next is wrong")

    monkeypatch.setattr(signals, "bench", some)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    run.keep(run.pd.DataFrame([{"contender": "a, b", "GFLOP/s": 3}]), tmp_path / "signals-cpu.csv")
    for options in (["--quick"], []):
        with pytest.raises(AssertionError, match="the next is wrong"):
            run.main(["signals", "--device", "cpu", *options])
    assert "appended to" in capsys.readouterr().out
    kept = run.pd.read_csv(tmp_path / "signals-cpu.csv")
    assert kept["contender"].tolist() == ["a, b", "ours", "ours"] and kept["GFLOP/s"].tolist()[0] == 3
    assert kept["GB/s"].isna().tolist() == [True, True, False] and kept["ms"].tolist()[1:] == [0.5, 0.5]
