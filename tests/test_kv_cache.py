"""CompressedCache: an evicted model is a full cache with the evicted columns masked, whatever the method, the budget and the padding."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from distilkernels import kv

transformers = pytest.importorskip("transformers")

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

METHODS = [
    kv.RKV(window=4), kv.SnapKV(window=5), kv.LazyEviction(alpha=0.02, window=4), kv.KaVa(), kv.AttentionOnly(window=3), kv.CosineOnly(), kv.Crop()
]  # fmt: skip
BUDGETS = {"one": 14, "layers": [14, 30, 9], "heads": [[14, 9], [11, 11], [9, 16]]}


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def llama(request):
    return tiny("Llama", attn_implementation=request.param)


def tiny(family: str, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}
    config = getattr(transformers, f"{family}Config")(**sizes, max_position_embeddings=512, **options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, weight in model.named_parameters():
        if "proj" in name:  # attention of a fresh model is flat, and every entry would matter as little
            weight.data.mul_(6 if "q_proj" in name or "k_proj" in name else 3)
    return model


def full_with_masked_columns(model, blocks, masks, positions, visible):
    """Logits of the blocks on a full cache; `visible[step][layer]` bool [B, Hkv, T] are the columns that are not masked."""
    step = 0

    def attention(module, query, key, value, mask, scaling, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        seen = visible[step][module.layer_idx].repeat_interleave(groups, 1)[:, :, None]
        logits = (query @ key.mT) * scaling + mask
        return (logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1) @ value).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("masked_columns", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("masked_columns", eager_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = "masked_columns"
    cache, logits = transformers.DynamicCache(), []
    try:
        for step, block in enumerate(blocks):
            out = model(block, attention_mask=masks[step], position_ids=positions[step], past_key_values=cache)
            logits.append(out.logits)
    finally:
        model.config._attn_implementation = before
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            del registry._global_mapping["masked_columns"]
    return logits


def stream(model, cache, ids, mask, sizes):
    """Feeds `ids` in blocks; returns the logits, and for each block and layer which tokens its attention could see."""
    blocks, masks, positions, visible, logits, first = [], [], [], [], [], 0
    where = (mask.long().cumsum(-1) - 1).clamp(min=0)
    for size in sizes:
        stop = first + size
        blocks.append(ids[:, first:stop])
        masks.append(mask[:, :stop])
        positions.append(where[:, first:stop])
        seen = []
        for layer in cache.layers:
            columns = torch.zeros(ids.shape[0], 2, stop + 1, dtype=torch.bool)
            if layer.positions is not None:
                columns.scatter_(2, layer.positions.long().masked_fill(layer.positions < 0, stop), True)
            columns[:, :, first:stop] = True
            seen.append(columns[:, :, :stop])
        visible.append(seen)
        logits.append(model(blocks[-1], attention_mask=masks[-1], position_ids=positions[-1], past_key_values=cache).logits)
        first = stop
    return logits, (blocks, masks, positions, visible)


SIZES = [26, *[1] * 9, 3, *[1] * 8]  # a prompt, tokens, a block of three, tokens


def padded(lengths, total):
    ids = torch.randint(1, 97, (len(lengths), total), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(len(lengths), total, dtype=torch.long)
    for i, pads in enumerate(lengths):
        mask[i, :pads] = 0
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("pads", [(0, 0), (0, 11, 23)], ids=["whole", "left-padded"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_evicted_model_is_the_full_one_with_masked_columns(llama, method, pads, budget):
    """Also requests shorter than the budget, layers that evict at different times, and a block of tokens after evictions."""
    ids, mask = padded(pads, sum(SIZES))
    with kv.CompressedCache(llama.config, method=method, budget=BUDGETS[budget], every=4, protect_first=1) as cache:
        got, said = stream(llama, cache, ids, mask, SIZES)
    want = full_with_masked_columns(llama, *said)
    first, evicted = 0, 0
    for size, a, b, seen in zip(SIZES, got, want, said[3]):
        real = mask[:, first : first + size].bool()
        assert (a - b)[real].abs().max() <= 1e-6 * max(1, float(b[real].abs().max()))
        evicted += sum(int((~columns[:, :, :first]).sum()) for columns in seen)
        first += size
    assert evicted > 100
    for layer in cache.layers:
        held = layer.positions >= 0
        # true tokens alone, in time order, the newest always; padding is evicted, or masked as an empty slot
        assert (layer.valid is None and held.all()) or (layer.valid <= held).all()
        assert mask.bool()[:, None].expand(-1, 2, -1).gather(2, layer.positions.clamp(min=0).long())[held if layer.valid is None else layer.valid].all()
        counts = held if layer.valid is None else layer.valid
        limit = torch.tensor(layer.budget if isinstance(layer.budget, list) else [layer.budget] * 2) + layer.since
        assert (counts.sum(-1) == torch.minimum(mask.sum(-1)[:, None], limit)).all()


@torch.no_grad()
def test_a_retained_pad_would_be_seen(llama):
    """What the masks are for: the same comparison with padding left visible is off by far more."""
    ids, mask = padded((0, 11), sum(SIZES))
    with kv.CompressedCache(llama.config, method=kv.CosineOnly(), budget=40, every=4) as cache:
        got, said = stream(llama, cache, ids, mask, SIZES)
    masks = [torch.ones_like(m) for m in said[1]]
    want = full_with_masked_columns(llama, said[0], masks, said[2], said[3])
    assert (got[-1] - want[-1])[1].abs().max() > 1e-3 and (got[-1] - want[-1])[0].abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS[:5], ids=lambda m: type(m).__name__)
def test_a_left_padded_request_is_the_request_alone(llama, method):
    ids, mask = padded((0, 6), sum(SIZES))
    options = {"method": method, "budget": 14, "every": 4}
    with kv.CompressedCache(llama.config, **options) as cache:
        batch, _ = stream(llama, cache, ids, mask, SIZES)
    with kv.CompressedCache(llama.config, **options) as alone:
        single, _ = stream(llama, alone, ids[1:, 6:], mask[1:, 6:], [20, *SIZES[1:]])
    for a, b in zip(batch[1:], single[1:]):
        torch.testing.assert_close(a[1:], b, rtol=0, atol=1e-5)
    for a, b in zip(cache.layers, alone.layers):
        assert torch.equal(a.positions[1] - 6, b.positions[0])


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS[:5], ids=lambda m: type(m).__name__)
def test_a_request_shorter_than_its_budget_is_the_request_alone(llama, method):
    """Its empty slots come before what it holds, so that the queries of the window are still those of its last tokens."""
    ids, mask = padded((0, 23), sum(SIZES))
    options = {"method": method, "budget": 14, "every": 1}
    with kv.CompressedCache(llama.config, **options) as cache:
        batch, _ = stream(llama, cache, ids, mask, SIZES)
    with kv.CompressedCache(llama.config, **options) as alone:
        single, _ = stream(llama, alone, ids[1:, 23:], mask[1:, 23:], [3, *SIZES[1:]])
    for a, b in zip(batch[1:], single[1:]):
        torch.testing.assert_close(a[1:], b, rtol=0, atol=1e-5)
    for a, b in zip(cache.layers, alone.layers):
        assert torch.equal(a.positions[1] - 23, b.positions[0])


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_a_budget_that_is_never_reached_changes_nothing(llama, method):
    ids, mask = padded((0, 5), 12)
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = llama.generate(ids, **options)
    with kv.CompressedCache(llama.config, method=method, budget=64) as cache:
        assert torch.equal(llama.generate(ids, past_key_values=cache, **options), want)
    beams = {**options, "num_beams": 3}
    want = llama.generate(ids, **beams)
    with kv.CompressedCache(llama.config, method=method, budget=64) as cache:
        assert torch.equal(llama.generate(ids, past_key_values=cache, **beams), want)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS[:4], ids=lambda m: type(m).__name__)
def test_generate_with_evictions(llama, method):
    """Tokens are the arg max of the stream that the full cache confirms; beams are reordered with their state."""
    ids, mask = padded((0, 9), 30)
    options = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with kv.CompressedCache(llama.config, method=method, budget=12, every=3) as cache:
        tokens = llama.generate(ids, past_key_values=cache, max_new_tokens=15, **options)
    with kv.CompressedCache(llama.config, method=method, budget=12, every=3) as again:
        whole = torch.cat([mask, torch.ones(2, 15, dtype=torch.long)], 1)
        logits, _ = stream(llama, again, tokens, whole, [30, *[1] * 14])
    assert torch.equal(torch.stack([row[:, -1].argmax(-1) for row in logits], 1), tokens[:, 30:])
    assert cache.get_seq_length() == 44 and cache.layers[0].keys.shape[2] <= 15
    with kv.CompressedCache(llama.config, method=method, budget=12, every=3) as beams:
        assert llama.generate(ids, past_key_values=beams, max_new_tokens=15, num_beams=3, **options).shape == (2, 45)


@torch.no_grad()
def test_memory_is_freed(llama):
    """A prompt of 400 tokens leaves budget + every slots, and nothing holds what it was; queries of it are a copy of a few."""
    ids, mask = padded((0, 0), 400)
    alive = []
    cache = kv.CompressedCache(llama.config, method=kv.RKV(window=4), budget=32, every=8)
    for layer in cache.layers:
        original = layer.update

        def update(keys, values, *args, original=original, **kwargs):
            found = original(keys, values, *args, **kwargs)
            alive.extend(weakref.ref(t) for t in (keys, *found))
            return found

        layer.update = update
    llama(ids, attention_mask=mask, past_key_values=cache)
    gc.collect()
    assert len(alive) == 9 and all(ref() is None for ref in alive)
    assert cache.nbytes == 3 * 2 * 2 * 2 * (32 + 8) * 16 * 4
    for layer in cache.layers:
        assert layer.keys.shape == (2, 2, 32, 16) and layer.queries.untyped_storage().nbytes() == 2 * 4 * 4 * 16 * 4
        del layer.update
    held = []
    for i in range(40):
        llama(ids[:, i : i + 1], past_key_values=cache)
        held.append(cache.nbytes)
        assert cache.layers[0].keys.shape[2] <= 40
    assert set(held) == {held[0]} and cache.get_seq_length() == 440
    cache.release()


@torch.no_grad()
def test_what_is_kept_while_streaming(llama):
    ids, mask = padded((0,), 60)
    with kv.CompressedCache(llama.config, method=kv.SnapKV(window=5), budget=16, every=6, protect_first=3) as cache:
        stream(llama, cache, ids, mask, [30, *[1] * 30])
        for layer in cache.layers:
            assert (layer.positions.diff() > 0).all() and layer.positions.shape[2] == 16 + 30 % 6
            assert (layer.positions[..., :3] == torch.arange(3)).all() and (layer.positions[..., -5:] == torch.arange(55, 60)).all()


@torch.no_grad()
def test_positions_keep_their_rotary_embedding(llama):
    """What is held is, to the bit, what a full cache holds at those positions."""
    ids, mask = padded((0,), 20)
    full = transformers.DynamicCache()
    llama(ids, past_key_values=full)
    with kv.CompressedCache(llama.config, method=kv.RKV(window=4), budget=[20, 9, 9], every=4) as cache:
        stream(llama, cache, ids, mask, [20])
        for i in (0, 1, 2):
            place = cache.layers[i].positions.long()[..., None].expand(1, 2, -1, 16)
            torch.testing.assert_close(cache.layers[i].keys, full.layers[i].keys.gather(2, place), rtol=0, atol=1e-6)
            torch.testing.assert_close(cache.layers[i].values, full.layers[i].values.gather(2, place), rtol=0, atol=1e-6)


@torch.no_grad()
def test_queries_of_padding_do_not_score(llama):
    """A request shorter than the window keeps what it keeps alone."""
    ids, mask = padded((0, 17), 26)
    options = {"method": kv.AttentionOnly(window=20), "budget": 4, "every": 1}
    with kv.CompressedCache(llama.config, **options) as batch, kv.CompressedCache(llama.config, **options) as alone:
        stream(llama, batch, ids, mask, [26])
        stream(llama, alone, ids[1:, 17:], mask[1:, 17:], [9])
    for a, b in zip(batch.layers, alone.layers):
        assert torch.equal(a.positions[1] - 17, b.positions[0])
    options = {"method": kv.LazyEviction(alpha=0.02, window=20), "budget": 64}
    with kv.CompressedCache(llama.config, **options) as batch, kv.CompressedCache(llama.config, **options) as alone:
        stream(llama, batch, ids, mask, [26])
        stream(llama, alone, ids[1:, 17:], mask[1:, 17:], [9])
    for a, b in zip(batch.layers, alone.layers):
        assert torch.equal(a.tracker.last_seen[1, :, 17:] - 17, b.tracker.last_seen[0])
        assert torch.equal(a.tracker.max_interval[1, :, 17:], b.tracker.max_interval[0])


@torch.no_grad()
def test_scores_have_the_models_own_scale(llama):
    """That of the attention is not 1/√D in every family: here queries are half as long and logits twice as scaled."""
    ids, mask = padded((0,), 30)
    found = []
    for factor in (1.0, 2.0):
        model = copy.deepcopy(llama)
        for layer in model.model.layers:
            layer.self_attn.scaling *= factor
            layer.self_attn.q_proj.weight.div_(factor)
        kept = []
        for method in (kv.SnapKV(window=5), kv.LazyEviction(alpha=0.1, window=4)):
            with kv.CompressedCache(model.config, method=method, budget=12, every=4) as cache:
                stream(model, cache, ids, mask, [20, *[1] * 10])
            kept += [layer.positions for layer in cache.layers]
        found.append(kept)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@torch.no_grad()
def test_lazy_eviction_knows_every_token_from_its_own_step(llama):
    """With an attention that is never enough, a token was last seen when it came: of a long prompt, a block and single tokens."""
    ids, mask = padded((0, 3), 30)
    with kv.CompressedCache(llama.config, method=kv.LazyEviction(alpha=1.0, window=4), budget=64) as cache:
        stream(llama, cache, ids, mask, [20, 7, 1, 2])
        for layer in cache.layers:
            assert torch.equal(layer.tracker.last_seen, torch.arange(30, dtype=torch.int32).expand(2, 2, 30))
            assert (layer.tracker.max_interval == 0).all()


@torch.no_grad()
def test_crop_reset_and_batch_changes(llama):
    ids, mask = padded((0, 4), 30)
    with kv.CompressedCache(llama.config, method=kv.RKV(window=4), budget=12, every=6) as cache:
        stream(llama, cache, ids, mask, [20, 1, 1, 1])
        kept = [layer.positions.clone() for layer in cache.layers]
        where = mask.cumsum(-1) - 1

        def feed(rows, t):
            return llama(ids[rows, t : t + 1], attention_mask=mask[rows, : t + 1], position_ids=where[rows, t : t + 1], past_key_values=cache).logits

        whole = feed([0, 1], 23)
        cache.crop(-1)
        assert cache.get_seq_length() == 23 and all(torch.equal(layer.positions, k) for layer, k in zip(cache.layers, kept))
        torch.testing.assert_close(feed([0, 1], 23), whole)
        with pytest.raises(ValueError, match=r"crop can take back tokens since the last eviction only, −4 … 0; got -5"):
            cache.crop(-5)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        swapped = feed([1, 0], 24)
        assert cache.layers[1].keys.shape[0] == 2
        cache.reset()
        assert cache.get_seq_length() == 0
        again, _ = stream(llama, cache, ids[[1, 0]], mask[[1, 0]], [20, 1, 1, 1, 1, 1])
        torch.testing.assert_close(again[-1], swapped, rtol=0, atol=1e-5)
        assert not cache.is_croppable


def test_gradients_pass_through_a_compressed_cache(llama):
    """What is kept stays attached: gradients are those of the full cache with masked columns, of every projection."""
    ids, mask = padded((0,), 24)
    weights = [getattr(layer.self_attn, f"{x}_proj").weight for layer in llama.model.layers for x in "qkv"]
    with kv.CompressedCache(llama.config, method=kv.CosineOnly(), budget=8, every=2) as cache:
        got, said = stream(llama, cache, ids, mask, [16, *[1] * 8])
    want = full_with_masked_columns(llama, *said)
    last = lambda logits: sum(x.logsumexp(-1).sum() for x in logits[-4:])
    for a, b in zip(torch.autograd.grad(last(got), weights), torch.autograd.grad(last(want), weights)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


def test_training_the_queries_alone_and_going_on_after_inference_mode(llama):
    """Slots are written in place only where no graph can have saved them, and where the memory may be written."""
    ids = torch.randint(0, 97, (1, 26))
    frozen = [p for p in llama.parameters() if p is not llama.model.layers[0].self_attn.q_proj.weight]
    options = {"method": kv.RKV(window=4), "budget": 8, "every": 4}
    try:
        for p in frozen:
            p.requires_grad_(False)
        with kv.CompressedCache(llama.config, **options) as cache:
            llama(ids[:, :20], past_key_values=cache)
            logits = [llama(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 26)]
            sum(x.logsumexp(-1).sum() for x in logits).backward()
        assert llama.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
    finally:
        llama.requires_grad_(True)
        llama.zero_grad()
    with kv.CompressedCache(llama.config, **options) as cache:
        with torch.inference_mode():
            llama(ids[:, :20], past_key_values=cache)
        with torch.no_grad():
            again = [llama(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 26)]
    for a, b in zip(again, logits):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-5)
