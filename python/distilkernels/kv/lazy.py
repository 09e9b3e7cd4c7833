"""LazyEviction (arXiv 2506.15969): keep the tokens that attention comes back to, by when it last came and how long it may stay away."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from ..primitives.boundary import plain_eager
from ..primitives.recurrence_update import recurrence
from .select import KVSelection

# Sources print three forms of H2 for the interval m = MRI. The first two fall with m, the last rises with it.
H2 = {
    "minus_one": lambda m: 2 * torch.sigmoid(-(m - 1)),
    "minus_mri_minus_one": lambda m: 2 * torch.sigmoid(-m - 1),
    "inverse": lambda m: 2 * torch.sigmoid(-1 / m),
}


def recurrence_scores(last_seen: Tensor, max_interval: Tensor, step: int, h2: str = "minus_one") -> Tensor:
    """H1 + H2, float32, of int32 state; high = keep.

    H1 = 2σ(−(step − last_seen)/max_interval), H2 as named. Where no interval is known yet (max_interval 0) the score is 1 for a
    token that was looked at in this very step and 0 otherwise, the limit of H1.
    """
    age, interval = (step - last_seen).float(), max_interval.float()
    known = interval.clamp(min=1)
    score = 2 * torch.sigmoid(-age / known) + H2[h2](known)
    return torch.where(max_interval > 0, score, (age == 0).float())


class RecurrenceTracker:
    """Two integers a head and token: the last step at which attention exceeded alpha, and the largest gap between two such steps.

    One tracker serves one layer, or several whose attention is stacked along the batch or the heads. A token is as good as
    looked at in its own step. Attention of a KV head is the largest over its query heads. An update is one launch.

    Args:
        alpha: attention above it counts as looking; the paper uses 5e-4 and 1e-4.
        num_heads: KV heads H, a divisor of the attention's; None: one state a query head.
        h2: "minus_one" 2σ(−(MRI − 1)), "minus_mri_minus_one" 2σ(−MRI − 1), or "inverse" 2σ(−1/MRI): sources differ.
        backend: see :func:`window_importance`.

    Raises:
        ValueError, TypeError: naming the argument, here and in the methods.
    """

    def __init__(self, *, alpha: float = 5e-4, num_heads: int | None = None, h2: str = "minus_one", backend: str | None = None):
        if not alpha >= 0:
            raise ValueError(f"alpha must be at least 0; got {alpha}")
        check_h2(h2)
        if num_heads is not None and (isinstance(num_heads, bool) or not isinstance(num_heads, numbers.Integral) or num_heads < 1):
            raise ValueError(f"num_heads must be None or a positive int; got {num_heads!r}")
        self.alpha, self.num_heads, self.h2, self.backend = float(alpha), num_heads, h2, backend
        self._last = self._interval = None
        self._length = 0
        self._step: int | None = None  # the last one that was taken

    def __len__(self) -> int:
        """T: tokens that are tracked."""
        return self._length

    @property
    def last_seen(self) -> Tensor:
        """int32 [B, H, T]; a view of the state, or [0, 0, 0] before the first update."""
        return torch.empty(0, 0, 0, dtype=torch.int32) if self._last is None else self._last[..., : self._length]

    @property
    def max_interval(self) -> Tensor:
        """int32 [B, H, T]; 0 where no token was looked at twice."""
        return torch.empty(0, 0, 0, dtype=torch.int32) if self._interval is None else self._interval[..., : self._length]

    def append(self, own_steps: Tensor) -> None:
        """Track more tokens, at the end, from their own steps: int [B, H, N], or what broadcasts to it once the state exists."""
        count = own_steps.shape[-1]
        if self._last is None:
            self._last, self._interval = (torch.zeros(*own_steps.shape[:2], 0, dtype=torch.int32, device=own_steps.device) for _ in range(2))
        need = self._length + count
        if need > self._last.shape[2]:
            # room for twice as many, so that a token a step does not copy the state every step
            room = max(2 * self._last.shape[2], need, 64)
            grow = (0, room - self._last.shape[2])
            self._last, self._interval = (torch.nn.functional.pad(t, grow) for t in (self._last, self._interval))
        self._last[..., self._length : need] = own_steps
        self._interval[..., self._length : need] = 0
        self._length = need

    def update(self, attention: Tensor, step: int) -> None:
        """Take the attention of step `step`, or of the W steps from it on.

        Args:
            attention: probabilities [B, Hq, T] of one query, or [B, Hq, W, T] of the queries of steps step … step + W − 1, over
                the tokens tracked so far and N new ones at the end, whose own steps are the last N.
            step: int, no smaller than any before.

        Raises:
            ValueError, TypeError: naming the argument; also for a step before the last that was taken.
        """
        if not isinstance(attention, Tensor) or not attention.is_floating_point():
            raise TypeError(f"attention must be a floating point tensor; got {attention.dtype if isinstance(attention, Tensor) else type(attention).__name__}")
        if isinstance(step, bool) or not isinstance(step, numbers.Integral):
            raise TypeError(f"step must be an int; got {type(step).__name__}")
        if attention.dim() not in (3, 4):
            raise ValueError(f"attention must have shape [B, Hq, T] or [B, Hq, W, T]; got {tuple(attention.shape)}")
        attention = attention.unsqueeze(2) if attention.dim() == 3 else attention
        b, query_heads, width, length = attention.shape
        heads = self.num_heads or query_heads
        if query_heads % heads:
            raise ValueError(f"attention must have a multiple of num_heads = {heads} query heads; got {query_heads}")
        if self._last is not None and (self._last.shape[:2] != (b, heads) or length < self._length):
            raise ValueError(f"attention must cover {tuple(self.last_seen.shape)} tracked tokens and new ones after them; got {tuple(attention.shape)}")
        if self._step is not None and step < self._step:
            raise ValueError(f"step must not go back: the last one taken was {self._step}; got {step}")
        self._step = int(step) + max(width - 1, 0)
        own = torch.arange(step + width - (length - self._length), step + width, device=attention.device)
        self.append(own.expand(b, heads, -1))
        attention = attention if attention.stride(-1) == 1 or length <= 1 else attention.contiguous()
        recurrence(attention, self.last_seen, self.max_interval, int(step), self.alpha, self.backend)

    def scores(self, step: int) -> Tensor:
        """float32 [B, H, T] at `step`, high = keep; see :func:`recurrence_scores`."""
        return recurrence_scores(self.last_seen, self.max_interval, int(step), self.h2)

    def keep(self, selection: KVSelection | Tensor) -> None:
        """Forget all but the selected tokens: what is done to the cache. Empty slots track nothing that ever scores.

        Raises:
            ValueError: an index is not below T. On a GPU, whose values are not waited for, PyTorch's gather asserts instead.
        """
        indices = selection.indices if isinstance(selection, KVSelection) else selection
        if not isinstance(indices, Tensor):
            raise TypeError(f"selection must be a KVSelection or an int tensor of indices; got {type(selection).__name__}")
        if indices.dim() != 3 or indices.shape[:2] != self.last_seen.shape[:2]:
            raise ValueError(f"selection must have indices [B, H, M] with [B, H] = {tuple(self.last_seen.shape[:2])}; got {tuple(indices.shape)}")
        if indices.device.type == "cpu" and plain_eager(indices) and indices.numel() and int(indices.max()) >= self._length:
            raise ValueError(f"selection must hold indices below the {self._length} tokens that are tracked; got {int(indices.max())}")
        place, empty = indices.clamp(min=0).long(), indices < 0
        kept = [t.gather(2, place).masked_fill_(empty, 0) for t in (self.last_seen, self.max_interval)]
        self._last, self._interval, self._length = *kept, indices.shape[2]

    def rows(self, take: Callable[[Tensor], Tensor]) -> None:
        """Apply `take`, a function along the batch (a reordering, a repetition), to the state."""
        if self._last is not None:
            self._last, self._interval = take(self._last), take(self._interval)

    def window(self, quantile: float = 0.8) -> int:
        """An eviction window from a sample: that quantile of the largest gaps of the tokens that have one (the paper: 0.8). Reads values."""
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile must be in [0, 1]; got {quantile}")
        gaps = self.max_interval[self.max_interval > 0].sort().values  # torch.quantile takes 2²⁴ numbers at most
        if not len(gaps):
            return 1
        place = quantile * (len(gaps) - 1)
        low, high = int(gaps[math.floor(place)]), int(gaps[math.ceil(place)])
        return math.ceil(low + (high - low) * (place % 1))


def check_h2(h2: str) -> None:
    if h2 not in H2:
        raise ValueError(f"h2 must be one of {', '.join(H2)}; got {h2!r}")
