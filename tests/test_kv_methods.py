"""The sets that published methods keep, against their listings in fp64, in padded batches and with every option of ``compress``."""

from __future__ import annotations

import math

import kv_listings as listing
import pytest
import torch
from servers import servers
from test_kv_scores import KINDS, K, Q, causal, inputs, name

from distilkernels import kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend,device", servers("window_importance"))
def test_methods_keep_what_their_listings_keep(backend, device, kind, dtype):
    full = torch.zeros(2, 2, 32, dtype=torch.float64)
    for groups, d, t, budget in ((4, 128, 151, 57), (7, 80, 97, 40), (1, 64, 83, 41), (8, 256, 67, 39)):
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


@pytest.mark.parametrize("call,error,match", [
    (lambda: kv.compress(None, K, K, 3, method=kv.RKV()), ValueError, "queries are needed"),
    (lambda: kv.compress(Q, K, K, 3, method=kv.RKV()), ValueError, "budget must be at least 8"),
    (lambda: kv.compress(Q, K, K, 3, method=kv.KaVa), TypeError, "method must be an object such as KaVa"),
    (lambda: kv.compress(Q, K, K, 3, method="kava"), TypeError, "method must be an object such as KaVa"),
    (lambda: kv.compress(Q[:1], K, K, 3, method=kv.LazyEviction()), ValueError, "queries .* and keys .* must share B and D"),
    (lambda: kv.compress(Q[..., :4], K, K, 3, method=kv.LazyEviction()), ValueError, "queries .* and keys .* must share B and D"),
    (lambda: kv.compress(Q, K, K, 9, method=kv.SnapKV(window=2), lse=torch.zeros(2, 4)), ValueError, r"lse must have shape \[B, Hq, W\]"),
    (lambda: kv.compress(Q, K, K, 3, method=kv.SnapKV(window=2, group_reduce="none")), ValueError, "scores 4 query heads; the cache has 2 KV heads"),
    (lambda: kv.compress(Q, K, K, 9, method=kv.SnapKV(window=2), lse=torch.zeros(2, 4, 3), span=(0, 9)), ValueError, "lse cannot serve a span"),
    (lambda: kv.KaVa(lam=1.5), ValueError, r"lam must be in \[0, 1\]"),
    (lambda: kv.KaVa(window=0), ValueError, "window must be a positive int"),
    (lambda: kv.RKV(threshold=-0.5), ValueError, "threshold must be at least 0"),
    (lambda: kv.SnapKV(window=0), ValueError, "window must be a positive int"),
    (lambda: kv.LazyEviction(h2="mri"), ValueError, "h2 must be one of minus_one"),
])  # fmt: skip
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
