"""Importance and redundancy on every backend against the published listings in fp64."""

from __future__ import annotations

import itertools
import math

import kv_listings as listing
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import servers

import distilkernels as dk
from distilkernels import BackendError, backends, kv
from distilkernels.primitives.window_importance import GROUP_REDUCE

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("random", "clustered", "duplicated")
# T is a multiple of nothing; D is those of models (80: not a power of two); groups 1 to 8
SHAPES = [(2, 1, 3, 131, 64, 5), (1, 2, 2, 77, 80, 9), (2, 4, 1, 263, 128, 3), (1, 8, 2, 61, 256, 17), (1, 3, 1, 7, 64, 1)]


def name(value) -> str:
    return str(value).removeprefix("torch.")


def refused(backend: str, primitive: str, *tensors) -> bool:
    return backends.module(backend).why_not(primitive, *tensors) is not None


def inputs(shape, dtype=torch.float32, kind="random", device="cpu", seed=0):
    b, groups, heads, t, d, w = shape
    g = torch.Generator().manual_seed(seed + 1)
    keys = listing.keys_of(kind, b, heads, t, d, seed).to(dtype)
    # sharp enough that a softmax is not flat
    queries = (torch.randn(b, heads * groups, w, d, generator=g) * 2).to(dtype)
    return queries.to(device), keys.to(device)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Scores are sums of T float32 numbers at most 1: relative to the row's largest."""
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.shape == want.shape
    if want.numel() == 0:
        return
    slack = 1e-11 if dtype == torch.float64 else 3e-6
    scale = want.abs().amax(-1, keepdim=True).clamp(min=1e-9)
    worst = ((got.double().cpu() - want) / scale).abs().max()
    assert not got.isnan().any() and worst <= slack, float(worst)


def causal(b: int, w: int, t: int) -> torch.Tensor:
    return (torch.arange(t) <= torch.arange(t - w, t)[:, None]).expand(b, w, t)


# ------------------------------------------------------------------------------------------ importance


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend,device", servers("window_importance"))
def test_importance_of_every_kind(backend, device, shape, dtype):
    queries, keys = inputs(shape, dtype, device=device)
    if refused(backend, "window_importance", keys, queries):
        with pytest.raises(BackendError, match=backend):
            kv.window_importance(queries, keys, backend=backend)
        return
    b, _, _, t, _, w = shape
    for group_reduce, window_reduce, sees in itertools.product(("max_logits", "max_probs", "mean_probs", "none"), ("mean", "sum", "max"), (False, True)):
        if window_reduce != "mean" and sees:
            continue  # the causal window and the reduction do not meet
        got = kv.window_importance(queries, keys, group_reduce=group_reduce, window_reduce=window_reduce, causal_window=sees, backend=backend)
        want = listing.importance(
            queries.cpu(), keys.cpu(), seen=causal(b, w, t) if sees else None, group_reduce=group_reduce, window_reduce=window_reduce
        )
        close(got, want, dtype)


@pytest.mark.parametrize("backend,device", servers("window_importance"))
def test_spans_masks_and_padded_queries(backend, device):
    """Whatever is outside may hold NaN; an empty span, a request without queries and one without keys score 0."""
    b, w, t = 5, 6, 67
    queries, keys = inputs((b, 2, 2, t, 64, w))
    start, stop = torch.tensor([0, 9, 20, 20, 66]), torch.tensor([67, 50, 20, 41, 67])
    mask = torch.rand(b, t, generator=torch.Generator().manual_seed(3)) > 0.2
    mask[4] = False
    query_mask = torch.rand(b, w, generator=torch.Generator().manual_seed(4)) > 0.4
    query_mask[3] = False
    position = torch.arange(t)
    inside = mask & (position >= start[:, None]) & (position < stop[:, None])
    keys[~inside[:, None, :, None].expand(keys.shape)] = math.nan
    queries[~query_mask[:, None, :, None].expand(queries.shape)] = math.nan
    for group_reduce, window_reduce in itertools.product(("max_logits", "max_probs", "mean_probs", "none"), ("mean", "sum", "max")):
        options = {"group_reduce": group_reduce, "window_reduce": window_reduce, "scale": 0.2}
        got = kv.window_importance(
            queries.to(device), keys.to(device), span=(start.to(device), stop.to(device)), mask=mask.to(device), query_mask=query_mask.to(device),
            backend=backend, **options,
        )  # fmt: skip
        want = listing.importance(queries, keys, seen=inside[:, None].expand(b, w, t), query_mask=query_mask, **options)
        close(got, want)
        assert (got.cpu()[[2, 3, 4]] == 0).all() and (got.cpu()[~inside[:, None].expand(got.shape)] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("group_reduce", ["max_probs", "mean_probs", "none"])
@pytest.mark.parametrize("backend,device", servers("window_importance"))
def test_a_given_lse_saves_a_pass_and_changes_nothing(backend, device, group_reduce, dtype):
    b, groups, _, t, d, w = shape = (2, 4, 2, 77, 64, 5)
    queries, keys = inputs(shape, dtype, device=device)
    mask = torch.ones(b, t, dtype=torch.bool, device=device)
    mask[1, :30] = False
    logits = queries.double() @ keys.double().repeat_interleave(groups, 1).mT * d**-0.5
    logits = logits.masked_fill(~(mask[:, None] & causal(b, w, t).to(device))[:, None], -math.inf)
    options = {"mask": mask, "group_reduce": group_reduce, "causal_window": True, "backend": backend}
    got = kv.window_importance(queries, keys, lse=logits.logsumexp(-1).float(), **options)
    torch.testing.assert_close(got, kv.window_importance(queries, keys, **options), rtol=2e-6, atol=2e-7)
    # a query without keys has an lse of −inf
    lse = logits.logsumexp(-1).float()
    lse[0] = -math.inf
    assert (kv.window_importance(queries, keys, lse=lse, **options)[0] == 0).all()


@pytest.mark.parametrize("backend,device", servers("window_importance"))
def test_a_causal_query_before_every_key_sees_nothing_and_counts(backend, device):
    queries, keys = inputs((1, 2, 2, 67, 64, 67))
    mask = torch.arange(67)[None] >= 8
    seen = causal(1, 67, 67) & mask[:, None]
    for group_reduce in ("max_logits", "max_probs", "mean_probs", "none"):
        got = kv.window_importance(
            queries.to(device), keys.to(device), mask=mask.to(device), causal_window=True, group_reduce=group_reduce, backend=backend
        )
        close(got, listing.importance(queries, keys, seen=seen, group_reduce=group_reduce))


@pytest.mark.parametrize("broken", ["query", "key"])
@pytest.mark.parametrize("group_reduce", GROUP_REDUCE)
def test_no_maximum_hides_a_nan(isa, group_reduce, broken):
    """As in the reference: a query that is NaN has no scores, and neither has any other where a key is."""
    queries, keys = inputs((2, 3, 2, 61, 64, 37))
    if broken == "query":
        queries[0, 1, 2] = math.nan
    else:
        keys[0, 1, 5] = math.nan
    got, want = (kv.window_importance(queries, keys, group_reduce=group_reduce, window_reduce="max", backend=b) for b in ("cpp", "reference"))
    assert want.isnan().any() and not want.isnan().all()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("backend,device", servers("window_importance"))
def test_any_strides(backend, device):
    """Queries and keys as models lay them out: [B, T, H, D] transposed, and a slice of a longer buffer."""
    queries = torch.randn(2, 5, 8, 64, device=device).transpose(1, 2)
    keys = torch.randn(2, 100, 2, 80, device=device).transpose(1, 2)[:, :, 7:74, :64]
    span = (torch.tensor([3, 0], device=device), torch.tensor([67, 41], device=device))
    got = kv.window_importance(queries, keys, span=span, backend=backend)
    torch.testing.assert_close(got, kv.window_importance(queries.contiguous(), keys.contiguous(), span=span, backend=backend))
    turned = torch.randn(2, 64, 2, 67, device=device).permute(0, 2, 3, 1)
    got = kv.window_importance(queries, turned, backend=backend)
    torch.testing.assert_close(got, kv.window_importance(queries, turned.contiguous(), backend=backend))


@pytest.mark.parametrize("pool", [("max", 7), ("avg", 5), ("avg", 1), ("max", 101)], ids=str)
def test_pooling_stays_inside_the_span(pool):
    """Averages count zeros outside, maxima count nothing; padding inside is left out of both and scores 0."""
    queries, keys = inputs((2, 2, 2, 67, 64, 5))
    start, stop = torch.tensor([0, 20]), torch.tensor([67, 51])
    mask = torch.rand(2, 67) > 0.2
    options = {"span": (start, stop), "mask": mask}
    plain, got = kv.window_importance(queries, keys, **options), kv.window_importance(queries, keys, pool=pool, **options)
    kind, size = pool
    for i in range(2):
        inside = [t for t in range(int(start[i]), int(stop[i])) if mask[i, t]]
        for t in range(67):
            near = [plain[i, :, s] for s in inside if abs(s - t) <= size // 2]
            want = torch.zeros(2)
            if t in inside:
                want = torch.stack(near).amax(0) if kind == "max" else torch.stack(near).sum(0) / size
            torch.testing.assert_close(got[i, :, t], want)


def test_an_empty_cache_has_no_scores_to_pool():
    queries, keys = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 0, 8)
    for method in (kv.RKV(window=2), kv.SnapKV(window=2)):
        kept = kv.compress(queries, keys, keys, 4, method=method)
        assert kept.scores.shape == (2, 2, 0) and (kept.selection.indices == -1).all() and (kept.keys == 0).all()


def test_pooling_before_a_causal_window_leaves_the_window_alone():
    queries, keys = inputs((1, 2, 2, 40, 64, 6))
    plain = kv.window_importance(queries, keys, causal_window=True)
    got = kv.window_importance(queries, keys, causal_window=True, pool=("avg", 5))
    torch.testing.assert_close(got[..., 34:], plain[..., 34:])
    torch.testing.assert_close(got[..., :34], torch.nn.functional.avg_pool1d(plain[..., :34], 5, stride=1, padding=2))


def test_a_causal_window_ends_at_the_last_real_token():
    """Right padding: the window is the request's own, as if it were alone."""
    queries, keys = inputs((2, 2, 2, 40, 64, 6))
    mask = torch.arange(40) < torch.tensor([40, 23])[:, None]
    got = kv.window_importance(queries, keys, mask=mask, causal_window=True, pool=("avg", 5))
    alone = kv.window_importance(queries[1:], keys[1:, :, :23], causal_window=True, pool=("avg", 5))
    torch.testing.assert_close(got[1:, :, :23], alone)
    assert (got[1, :, 23:] == 0).all()


# ------------------------------------------------------------------------------------------ redundancy


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("backend,device", servers("key_redundancy"))
def test_redundancy_is_the_published_one(backend, device, shape, kind, dtype):
    """5e-7 relative, on keys without neighbours, with near ones and with equal ones."""
    _, keys = inputs(shape, dtype, kind, device)
    if refused(backend, "key_redundancy", keys):
        with pytest.raises(BackendError, match=backend):
            kv.key_redundancy(keys, backend=backend)
        return
    slack = {"rtol": 1e-11, "atol": 0} if dtype == torch.float64 else {"rtol": 5e-7, "atol": 1e-9}
    for mode, want in (("kava", listing.kava_redundancy(keys.cpu())), ("rkv", listing.rkv_redundancy(keys.cpu()))):
        torch.testing.assert_close(kv.key_redundancy(keys, mode=mode, backend=backend).double().cpu(), want, **slack)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend,device", servers("key_redundancy"))
def test_redundancy_with_padding_and_spans(backend, device, kind):
    """A batch of requests is each request alone; masked keys hold NaN; one request has a single key and one has none."""
    t = 67
    keys = listing.keys_of(kind, 5, 2, t, 80)
    position = torch.arange(t)
    start, stop = torch.tensor([0, 13, 5, 30, 9]), torch.tensor([67, 67, 60, 31, 9])
    mask = torch.ones(5, t, dtype=torch.bool)
    mask[0, :11] = False  # left padding
    mask[1, 40:] = False  # right padding
    mask[2, 20:33] = False
    inside = mask & (position >= start[:, None]) & (position < stop[:, None])
    padded = keys.clone()
    padded[~inside[:, None, :, None].expand(keys.shape)] = math.nan
    span = (start.to(device), stop.to(device))
    for mode in ("kava", "rkv"):
        got = kv.key_redundancy(padded.to(device), mode=mode, span=span, mask=mask.to(device), backend=backend).cpu()
        assert (got[~inside[:, None].expand(got.shape)] == 0).all()
        for i in range(5):
            alone = keys[i : i + 1, :, inside[i]]
            want = listing.kava_redundancy(alone) if mode == "kava" else listing.rkv_redundancy(alone)
            torch.testing.assert_close(got[i : i + 1, :, inside[i]].double(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend,device", servers("key_redundancy"))
def test_pad_in_softmax_is_the_published_listing(backend, device):
    """Padding enters the denominator as exp(0): scores shrink, and the order stays."""
    keys = listing.keys_of("clustered", 2, 2, 51, 64)
    mask = torch.arange(51) >= torch.tensor([20, 0])[:, None]
    got = kv.key_redundancy(keys.to(device), mask=mask.to(device), pad_in_softmax=True, backend=backend)
    torch.testing.assert_close(got.double().cpu(), listing.kava_redundancy(keys, mask, pad_in_softmax=True), rtol=1e-6, atol=1e-9)
    assert got[0].sum(-1).max() < 0.8 and (got[1].sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("backend,device", servers("key_redundancy"))
def test_the_last_neighbour_rule(backend, device):
    """By hand: row 0's last neighbour is column 2; rows without one lose column 0; row 0 itself has C[0, 0] = 0 to lose."""
    keys = torch.tensor([[1.0, 0, 0], [1, 0.1, 0], [1, 0, 0.1], [0, 1, 0], [0, 0, -1]])[None, None].to(device)
    unit = keys[0, 0].double().cpu() / keys[0, 0].double().cpu().norm(dim=-1, keepdim=True)
    cosine = unit @ unit.T
    cosine.fill_diagonal_(0)
    for row, column in ((0, 2), (1, 2), (2, 1), (3, 0), (4, 0)):
        cosine[row, column] = 0
    got = kv.key_redundancy(keys, mode="rkv", backend=backend)[0, 0]
    torch.testing.assert_close(got.double().cpu(), cosine.mean(0).softmax(-1), rtol=1e-6, atol=0)
    lone = kv.key_redundancy(torch.eye(3, device=device)[None, None], mode="rkv", backend=backend)[0, 0]
    torch.testing.assert_close(lone.cpu(), torch.full((3,), 1 / 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
@pytest.mark.parametrize("backend,device", servers("key_redundancy"))
def test_large_and_small_16_bit_keys(backend, device, dtype):
    """Squares of these overflow float16, or vanish in it; a zero key has cosine 0 with all."""
    keys = listing.keys_of("clustered", 1, 2, 61, 128)
    keys[:, 0] *= 3000
    keys[:, 1] *= 1e-4
    keys[:, :, 5] = 0
    keys = keys.to(dtype).to(device)
    for mode, want in (("kava", listing.kava_redundancy(keys.cpu())), ("rkv", listing.rkv_redundancy(keys.cpu()))):
        torch.testing.assert_close(kv.key_redundancy(keys, mode=mode, backend=backend).double().cpu(), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend,device", servers("key_redundancy"))
def test_no_cosine_is_above_one(backend, device):
    """That of equal keys is 1 but for its rounding: at a threshold of 1 they are no neighbours, as at any beyond."""
    _, keys = inputs((2, 1, 3, 67, 80, 1), kind="duplicated", device=device)
    at_one, beyond, below = (kv.key_redundancy(keys, mode="rkv", threshold=t, backend=backend) for t in (1.0, 1.5, 1 - 1e-5))
    assert torch.equal(at_one, beyond) and not torch.equal(at_one, below)


@pytest.mark.parametrize("backend,device", servers("key_redundancy"))
def test_redundancy_is_deterministic_and_takes_strides(backend, device):
    keys = listing.keys_of("clustered", 2, 3, 131, 64).to(device)
    strided = keys.transpose(1, 2).contiguous().transpose(1, 2)
    for mode in ("kava", "rkv"):
        once = kv.key_redundancy(keys, mode=mode, backend=backend)
        assert torch.equal(once, kv.key_redundancy(keys, mode=mode, backend=backend))
        torch.testing.assert_close(kv.key_redundancy(strided, mode=mode, backend=backend), once, rtol=1e-6, atol=0)


@settings(max_examples=25, deadline=None)
@given(st.tuples(st.integers(0, 3), st.integers(1, 8), st.integers(1, 3), st.integers(0, 40), st.integers(1, 40), st.integers(0, 9)), st.integers(0, 9))
def test_any_shape(shape, seed):
    b, _, heads, t, d, _ = shape
    queries, keys = inputs(shape, seed=seed)
    for backend in ("cpp", "reference"):
        if not refused(backend, "window_importance", keys, queries):
            got = kv.window_importance(queries, keys, group_reduce="max_probs", window_reduce="max", backend=backend)
            close(got, listing.importance(queries, keys, group_reduce="max_probs", window_reduce="max").view(b, heads, t))
        if not refused(backend, "key_redundancy", keys) and d > 1:
            got = kv.key_redundancy(keys, mode="rkv", threshold=0.3, backend=backend)
            torch.testing.assert_close(got.double(), listing.rkv_redundancy(keys, threshold=0.3), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend,device", servers("window_importance"))
def test_opcheck(backend, device):
    queries, keys = inputs((2, 2, 2, 19, 64, 3), device=device)
    start, stop = torch.tensor([0, 4], dtype=torch.int32, device=device), torch.tensor([19, 11], dtype=torch.int32, device=device)
    mask = torch.ones(2, 19, dtype=torch.bool, device=device)
    for reduce in ("none", "max_logits"):
        arguments = (queries, keys, start, stop, mask, None, 0.1, reduce, "mean", True, None, start, stop, backend)
        torch.library.opcheck(torch.ops.distilkernels.window_importance.default, arguments)
    torch.library.opcheck(torch.ops.distilkernels.key_redundancy.default, (keys, start, stop, mask, 0.5, True, True, "reference"))


Q, K = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8)


@pytest.mark.parametrize("call,error,match", [
    (lambda: kv.window_importance(Q[:1], K), ValueError, "queries .* and keys .* must share B and D"),
    (lambda: kv.window_importance(Q[:, :3], K), ValueError, "Hkv must divide Hq"),
    (lambda: kv.window_importance(Q[:, :0], K), ValueError, "Hkv must divide Hq"),
    (lambda: kv.window_importance(Q.double(), K), ValueError, "queries must have the keys' dtype"),
    (lambda: kv.window_importance(Q, K[0]), ValueError, r"keys must have shape \[B, H, T, D\]"),
    (lambda: kv.window_importance(Q, K.long()), TypeError, "keys must be float32"),
    (lambda: kv.window_importance(Q, K, group_reduce="mean"), ValueError, "group_reduce must be one of max_logits"),
    (lambda: kv.window_importance(Q, K, window_reduce="min"), ValueError, "window_reduce must be one of mean"),
    (lambda: kv.window_importance(Q, K, pool=("avg", 4)), ValueError, "pool's size must be an odd int"),
    (lambda: kv.window_importance(Q, K, pool="avg"), ValueError, "pool must be None"),
    (lambda: kv.window_importance(Q, K, mask=torch.ones(2, 9)), TypeError, "mask must be a bool tensor"),
    (lambda: kv.window_importance(Q, K, query_mask=torch.ones(2, 9).bool()), ValueError, r"query_mask must have shape \(2, 3\)"),
    (lambda: kv.window_importance(Q, K, span=(0, 10)), ValueError, r"span must have 0 ≤ start ≤ stop ≤ T = 9; got \(0, 10\)"),
    (lambda: kv.window_importance(Q, K, span=(torch.tensor([0, 5]), 4)), ValueError, r"got \(5, 4\) for request 1"),
    (lambda: kv.window_importance(Q, K, span=(0, 2**40)), ValueError, r"got \(0, 1099511627776\)"),
    (lambda: kv.window_importance(Q, K, span=(torch.tensor([0, 2**32]), torch.tensor([4, 2**32 + 5]))), ValueError, "for request 1"),
    (lambda: kv.window_importance(Q, K, span=5), TypeError, r"span must be \(start, stop\)"),
    (lambda: kv.window_importance(Q, K, span=(0.0, 4)), TypeError, "span's start must be an int"),
    (lambda: kv.window_importance(Q, K, lse=torch.zeros(2, 4, 3)), ValueError, "lse cannot serve group_reduce='max_logits'"),
    (lambda: kv.window_importance(Q, K, lse=torch.zeros(2, 4, 3), group_reduce="none", span=(0, 4)), ValueError, "lse cannot serve a span"),
    (lambda: kv.window_importance(Q, K, lse=torch.zeros(2, 4), group_reduce="none"), ValueError, r"lse must have shape \[B, Hq, W\] = \(2, 4, 3\)"),
    (lambda: kv.window_importance(Q, K, scale=math.nan), ValueError, "scale must be finite"),
    (lambda: kv.key_redundancy(K, mode="kv"), ValueError, "mode must be one of kava, rkv"),
    (lambda: kv.key_redundancy(K, mode="rkv", threshold=-0.1), ValueError, "threshold must be at least 0"),
    (lambda: kv.key_redundancy(K, mode="rkv", pad_in_softmax=True), ValueError, "pad_in_softmax=True belongs to mode='kava'"),
])  # fmt: skip
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_kv_is_reached_by_name():
    assert dk.kv is kv and "CompressedCache" in kv.__all__
