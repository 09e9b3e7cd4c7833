"""Token signals against fp64 softmax forms, on extreme rows, by numerical differentiation; masks, windows, rewards and votes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import servers

from distilkernels import signals

EXACT = ("entropy", "confidence", "margin", "self_certainty")


def plain(z, ids=None):
    """Every signal from a full fp64 softmax over the finite columns of a row."""
    z = z.double()
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    finite = z.isfinite()
    top = torch.cat([p, torch.zeros_like(p[..., :1])], -1).topk(2).values
    n = finite.sum(-1)
    found = {
        "entropy": -(p * log_p.masked_fill(~finite, 0)).sum(-1),
        "confidence": top[..., 0],
        "margin": top[..., 0] - top[..., 1],
        "self_certainty": -log_p.masked_fill(~finite, 0).sum(-1) / n - n.double().log(),
    }
    if ids is not None:
        found["logprob"] = log_p.gather(-1, ids[..., None])[..., 0]
        found["rank"] = (z > z.gather(-1, ids[..., None])).sum(-1)
    return found


def assert_signals(got, want, tolerance=1e-5):
    for name, value in want.items():
        if name == "rank":
            assert torch.equal(got.rank, value)
        else:
            torch.testing.assert_close(getattr(got, name).double(), value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend,device", servers("vocab_stats"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_from_logits(backend, device, dtype):
    x = (torch.randn(2, 3, 4099) * 4).to(dtype)
    x[0, 0, 7] = x[0, 0].max()  # a tie for the first place: margin 0
    x[1, :, 4000:] = -math.inf
    ids = torch.randint(0, 4000, (2, 3))
    ids[1, 2] = x[1, 2].argmax()
    head = dict(logit_scale=0.7, temperature=1.3, valid_vocab=4050)
    z = x.double()[..., :4050] * 0.7 / 1.3
    got = signals.from_logits(x.to(device), ids.to(device), backend=backend, **head)
    assert_signals(signals.TokenSignals(*(t.cpu() for t in got)), plain(z, ids))
    assert got.margin[0, 0] == 0 and got.rank[1, 2] == 0
    several = signals.from_logits(x.to(device), ids.to(device)[..., None].expand(2, 3, 2).contiguous(), backend=backend, **head)
    assert several.logprob.shape == several.rank.shape == (2, 3, 2)
    assert torch.equal(several.logprob[..., 0], got.logprob) and (several.rank[..., 1] == -1).all()  # repeated in the row: an empty slot


def test_from_hidden():
    h, w, b = torch.randn(2, 7, 16), torch.randn(307, 16), torch.randn(307)
    ids = torch.randint(0, 307, (2, 7))
    got = signals.from_hidden(h, w, ids, bias=b, chunk_size=4, softcap=8.0)
    z = 8 * torch.tanh((h.double() @ w.double().t() + b.double()) / 8)
    assert_signals(got, plain(z, ids))
    assert signals.from_hidden(h, w).logprob is None and signals.from_hidden(h, w).rank is None
    at = signals.from_hidden(h, w, ids, bias=b, chunk_size=4, softcap=8.0, temperatures=(0.5, 2.0))
    for i, t in enumerate((0.5, 2.0)):
        assert_signals(signals.TokenSignals(*(f[..., i] for f in at)), plain(z / t, ids))


def test_several_temperatures(monkeypatch):
    """Blocks of rows and no blocks agree; strided logits; nothing has a gradient."""
    monkeypatch.setattr(signals, "_block_rows", lambda rows: 2)
    x = torch.randn(3, 6, 501, requires_grad=True)
    rows, ids = x[:, :-1], torch.randint(0, 501, (3, 5))
    got = signals.from_logits(rows, ids, temperatures=(0.3, 1.0, 4.0))
    assert not any(t.requires_grad for t in got) and got.entropy.shape == (3, 5, 3)
    for i, t in enumerate((0.3, 1.0, 4.0)):
        assert_signals(signals.TokenSignals(*(f[..., i] for f in got)), plain(rows.detach() / t, ids))
    assert signals.from_logits(rows[:0], temperatures=(1.0,)).entropy.shape == (0, 5, 1)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients(fused):
    """By numerical differentiation, ids inside and outside the argmax; margin and rank are detached."""
    x = torch.randn(4, 6 if fused else 9, dtype=torch.float64, requires_grad=True)
    w = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    ids = ((x @ w.t()) if fused else x).argmax(-1)
    ids[::2] = (ids[::2] + 1) % 9

    def differentiable(x, w=w):
        got = signals.from_hidden(x, w, ids, temperature=0.8) if fused else signals.from_logits(x, ids, temperature=0.8)
        assert not got.margin.requires_grad and not got.rank.requires_grad
        return got.logprob, got.entropy, got.confidence, got.self_certainty

    assert torch.autograd.gradcheck(differentiable, (x, w) if fused else (x,))


@pytest.mark.skipif(torch._dynamo.config.disable, reason="torch.compile is switched off")
def test_compiles_whole():
    """One graph, the same numbers and gradients."""
    x, ids = torch.randn(3, 301, requires_grad=True), torch.randint(0, 301, (3,))

    def loss(x):
        found = signals.from_logits(x, ids)
        return (found.entropy + found.confidence + 0.1 * found.self_certainty - found.logprob + found.margin).sum()

    got, want = torch.compile(loss, fullgraph=True, backend="aot_eager")(x), loss(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], torch.autograd.grad(want, x)[0])


def extreme_rows(v=1031):
    one = torch.full((v,), -1e4)
    one[17] = 1e4
    only = torch.full((v,), -math.inf)
    only[3] = -2.0
    half = torch.randn(v)
    half[::2] = -math.inf
    return torch.stack([one, torch.zeros(v), torch.full((v,), 1e4), only, half, torch.randn(v) * 1e4, torch.linspace(-1e4, 1e4, v)])


@pytest.mark.parametrize("backend,device", servers("vocab_stats"))
def test_extreme_rows(backend, device):
    """One-hot, uniform, shifted by 1e4, one finite column, every other one, spreads of 1e4: finite, in bounds, right; so is the gradient."""
    x = extreme_rows().to(device).requires_grad_()
    got = signals.from_logits(x, x.argmax(-1), backend=backend)
    exact = plain(x.detach().cpu(), x.argmax(-1).cpu())
    # float32 PyTorch rounds an lse of 1e4 to 1e-3
    assert_signals(signals.TokenSignals(*(t.detach().cpu() for t in got)), exact, 1e-3 if backend == "reference" else 1e-5)
    assert (got.entropy >= 0).all() and (got.entropy <= math.log(1031) * (1 + 1e-6)).all()
    assert (got.self_certainty >= 0).all() and (got.confidence <= 1).all()
    assert got.entropy[[0, 3]].eq(0).all()
    (grad,) = torch.autograd.grad(got.entropy.sum() + got.confidence.sum() + got.self_certainty.sum() + got.logprob.sum(), x)
    assert grad.isfinite().all()


def test_rows_without_a_distribution():
    x = torch.randn(3, 50)
    x[0, 4], x[1] = math.nan, -math.inf
    got = signals.from_logits(x, torch.zeros(3, dtype=torch.int64))
    for name in EXACT:
        assert getattr(got, name)[:2].isnan().all() and getattr(got, name)[2].isfinite(), name
    assert got.rank.tolist()[0] == -1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.integers(1, 70), st.floats(0.05, 50), st.integers(0, 2**31))
def test_any_shape(n, v, spread, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, v, generator=g) * spread
    x[torch.rand(n, v, generator=g) < 0.2] = -math.inf
    x[:, v // 2] = 1.0
    ids = torch.randint(0, v, (n,), generator=g)
    got = signals.from_logits(x, ids)
    assert_signals(got, plain(x, ids), 2e-5)
    assert (got.entropy >= 0).all() and (got.entropy.double() <= x.isfinite().sum(-1).double().log() + 1e-6).all() and (got.self_certainty >= 0).all()


def test_refusals():
    x = torch.randn(2, 5)
    for arguments, sentence in (
        (dict(temperatures=()), "temperatures must have at least one"),
        (dict(temperatures=(1.0, -1.0)), "temperatures must be positive"),
        (dict(temperatures=(1.0,), temperature=2.0), "temperatures replaces temperature"),
    ):
        with pytest.raises(ValueError, match=sentence):
            signals.from_logits(x, **arguments)
    with pytest.raises(TypeError, match="temperatures must be several numbers; got float"):
        signals.from_logits(x, temperatures=1.0)
    with pytest.raises(ValueError, match="ids must have shape"):
        signals.from_logits(x, torch.zeros(3, 1, dtype=torch.int64))


# ------------------------------------------------------------------------------------------ over sequences


def test_forking_mask():
    entropy = torch.tensor([[5.0, 1.0, 3.0, 3.0, 9.0], [2.0, 8.0, 0.5, 100.0, math.nan]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])  # 7 tokens: 9, 100 and NaN are no tokens
    kept = signals.forking_mask(entropy, mask, 0.2)  # ⌈1.4⌉ = 2: 8 and 5
    assert kept.tolist() == [[True, False, False, False, False], [False, True, False, False, False]]
    assert signals.forking_mask(entropy, mask, 3 / 7).sum() == 4  # the third is 3, twice
    assert signals.forking_mask(entropy, mask, 0.5, across="sequence").sum(-1).tolist() == [3, 2]
    assert not signals.forking_mask(entropy, mask, 0.0).any() and torch.equal(signals.forking_mask(entropy, mask, 1.0), mask.bool())
    assert not signals.forking_mask(entropy, torch.zeros_like(mask)).any()
    assert signals.forking_mask(torch.rand(1, 100), fraction=0.07).sum() == 7
    # a NaN of the mask is no fork, and takes no other's place
    assert signals.forking_mask(torch.tensor([1.0, math.nan, 3.0, 2.0, 0.0]), fraction=0.4).tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("align,first", [("following", 0), ("preceding", -3), ("centered", -2)])
def test_windowed_entropy(align, first):
    entropy, mask = torch.rand(3, 11, dtype=torch.float64, requires_grad=True), torch.rand(3, 11) < 0.7
    got = signals.windowed_entropy(entropy, mask, 4, align=align)
    for b in range(3):
        for t in range(11):
            inside = [i for i in range(t + first, t + first + 4) if 0 <= i < 11 and mask[b, i]]
            want = sum(entropy[b, i].item() for i in inside) / len(inside) if mask[b, t] else 0.0
            assert abs(got[b, t].item() - want) < 1e-12
    assert torch.autograd.gradcheck(lambda e: signals.windowed_entropy(e, mask, 4, align=align), entropy)


def test_windows_keep_what_is_not_finite():
    x = torch.tensor([1.0, 3.0, math.nan, 5.0, 1.0, -math.inf, 2.0, 4.0, math.inf, 6.0])
    nan, inf = math.nan, math.inf
    want = torch.tensor([2.0, nan, nan, 3.0, -inf, -inf, 3.0, inf, inf, 6.0])
    torch.testing.assert_close(signals.windowed_entropy(x, None, 2), want, equal_nan=True)
    assert signals.sequence_confidence(x[3:], reduction="lowest_window", window=2) == -inf


def test_sequences_of_no_tokens():
    x = torch.zeros(2, 0)
    for reduction in ("mean", "min", "sum", "lowest_window"):
        got = signals.sequence_confidence(x, reduction=reduction, window=2 if reduction == "lowest_window" else None)
        assert got.shape == (2,) and (got.eq(0).all() if reduction == "sum" else got.isnan().all())
    assert signals.last_token_reward(x, x).isnan().all() and signals.windowed_entropy(x, None, 3).shape == (2, 0)


def test_sequence_confidence_and_last_token():
    values = torch.tensor([[0.9, 0.5, 0.7, math.nan], [0.2, 0.4, 0.6, 0.8], [1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    for reduction, want in (("mean", [0.7, 0.6, math.nan]), ("min", [0.5, 0.4, math.nan]), ("sum", [2.1, 1.8, 0.0])):
        got = signals.sequence_confidence(values, mask, reduction=reduction)
        torch.testing.assert_close(got, torch.tensor(want), equal_nan=True)
    got = signals.sequence_confidence(values, mask, reduction="lowest_window", window=2)
    torch.testing.assert_close(got, torch.tensor([0.6, 0.5, math.nan]), equal_nan=True)
    whole = signals.sequence_confidence(values, mask, reduction="lowest_window", window=9)
    torch.testing.assert_close(whole, torch.tensor([0.7, 0.6, math.nan]), equal_nan=True)
    logprobs = torch.log(values)
    got = signals.last_token_reward(logprobs, mask, constant=-20.0, scale=0.2)
    torch.testing.assert_close(got, torch.tensor([0.2 * (math.log(0.7) + 20), 0.2 * (math.log(0.8) + 20), math.nan]), equal_nan=True)
    torch.testing.assert_close(signals.last_token_reward(torch.tensor(-18.0)), torch.tensor(0.5))
    with pytest.raises(ValueError, match="window belongs to"):
        signals.sequence_confidence(values, mask, window=3)


def test_votes():
    certainty = torch.tensor([[3.0, 1.0, 2.0, 4.0], [1.0, 2.0, 3.0, math.nan]])
    answers = torch.tensor([[7, 9, 7, 9], [5, 5, 6, -1]])
    vote = signals.borda_vote(certainty, answers, power=1.0)
    # places 2, 4, 3, 1 of 4 give 3, 1, 2, 4 points: 7 and 9 have 5 each, and 7 came first; 5 has 1 + 2, 6 has 3
    assert vote.votes.tolist() == [[5, 5, 5, 5], [3, 3, 3, 0]] and vote.answer.tolist() == [7, 5]
    assert signals.borda_vote(certainty, answers, power=2.0).answer.tolist() == [9, 6]
    assert signals.borda_vote(certainty, answers, power=0.0).answer.tolist() == [7, 5]
    assert signals.borda_vote(certainty, answers, keep=answers == 5).answer.tolist() == [-1, 5]
    # the least certain of two has a point, whatever stands before it and takes no part
    last = signals.borda_vote(torch.tensor([[9.0, -math.inf, 2.0], [9.0, math.nan, 2.0]]), torch.tensor([[-1, 5, 6], [-1, 5, 6]]))
    assert last.votes.tolist() == [[0, 1, 2], [0, 1, 2]]

    p = torch.tensor([0.5, 0.1, 0.3, 0.1], dtype=torch.float64)
    answers = torch.tensor([1, 2, 2, 3])
    vote = signals.perplexity_vote(p.log() - 2000, answers)
    torch.testing.assert_close(vote.votes, torch.tensor([0.5, 0.4, 0.4, 0.1], dtype=torch.float64))
    pruned = signals.perplexity_vote(p.log(), answers, prune="mean")  # 0.25: the two of 0.1 go
    torch.testing.assert_close(pruned.votes, torch.tensor([0.625, 0.0, 0.375, 0.0], dtype=torch.float64))
    by_length = signals.perplexity_vote(torch.tensor([-4.0, -8.0]), torch.tensor([0, 1]), lengths=torch.tensor([2, 8]))
    torch.testing.assert_close(by_length.votes, torch.tensor([math.exp(-2), math.exp(-1)]).double() / (math.exp(-2) + math.exp(-1)))
    assert signals.perplexity_vote(p.log(), -answers).answer == -1
    alike = signals.perplexity_vote(torch.full((3,), -7.3), torch.tensor([0, 0, 1]), prune="mean")  # none is below the mean
    torch.testing.assert_close(alike.votes, torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64) / 3)
