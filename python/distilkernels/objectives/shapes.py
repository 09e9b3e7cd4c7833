"""Checks of the tensors that objectives take, with errors that name the argument."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(t: Tensor) -> Tensor:
    """float32, or float64 as it is: sixteen bits cannot count the tokens of a batch."""
    return t if t.dtype == torch.float64 else t.float()


def checked_floats(name: str, t: Tensor, shape: tuple[int, ...] | None = None, like: str = "") -> Tensor:
    """A floating-point tensor as :func:`wide`, of `shape` (that of the argument `like`) where given."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {getattr(t, 'dtype', type(t).__name__)}")
    if shape is not None and tuple(t.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape of {like}, {tuple(shape)}; got {tuple(t.shape)}")
    return wide(t)


def checked_mask(name: str, mask: Tensor | None, t: Tensor, like: str) -> Tensor:
    """A mask as weights in the dtype of `t`, which it must fit; None is all ones."""
    if mask is None:
        return t.new_ones(t.shape)
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(mask).__name__}")
    if mask.shape != t.shape:
        raise ValueError(f"{name} must have the shape of {like}, {tuple(t.shape)}; got {tuple(mask.shape)}")
    return mask.detach().to(t.dtype)


def inside(mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, of one shape, with 0 where the mask has no token: a NaN there would meet a gradient of 0."""
    if mask is None:
        return tensors
    outside = checked_mask("mask", mask, tensors[0], "the log-probs") == 0
    return tuple(t.masked_fill(outside, 0) for t in tensors)


def per_token(name: str, t: Tensor, like: Tensor) -> Tensor:
    """[..., L] as it is, or one number for each sequence [...] widened to its tokens."""
    t = checked_floats(name, t)
    if t.shape == like.shape:
        return t
    if t.shape == like.shape[:-1]:
        return t.unsqueeze(-1).expand_as(like)
    raise ValueError(f"{name} must have shape {tuple(like.shape)}, one per token, or {tuple(like.shape[:-1])}; got {tuple(t.shape)}")


def over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator/denominator; where nothing counted a 0 that stays attached to the graph."""
    return numerator / denominator.masked_fill(denominator == 0, 1)
