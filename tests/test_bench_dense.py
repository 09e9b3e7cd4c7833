"""The benchmark of dense teachers at a small vocabulary: its gate passes, fails for a wrong gradient, and its formulas are the package's."""

from __future__ import annotations

import pytest
import torch

suite = pytest.importorskip("benchmarks.dense")

import distilkernels as dk  # noqa: E402

SMALL = suite.Case("small", 6, 517, 4)


class Silent:
    def __getattr__(self, name):
        return lambda *a, **k: None


def test_rows_of_the_table(monkeypatch):
    for name, value in (("CPU", (SMALL,)), ("TOKENS", (2, 3)), ("MEMORY_VOCAB", 257)):
        monkeypatch.setattr(suite, name, value)
    # of small tensors there is nothing to see, and looking collects garbage each time
    monkeypatch.setattr(suite, "peak_extra_bytes", lambda run, device: len(run()))
    rows = list(suite.bench("cpu", 1, True, Silent()))
    timed = [r for r in rows if r["case"] == "small"]
    assert {(r["dtype"], r["divergence"]) for r in timed} == {
        (dtype, d) for dtype in ("float32", "bfloat16") for d in (*suite.BETA, "total_variation", "samples")
    }
    for name in suite.BETA:
        names = {r["contender"].split(" avx")[0] for r in timed if r["divergence"] == name} - {"trl"}
        assert {"ours in place", "ours fresh", "eager", "copy"} == names
    peaks = [r for r in rows if r["case"] == "memory"]
    assert len(peaks) == 2 * 2 * 5 and {r["N"] for r in peaks} == {2, 3}


@pytest.mark.parametrize("divergence", [*suite.BETA, *suite.SUMS, *suite.BLOCKS])
def test_the_eager_formula_is_the_divergence(divergence):
    z, t = torch.randn(4, 31, dtype=torch.float64), torch.randn(4, 31, dtype=torch.float64)
    want = dk.divergences.resolve(divergence)(t.log_softmax(-1), z.log_softmax(-1)).mean()
    torch.testing.assert_close(suite.eager_loss(z, t, divergence), want)


@pytest.mark.parametrize("divergence", ["reverse_kl", "todi"])
def test_the_gate_sees_a_wrong_loss(monkeypatch, divergence):
    honest = dk.distill_loss
    monkeypatch.setattr(dk, "distill_loss", lambda z, t, **options: 1.001 * honest(z, t, **options))
    with pytest.raises(AssertionError, match=r"ours in place.*: relative gradient error 1\.0"):
        suite.on_logits(SMALL, torch.float32, divergence, "cpu", False)


def test_the_gate_sees_wrong_samples_and_hidden_states(monkeypatch):
    honest, linear = dk.sampled_distill_loss, dk.linear_distill_loss
    suite.from_hidden((6, 127, 8), torch.float32, "cpu", True)
    suite.from_hidden((6, 127, 8), torch.bfloat16, "cpu", False)
    monkeypatch.setattr(dk, "sampled_distill_loss", lambda z, s: 1.001 * honest(z, s))
    with pytest.raises(AssertionError, match=r"ours fresh: relative gradient error 1\.0"):
        suite.sampled(SMALL, torch.float32, "cpu")
    monkeypatch.setattr(dk, "linear_distill_loss", lambda *a, **options: 1.001 * linear(*a, **options))
    with pytest.raises(AssertionError, match=r"ours forward_kl: relative error of d hidden 1\.0"):
        suite.from_hidden((6, 127, 8), torch.float32, "cpu", True)
