"""A teacher's distribution as weighted random samples of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TeacherSamples:
    """Ids drawn from a proposal g ∝ p^τ and their importance weights (random-sampling KD, arXiv 2503.16870).

    Args:
        ids: int32 or int64 [..., R]: the distinct ids of R draws, ascending, then −1.
        weights: float [..., R]: w_j = (p_j/g_j)·count_j/R, 0 at −1. E[Σ_j w_j f(id_j)] = Σ_v p_v f(v) for any f, so the
            cross-entropy −Σ w_j log q_j has the expected gradient q − p.
        temperature: the softmax temperature of p.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices.
    """

    ids: Tensor
    weights: Tensor
    temperature: float = 1.0

    def __post_init__(self):
        for name, tensor in (("ids", self.ids), ("weights", self.weights)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if self.ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids must be int32 or int64; got {self.ids.dtype}")
        if not self.weights.is_floating_point():
            raise TypeError(f"weights must be floating point; got {self.weights.dtype}")
        if self.ids.dim() == 0 or self.ids.shape != self.weights.shape:
            raise ValueError(f"ids and weights must share a shape [..., R]; got {tuple(self.ids.shape)} and {tuple(self.weights.shape)}")
        if self.ids.device != self.weights.device:
            raise ValueError(f"weights must be on {self.ids.device}, where ids is; got {self.weights.device}")

    @property
    def shape(self) -> torch.Size:
        """The token shape, without R."""
        return self.ids.shape[:-1]

    def __len__(self) -> int:
        return self.shape[0]

    def to(self, device, non_blocking: bool = False) -> TeacherSamples:
        return TeacherSamples(*(t.to(device, non_blocking=non_blocking) for t in (self.ids, self.weights)), self.temperature)

    def __getitem__(self, index) -> TeacherSamples:
        """Tokens by any index over the token dimensions."""
        slots = (*(index if isinstance(index, tuple) else (index,)), Ellipsis, slice(None))
        return TeacherSamples(self.ids[slots], self.weights[slots], self.temperature)

    def reshape(self, *shape: int) -> TeacherSamples:
        """The same tokens in another token shape."""
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        ids = self.ids.reshape(*shape, self.ids.shape[-1])
        return TeacherSamples(ids, self.weights.reshape(ids.shape), self.temperature)
