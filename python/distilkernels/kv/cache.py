"""A transformers cache that keeps a budget of entries of every head while the model generates."""

from __future__ import annotations

import numbers
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .attention import base_of, unwatch, watch
from .compress import Cached, LazyEviction, Method, check_heads, check_method
from .scores import window_importance
from .select import gather, select

_STATE = ("keys", "values", "valid", "positions", "queries", "queries_real", "queries_lse")


class CompressedLayer(DynamicLayer):
    """One layer: keys and values of the kept entries, oldest first, empty slots before them.

    ``keys``, ``values`` [B, H, P, D]: the P physical slots. ``valid`` bool [B, H, P], or None while every slot holds a real token.
    ``positions`` int32 [B, H, P]: which seen token each slot holds, −1 for none. ``seen``: tokens so far, padding included.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, method: Method, budget: int | Sequence[int], every: int, protect_first: int, backend: str | None):
        super().__init__()
        self.method, self.every, self.protect_first, self.backend = method, every, protect_first, backend
        self.budget, self.limits = budget, None
        self.slots = budget if isinstance(budget, int) else max(budget)
        self.window = getattr(method, "window", method.protected)
        self._clear()

    def _clear(self) -> None:
        self.valid = self.positions = self.queries = self.queries_real = self.queries_lse = self.tracker = None
        self._buffers = None
        self.seen = self.since = 0
        self.first_eviction: int | None = None
        self._waiting = False

    # ------------------------------------------------------------------------ what transformers asks

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        # transformers before 5 passes cache_position
        queries = query_length if isinstance(query_length, int) else query_length.shape[0]
        physical = self.keys.shape[2] if self.is_initialized else 0
        return physical + queries, self.seen - physical

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self._waiting:
            raise RuntimeError(
                "the last tokens' attention was not seen: this model does not call ALL_ATTENTION_FUNCTIONS, or its config is not the one "
                "that CompressedCache was made with"
            )
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.positions = torch.empty(*key_states.shape[:2], 0, dtype=torch.int32, device=key_states.device)
        fresh = key_states.shape[2]
        self.keys, self.values = self._appended(key_states, value_states)
        own = torch.arange(self.seen, self.seen + fresh, dtype=torch.int32, device=self.device)
        self.positions = torch.cat([self.positions, own.expand(*self.positions.shape[:2], fresh)], -1)
        self.seen += fresh
        self.since += fresh
        self._waiting = True
        return self.keys, self.values

    def _appended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The cache with new entries: in the room that the last eviction left, or by concatenation."""
        held, fresh = self.keys.shape[2], keys.shape[2]
        # a graph may have saved what it holds, also where only the queries are trained
        if self._buffers is not None and held + fresh <= self._buffers[0].shape[2] and _writable(self._buffers[0]):
            for buffer, new in zip(self._buffers, (keys, values)):
                buffer[:, :, held : held + fresh] = new
            return tuple(buffer[:, :, : held + fresh] for buffer in self._buffers)
        self._buffers = None
        return tuple(torch.cat([old, new], 2) for old, new in ((self.keys, keys), (self.values, values)))

    def crop(self, tokens_to_remove: int) -> None:
        count = abs(int(tokens_to_remove))
        most = 0 if self.tracker is not None else self.seen if self.first_eviction is None else self.since
        if tokens_to_remove > 0 or count > most:
            raise ValueError(f"crop can take back tokens since the last eviction only, −{most} … 0; got {tokens_to_remove}")
        if count and self.is_initialized:
            for name in ("keys", "values"):
                setattr(self, name, getattr(self, name)[:, :, :-count])
            for name in ("valid", "positions"):
                setattr(self, name, None if getattr(self, name) is None else getattr(self, name)[..., :-count])
            for name, dim in (("queries", 2), ("queries_real", 1), ("queries_lse", 2)):
                t = getattr(self, name)
                setattr(self, name, None if t is None else t.narrow(dim, 0, max(t.shape[dim] - count, 0)))
            self.seen, self.since = self.seen - count, self.since - count

    def reset(self) -> None:
        super().reset()
        self._clear()

    def _rows(self, take) -> None:
        """Applies `take`, a function of the batch dimension, to everything held."""
        if not self.is_initialized:
            return
        for name in _STATE:
            if getattr(self, name) is not None:
                setattr(self, name, take(getattr(self, name)))
        if self.tracker is not None:
            self.tracker.rows(take)
        self._buffers = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda t: t[indices])

    # ------------------------------------------------------------------------ what the attention asks

    def mask(self, given: Tensor | None, query: Tensor, real: Tensor | None, flash: bool, whole: bool) -> Tensor | None:
        """The mask over this layer's slots: the model's for the newest tokens, the cache's own for those before.

        The model makes one mask, for the first layer's length, and from the last columns of the padding mask. That is right
        while the cache is `whole`; later those are not the tokens that are kept. Also notes which of the newest tokens are `real`.
        """
        batch, heads, width, _ = query.shape
        past, kv_heads = self.keys.shape[2] - width, self.keys.shape[1]
        if self.valid is None and real is not None:
            self.valid = torch.ones(batch, kv_heads, past, dtype=torch.bool, device=query.device)
        held = self.valid
        if self.valid is not None:
            fresh = torch.ones(batch, width, dtype=torch.bool, device=query.device) if real is None else real
            self.valid = torch.cat([self.valid, fresh[:, None].expand(batch, kv_heads, width)], -1)
        if whole or (held is None and given is None and width == 1):
            return given
        if flash:
            return None if self.valid is None else self.valid[:, 0]
        if held is None:
            held = torch.ones(1, 1, past, dtype=torch.bool, device=query.device)
        held = held.repeat_interleave(heads // held.shape[1], 1) if held.shape[1] > 1 else held
        if given is None:
            newest = torch.ones(width, width, dtype=torch.bool, device=query.device).tril()[None, None]
        else:
            newest = given[..., -width:]
        if newest.dtype != torch.bool:
            held = torch.zeros_like(held, dtype=newest.dtype).masked_fill_(~held, torch.finfo(newest.dtype).min)
        held = held[:, :, None].expand(-1, -1, width, -1)
        shape = (max(held.shape[0], newest.shape[0]), max(held.shape[1], newest.shape[1]))
        return torch.cat([held.expand(*shape, -1, -1), newest.expand(*shape, -1, -1)], -1)

    def observe(self, query: Tensor, real: Tensor | None, scale: float | None, lse: Tensor | None) -> None:
        """Takes the queries of the tokens just appended, after their attention; evicts where it is time."""
        self._waiting = False
        with torch.no_grad():
            query = query.detach()
            if isinstance(self.method, LazyEviction):
                self._track(query, real, scale, lse)
            elif self.window:
                self._remember(query, real, lse)
            if self.keys.shape[2] <= self.slots or self.since < self.every:
                return
            indices = self._chosen(scale)
        self._compact(indices)

    def _remember(self, query: Tensor, real: Tensor | None, lse: Tensor | None) -> None:
        """The last `window` queries; a copy of them, so that a prompt's are not held."""
        if real is None:
            real = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
        first = max(query.shape[2] - self.window, 0)
        joined = []
        for old, new, dim in ((self.queries, query, 2), (self.queries_real, real, 1), (self.queries_lse, lse, 2)):
            if new is None:  # without one of them the others are of no use
                joined.append(None)
                continue
            new = new.narrow(dim, first, new.shape[dim] - first)
            kept = self.window - new.shape[dim]
            whole = old is not None and kept > 0
            joined.append(torch.cat([old.narrow(dim, max(old.shape[dim] - kept, 0), min(kept, old.shape[dim])), new], dim) if whole else new.clone())
        self.queries, self.queries_real, self.queries_lse = joined

    def _folded(self, t: Tensor | None) -> Tensor | None:
        """[B, H, ...] as [B·H, ...]: heads keep different entries, so each is a request of its own."""
        return None if t is None else t.flatten(0, 1)

    def _track(self, query: Tensor, real: Tensor | None, scale: float | None, lse: Tensor | None) -> None:
        """LazyEviction's state: one step a query, of a prompt its last `window`."""
        (batch, kv_heads, length, _), width = self.keys.shape, query.shape[2]
        rows = min(width, self.window)
        if self.tracker is None:
            self.tracker = self.method.tracker(kv_heads, self.backend)
        skipped = length - rows - len(self.tracker)
        if skipped > 0:  # a prompt's earlier tokens, known from their own steps on
            own = torch.arange(self.seen - rows - skipped, self.seen - rows, device=query.device)
            self.tracker.append(own.expand(batch, kv_heads, skipped))
        keys, valid = self._folded(self.keys), self._folded(self.valid)
        for row in range(width - rows, width):
            stop = length - width + row + 1
            one = query[:, :, row : row + 1].unflatten(1, (kv_heads, -1)).flatten(0, 1)
            seen = None if lse is None else lse[:, :, row : row + 1].unflatten(1, (kv_heads, -1)).flatten(0, 1)
            attention = window_importance(
                one, keys[:, None, :stop], mask=None if valid is None else valid[:, :stop], scale=scale, group_reduce="max_probs", lse=seen,
                query_mask=None if real is None else real[:, row : row + 1].repeat_interleave(kv_heads, 0), backend=self.backend,
            )  # fmt: skip
            self.tracker.update(attention.view(batch, kv_heads, stop), self.seen - width + row)

    def _chosen(self, scale: float | None) -> Tensor:
        """Which slots to keep, int32 [B, H, slots]: ascending, empty ones first, so that what is held ends at the newest token in every head."""
        batch, kv_heads, length, _ = self.keys.shape
        if self.tracker is not None:
            scores = self.tracker.scores(self.seen - 1)
        else:
            scores = self.method.scores(self._cached(scale)).view(batch, kv_heads, length)
        if self.limits is None or self.limits.device != self.device:
            # budgets of heads go to the device once
            self.limits = torch.tensor([self.budget] * kv_heads if isinstance(self.budget, int) else self.budget, device=self.device)
        kept = select(
            scores, self.limits.expand(batch, kv_heads), protect_first=self.protect_first, protect_last=self.method.protected,
            mask=self.valid, slots=self.slots, backend=self.backend,
        )  # fmt: skip
        return kept.indices.sort(dim=-1).values

    def _compact(self, indices: Tensor) -> None:
        """Keeps these alone; keys and values stay attached to a graph."""
        keys, values = gather(self.keys, self.values, indices, backend=self.backend)
        held = indices >= 0
        self.positions = self.positions.gather(2, indices.clamp(min=0).long()).masked_fill_(~held, -1)
        if self.valid is not None or not isinstance(self.budget, int):
            self.valid = held
        if self.tracker is not None:
            self.tracker.keep(indices)
        self._buffers = None
        if not torch.is_grad_enabled():
            self._buffers = tuple(t.new_empty(*t.shape[:2], self.slots + self.every, t.shape[3]) for t in (keys, values))
            for buffer, t in zip(self._buffers, (keys, values)):
                buffer[:, :, : self.slots] = t
            keys, values = (buffer[:, :, : self.slots] for buffer in self._buffers)
        self.keys, self.values = keys, values
        self.since = 0
        self.first_eviction = self.seen if self.first_eviction is None else self.first_eviction

    def _cached(self, scale: float | None) -> Cached:
        batch, kv_heads, length, _ = self.keys.shape
        queries = lse = real = None
        if self.queries is not None:
            queries = self._folded(self.queries.unflatten(1, (kv_heads, -1)))
            real = self.queries_real.repeat_interleave(kv_heads, 0)
            # it counts what its query saw: that is still all here only where nothing was evicted since
            known = self.queries_lse is not None and self.queries_lse.shape[2] == self.queries.shape[2]
            if known and (self.first_eviction is None or self.since >= self.queries.shape[2]):
                lse = self._folded(self.queries_lse.unflatten(1, (kv_heads, -1)))
        start = torch.zeros(batch * kv_heads, dtype=torch.int32, device=self.device)
        return Cached(queries, self._folded(self.keys)[:, None], start, start + length, self._folded(self.valid), real, scale, lse, self.backend)


def _writable(buffer: Tensor) -> bool:
    return not torch.is_grad_enabled() and (torch.is_inference_mode_enabled() or not buffer.is_inference())


class CompressedCache(Cache):
    """Keeps `budget` entries of every head; give it as ``past_key_values`` to ``generate`` or to the model.

    The model runs as ever: positions keep their true rotary embedding, the mask is that of the slots that are left, and after the
    attention of a layer its cache is scored, selected and compacted where it is time. Padding is evicted first, or masked. It
    needs ``prepare`` of nothing and patches no module: while it lives, `config` names an attention function of ours that
    calls the model's own (eager, sdpa, flash_attention_2) and shows the cache its queries. ``release()``, leaving a ``with`` block
    or the end of its life give the config its own name back. Several caches may share a config.

    Queries while streaming: RKV, SnapKV and KaVa score by the last `window` queries (of the prompt's end, then those generated);
    LazyEviction tracks every generated query and the last `window` of a prompt; Crop and CosineOnly use none. With
    flash_attention_2 and no padding, the softmax's log-sum-exp is FlashAttention's own and SnapKV reads the keys once.

    Args:
        config: the model's (``model.config``); every layer must be full attention.
        method: one of the methods of :func:`compress`, or an object with ``scores(cached)``, ``protected`` and perhaps ``window``. Heads arrive
            as requests: queries [B·Hkv, G, W, D], keys [B·Hkv, 1, P, D].
        budget: entries a head keeps: an int, or a sequence with one entry a layer, each an int or a sequence of ints, one a KV head.
            Heads with fewer entries have empty slots, so a layer's memory is that of its largest head.
        every: evict when so many tokens came since the last eviction and a layer holds more than its budget; default the
            method's window. So a layer holds at most budget + every entries, and a prompt at most while its own attention runs.
        protect_first: so many first tokens are always kept (attention sinks).
        backend: see :func:`window_importance`.

    Beam search, contrastive reordering and ``crop`` back to the last eviction work; assisted generation, which rolls back further,
    does not. ``cache.layers[i].positions`` tells which tokens are kept.

    Raises:
        ValueError, TypeError: naming the argument; layers with sliding or linear attention; an attention implementation that
        cannot mask slots. RuntimeError: the model's attention does not pass through transformers' registry.
    """

    def __init__(
        self, config: Any, *, method: Method, budget: int | Sequence[int | Sequence[int]], every: int | None = None, protect_first: int = 0,
        backend: str | None = None,
    ):  # fmt: skip
        if hasattr(config, "config"):
            raise TypeError(f"config must be a model's config, such as model.config; got {type(config).__name__}")
        config = config.get_text_config(decoder=True)
        check_method(method)
        _check_layers(config)
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        check_heads(method, config.num_attention_heads, kv_heads)
        every = max(getattr(method, "window", method.protected), 1) if every is None else every
        if isinstance(every, bool) or not isinstance(every, numbers.Integral) or every < 1:
            raise ValueError(f"every must be a positive int; got {every!r}")
        if isinstance(protect_first, bool) or not isinstance(protect_first, numbers.Integral) or protect_first < 0:
            raise ValueError(f"protect_first must not be negative; got {protect_first!r}")
        budgets = _budgets(budget, config.num_hidden_layers, kv_heads, protect_first + method.protected)
        if base_of(config).startswith("flash_attention") and any(not isinstance(b, int) for b in budgets):
            raise ValueError("budget must be one number a layer with flash_attention: it knows no heads with slots of their own; use eager or sdpa")
        layers = [CompressedLayer(method, b, int(every), int(protect_first), backend) for b in budgets]
        super().__init__(layers=layers)
        watch(config, self)
        # a WeakSet has lost this cache by the time it is finalized
        self._finalizer = weakref.finalize(self, unwatch, id(config))
        self._config = config

    def layer_of(self, keys: Tensor) -> CompressedLayer | None:
        """The layer whose update returned these very keys."""
        return next((layer for layer in self.layers if layer.keys is keys), None)

    def mask_is_whole(self, layer: CompressedLayer) -> bool:
        """Whether the model's mask of this forward is that of all tokens: no layer had evicted when it was made."""
        return all(other.first_eviction is None or other.first_eviction == layer.seen for other in self.layers)

    def release(self) -> None:
        """Gives the config its attention implementation back, unless another cache still looks; the cache can be read, not used."""
        if self._finalizer.detach() is not None:
            unwatch(id(self._config), self)

    def __enter__(self) -> CompressedCache:
        return self

    def __exit__(self, *error) -> None:
        self.release()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keys and values hold, spare slots included."""
        return sum(t.untyped_storage().nbytes() for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values))


def _check_layers(config: Any) -> None:
    kinds = getattr(config, "layer_types", None)
    if kinds is None and getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        kinds = ["sliding_attention"]
    others = sorted(set(kinds or ()) - {"full_attention"})
    if others or getattr(config, "is_encoder_decoder", False):
        what = ", ".join(others) or "encoder-decoder"
        raise ValueError(f"config has {what} layers: CompressedCache keeps entries of full, causal self-attention alone")


def _budgets(budget, layers: int, kv_heads: int, protected: int) -> list[int | list[int]]:
    whole = isinstance(budget, numbers.Integral)
    if isinstance(budget, bool) or not (whole or (isinstance(budget, Sequence) and not isinstance(budget, str))):
        raise TypeError(f"budget must be an int or a sequence, one entry a layer; got {type(budget).__name__}")
    given = [budget] * layers if whole else list(budget)
    if len(given) != layers:
        raise ValueError(f"budget must have one entry a layer, {layers}; got {len(given)}")
    found = []
    for entry in given:
        each = [entry] if isinstance(entry, numbers.Integral) else list(entry)
        if len(each) not in ((1,) if isinstance(entry, numbers.Integral) else (kv_heads,)):
            raise ValueError(f"budget must have one number a KV head, {kv_heads}; got {len(each)}")
        if min(each) < max(protected, 1):
            raise ValueError(f"budget must be at least {max(protected, 1)}, the number of protected entries; got {min(each)}")
        found.append(int(entry) if isinstance(entry, numbers.Integral) else [int(n) for n in each])
    return found
