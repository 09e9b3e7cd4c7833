"""The KV caches of transformers causal LMs, as far as a rollback per request needs them: which models allow it, and how slots move."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The causal LM inside adapters and torch.compile: its ``forward`` names the arguments it understands."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def checked_model(name: str, model: Any) -> None:
    """ValueError or TypeError where `model` is no causal LM whose cache can be rolled back by masking."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"{name} must be a transformers causal LM; got {type(model).__name__}")
    kind = type(unwrapped(model)).__name__
    parameters = inspect.signature(unwrapped(model).forward).parameters
    missing = [needed for needed in ("attention_mask", "position_ids", "past_key_values") if needed not in parameters]
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} must be a decoder-only causal LM; got the encoder-decoder {kind}")
    if getattr(unwrapped(model), "_is_stateful", False):
        raise ValueError(f"{name} must keep its past in a KV cache: {kind} keeps a recurrent state, which rejected tokens cannot be taken out of")
    if missing:
        raise ValueError(f"{name} must take {', '.join(missing)} in forward, so that rejected tokens can be masked; {kind} does not")
    if model.training:
        raise ValueError(f"{name} must be in evaluation mode (dropout would change its law between two reads); call .eval() on the {kind}")


def new_cache(name: str, model: nn.Module, capacity: int) -> Any:
    """An empty DynamicCache, or a StaticCache of `capacity` slots where the model's generation_config asks for one."""
    from transformers import DynamicCache, StaticCache
    from transformers.cache_utils import DynamicLayer, StaticLayer

    kind = type(unwrapped(model)).__name__
    for layer in DynamicCache(config=model.config).layers:
        window = getattr(layer, "sliding_window", None)
        if window is not None and isinstance(layer, DynamicLayer):
            if window < capacity:
                raise ValueError(
                    f"{name}: {kind} attends through a window of {window} slots and this run may fill {capacity}; "
                    "a window that has passed a rejected token cannot be rolled back"
                )
        elif type(layer) is not DynamicLayer:
            raise ValueError(f"{name}: {kind} has a {type(layer).__name__} in its cache, which cannot be rolled back per request")
    asked = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
    if asked in (None, "dynamic"):
        # without the config every layer keeps every slot, a window's too: it is never reached
        return DynamicCache()
    if asked != "static":
        raise ValueError(f"{name}: cache_implementation must be None, 'dynamic' or 'static'; {kind}'s generation_config has {asked!r}")
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    if not all(type(layer) is StaticLayer and hasattr(layer, "cumulative_length") for layer in cache.layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers}))
        raise ValueError(f"{name}: a StaticCache can be rolled back with full attention and transformers ≥ 5 only; {kind} has {kinds} here")
    return cache


def crop(cache: Any, slots: int) -> None:
    """Forgets every slot from `slots` on, of all requests."""
    for layer in cache.layers:
        if layer.keys is None:  # KV sharing: nothing of its own
            continue
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length.fill_(slots)
        else:
            layer.keys, layer.values = layer.keys[..., :slots, :], layer.values[..., :slots, :]


def regather(cache: Any, rows: Tensor, index: Tensor) -> None:
    """Keeps requests `rows` int64 [B′], each with its slots `index` int64 [B′, S′], in that order."""
    slots = index.shape[1]
    for layer in cache.layers:
        if layer.keys is None:  # KV sharing: nothing of its own
            continue
        static = hasattr(layer, "cumulative_length")
        for side in ("keys", "values"):
            old = getattr(layer, side)
            wide = index.to(old.device)[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
            chosen = old[rows.to(old.device)]
            kept = chosen.gather(2, wide)
            if static:
                chosen[:, :, :slots] = kept
                kept = chosen
            setattr(layer, side, kept)
        if static:
            layer.batch_size = rows.shape[0]
            layer.cumulative_length.fill_(slots)
