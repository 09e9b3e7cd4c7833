"""Which entries of a cache to keep, and the keys and values at them."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..primitives.boundary import plain_eager
from ..primitives.head import Head
from ..primitives.kv_gather import Rotation
from ..primitives.kv_gather import gather as gather_rows
from ..primitives.topk_select import MAX_K, top_k
from .scores import checked_keys

ORDERS = ("time", "score")


@dataclass(frozen=True)
class KVSelection:
    """Kept entries of each head: ``indices`` int32 [B, H, M] along T, −1 for an empty slot, those after the others; ``counts`` int32 [B, H]."""

    indices: Tensor
    counts: Tensor

    @property
    def mask(self) -> Tensor:
        """bool [B, H, M]: the slot holds an entry."""
        return self.indices >= 0

    def __post_init__(self):
        if not isinstance(self.indices, Tensor) or self.indices.dtype != torch.int32 or self.indices.dim() != 3:
            raise ValueError("indices must be an int32 tensor [B, H, M]")
        if tuple(self.counts.shape) != tuple(self.indices.shape[:2]):
            raise ValueError(f"counts must have shape [B, H] = {tuple(self.indices.shape[:2])}; got {tuple(self.counts.shape)}")


@torch.no_grad()
def select(
    scores: Tensor, budget: int | Sequence[int] | Tensor, *, protect_first: int = 0, protect_last: int = 0, mask: Tensor | None = None,
    order: str = "time", slots: int | None = None, backend: str | None = None,
) -> KVSelection:  # fmt: skip
    """The `budget` best entries of every head. Equal scores: the lower index. The same answer whatever the batch or device.

    Args:
        scores: [B, H, T], high = keep. A NaN ranks below every number.
        budget: entries to keep, protected ones included: an int; one a request, a sequence or int tensor [B]; or a tensor [B, H].
            Heads with fewer valid entries keep what they have and leave slots empty.
        protect_first, protect_last: so many of the first and last valid entries are kept whatever their scores.
        mask: bool [B, T] or [B, H, T], True = valid; others are never kept.
        order: of the slots: "time" (ascending index) or "score" (protected entries first, then descending).
        slots: M. Default the largest budget; a budget tensor on a GPU, whose values are not waited for, makes it T.
        backend: which one serves the top-k, see :func:`window_importance`.

    Returns:
        :class:`KVSelection`; empty slots come last.

    Raises:
        ValueError, TypeError: naming the argument; a budget smaller than what is protected.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(f"scores must be a floating point tensor; got {scores.dtype if isinstance(scores, Tensor) else type(scores).__name__}")
    if scores.dim() != 3:
        raise ValueError(f"scores must have shape [B, H, T]; got {tuple(scores.shape)}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
    protect_first, protect_last = _count("protect_first", protect_first), _count("protect_last", protect_last)
    b, heads, length = scores.shape
    limits, largest = _checked_budget(budget, b, heads, length, protect_first + protect_last, scores.device)
    slots = largest if slots is None else _count("slots", slots)
    valid = _checked_valid(mask, scores)
    ranked = _ranking(scores, valid, protect_first, protect_last)
    kept = min(slots, length)
    if kept == 0:
        indices = torch.empty((b, heads, 0), dtype=torch.int32, device=scores.device)
    elif kept <= MAX_K:
        indices = top_k(ranked, kept, Head(), backend).ids.view(b, heads, kept)
    else:
        indices = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :kept].int()
    counts = torch.minimum(limits, valid.sum(-1)).clamp(0, kept).int()
    indices = indices.masked_fill(torch.arange(kept, device=scores.device) >= counts[..., None], -1)
    if order == "time":
        ascending = indices.masked_fill(indices < 0, length).sort(dim=-1).values
        indices = ascending.masked_fill_(ascending == length, -1)
    if slots > kept:
        indices = torch.nn.functional.pad(indices, (0, slots - kept), value=-1)
    return KVSelection(indices.contiguous(), counts)


def _ranking(scores: Tensor, valid: Tensor, first: int, last: int) -> Tensor:
    """One number an entry: protected ones above every score, valid ones above every other."""
    x = scores if scores.dtype == torch.float64 else scores.float()
    top = torch.finfo(x.dtype).max
    # floats stay free above and below the scores, so that protection, validity and NaN are part of the one order
    x = x.clamp(-top / 2, top / 2).masked_fill(x.isnan(), -0.75 * top)
    if first or last:
        rank = valid.cumsum(-1)
        protected = (rank <= first) | (rank > rank[..., -1:] - last)
        x = x.masked_fill(protected & valid, top)
    return x.masked_fill(~valid, -top)


def _checked_budget(budget, b: int, heads: int, length: int, protected: int, device: torch.device) -> tuple[Tensor, int]:
    """Budgets as an int tensor that broadcasts to [B, H], and the number of slots they need."""
    if isinstance(budget, numbers.Integral) and not isinstance(budget, bool):
        values = [int(budget)]
    elif isinstance(budget, Tensor):
        values = None
        if budget.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"budget must hold integers; got {budget.dtype}")
        if tuple(budget.shape) not in ((b,), (b, heads)):
            raise ValueError(f"budget must have shape [B] = ({b},) or [B, H] = ({b}, {heads}); got {tuple(budget.shape)}")
        if budget.device != device:
            raise ValueError(f"budget must be on {device}, where the scores are; got {budget.device}")
        limits = budget.view(b, -1)
        if device.type == "cpu" and plain_eager(budget):
            values = budget.flatten().tolist()
    elif isinstance(budget, Sequence) and not isinstance(budget, str):
        values = [_count("budget", value) for value in budget]
        if len(values) != b:
            raise ValueError(f"budget must have one entry a request, {b}; got {len(values)}")
    else:
        raise TypeError(f"budget must be an int, a sequence of ints or an int tensor; got {type(budget).__name__}")
    if values is None:
        return limits.expand(b, heads), length
    if min(values, default=protected) < protected:
        raise ValueError(f"budget must be at least {protected}, the number of protected entries; got {min(values)}")
    if len(values) == 1 and not isinstance(budget, Tensor):
        limits = torch.full((b, 1), values[0], device=device)
    elif not isinstance(budget, Tensor):
        limits = torch.tensor(values, device=device).view(-1, 1)
    return limits.expand(b, heads), max(values, default=0)


def _checked_valid(mask: Tensor | None, scores: Tensor) -> Tensor:
    if mask is None:
        return torch.ones_like(scores, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True = valid; got {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}")
    b, heads, length = scores.shape
    if tuple(mask.shape) not in ((b, length), (b, heads, length)) or mask.device != scores.device:
        raise ValueError(f"mask must have shape ({b}, {length}) or ({b}, {heads}, {length}) on {scores.device}; got {tuple(mask.shape)} on {mask.device}")
    return (mask[:, None] if mask.dim() == 2 else mask).expand(scores.shape)


def _count(name: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must not be negative; got {value}")
    return int(value)


# ---------------------------------------------------------------------------------------------- gather


@dataclass(frozen=True)
class Rope:
    """Turn gathered keys to other positions: rotary embeddings rotate, so R(p′)R(p)⁻¹ takes a key from p to p′.

    Args:
        inv_freq: [R/2], the model's inverse frequencies (``model.model.rotary_emb.inv_freq``), R ≤ D features turn.
        source: where the cached keys were encoded: None for 0…T − 1, or int [B, T] or [B, H, T].
        target: None un-rotates (position 0), "slots" re-rotates to 0…M − 1, or int [B, M] or [B, H, M].
        interleaved: feature pairs are (2i, 2i + 1), as GPT-J has them, else (i, i + R/2), as Llama has them.
        max_position: every position is below it. Needed for position tensors on a GPU, whose maximum would have to be waited for.
            A position outside [0, max_position) is an error on a CPU; on a GPU, which is not waited for, its key becomes zeros.

    Angles are float32 products as transformers makes them, so that keys turned to p′ equal those that a model encodes there. A
    scale on the embedding (YaRN) stays on the key.
    """

    inv_freq: Tensor
    source: Tensor | None = None
    target: Tensor | str | None = None
    interleaved: bool = False
    max_position: int | None = None
    _tables: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        if not isinstance(self.inv_freq, Tensor) or self.inv_freq.dim() != 1 or not self.inv_freq.is_floating_point():
            raise ValueError("inv_freq must be a floating point tensor [R/2]")
        for name, given in (("source", self.source), ("target", self.target)):
            if given is None or (name == "target" and isinstance(given, str) and given == "slots"):
                continue
            if not isinstance(given, Tensor) or given.dtype not in (torch.int32, torch.int64) or given.dim() not in (2, 3):
                raise ValueError(f"{name} must be None{', slots' if name == 'target' else ''} or an int tensor of two or three dimensions; got {given!r}")

    def rotation(self, indices: Tensor, length: int) -> Rotation:
        """What the kernel turns by, for `indices` [B, H, M] into a cache of `length` keys."""
        b, heads, slots = indices.shape
        place = indices.clamp(min=0)
        source = place
        if self.source is not None:
            given = self._expanded("source", self.source, (b, heads, length))
            source = given.gather(2, place.long()).int() if length else torch.zeros_like(place)
        target = None
        if isinstance(self.target, Tensor):
            target = self._expanded("target", self.target, (b, heads, slots)).int().contiguous()
        elif self.target is not None:
            target = torch.arange(slots, dtype=torch.int32, device=indices.device).expand(indices.shape).contiguous()
        if indices.device.type == "cpu" and plain_eager(indices):
            for name, given, used in (("source", self.source, source), ("target", self.target, target)):
                if isinstance(given, Tensor):
                    self._check(name, used[indices >= 0])
        cos, sin = self._angles(max(length, slots, 1), indices.device)
        return Rotation(cos, sin, source.contiguous(), target, self.interleaved)

    def _check(self, name: str, positions: Tensor) -> None:
        if not positions.numel():
            return
        low, high = map(int, positions.aminmax())
        if low < 0:
            raise ValueError(f"{name} must hold positions of at least 0 where an entry is kept; got {low}")
        if self.max_position is not None and high >= self.max_position:
            raise ValueError(f"{name} must hold positions below max_position = {self.max_position}; got {high}")

    def _expanded(self, name: str, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
        positions = positions[:, None] if positions.dim() == 2 else positions
        if positions.shape[0] != shape[0] or positions.shape[1] not in (1, shape[1]) or positions.shape[2] != shape[2]:
            raise ValueError(f"{name} must have shape {(shape[0], shape[2])} or {shape}; got {tuple(positions.shape)}")
        return positions.expand(shape)

    def _angles(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        given = [t for t in (self.source, self.target) if isinstance(t, Tensor)]
        if self.max_position is not None:
            rows = max(rows, self.max_position)
        elif any(t.device.type != "cpu" for t in given):
            raise ValueError("max_position must be given for positions on a GPU: their maximum would have to be waited for")
        else:
            rows = max([rows, *(int(t.max()) + 1 for t in given if t.numel())])
        if (rows, device) not in self._tables:
            angle = torch.arange(rows, device=device, dtype=torch.float32)[:, None] * self.inv_freq.to(device, torch.float32)
            self._tables.clear()
            self._tables[rows, device] = angle.cos(), angle.sin()
        return self._tables[rows, device]


def gather(
    keys: Tensor, values: Tensor, selection: KVSelection | Tensor, *, inplace: bool = False, rotate: Rope | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The selected keys and values of every head, one launch for both; zeros in empty slots.

    Args:
        keys: [B, H, T, D]; values: [B, H, T, Dv], any strides.
        selection: a :class:`KVSelection`, or int32 or int64 indices [B, H, M] (or [B, 1, M] for every head), −1 = empty.
        inplace: compact into the first M slots of the given tensors and return views of those. Needs each head's indices
            ascending with empty slots last, as ``order="time"`` makes them, and no gradient.
        rotate: a :class:`Rope`: keys turned back or to new positions on the way.
        backend: see :func:`window_importance`.

    Returns:
        keys [B, H, M, D] and values [B, H, M, Dv] in their dtypes; differentiable out of place.

    Raises:
        ValueError, TypeError: naming the argument. BackendError: `backend` cannot serve these tensors.
    """
    checked_keys("keys", keys)
    checked_keys("values", values)
    if values.shape[:3] != keys.shape[:3] or values.device != keys.device:
        raise ValueError(f"values must share keys' [B, H, T] {tuple(keys.shape[:3])} and device {keys.device}; got {tuple(values.shape)} on {values.device}")
    indices = selection.indices if isinstance(selection, KVSelection) else selection
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"selection must be a KVSelection or an int tensor of indices; got {type(selection).__name__}")
    b, heads, length = keys.shape[:3]
    if indices.dim() != 3 or indices.shape[0] != b or indices.shape[1] not in (1, heads):
        raise ValueError(f"selection must have indices of shape ({b}, {heads}, M) or ({b}, 1, M); got {tuple(indices.shape)}")
    if indices.device != keys.device:
        raise ValueError(f"selection must be on {keys.device}, where the keys are; got {indices.device}")
    if keys.device.type == "cpu" and plain_eager(indices) and indices.numel():
        _check_indices(indices, length, inplace)
    if indices.dtype == torch.int64:
        indices = indices.clamp(-1, length).int()  # what int32 cannot hold is outside, not wrapped around
    indices = indices.expand(b, heads, -1).contiguous()
    if rotate is not None and not isinstance(rotate, Rope):
        raise TypeError(f"rotate must be a Rope; got {type(rotate).__name__}")
    if rotate is not None and 2 * rotate.inv_freq.shape[0] > keys.shape[3]:
        raise ValueError(f"rotate turns {2 * rotate.inv_freq.shape[0]} features; keys have {keys.shape[3]}")
    rotation = None if rotate is None else rotate.rotation(indices, length)
    if not inplace:
        keys, values = (t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous() for t in (keys, values))
        return gather_rows(keys, values, indices, rotation, backend=backend)
    for name, t in (("keys", keys), ("values", values)):
        if t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"inplace=True would overwrite {name}, which require a gradient")
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            raise ValueError(f"inplace=True needs {name} with last stride 1; got {t.stride(-1)}")
        if any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape)):
            raise ValueError(f"inplace=True needs {name} whose heads have memory of their own; got strides {t.stride()}")
    if keys.data_ptr() == values.data_ptr() and keys.numel():
        raise ValueError("inplace=True needs keys and values in memory of their own: what is compacted twice is lost")
    if indices.shape[2] > length:
        raise ValueError(f"inplace=True has {length} slots to write; the selection has {indices.shape[2]}")
    return gather_rows(keys, values, indices, rotation, inplace=True, backend=backend)


def _check_indices(indices: Tensor, length: int, ascending: bool) -> None:
    low, high = indices.aminmax()
    if low < -1 or high >= length:
        bad = ((indices < -1) | (indices >= length)).nonzero()[0].tolist()
        raise ValueError(f"selection{bad} is {int(indices[tuple(bad)])}; indices must be in [0, {length}) or -1 for an empty slot")
    if ascending:
        last = indices.masked_fill(indices < 0, length).long()
        if ((last[..., 1:] <= last[..., :-1]) & (last[..., 1:] < length)).any():
            raise ValueError('inplace=True needs each head\'s indices ascending, empty slots last: select with order="time"')
