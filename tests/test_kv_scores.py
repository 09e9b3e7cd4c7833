"""Importance and redundancy on every backend against the published listings in fp64, and the sets that methods keep by them."""

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
def test_redundancy_is_deterministic_and_takes_strides(backend, device):
    keys = listing.keys_of("clustered", 2, 3, 131, 64).to(device)
    strided = keys.transpose(1, 2).contiguous().transpose(1, 2)
    for mode in ("kava", "rkv"):
        once = kv.key_redundancy(keys, mode=mode, backend=backend)
        assert torch.equal(once, kv.key_redundancy(keys, mode=mode, backend=backend))
        torch.testing.assert_close(kv.key_redundancy(strided, mode=mode, backend=backend), once, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------ what methods keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend,device", servers("window_importance"))
def test_methods_keep_what_their_listings_keep(backend, device, kind, dtype):
    full = torch.zeros(2, 2, 32, dtype=torch.float64)
    for groups, d, t, budget in ((4, 128, 151, 57), (7, 80, 97, 40)):
        queries, keys = inputs((2, groups, 2, t, d, 32), dtype, kind)
        values = torch.randn(2, 2, t, d).to(dtype)
        for method, scores, window in (
            (kv.KaVa(), listing.kava(queries, keys), 0),
            (kv.RKV(), listing.rkv(queries, keys), 8),
            (kv.RKV(lam=0.07, window=5), listing.rkv(queries, keys, window=5, lam=0.07), 5),
            (kv.SnapKV(), listing.kvpress_snapkv(queries, keys), 32),
            (kv.CosineOnly(), listing.kava(queries, keys, lam=0), 0),
            (kv.AttentionOnly(), listing.kava(queries, keys, lam=1), 0),
            (kv.AttentionOnly(group_reduce="mean_probs"), listing.attention(queries, keys, torch.tensor(True)).unflatten(1, (2, -1)).mean((2, 3)), 0),
            (kv.Crop(), -torch.arange(t).double().expand(2, 2, t), 0),
        ):
            got = kv.compress(queries.to(device), keys.to(device), values.to(device), budget, method=method, backend=backend)
            wanted = torch.cat([scores, full[..., :window] + math.inf], -1)
            listing.assert_kept(got.selection.indices.cpu(), wanted, budget, 1e-7 * float(scores.abs().max()))
            assert (got.selection.indices.diff() > 0).all() and (got.selection.counts == budget).all()
            assert (got.selection.indices.cpu()[..., budget - window :] == torch.arange(t - window, t)).all()
            place = got.selection.indices.cpu().long()[..., None].expand(2, 2, budget, d)
            assert torch.equal(got.keys.cpu(), keys.gather(2, place)) and torch.equal(got.values.cpu(), values.gather(2, place))


def test_snapkv_of_one_head_a_query_is_the_original():
    queries, keys = inputs((1, 1, 6, 90, 64, 32), kind="clustered")
    got = kv.compress(queries, keys, keys, 50, method=kv.SnapKV(group_reduce="none"))
    wanted = torch.nn.functional.pad(listing.snapkv(queries, keys), (0, 32), value=math.inf)
    listing.assert_kept(got.selection.indices, wanted, 50, 1e-7)
    lse = (queries.double() @ keys.double().mT / 8).masked_fill(~causal(1, 32, 90), -math.inf).logsumexp(-1)
    again = kv.compress(queries, keys, keys, 50, method=kv.SnapKV(group_reduce="none"), lse=lse)
    assert torch.equal(again.selection.indices, got.selection.indices)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "method", [kv.KaVa(), kv.RKV(window=6), kv.SnapKV(window=6), kv.LazyEviction(alpha=0.02, window=4), kv.CosineOnly(), kv.Crop()],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_a_padded_batch_is_its_requests_alone(method, side):
    """Also one shorter than the window, one shorter than the budget, and the queries of all tokens given."""
    t, budget, lengths = 40, 12, (40, 23, 9, 3)
    queries, keys = inputs((4, 2, 2, t, 64, t), kind="clustered")
    real = torch.arange(t) < torch.tensor(lengths)[:, None]
    real = real if side == "right" else real.flip(-1)
    queries, keys = (x.masked_fill(~real[:, None, :, None], math.nan) for x in (queries, keys))
    batch = kv.compress(queries, keys, keys, budget, method=method, mask=real, query_mask=real)
    for i, n in enumerate(lengths):
        alone = kv.compress(queries[i : i + 1, :, real[i]], keys[i : i + 1, :, real[i]], keys[i : i + 1, :, real[i]], budget, method=method)
        assert batch.selection.counts[i].tolist() == [min(n, budget)] * 2
        first = 0 if side == "right" else t - n
        kept = alone.selection.indices[0]
        assert torch.equal(batch.selection.indices[i], torch.where(kept >= 0, kept + first, -1))
        if not isinstance(method, kv.Crop):  # its scores are positions
            torch.testing.assert_close(batch.scores[i][:, real[i]], alone.scores[0], rtol=1e-5, atol=1e-7)
        assert not batch.keys[i].isnan().any() and (batch.keys[i][kept < 0] == 0).all()


@pytest.mark.parametrize("method", [kv.RKV(window=8), kv.SnapKV(window=8)], ids=lambda m: type(m).__name__)
def test_a_masked_query_inside_the_window_counts_nowhere(method):
    """Known by the keys' mask or by the queries' own, whether those of all tokens are given or the last ones."""
    queries, keys = inputs((2, 2, 2, 40, 64, 40), kind="clustered")
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, 36] = False
    others = torch.tensor([i for i in range(32, 40) if i != 36])
    broken = queries.masked_fill(~real[:, None, :, None], math.nan)
    for q, own in ((broken, real), (broken[:, :, -8:], real[:, -8:])):
        by_queries = kv.compress(q, keys, keys, 20, method=method, query_mask=own).scores
        torch.testing.assert_close(by_queries[:1], kv.compress(queries[:1, :, -8:], keys[:1], keys[:1], 20, method=method).scores)
        if isinstance(method, kv.RKV):  # no causal places: the query may as well not be there
            want = kv.window_importance(queries[1:, :, others], keys[1:], span=(0, 32), pool=("max", 7)) * 0.1 - 0.9 * kv.key_redundancy(keys[1:], mode="rkv")
            torch.testing.assert_close(by_queries[1:], want)
        by_keys = kv.compress(q, keys, keys, 20, method=method, mask=real).scores
        assert torch.equal(by_keys, kv.compress(q, keys, keys, 20, method=method, mask=real, query_mask=own).scores) and not by_keys.isnan().any()


def test_compress_hands_its_options_on():
    queries, keys = inputs((2, 2, 2, 40, 64, 6), kind="clustered")
    mask = torch.arange(40) >= torch.tensor([0, 15])[:, None]
    listed = kv.key_redundancy(keys, mask=mask, pad_in_softmax=True)
    assert torch.equal(kv.compress(None, keys, keys, 9, method=kv.CosineOnly(pad_in_softmax=True), mask=mask).scores, listed)
    got = kv.compress(queries, keys, keys, 9, method=kv.KaVa(pad_in_softmax=True), mask=mask).scores
    torch.testing.assert_close(got.double(), listing.kava(queries, keys, mask, pad_in_softmax=True), rtol=1e-5, atol=1e-8)
    near = kv.key_redundancy(keys, mode="rkv", threshold=0.97)
    assert not torch.equal(near, kv.key_redundancy(keys, mode="rkv"))
    assert torch.equal(kv.compress(queries, keys, keys, 9, method=kv.RKV(lam=0.0, window=6, threshold=0.97)).scores, -near)
    rope = kv.Rope(torch.rand(32), target="slots")
    got = kv.compress(queries, keys, keys, 9, method=kv.KaVa(), mask=mask, protect_first=3, order="score", rotate=rope)
    want = kv.select(got.scores, 9, protect_first=3, order="score", mask=mask)
    assert torch.equal(got.selection.indices, want.indices) and not (want.indices.diff() > 0).all() and (want.indices[1, :, :3] == torch.arange(15, 18)).all()
    assert torch.equal(got.keys, kv.gather(keys, keys, want, rotate=rope)[0])


def test_methods_take_a_scale():
    queries, keys = inputs((1, 2, 2, 40, 64, 40))
    for method in (kv.KaVa(), kv.RKV(window=4), kv.SnapKV(window=4), kv.LazyEviction(alpha=0.02, window=4)):
        want = kv.compress(queries, keys, keys, 9, method=method, scale=0.25)
        assert torch.equal(kv.compress(queries * 2, keys, keys, 9, method=method, scale=0.125).scores, want.scores)


def test_kava_of_a_chain_of_thought_inside_a_sequence():
    """The span is each request's chain of thought, the queries its answer's."""
    queries, keys = inputs((2, 2, 2, 60, 64, 7), kind="clustered")
    answer = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 0, 0]]).bool()
    start, stop = torch.tensor([5, 20]), torch.tensor([50, 33])
    got = kv.compress(queries, keys, keys, 24, method=kv.KaVa(), span=(start, stop), query_mask=answer)
    for i in range(2):
        inside = keys[i : i + 1, :, start[i] : stop[i]]
        want = listing.kava(queries[i : i + 1, :, answer[i]], inside)
        torch.testing.assert_close(got.scores[i : i + 1, :, start[i] : stop[i]].double(), want, rtol=1e-5, atol=1e-8)
    assert got.selection.counts.tolist() == [[24, 24], [13, 13]]
    assert (got.selection.indices[1] >= -1).all() and (got.selection.indices[1, :, 13:] == -1).all()


def test_methods_differ():
    """The first two reductions keep different sets: why they are options."""
    queries, keys = inputs((1, 8, 4, 400, 64, 16))
    kept = [set(kv.select(kv.window_importance(queries, keys, group_reduce=r), 40).indices[0, 0].tolist()) for r in ("max_logits", "max_probs")]
    assert len(kept[0] & kept[1]) < 40


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
    (lambda: kv.compress(None, K, K, 3, method=kv.RKV()), ValueError, "queries are needed"),
    (lambda: kv.compress(Q, K, K, 3, method=kv.RKV()), ValueError, "budget must be at least 8"),
    (lambda: kv.compress(Q, K, K, 3, method=kv.KaVa), TypeError, "method must be an object such as KaVa"),
    (lambda: kv.compress(Q, K, K, 3, method="kava"), TypeError, "method must be an object such as KaVa"),
    (lambda: kv.compress(Q[:1], K, K, 3, method=kv.LazyEviction()), ValueError, "queries .* and keys .* must share B and D"),
    (lambda: kv.compress(Q[..., :4], K, K, 3, method=kv.LazyEviction()), ValueError, "queries .* and keys .* must share B and D"),
    (lambda: kv.compress(Q, K, K, 9, method=kv.SnapKV(window=2), lse=torch.zeros(2, 4)), ValueError, r"lse must have shape \[B, Hq, W\]"),
    (lambda: kv.compress(Q, K, K, 3, method=kv.SnapKV(window=2, group_reduce="none")), ValueError, "scores 4 query heads; the cache has 2 KV heads"),
    (lambda: kv.KaVa(lam=1.5), ValueError, r"lam must be in \[0, 1\]"),
    (lambda: kv.KaVa(window=0), ValueError, "window must be a positive int"),
    (lambda: kv.RKV(threshold=-0.5), ValueError, "threshold must be at least 0"),
    (lambda: kv.SnapKV(window=0), ValueError, "window must be a positive int"),
    (lambda: kv.LazyEviction(h2="mri"), ValueError, "h2 must be one of minus_one"),
])  # fmt: skip
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_kv_is_reached_by_name():
    assert dk.kv is kv and "CompressedCache" in kv.__all__
