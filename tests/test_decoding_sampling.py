"""`decoding.sample` and its settings, `decoding.combine`, and what their arguments may not be."""

from __future__ import annotations

import math

import oracle_decoding as oracle
import pytest
import torch
from servers import servers

from distilkernels import BackendError
from distilkernels import decoding as dk
from distilkernels.decoding import Sampling

INF, NAN = math.inf, math.nan
X2 = torch.zeros(2, 3)
BACKENDS = pytest.mark.parametrize("backend,device", servers("sample_rows"))


def kept_by(sampling: Sampling, logits: list[float], backend="reference", device="cpu") -> set[int]:
    rows = torch.tensor(logits, dtype=torch.float32, device=device).expand(600, -1)
    at = torch.zeros(600, dtype=torch.int64, device=device)
    tokens, logprobs = dk.sample(rows, seeds=torch.arange(600, device=device), positions=at, sampling=sampling, backend=backend)
    assert abs(float(logprobs.exp().double()[[int((tokens == t).nonzero()[0]) for t in tokens.unique()]].sum()) - 1) < 1e-5
    return set(tokens.tolist())


@BACKENDS
def test_filters_at_their_ends(backend, device):
    rows, flat = [1.0, 3.0, 3.0, 2.0, -INF], [0.5] * 5
    for sampling, logits, want in (
        (Sampling(0.0), rows, {1}),
        (Sampling(0), flat, {0}),
        (Sampling(0.0, top_k=4, top_p=0.99, min_p=0.1), rows, {1}),
        (Sampling(top_p=0.0), rows, {1, 2}),
        (Sampling(top_p=0.0), [1.0, 2.0, 0.0], {1}),
        (Sampling(top_p=1.0), rows, {0, 1, 2, 3}),
        (Sampling(top_p=7.5), rows, {0, 1, 2, 3}),
        (Sampling(top_k=1), rows, {1, 2}),
        (Sampling(top_k=1), flat, {0, 1, 2, 3, 4}),
        (Sampling(top_k=3), rows, {1, 2, 3}),
        (Sampling(top_k=10**9), rows, {0, 1, 2, 3}),
        (Sampling(min_p=1.0), rows, {1, 2}),
        (Sampling(min_p=0.0), rows, {0, 1, 2, 3}),
        (Sampling(min_p=0.35), rows, {1, 2, 3}),  # e⁻¹ = 0.368
        (Sampling(0.5, min_p=0.35), rows, {1, 2}),  # after the temperature: e⁻²
        (Sampling(top_p=0.84), rows, {1, 2, 3}),  # ⅔ of the mass in the top two, 0.79 exactly
        (Sampling(top_p=0.7), rows, {1, 2}),
        (Sampling(top_k=2, top_p=0.4), [2.0, 1.9, 1.9], {0, 1, 2}),  # the tie keeps three; above the second 0.35
    ):
        assert kept_by(sampling, logits, backend, device) == want, sampling


def places(b: int) -> dict:
    return {"seeds": torch.arange(b) * 31 - 7, "positions": torch.arange(b) + 100}


@BACKENDS
def test_sample_is_the_oracles_draw(backend, device):
    g = torch.Generator().manual_seed(2)
    rows, near = torch.randn(60, 37, generator=g) * 2, 0
    rows[7, 3], rows[8], rows[9, 2] = NAN, -INF, INF
    for sampling in (Sampling(), Sampling(0.7, top_k=9), Sampling(torch.linspace(0, 2, 60).double(), top_p=0.8), Sampling(1.3, min_p=0.05)):
        offsets = torch.arange(60) % 5
        moved = Sampling(sampling.temperature.to(device), top_p=0.8) if isinstance(sampling.temperature, torch.Tensor) else sampling
        at = {k: v.to(device) for k, v in places(60).items()}
        tokens, logprobs = dk.sample(rows.to(device), **at, offsets=offsets.to(device), sampling=moved, stream=5, valid_vocab=33, backend=backend)
        assert logprobs.dtype == torch.float32
        for b in range(60):
            row, closest = rows[b, :33].double().numpy(), oracle.Near()
            if oracle.bad(row):
                assert tokens[b] == -1 and logprobs[b].isnan()
                continue
            settings = oracle.settings_of(sampling, b)
            q = oracle.law(row, **settings, near=closest)
            want = oracle.draw(q, places(60)["seeds"][b].item(), 100 + b, int(offsets[b]), 5, closest)
            if closest.distance < 1e-5:
                near += 1
                continue
            assert tokens[b] == want
            assert abs(float(logprobs[b]) - math.log(q[want])) < 5e-6
    assert near <= 3


def test_sample_streams_offsets_and_seeds_are_different_noise():
    rows, at = torch.zeros(500, 64), places(500)
    base = dk.sample(rows, **at)[0]
    for change in ({"stream": 4}, {"offsets": torch.ones(500, dtype=torch.int64)}, {"positions": at["positions"] + 500}, {"seeds": at["seeds"] + 2**40}):
        assert (dk.sample(rows, **at | change)[0] == base).float().mean() < 0.1
    assert torch.equal(dk.sample(rows, **at, offsets=torch.zeros(500, dtype=torch.int64))[0], base)
    # an int is every request's seed
    same = dk.sample(rows, seeds=2**64 - 5, positions=at["positions"])[0]
    assert torch.equal(same, dk.sample(rows, seeds=torch.full((500,), -5), positions=at["positions"])[0])


def test_limits_do_not_loosen_a_sides_own_top_k():
    both = torch.tensor([1, 9])
    for own, limit, least in ((2, 5, 2), (5, 2, 2), (both, 3, [1, 3]), (3, both, [1, 3]), (both, both.flip(0), [1, 1]), (None, 3, 3), (3, None, 3)):
        top_k = Sampling(0.7, own, 0.9, 0.1).limited(limit).top_k
        assert (top_k.tolist() if isinstance(top_k, torch.Tensor) else top_k) == least


def test_sample_dtypes_and_empties():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tokens, logprobs = dk.sample(torch.randn(4, 9).to(dtype), **places(4), sampling=Sampling(0.8))
        assert tokens.dtype == torch.int64 and logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tokens, logprobs = dk.sample(torch.empty(0, 9), **places(0))
    assert tokens.shape == logprobs.shape == (0,)


@pytest.mark.parametrize(
    "kind,words,build",
    [
        (ValueError, "temperature must be at least 0; got -1", lambda: Sampling(-1)),
        (ValueError, "temperature must be at least 0; got inf", lambda: Sampling(INF)),
        (ValueError, "temperature must be", lambda: Sampling(NAN)),
        (ValueError, "top_k must be at least 1; got 0", lambda: Sampling(top_k=0)),
        (TypeError, "top_k must be an int or a tensor; got float", lambda: Sampling(top_k=2.0)),
        (TypeError, "top_k must be an int or an integer tensor", lambda: Sampling(top_k=torch.ones(2))),
        (ValueError, "top_p must be at least 0", lambda: Sampling(top_p=-0.1)),
        (ValueError, "min_p must be in \\[0, 1\\]; got 1.5", lambda: Sampling(min_p=1.5)),
        (ValueError, "min_p must be in", lambda: Sampling(min_p=torch.tensor([0.5, 2.0]))),
        (ValueError, "temperature must be", lambda: Sampling(torch.tensor([1.0, NAN]))),
        (ValueError, r"logits must have shape \[B, V\]", lambda: dk.sample(torch.zeros(1, 2, 3), **places(1))),
        (ValueError, "top_p must be a number or have one entry a request", lambda: dk.sample(X2, **places(2), sampling=Sampling(top_p=torch.ones(3)))),
        (ValueError, "positions must have the token shape", lambda: dk.sample(torch.zeros(2, 3), seeds=1, positions=torch.zeros(3, dtype=torch.int64))),
        (TypeError, "seeds must be an int or an int64 tensor", lambda: dk.sample(torch.zeros(2, 3), seeds=1.5, positions=torch.zeros(2, dtype=torch.int64))),
        (TypeError, "sampling must be a Sampling; got float", lambda: dk.sample(torch.zeros(2, 3), **places(2), sampling=0.7)),
        (ValueError, "valid_vocab", lambda: dk.sample(torch.zeros(2, 3), **places(2), valid_vocab=4)),
        (ValueError, "min_prob of ReverseSpeculative must be in", lambda: dk.ReverseSpeculative(1.5)),
        (ValueError, "trials of ReverseSpeculative must be an int of at least 1; got 0", lambda: dk.ReverseSpeculative(trials=0)),
        (TypeError, "trials of ReverseSpeculative must be an int", lambda: dk.ReverseSpeculative(trials=2.0)),
        (TypeError, "trials of ReverseSpeculative", lambda: dk.ReverseSpeculative(trials=torch.tensor([2]))),
        (ValueError, "k of TopKAcceptance must be an int of at least 1", lambda: dk.TopKAcceptance(0)),
        (ValueError, "p of TopPAcceptance must be at least 0", lambda: dk.TopPAcceptance(-1)),
        (ValueError, "epsilon of TypicalAcceptance", lambda: dk.TypicalAcceptance(epsilon=2)),
        (ValueError, "fallback of ThresholdAcceptance must be 'draw' or 'argmax'; got 'none'", lambda: dk.ThresholdAcceptance(fallback="none")),
        (ValueError, "fallback of TypicalAcceptance must be 'draw' or 'argmax'; got 'residual'", lambda: dk.TypicalAcceptance(fallback="residual")),
        (ValueError, "fallback of ThresholdAcceptance must be 'draw' or 'argmax'; got 'retry'", lambda: dk.ThresholdAcceptance(fallback="retry")),
        (ValueError, "bonus of GreedyAcceptance must be None, 'draw' or 'argmax'; got 'all'", lambda: dk.GreedyAcceptance(bonus="all")),
    ],
)
def test_settings_are_checked(kind, words, build):
    with pytest.raises(kind, match=words):
        build()


@pytest.mark.parametrize(
    "kind,words,change",
    [
        (TypeError, "rule must be one of", {"rule": "greedy"}),
        (TypeError, "proposals must be an int32 or int64 tensor; got torch.float32", {"proposals": torch.zeros(2, 3)}),
        (ValueError, r"proposals must have shape \[B, G\]", {"proposals": torch.zeros(2, 3, 1, dtype=torch.int64)}),
        (ValueError, r"judge_logits must have shape \(2, 3 or 4, V\)", {"judge_logits": torch.zeros(2, 5, 7)}),
        (ValueError, r"proposer_logits must have shape \(2, 3, V\)", {"proposer_logits": torch.zeros(2, 4, 7)}),
        (ValueError, "SpeculativeSampling compares with the proposer's law: proposer_logits is needed", {"proposer_logits": None}),
        (ValueError, r"lengths must be in \[0, 3\], the number of proposals; got 4", {"lengths": torch.tensor([4, 1])}),
        (ValueError, r"lengths must be in \[0, 3\], the number of proposals; got -1", {"lengths": torch.tensor([3, -1])}),
        (TypeError, "lengths must be", {"lengths": torch.tensor([1.0, 2.0])}),
        (ValueError, "seeds must have the token shape", {"seeds": torch.zeros(3, dtype=torch.int64)}),
        (TypeError, "positions must be an int or an int64 tensor", {"positions": torch.zeros(2)}),
        (TypeError, "judge must be a Sampling", {"judge": 0.6}),
        (ValueError, "temperature must be a number or have one entry a request", {"judge": Sampling(torch.ones(3))}),
        (ValueError, "a rule's parameter must be a number or have one entry a request", {"rule": dk.TopKAcceptance(torch.ones(3, dtype=torch.int64))}),
        (ValueError, "valid_vocab", {"valid_vocab": 8}),
        (BackendError, "'cuda'", {"backend": "cuda"}),
        (TypeError, "Rule must define accept", {"rule": dk.Rule()}),
    ],
)
def test_verify_arguments_are_checked(kind, words, change):
    good = {"rule": dk.SpeculativeSampling(), "proposals": torch.zeros(2, 3, dtype=torch.int64), "proposer_logits": torch.zeros(2, 3, 7),
            "judge_logits": torch.zeros(2, 4, 7), "seeds": 1, "positions": torch.zeros(2, dtype=torch.int64)}  # fmt: skip
    dk.verify(**good)
    with pytest.raises(kind, match=words):
        dk.verify(**good | change)


def test_a_rule_of_ones_own():
    class EvenTokens(dk.Rule):
        bonus = "argmax"

        def accept(self, block):
            return block.ids % 2 == 0

    v = dk.verify(EvenTokens(), torch.tensor([[2, 4, 3], [0, 2, 4]]), judge_logits=torch.eye(4, 6).expand(2, 4, 6), seeds=1, positions=torch.arange(2))
    assert v.num_accepted.tolist() == [2, 3] and v.next_source.tolist() == [dk.Source.FALLBACK, dk.Source.BONUS] and v.next_token[1] == 3


def test_combine_is_the_weighted_sum_and_its_gradient():
    a, b = (torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    alpha = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(dk.combine([a, b], [1.0, 0.5]), a + 0.5 * b)  # UniR
    torch.testing.assert_close(dk.combine([a, b], [0.5, 0.5]), (a + b) / 2)
    torch.testing.assert_close(dk.combine([a, b], [1 + alpha, -alpha]), (1 + alpha) * a - alpha * b)  # DCD
    assert torch.autograd.gradcheck(lambda *x: dk.combine(x[:2], [1 + x[2], -x[2]]), (a, b, alpha))
    per_request = torch.rand(2, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(dk.combine([a, b], [per_request, 1 - per_request]), per_request * a + (1 - per_request) * b)
    assert torch.equal(dk.combine([a], [0.0]), torch.zeros_like(a)) and torch.equal(dk.combine([a, b], [0.0, 1.0]), b)
    assert dk.combine([a.float(), b.to(torch.bfloat16)], [1, 1]).dtype == torch.float32


def test_combine_masks():
    a = torch.tensor([2.0, 1.0, -INF, 0.0, -1.0], requires_grad=True)
    b = torch.tensor([0.5, -INF, -INF, 1.0, 3.0, 9.0], requires_grad=True)
    # −(−inf) would be +inf, and −inf + inf NaN: a column that one of them masks stays masked
    out = dk.combine([a, b], [1.5, -0.5])
    assert out.isneginf().tolist() == [False, True, True, False, False] and not out.isnan().any()
    out[~out.isneginf()].sum().backward()
    assert a.grad.tolist() == [1.5, 0, 0, 1.5, 1.5] and b.grad.tolist() == [-0.5, 0, 0, -0.5, -0.5, 0]
    # an addend of weight 0 is not there at all, nor are its masks and NaN
    assert torch.equal(dk.combine([a, torch.full((5,), NAN)], [1.0, 0.0]), a)
    # p ≥ 0.2·max p under the first: a difference of 1.609
    plausible = dk.combine([a, b], [1.0, 0.0], plausibility=0.2)
    assert plausible.isneginf().tolist() == [False, False, True, True, True]
    assert dk.combine([a, b], [1.0, 0.0], plausibility=1.0).isneginf().tolist() == [False, True, True, True, True]
    boundary = torch.tensor([0.0, math.log(0.25), math.log(0.25) - 1e-3], dtype=torch.float64)
    assert dk.combine([boundary], [1.0], plausibility=0.25).isneginf().tolist() == [False, False, True]


@pytest.mark.parametrize(
    "words,arguments",
    [
        ("logits_list and weights must have the same length, at least 1; got 0 and 0", ([], [])),
        ("logits_list and weights must have the same length", ([torch.zeros(2)], [1.0, 2.0])),
        (r"logits_list\[1\] must have the token shape", ([torch.zeros(2, 3), torch.zeros(3, 3)], [1, 1])),
        ("plausibility must be in", ([torch.zeros(2)], [1.0], 0.0)),
        ("plausibility must be in", ([torch.zeros(2)], [1.0], 1.5)),
        ("plausibility must be a number or None; got str", ([torch.zeros(2)], [1.0], "high")),
        (r"weights\[1\] must be a number or a tensor; got str", ([torch.zeros(2), torch.zeros(2)], [1.0, "half"])),
    ],
)
def test_combine_arguments_are_checked(words, arguments):
    with pytest.raises((ValueError, TypeError), match=words):
        dk.combine(*arguments)
