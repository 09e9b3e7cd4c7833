"""How CompressedCache is hooked into a model: families, the attention registry, the config it changes and restores, flash attention's lse."""

from __future__ import annotations

import gc
import sys
import types

import pytest
import torch

from distilkernels import kv

transformers = pytest.importorskip("transformers")

from test_kv_cache import full_with_masked_columns, padded, stream, tiny  # noqa: E402


@torch.no_grad()
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral"])
def test_other_families(family):
    options = {"sliding_window": None} if family == "Mistral" else {"head_dim": 16} if family == "Qwen3" else {}
    model = tiny(family, **options)
    ids, mask = padded((0, 7), 36)
    with kv.CompressedCache(model.config, method=kv.RKV(window=4), budget=12, every=3) as cache:
        got, said = stream(model, cache, ids, mask, [26, *[1] * 10])
    want = full_with_masked_columns(model, *said)
    assert all((a - b)[:, -1].abs().max() <= 1e-5 for a, b in zip(got, want)) and cache.layers[2].keys.shape[2] <= 15


def test_the_config_is_restored():
    model = tiny("Llama", attn_implementation="sdpa")
    ids, config = torch.randint(0, 97, (1, 20)), model.config
    options = {"method": kv.CosineOnly(), "budget": 8}
    cache = kv.CompressedCache(config, **options)
    assert config._attn_implementation != "sdpa"
    del cache
    gc.collect()
    assert config._attn_implementation == "sdpa"
    with pytest.raises(ZeroDivisionError), kv.CompressedCache(config, **options):
        1 / 0  # noqa: B018
    assert config._attn_implementation == "sdpa"
    # two caches share a config; each sees its own forward, and a plain cache passes through
    with torch.no_grad():
        want = model(ids).logits
        with kv.CompressedCache(config, **options) as one:
            with kv.CompressedCache(config, **options) as two:
                torch.testing.assert_close(model(ids, past_key_values=one).logits, want)
            assert config._attn_implementation != "sdpa" and two.get_seq_length() == 0
            torch.testing.assert_close(model(ids, past_key_values=transformers.DynamicCache()).logits, want)
            torch.testing.assert_close(model(ids).logits, want)
            assert one.layers[0].keys.shape[2] == 8 and one.get_seq_length() == 20
        assert config._attn_implementation == "sdpa"
        one.release()
        # a name given in between is left alone
        three = kv.CompressedCache(config, **options)
        config._attn_implementation = "eager"
        three.release()
        assert config._attn_implementation == "eager"


@torch.no_grad()
def test_flash_attentions_own_lse_is_used(monkeypatch):
    """With a stand-in for the flash_attn package: its softmax_lse reaches the score, and the kept sets are those of sdpa."""
    calls = []

    def flash_attn_func(q, k, v, softmax_scale, causal, return_attn_probs):
        assert causal and return_attn_probs
        groups, width, length = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(groups, 1), v.transpose(1, 2).repeat_interleave(groups, 1)
        logits = (q @ k.mT * softmax_scale).float()
        logits = logits.masked_fill(torch.arange(length) > torch.arange(length - width, length)[:, None], -torch.inf)
        calls.append(width)
        return (logits.softmax(-1) @ v).transpose(1, 2), logits.logsumexp(-1), None

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
    model = tiny("Llama", attn_implementation="sdpa")
    ids, mask = padded((0, 0), 40)
    # evicting more often than the window is long leaves some of its lse about keys that are gone: they are not used
    for method, every in ((kv.SnapKV(window=5), 6), (kv.LazyEviction(alpha=0.02, window=4), 6), (kv.SnapKV(window=5), 2)):
        options = {"method": method, "budget": 14, "every": every}
        with kv.CompressedCache(model.config, **options) as plain:
            want, _ = stream(model, plain, ids, mask, [26, *[1] * 14])
        model.config._attn_implementation = "flash_attention_2"
        passes = []

        def counted(*tensors, passes=passes, **named):
            passes.append(named.get("lse") is not None)
            return kv.window_importance(*tensors, **named)

        for where in ("cache", "compress"):
            monkeypatch.setattr(sys.modules[f"distilkernels.kv.{where}"], "window_importance", counted)
        with kv.CompressedCache(model.config, **options) as flash:
            got, _ = stream(model, flash, ids, mask, [26, *[1] * 14])
        monkeypatch.undo()
        monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=flash_attn_func))
        assert model.config._attn_implementation == "flash_attention_2"
        model.config._attn_implementation = "sdpa"
        assert any(passes) and all(passes) == (every == 6)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        for a, b in zip(flash.layers, plain.layers):
            assert torch.equal(a.positions, b.positions)
    assert calls.count(26) == 9


def test_a_model_outside_the_registry_is_noticed():
    model = tiny("Llama")
    stranger = transformers.LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 3})
    stranger._attn_implementation = "sdpa"
    with kv.CompressedCache(stranger, method=kv.CosineOnly(), budget=8) as cache, torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.long), past_key_values=cache)
        with pytest.raises(RuntimeError, match="the last tokens' attention was not seen"):
            model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)


CONFIG = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=9)
CONFIG._attn_implementation = "sdpa"


def cache(config=CONFIG, method=None, budget=16, **options):
    return kv.CompressedCache(config, method=kv.RKV() if method is None else method, budget=budget, **options)


def configured(**changes):
    config = transformers.LlamaConfig(**{**CONFIG.to_dict(), **changes})
    config._attn_implementation = changes.get("attention", "sdpa")
    return config


@pytest.mark.parametrize("call,error,match", [
    (lambda: cache(method=kv.RKV), TypeError, "method must be an object such as"),
    (lambda: cache(method="rkv"), TypeError, "method must be an object such as"),
    (lambda: cache(method=kv.SnapKV(window=4, group_reduce="none")), ValueError, "scores 4 query heads; the cache has 2 KV heads"),
    (lambda: cache(budget=7), ValueError, "budget must be at least 8, the number of protected entries; got 7"),
    (lambda: cache(budget=[16]), ValueError, "budget must have one entry a layer, 2; got 1"),
    (lambda: cache(budget=[16, [16]]), ValueError, "budget must have one number a KV head, 2; got 1"),
    (lambda: cache(budget=0.5), TypeError, "budget must be an int or a sequence"),
    (lambda: cache(every=0), ValueError, "every must be a positive int"),
    (lambda: cache(protect_first=-1), ValueError, "protect_first must not be negative"),
    (lambda: cache(tiny("Llama")), TypeError, "config must be a model's config"),
    (lambda: cache(configured(layer_types=["full_attention", "sliding_attention"])), ValueError, "config has sliding_attention layers"),
    (lambda: cache(configured(attention="paged")), ValueError, "attention implementation 'paged', which has no registered mask"),
    (lambda: cache(configured(attention="flex_attention")), ValueError, "flex_attention"),
    (lambda: cache(configured(attention="flash_attention_2"), budget=[[16, 16]] * 2), ValueError, "one number a layer with flash_attention"),
])  # fmt: skip
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
    assert CONFIG._attn_implementation == "sdpa"
