"""Between a transformers model and its attention function: shows a cache the queries, and masks the slots it left empty.

A model asks ``ALL_ATTENTION_FUNCTIONS`` for config._attn_implementation. While a cache is in use that name is changed to ours, which
calls the one it stands for. A name without an entry in ``ALL_MASK_ATTENTION_FUNCTIONS`` would silently get no mask, so ours has
both; "eager" is in neither's way: it is no entry of the first, but a function of the model's own module.
"""

from __future__ import annotations

import importlib.util
import sys
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "distilkernels_"


class _Watched(NamedTuple):
    """A config whose attention is ours, the name it had, and the caches that look."""

    config: Any
    original: str | None
    caches: weakref.WeakSet


_watched: dict[int, _Watched] = {}


def watch(config: Any, cache: Any) -> None:
    """From now on `cache` sees the attention of models with this config."""
    entry = _watched.get(id(config))
    if entry is None:
        original = config._attn_implementation
        base = original or "eager"
        if base not in ALL_MASK_ATTENTION_FUNCTIONS or not (base == "eager" or base in ALL_ATTENTION_FUNCTIONS):
            raise ValueError(f"config has attention implementation {base!r}, which has no registered mask; use eager, sdpa or flash_attention_2")
        if base == "flex_attention":
            raise ValueError("config has attention implementation 'flex_attention', whose block masks know no heads with slots of their own; use eager or sdpa")
        name = PREFIX + base
        ALL_ATTENTION_FUNCTIONS.register(name, _attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
        entry = _watched[id(config)] = _Watched(config, original, weakref.WeakSet())
        config._attn_implementation_internal = name
    entry.caches.add(cache)


def unwatch(config_id: int, cache: Any | None = None) -> None:
    """`cache` looks no more; with the last one the config has its own name again."""
    entry = _watched.get(config_id)
    if entry is None:
        return
    if cache is not None:
        entry.caches.discard(cache)
    # a set of weak references still counts what is being finalized; iterating it does not
    if not list(entry.caches):
        del _watched[config_id]
        if entry.config._attn_implementation == PREFIX + (entry.original or "eager"):
            entry.config._attn_implementation_internal = entry.original


def base_of(config: Any) -> str:
    """The attention implementation that this config's name stands for."""
    return (config._attn_implementation or "eager").removeprefix(PREFIX)


def _attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options):
    """The base implementation with the cache's mask, then the cache's look at the queries."""
    base = base_of(module.config)
    entry = _watched.get(id(module.config))
    found = None if entry is None else next(((cache, layer) for cache in entry.caches if (layer := cache.layer_of(key)) is not None), None)
    if found is None:
        return _base(module, base)(module, query, key, value, attention_mask, **options)
    cache, layer = found
    flash = base.startswith("flash_attention")
    real = _real(attention_mask, query.shape[2], flash)
    attention_mask = layer.mask(attention_mask, query, real, flash, whole=cache.mask_is_whole(layer))
    lse = None
    if base == "flash_attention_2" and attention_mask is None and _flash_gives_lse(options):
        output, lse = _flash(module, query, key, value, options)
        weights = None
    else:
        output, weights = _base(module, base)(module, query, key, value, attention_mask, **options)
    layer.observe(query, real, options.get("scaling"), lse)
    return output, weights


def _base(module, base: str):
    if base != "eager":
        function = ALL_ATTENTION_FUNCTIONS[base]
    else:
        function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if function is None:
            raise ValueError(f"{type(module).__name__}: its module has no eager_attention_forward; load the model with attn_implementation='sdpa'")

    def call(module, *args, **options):
        # some implementations look at their own name
        ours = module.config._attn_implementation
        module.config._attn_implementation_internal = base
        try:
            return function(module, *args, **options)
        finally:
            module.config._attn_implementation_internal = ours

    return call


def _real(attention_mask: Tensor | None, width: int, flash: bool) -> Tensor | None:
    """Which of the `width` newest tokens are no padding, bool [B, width], from what the last query may see; None: all."""
    if attention_mask is None:
        return None
    if flash:
        return attention_mask[:, -width:].bool()
    row = attention_mask[:, 0, -1, -width:]
    return row if row.dtype == torch.bool else row == 0


def _flash_gives_lse(options: dict) -> bool:
    plain = all(options.get(name) is None for name in ("sliding_window", "softcap", "s_aux")) and not options.get("dropout")
    return plain and options.get("is_causal") is not False and ("flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None)


def _flash(module, query: Tensor, key: Tensor, value: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    """FlashAttention 2 called as transformers calls it, for its log-sum-exp [B, Hq, W] as well."""
    from flash_attn import flash_attn_func

    swapped = (t.transpose(1, 2) for t in (query, key, value))
    output, lse, *_ = flash_attn_func(*swapped, softmax_scale=options.get("scaling"), causal=True, return_attn_probs=True)
    return output, lse
