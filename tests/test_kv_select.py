"""Which entries are kept, exactly, and the keys and values at them: every backend's gather against a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import servers

from distilkernels import BackendError, backends, kv
from distilkernels.primitives.kv_gather import gather as gather_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def kept_by_hand(row: list[float], valid: list[bool], budget: int, first: int, last: int, order: str) -> list[int]:
    """Python's sort: protected ones, then by descending score (NaN below all), then by index."""
    alive = [i for i, v in enumerate(valid) if v]
    protected = set(alive[:first]) | set(alive[max(len(alive) - last, 0) :])
    rank = lambda i: (0, 0, 0, i) if i in protected else (1, math.isnan(row[i]), 0 if math.isnan(row[i]) else -row[i], i)
    best = sorted(alive, key=rank)[:budget]
    return sorted(best) if order == "time" else best


def assert_selected(scores, budgets, selection, valid, first=0, last=0, order="time"):
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            want = kept_by_hand(scores[b, h].tolist(), valid[b, h].tolist(), int(budgets[b, h]), first, last, order)
            got = selection.indices[b, h].tolist()
            assert got[: len(want)] == want and set(got[len(want) :]) <= {-1}
            assert int(selection.counts[b, h]) == len(want)


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 40)), st.integers(0, 45), st.integers(0, 3), st.integers(0, 3),
    st.sampled_from(["time", "score"]), st.booleans(), st.booleans(), st.integers(0, 999),
)  # fmt: skip
def test_selection_is_that_of_a_sort(shape, budget, first, last, order, ties, masked, seed):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=g)
    scores = scores.mul(2).round() if ties else scores
    scores[torch.rand(shape, generator=g) < 0.1] = math.nan
    scores[torch.rand(shape, generator=g) < 0.1] = -math.inf
    scores[torch.rand(shape, generator=g) < 0.05] = math.inf
    mask = torch.rand(shape[0], shape[2], generator=g) > 0.4 if masked else None
    valid = torch.ones(shape, dtype=torch.bool) if mask is None else mask[:, None].expand(shape)
    budget = max(budget, first + last)
    got = kv.select(scores, budget, protect_first=first, protect_last=last, mask=mask, order=order)
    assert got.indices.shape == (*shape[:2], budget) and got.indices.dtype == got.counts.dtype == torch.int32
    assert_selected(scores, torch.full(shape[:2], budget), got, valid, first, last, order)
    assert torch.equal(got.mask.sum(-1), got.counts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_sets_of_thousands(dtype):
    """Beyond 1,024 entries another path sorts; the order is the same, ties by the thousand included."""
    scores = (torch.randn(2, 2, 3001) * 3).round().to(dtype)
    valid = torch.ones(2, 2, 3001, dtype=torch.bool)
    small, large = kv.select(scores, 1024, order="score"), kv.select(scores, 1025, order="score")
    assert torch.equal(large.indices[..., :1024], small.indices)
    assert_selected(scores, torch.full((2, 2), 1025), large, valid, order="score")


def test_budgets_of_requests_and_heads():
    scores, valid = torch.randn(2, 3, 20), torch.ones(2, 3, 20, dtype=torch.bool)
    each = torch.tensor([[3, 20, 0], [7, 1, 25]])
    got = kv.select(scores, each)
    assert got.indices.shape == (2, 3, 25)
    assert_selected(scores, each, got, valid)
    for budget in ([4, 9], torch.tensor([4, 9])):
        got = kv.select(scores, budget)
        assert got.indices.shape == (2, 3, 9)
        assert_selected(scores, torch.tensor([[4] * 3, [9] * 3]), got, valid)
    wide, narrow = kv.select(scores, 5, slots=8), kv.select(scores, 5, slots=3)
    assert torch.equal(wide.indices[..., :5], kv.select(scores, 5).indices) and (wide.indices[..., 5:] == -1).all()
    assert narrow.counts.tolist() == [[3] * 3] * 2
    assert torch.equal(narrow.indices, kv.select(scores, 3).indices)


def test_masks_of_heads_and_protection_counts_valid_tokens():
    scores = torch.zeros(1, 2, 8)
    mask = torch.tensor([[[0, 1, 1, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0, 0, 0]]]).bool()
    got = kv.select(scores, 3, protect_last=2, mask=mask)
    assert got.indices.tolist() == [[[1, 4, 6], [0, 1, 2]]]
    got = kv.select(scores, 2, protect_first=1, protect_last=1, mask=mask)
    assert got.indices.tolist() == [[[1, 6], [0, 2]]]


def test_no_batch_or_padding_changes_a_selection():
    scores = torch.randn(5, 2, 300).mul(3).round()
    whole = kv.select(scores, 40)
    assert torch.equal(kv.select(scores[3:4], 40).indices, whole.indices[3:4])
    padded = torch.cat([torch.full((5, 2, 7), math.inf), scores], -1)
    mask = torch.arange(307).expand(5, 307) >= 7
    assert torch.equal(kv.select(padded, 40, mask=mask).indices - 7, whole.indices)


# ---------------------------------------------------------------------------------------------- gather


def gathered_by_hand(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(*indices.shape, x.shape[3], dtype=x.dtype)
    for b in range(indices.shape[0]):
        for h in range(indices.shape[1]):
            for m, i in enumerate(indices[b, h].tolist()):
                if i >= 0:
                    out[b, h, m] = x[b, h, i]
    return out


def some_indices(b: int, h: int, t: int, m: int) -> torch.Tensor:
    """Ascending, another number of them in every head."""
    rows = torch.stack([torch.randperm(t)[:m].sort().values for _ in range(b * h)]).view(b, h, m)
    counts = torch.randint(0, m + 1, (b, h))
    counts[0, 0] = m
    return rows.masked_fill(torch.arange(m) >= counts[..., None], -1).int()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend,device", servers("kv_gather"))
def test_gather_is_exact(backend, device, dtype):
    """The bits of the cache; odd D, another width for values, strided caches, the 32nd and 33rd slot."""
    for b, h, t, d, dv, m in ((2, 3, 37, 64, 40, 33), (1, 2, 9, 80, 80, 9), (3, 1, 5, 7, 129, 2)):
        keys, values = torch.randn(b, h, t, d).to(dtype), torch.randn(b, t, h, dv).to(dtype).transpose(1, 2)
        indices = some_indices(b, h, t, m)
        if backends.module(backend).why_not("kv_gather", keys.to(device), values.to(device)) is not None:
            with pytest.raises(BackendError, match=backend):
                kv.gather(keys.to(device), values.to(device), indices.to(device), backend=backend)
            return
        for chosen in (indices, indices.long().flip(-1)):
            k, v = kv.gather(keys.to(device), values.to(device), chosen.to(device), backend=backend)
            assert torch.equal(k.cpu(), gathered_by_hand(keys, chosen)) and torch.equal(v.cpu(), gathered_by_hand(values, chosen))
        one = kv.gather(keys.to(device), values.to(device), indices[:, :1].to(device), backend=backend)[0]
        assert torch.equal(one.cpu(), gathered_by_hand(keys, indices[:, :1].expand(b, h, m)))


@pytest.mark.parametrize("backend,device", servers("kv_gather"))
def test_gather_in_place(backend, device):
    """Compacts the first slots of the same memory, inside a longer buffer too, and touches nothing else."""
    for b, h, t, d, m in ((2, 3, 1037, 16, 700), (1, 1, 40, 64, 40), (2, 2, 300, 8, 1)):
        buffer = torch.randn(2, b, h, t + 9, d, device=device)
        keys, values = buffer[0, :, :, :t], buffer[1, :, :, :t]
        before, indices = buffer.cpu().clone(), some_indices(b, h, t, m)
        k, v = kv.gather(keys, values, indices.to(device), inplace=True, backend=backend)
        assert k.data_ptr() == keys.data_ptr() and v.data_ptr() == values.data_ptr()
        assert torch.equal(k.cpu(), gathered_by_hand(before[0], indices)) and torch.equal(v.cpu(), gathered_by_hand(before[1], indices))
        assert torch.equal(buffer.cpu()[:, :, :, m:], before[:, :, :, m:])


@pytest.mark.parametrize("backend,device", servers("kv_gather"))
def test_a_graph_notices_that_its_cache_was_compacted(backend, device):
    """What attention saved for its backward is overwritten: an error there, never another gradient."""
    query = torch.randn(1, 2, 3, 8, device=device, requires_grad=True)
    keys, values = torch.randn(1, 2, 9, 8, device=device), torch.randn(1, 2, 9, 8, device=device)
    loss = (query @ keys.mT).sum()
    kv.gather(keys, values, some_indices(1, 2, 9, 4).to(device), inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        keys = torch.randn(1, 2, 9, 8, device=device)
        want = keys[:, :, 5:].clone()
        indices = torch.arange(5, 9, device=device).expand(1, 2, 4)
        assert torch.equal(kv.gather(keys, keys.clone(), indices, inplace=True, backend=backend)[0], want)


def test_gather_of_nothing():
    empty = torch.zeros(2, 2, 0, dtype=torch.int32)
    keys = torch.randn(2, 2, 5, 8)
    assert kv.gather(keys, keys, empty)[0].shape == (2, 2, 0, 8)
    k, v = kv.gather(keys[:, :, :0], keys[:, :, :0], torch.full((2, 2, 3), -1, dtype=torch.int32))
    assert (k == 0).all() and v.shape == (2, 2, 3, 8)
    assert kv.gather(keys[:0], keys[:0], torch.zeros(0, 2, 3, dtype=torch.int64))[0].shape == (0, 2, 3, 8)


def encoded(x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """RoPE by complex multiplication in fp64; x [B, H, T, D], positions [B, H, T], float32 angles as models have them."""
    angle = (positions[..., None].float() * inv_freq.float()).double()
    width, x = 2 * inv_freq.shape[0], x.double()
    part = x[..., :width]
    pair = part.unflatten(-1, (-1, 2)) if interleaved else part.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pair.contiguous()) * torch.polar(torch.ones_like(angle), angle))
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat([turned, x[..., width:]], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend,device", servers("kv_gather"))
def test_rotation(backend, device, interleaved, dtype):
    """Un-rotated keys are the ones before RoPE, re-rotated keys those encoded at the new positions; partial widths too."""
    b, h, t, m = 2, 3, 700, 33
    for d, width in ((64, 64), (80, 32)):
        inv_freq = 10_000 ** -(torch.arange(0, width, 2) / width)
        plain, values = torch.randn(b, h, t, d), torch.randn(b, h, t, d, device=device).to(dtype)
        indices = some_indices(b, h, t, m)
        place = indices.clamp(min=0).long()
        bare = gathered_by_hand(plain, indices).double()
        ragged = torch.arange(t).expand(b, t) + torch.tensor([[300], [0]])
        target = torch.randint(0, 900, (b, h, m))
        for source, to, new in (
            (None, None, None),
            (None, "slots", torch.arange(m).expand(b, h, m)),
            (ragged, target, target),
            (ragged, target[:, 0], target[:, :1].expand(b, h, m)),
        ):
            at = torch.arange(t).expand(b, h, t) if source is None else source[:, None].expand(b, h, t)
            keys = encoded(plain, at, inv_freq, interleaved).to(dtype)
            rope = kv.Rope(
                inv_freq.to(device), None if source is None else source.to(device), to.to(device) if isinstance(to, torch.Tensor) else to, interleaved, 1000
            )
            k, v = kv.gather(keys.to(device), values, indices.to(device), rotate=rope, backend=backend)
            want = bare if new is None else encoded(bare, new, inv_freq, interleaved)
            if dtype == torch.bfloat16:  # the cache was rounded before it is turned
                back = gathered_by_hand(keys, indices).double()
                want = encoded(back, (0 if new is None else new) - at.gather(2, place), inv_freq, interleaved).masked_fill(indices[..., None] < 0, 0)
            tolerance = {"rtol": 1e-5, "atol": 3e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
            torch.testing.assert_close(k.double().cpu(), want, **tolerance)
            assert torch.equal(v.cpu(), gathered_by_hand(values.cpu(), indices)) and (k.cpu()[indices < 0] == 0).all()


@pytest.mark.parametrize("backend,device", servers("kv_gather"))
def test_rotation_in_place_and_outside_its_table(backend, device):
    keys = torch.randn(1, 2, 50, 16, device=device)
    indices = some_indices(1, 2, 50, 20).to(device)
    rope = kv.Rope(torch.rand(8, device=device), target="slots")
    want = kv.gather(keys, keys, indices, rotate=rope)[0]
    got = kv.gather(keys.clone(), keys.clone(), indices, rotate=rope, inplace=True, backend=backend)[0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    # no position is read out of bounds: a key whose position has no angles is zeros
    rotation = rope.rotation(indices, 50)
    for outside in (-5, 50):
        rotation.source[0, 0, 3] = outside
        got, _ = gather_rows(keys, keys, indices, rotation, backend=backend)
        assert (got[0, 0, 3] == 0).all() and not (got[0, 0, 2] == 0).any()


def test_positions_outside_are_named():
    """On a CPU, whose values are there to be read; those of entries that are not kept do not matter."""
    keys, freq = torch.randn(2, 2, 9, 8), torch.rand(4)
    indices = torch.tensor([3, 5, -1], dtype=torch.int32).expand(2, 2, 3)
    turned = lambda **options: kv.gather(keys, keys, indices, rotate=kv.Rope(freq, **options))[0]
    source = torch.arange(9).expand(2, 9).clone()
    source[:, 0], source[:, 8] = -7, 900
    want = turned(source=torch.arange(9).expand(2, 9))
    assert torch.equal(turned(source=source, max_position=9), want)
    assert torch.equal(turned(source=source, target=torch.tensor([[0, 0, -1]] * 2)), want)
    for options, match in (
        ({"source": source.roll(3, 1)}, "source must hold positions of at least 0 where an entry is kept; got -7"),
        ({"source": source, "max_position": 5}, "source must hold positions below max_position = 5; got 5"),
        ({"target": torch.tensor([[4, -1, 0]] * 2)}, "target must hold positions of at least 0 where an entry is kept; got -1"),
        ({"target": torch.tensor([[4, 64, 0]] * 2), "max_position": 64}, "target must hold positions below max_position = 64; got 64"),
    ):
        with pytest.raises(ValueError, match=match):
            turned(**options)


def test_keys_at_new_positions_are_those_of_the_model():
    """A cache of transformers' Llama, turned to 0…M − 1, is the cache of a sequence with those tokens there."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, rope_theta=500_000.0)
    rotary = LlamaRotaryEmbedding(config)
    bare = torch.randn(1, 2, 300, 16)
    at = lambda x: apply_rotary_pos_emb(x, x, *rotary(x, torch.arange(x.shape[2])[None]))[1]
    indices = torch.arange(5, 300, 7, dtype=torch.int32).expand(1, 2, -1)
    got, _ = kv.gather(at(bare), bare, indices, rotate=kv.Rope(rotary.inv_freq, target="slots"))
    torch.testing.assert_close(got, at(bare[:, :, 5::7]), rtol=1e-5, atol=1e-5)


def test_gradient():
    keys, values = (torch.randn(2, 2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    indices = torch.tensor([[[5, 0, -1], [1, 2, 3]], [[-1, -1, -1], [4, 0, 5]]], dtype=torch.int32)
    for rope in (None, kv.Rope(torch.tensor([0.3])), kv.Rope(torch.tensor([0.3, 0.7]), target="slots", interleaved=True)):
        assert torch.autograd.gradcheck(lambda k, v, rope=rope: kv.gather(k, v, indices, rotate=rope), (keys, values))
    (grad,) = torch.autograd.grad(kv.gather(keys, values.detach(), indices)[0].sum(), keys)
    assert (grad[1, 0] == 0).all() and (grad[0, 0, 5] == 1).all()


def test_compiled_gather_is_the_eager_one():
    keys, indices = torch.randn(1, 2, 9, 8), torch.tensor([[[1, 4], [0, -1]]], dtype=torch.int32)
    compiled = torch.compile(lambda k: kv.gather(k, k, indices)[0], fullgraph=True)
    assert torch.equal(compiled(keys), kv.gather(keys, keys, indices)[0])


@pytest.mark.parametrize("backend,device", servers("kv_gather"))
def test_opcheck(backend, device):
    keys, indices = torch.randn(1, 2, 9, 8, device=device), torch.tensor([[[1, 4], [0, -1]]], dtype=torch.int32, device=device)
    table = torch.rand(9, 4, device=device)
    torch.library.opcheck(torch.ops.distilkernels.kv_gather.default, (keys, keys, indices, None, None, None, None, False, backend))
    torch.library.opcheck(torch.ops.distilkernels.kv_gather.default, (keys, keys, indices, table, table, indices + 1, indices + 2, True, backend))


X, I = torch.randn(1, 2, 9, 8), torch.tensor([[[1, 4], [0, -1]]])


@pytest.mark.parametrize("call,error,match", [
    (lambda: kv.select(X, 3), ValueError, r"scores must have shape \[B, H, T\]"),
    (lambda: kv.select(X[..., 0].long(), 3), TypeError, "scores must be a floating point tensor"),
    (lambda: kv.select(X[..., 0], 3.0), TypeError, "budget must be an int"),
    (lambda: kv.select(X[..., 0], -1), ValueError, "budget must be at least 0"),
    (lambda: kv.select(X[..., 0], [3, 4]), ValueError, "budget must have one entry a request, 1; got 2"),
    (lambda: kv.select(X[..., 0], torch.tensor([1.0])), TypeError, "budget must hold integers"),
    (lambda: kv.select(X[..., 0], torch.tensor([1, 2, 3])), ValueError, r"budget must have shape \[B\]"),
    (lambda: kv.select(X[..., 0], 3, protect_first=2, protect_last=2), ValueError, "budget must be at least 4, the number of protected"),
    (lambda: kv.select(X[..., 0], 3, protect_last=-1), ValueError, "protect_last must not be negative"),
    (lambda: kv.select(X[..., 0], 3, order="best"), ValueError, "order must be one of time, score"),
    (lambda: kv.select(X[..., 0], 3, mask=torch.ones(1, 9)), TypeError, "mask must be a bool tensor"),
    (lambda: kv.select(X[..., 0], 3, mask=torch.ones(2, 8).bool()), ValueError, r"mask must have shape \(1, 9\) or"),
    (lambda: kv.gather(X, X[:, :, :4], I), ValueError, "values must share keys'"),
    (lambda: kv.gather(X, X, I.float()), TypeError, "selection must be a KVSelection"),
    (lambda: kv.gather(X, X, I[0]), ValueError, "selection must have indices of shape"),
    (lambda: kv.gather(X, X, I + 6), ValueError, r"selection\[0, 0, 1\] is 10; indices must be in \[0, 9\) or -1"),
    (lambda: kv.gather(X, X, I + 2**32), ValueError, r"selection\[0, 0, 0\] is 4294967297; indices must be in"),
    (lambda: kv.gather(X, X, I - 1), ValueError, r"selection\[0, 1, 1\] is -2"),
    (lambda: kv.gather(X, X, I.flip(-1), inplace=True), ValueError, "indices ascending, empty slots last"),
    (lambda: kv.gather(X, X, torch.tensor([[[-1, 2], [0, 1]]]), inplace=True), ValueError, "indices ascending, empty slots last"),
    (lambda: kv.gather(X, X, I[:, :, :1], inplace=True), ValueError, "what is compacted twice is lost"),
    (lambda: kv.gather(X[:, :1].expand(1, 2, 9, 8), X.clone(), I, inplace=True), ValueError, "needs keys whose heads have memory of their own"),
    (lambda: kv.gather(X.clone().requires_grad_(), X, I, inplace=True), ValueError, "would overwrite keys, which require a gradient"),
    (lambda: kv.gather(X.mT.contiguous().mT, X.clone(), I, inplace=True), ValueError, "needs keys with last stride 1"),
    (lambda: kv.gather(X, X, I, rotate=1.0), TypeError, "rotate must be a Rope"),
    (lambda: kv.gather(X, X, I, rotate=kv.Rope(torch.rand(5))), ValueError, "rotate turns 10 features; keys have 8"),
    (lambda: kv.gather(X, X, I, rotate=kv.Rope(torch.rand(4), target=torch.zeros(1, 3, dtype=torch.int64))), ValueError, "target must have shape"),
    (lambda: kv.Rope(torch.rand(4), target="end"), ValueError, "target must be None, slots or an int tensor"),
    (lambda: kv.Rope([1.0]), ValueError, "inv_freq must be a floating point tensor"),
    (lambda: kv.KVSelection(I, I[..., 0]), ValueError, "indices must be an int32 tensor"),
])  # fmt: skip
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
