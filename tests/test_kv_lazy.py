"""LazyEviction's state and score against a plain Python simulation, exactly."""

from __future__ import annotations

import math

import pytest
import torch
from servers import servers

from distilkernels import kv


class Simulation:
    """The paper's bookkeeping of one head in Python integers: tokens are dicts, a step at a time."""

    def __init__(self, alpha: float):
        self.alpha, self.tokens = alpha, []

    def step(self, step: int, attention: list[float], new: int = 1) -> None:
        for i in range(new):
            self.tokens.append({"ts": step - new + 1 + i, "mri": 0})
        for token, a in zip(self.tokens, attention):
            if a > self.alpha:
                token["mri"] = max(token["mri"], step - token["ts"])
                token["ts"] = step

    def scores(self, step: int) -> list[float]:
        sigmoid = lambda x: 1 / (1 + math.exp(-x)) if x > -700 else 0.0
        out = []
        for token in self.tokens:
            age, mri = step - token["ts"], token["mri"]
            if mri == 0:
                out.append(1.0 if age == 0 else 0.0)
            else:
                out.append(2 * sigmoid(-age / mri) + 2 * sigmoid(-(mri - 1)))
        return out


def attention_of(b: int, h: int, t: int, g: torch.Generator) -> torch.Tensor:
    """Rows where most tokens are looked at rarely, some often, and some exactly at the threshold."""
    a = torch.rand(b, h, t, generator=g) ** 12
    a[..., ::7] = torch.where(torch.rand(b, h, len(range(0, t, 7)), generator=g) < 0.2, 0.25, 0.0)
    return a


@pytest.mark.parametrize("backend,device", servers("recurrence_update"))
def test_a_thousand_steps_are_the_simulation(backend, device):
    """Random attention of two layers' heads in groups of two, with an eviction every 50 steps; state and kept sets exactly."""
    b, heads, groups, alpha, budget, window = 2, 2, 2, 0.25, 40, 50
    # the interpreter takes a second a hundred steps
    steps = 300 if backend == "triton" and device == "cpu" else 1000
    g = torch.Generator().manual_seed(0)
    tracker = kv.RecurrenceTracker(alpha=alpha, num_heads=heads, backend=backend)
    plain = [[Simulation(alpha) for _ in range(heads)] for _ in range(b)]
    for step in range(steps):
        attention = attention_of(b, heads * groups, len(tracker) + 1, g)
        tracker.update(attention.to(device), step)
        largest = attention.unflatten(1, (heads, groups)).amax(2).tolist()
        for i in range(b):
            for h in range(heads):
                plain[i][h].step(step, largest[i][h])
        if step % window == window - 1:
            scores = tracker.scores(step)
            want = torch.tensor([[s.scores(step) for s in row] for row in plain], dtype=torch.float64)
            torch.testing.assert_close(scores.double().cpu(), want, rtol=1e-6, atol=1e-30)
            kept = kv.select(scores, budget, protect_last=10)
            tracker.keep(kept)
            for i in range(b):
                for h in range(heads):
                    tokens = plain[i][h].tokens
                    plain[i][h].tokens = [tokens[k] for k in kept.indices[i, h].tolist() if k >= 0]
        for name, field in (("last_seen", "ts"), ("max_interval", "mri")):
            state = getattr(tracker, name)
            assert state.dtype == torch.int32
            assert state.tolist() == [[[t[field] for t in s.tokens] for s in row] for row in plain], step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend,device", servers("recurrence_update"))
def test_several_steps_at_once_are_the_steps_one_by_one(backend, device, dtype):
    """Strided attention [B, Hq, W, T] of a prefill; NaN, as masked rows may hold, exceeds nothing."""
    if dtype == torch.float64 and backend not in ("reference", "cpp"):
        return
    attention = (torch.rand(2, 5, 6, 33).transpose(1, 2) ** 4).to(dtype)
    attention[1, :, :, 3] = math.nan
    own = torch.arange(33) > torch.arange(28, 33)[:, None]
    attention = attention.masked_fill(own, 0).to(device)
    whole, single = (kv.RecurrenceTracker(alpha=0.1, num_heads=2, backend=name) for name in (backend, "reference"))
    whole.update(attention, 100)
    single.append(torch.arange(72, 105, device=device).expand(2, 2, 33))
    for w in range(5):
        single.update(attention[:, :, w], 100 + w)
    assert torch.equal(whole.last_seen, single.last_seen) and torch.equal(whole.max_interval, single.max_interval)
    assert (whole.max_interval > 0).any() and (whole.last_seen[1, :, 3] == 75).all()


def test_scores_by_hand():
    last, interval = torch.tensor([10, 10, 7, 10, 2]), torch.tensor([0, 3, 0, 1, 4])
    half = lambda x: 2 / (1 + math.exp(-x))
    h1 = [1.0, half(-10 / 3 + 10 / 3), 0.0, 1.0, half(-8 / 4)]
    for h2, second in (
        ("minus_one", lambda m: half(-(m - 1))), ("minus_mri_minus_one", lambda m: half(-m - 1)), ("inverse", lambda m: half(-1 / m))
    ):  # fmt: skip
        tracker = kv.RecurrenceTracker(h2=h2)
        tracker.append(last[None, None])
        tracker.max_interval.copy_(interval)
        want = [a + (second(m) if m else 0) for a, m in zip(h1, interval.tolist())]
        torch.testing.assert_close(tracker.scores(10)[0, 0], torch.tensor(want))
    assert not tracker.scores(10**6).isnan().any() and (tracker.scores(10**6)[0, 0, [0, 2]] == 0).all()


def test_an_eviction_window_from_a_sample():
    tracker = kv.RecurrenceTracker()
    tracker.append(torch.zeros(1, 1, 11, dtype=torch.int64))
    assert tracker.window() == 1
    tracker.max_interval.copy_(torch.arange(11))
    assert tracker.window(0.8) == 9 and tracker.window(0.5) == 6
    assert tracker.window(0.0) == 1 and tracker.window(1.0) == 10
    many = kv.RecurrenceTracker()
    many.append(torch.zeros(1, 1, 2**24 + 1, dtype=torch.int32))
    many.max_interval.fill_(3)
    assert many.window() == 3


def test_the_method_replays_the_tracker():
    """compress with LazyEviction is a tracker fed with the causal attention of the same queries."""
    b, heads, groups, t, w, d = 2, 2, 2, 50, 37, 16
    queries, keys = torch.randn(b, heads * groups, w, d) * 2, torch.randn(b, heads, t, d)
    tracker = kv.RecurrenceTracker(alpha=0.05, num_heads=heads)
    logits = queries @ keys.repeat_interleave(groups, 1).mT / 4
    causal = torch.arange(t) <= torch.arange(t - w, t)[:, None]
    attention = logits.masked_fill(~causal, -math.inf).softmax(-1)
    tracker.append(torch.arange(t - w).expand(b, heads, -1))
    for i in range(w):
        tracker.update(attention[:, :, i, : t - w + i + 1], t - w + i)
    got = kv.compress(queries, keys, keys, 20, method=kv.LazyEviction(alpha=0.05, window=6))
    torch.testing.assert_close(got.scores, tracker.scores(t - 1))
    assert torch.equal(got.selection.indices, kv.select(tracker.scores(t - 1), 20, protect_last=6).indices)
    assert (got.selection.indices[..., -6:] == torch.arange(44, 50)).all()


@pytest.mark.parametrize("backend,device", servers("recurrence_update"))
def test_opcheck(backend, device):
    attention = torch.rand(1, 4, 2, 9, device=device)
    state = [torch.zeros(1, 2, 9, dtype=torch.int32, device=device) for _ in range(2)]
    torch.library.opcheck(torch.ops.distilkernels.recurrence_update.default, (attention, *state, 3, 0.5, backend))


def started(steps: int = 1, **options) -> kv.RecurrenceTracker:
    tracker = kv.RecurrenceTracker(**options)
    tracker.update(torch.rand(1, 4, steps, 5), 4)
    return tracker


@pytest.mark.parametrize("call,error,match", [
    (lambda: kv.RecurrenceTracker(alpha=-1), ValueError, "alpha must be at least 0"),
    (lambda: kv.RecurrenceTracker(h2="x"), ValueError, "h2 must be one of"),
    (lambda: started().update(torch.ones(1, 4, 5).long(), 5), TypeError, "attention must be a floating point tensor"),
    (lambda: started().update(torch.ones(4, 5), 5), ValueError, r"attention must have shape \[B, Hq, T\]"),
    (lambda: started().update(torch.ones(1, 4, 4), 5), ValueError, r"attention must cover \(1, 4, 5\) tracked tokens"),
    (lambda: started().update(torch.ones(1, 4, 6), 5.0), TypeError, "step must be an int"),
    (lambda: started().update(torch.ones(1, 4, 5), 3), ValueError, "step must not go back: the last one taken was 4; got 3"),
    (lambda: started(steps=3).update(torch.ones(1, 4, 5), 5), ValueError, "step must not go back: the last one taken was 6; got 5"),
    (lambda: started().keep(torch.tensor([[[0, 5]] * 4])), ValueError, "selection must hold indices below the 5 tokens that are tracked; got 5"),
    (lambda: started(num_heads=0), ValueError, "num_heads must be None or a positive int; got 0"),
    (lambda: started().keep([0]), TypeError, "selection must be a KVSelection"),
    (lambda: started().window(1.5), ValueError, r"quantile must be in \[0, 1\]; got 1.5"),
    (lambda: started(num_heads=3), ValueError, "a multiple of num_heads = 3"),
    (lambda: started().keep(torch.zeros(1, 2, 3, dtype=torch.int32)), ValueError, "selection must have indices"),
])  # fmt: skip
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
