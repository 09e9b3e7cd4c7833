"""`decoding.verify` and `decoding.sample` against a float64 oracle under the same random words, and every edge that has a defined answer."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import oracle_decoding as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import servers

from distilkernels import decoding as dk
from distilkernels.decoding import Sampling, Source
from distilkernels.primitives import sample_rows

NAN, INF = math.nan, math.inf
KINDS = ("reverse", "reverse_retry", "top_k", "top_p", "speculative", "block", "typical", "threshold", "greedy")
BACKENDS = pytest.mark.parametrize("backend,device", servers("sample_rows"))
EPSILON = 1e-5  # a decision nearer than this (relative) may go either way in float32


def a_rule(kind: str, b: int, g: torch.Generator, per_request: bool) -> dk.Rule:
    def value(low: float, high: float):
        x = low + (high - low) * torch.rand(b, generator=g, dtype=torch.float64)
        return x if per_request and b else float(x[0]) if b else high

    def count(low: int, high: int):
        x = torch.randint(low, high + 1, (max(b, 1),), generator=g)
        return x[:b] if per_request and b else int(x[0])

    coin = bool(torch.randint(2, (), generator=g))
    end = (None, "draw", "argmax")[int(torch.randint(3, (), generator=g))]
    return {
        "reverse": lambda: dk.ReverseSpeculative(value(0.02, 0.3), judge_top_k=count(1, 5) if coin else None, bonus=end),
        "reverse_retry": lambda: dk.ReverseSpeculative(
            value(0.02, 0.5), trials=2 + 3 * coin, proposer_top_k=count(1, 5), judge_top_k=count(1, 5) if coin else None, bonus=end
        ),
        "top_k": lambda: dk.TopKAcceptance(count(1, 4), bonus=end),
        "top_p": lambda: dk.TopPAcceptance(value(0.0, 1.2), bonus=end),
        "speculative": lambda: dk.SpeculativeSampling(bonus=end),
        "block": lambda: dk.BlockVerification(bonus=end),
        "typical": lambda: dk.TypicalAcceptance(value(0.02, 0.3), value(0.05, 0.9), fallback="argmax" if coin else "draw", bonus=end),
        "threshold": lambda: dk.ThresholdAcceptance(value(0.02, 0.4), fallback="argmax" if coin else "draw", bonus=end),
        "greedy": lambda: dk.GreedyAcceptance(bonus=end),
    }[kind]()


def some_sampling(b: int, g: torch.Generator, per_request: bool) -> Sampling:
    def on() -> bool:
        return bool(torch.rand((), generator=g) < 0.4)

    def value(low: float, high: float):
        x = low + (high - low) * torch.rand(max(b, 1), generator=g, dtype=torch.float64)
        return x[:b] if per_request and b else float(x[0])

    temperature = value(0.4, 1.8) if on() else 1.0
    if on() and per_request and b:
        temperature = torch.where(torch.rand(b, generator=g) < 0.3, 0.0, torch.as_tensor(temperature).expand(b).double())
    top_k = torch.randint(1, 8, (max(b, 1),), generator=g)
    return Sampling(temperature, (top_k[:b] if per_request and b else int(top_k[0])) if on() else None, value(0.0, 1.1) if on() else None,
                    value(0.0, 0.5) if on() else None)  # fmt: skip


def some_block(b: int, g: int, vp: int, vj: int, bonus_row: bool, content: str, r: torch.Generator) -> dict:
    """Proposals, rows, lengths and places; proposals mostly from both sides' likely ids, some −1 or beyond the judge's columns."""
    judge = torch.randn(b, g + bonus_row, vj, generator=r) * 2
    proposer = torch.randn(b, g, vp, generator=r) * 2
    common = min(vp, vj)
    if content == "alike":
        proposer[..., :common] = judge[:, :g, :common] + 0.3 * torch.randn(b, g, common, generator=r)
    elif content == "masked":
        judge[..., 1:] = judge[..., 1:].masked_fill(torch.rand(judge[..., 1:].shape, generator=r) < 0.4, -INF)
        proposer[..., 1:] = proposer[..., 1:].masked_fill(torch.rand(proposer[..., 1:].shape, generator=r) < 0.4, -INF)
    elif content == "broken" and judge.numel():
        for rows in (judge, proposer):
            spoiled = torch.rand(rows.shape[:2], generator=r) < 0.15
            rows[..., 0] = torch.where(spoiled, torch.tensor([NAN, INF])[torch.randint(2, spoiled.shape, generator=r)], rows[..., 0])
            rows[torch.rand(rows.shape[:2], generator=r) < 0.08] = -INF
    noise = -torch.log(-torch.log(torch.rand(b, g, vp, generator=r).clamp(1e-6, 1 - 1e-6)))
    proposals = (proposer.nan_to_num(0, 9, -99) + noise).argmax(-1) if vp else torch.zeros(b, g, dtype=torch.int64)
    proposals[torch.rand(b, g, generator=r) < 0.06] = -1
    return {
        "proposals": proposals, "proposer_logits": proposer, "judge_logits": judge,
        "lengths": torch.randint(0, g + 1, (b,), generator=r) if torch.rand((), generator=r) < 0.6 else None,
        "seeds": torch.randint(-(2**62), 2**62, (b,), generator=r), "positions": torch.randint(0, 10**6, (b,), generator=r),
    }  # fmt: skip


def on(device: str, value):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (Sampling, dk.Rule)):
        moved = {f.name: on(device, getattr(value, f.name)) for f in fields(value)} if hasattr(value, "__dataclass_fields__") else {}
        return replace(value, **moved)
    return value


def compare(rule: dk.Rule, block: dict, backend: str, device: str = "cpu", **more) -> tuple[int, int]:
    """Asserts the oracle's answer for every request that is not a near tie; (requests, near ties)."""
    want = oracle.verify(rule, **block, **more)
    got = dk.verify(on(device, rule), **{k: on(device, v) for k, v in (block | more).items()}, backend=backend)
    g = block["proposals"].shape[1]
    labels = [t.double().cpu() for t in (got.judge_logprobs, got.proposer_logprobs, got.judge_rank, got.judge_entropy)]
    near = 0
    for b, w in enumerate(want):
        if w.near < EPSILON:
            near += 1
            continue
        mine = tuple(int(t[b]) for t in (got.valid, got.num_accepted, got.next_token, got.next_source))
        assert mine == (w.valid, w.num_accepted, w.next_token, w.next_source), f"request {b} of {rule}: {mine}, not {w}"
        assert got.accepted[b].tolist() == [i < w.num_accepted for i in range(g)]
        emitted = block["proposals"][b, : w.num_accepted].tolist() + [w.next_token] * (w.num_accepted <= g)
        assert got.tokens(block["proposals"].to(device))[b].tolist() == emitted + [-1] * (g + 1 - len(emitted))
        nothing = (NAN, NAN, -1, NAN)
        want_labels = torch.tensor(w.labels + [nothing] * (g + 1 - len(w.labels)), dtype=torch.float64).view(g + 1, 4)
        for column, mine in enumerate(labels):
            torch.testing.assert_close(mine[b], want_labels[:, column], rtol=2e-5, atol=2e-5, equal_nan=True)
    return len(want), near


@BACKENDS
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_on_generated_blocks(kind, backend, device):
    total = [0, 0]

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        st.integers(0, 2**31), st.integers(0, 7), st.integers(0, 3), st.sampled_from([(13, 13), (13, 9), (7, 18), (1, 1), (4, 4)]),
        st.booleans(), st.booleans(), st.sampled_from(["normal", "alike", "masked", "broken"]),
    )  # fmt: skip
    def generated(seed, b, g, widths, per_request, bonus_row, content):
        r = torch.Generator().manual_seed(seed)
        rule = a_rule(kind, b, r, per_request)
        block = some_block(b, g, *widths, bonus_row, content, r)
        sides = {"proposer": some_sampling(b, r, per_request), "judge": some_sampling(b, r, per_request)}
        counted = compare(rule, block, backend, device, **sides, valid_vocab=5 if seed % 3 == 0 and min(widths) > 5 else None)
        total[0], total[1] = total[0] + counted[0], total[1] + counted[1]

    generated()
    assert total[0] > 60 and total[1] <= 2 + total[0] // 300
