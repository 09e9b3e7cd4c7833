"""``kv_gather``: the selected keys and values of every head, side by side, in one launch.

Bytes: B·H·M·(D + Dv)·itemsize read and as many written. Optionally the keys are turned from the position they were encoded
at to another one on the way (rotary embeddings are rotations: R(p′)R(p)⁻¹), or back to position 0.

In place, slot m of each head is overwritten by slot indices[m] ≥ m: with ascending indices a chunk of slots that is read
before it is written never reads what an earlier chunk wrote.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import resolve
from .boundary import plain_eager


class Rotation(NamedTuple):
    """``cos``, ``sin`` float32 [P, R/2] contiguous: of position times inverse frequency. The first R ≤ D features turn.

    ``source``, ``target`` int32 [B, H, M] contiguous, in [0, P): where each slot's key was encoded and where it goes; target
    None is position 0, which has no rotation. Where either is outside [0, P) the key is zeros.
    ``interleaved``: feature pairs are (2i, 2i + 1), as GPT-J has them, else (i, i + R/2), as Llama has them.
    """

    cos: Tensor
    sin: Tensor
    source: Tensor
    target: Tensor | None
    interleaved: bool = False


def turn(rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
    """cos and sin [B, H, M, R/2] of the angle from source to target, and where the key is zeros (bool [B, H, M])."""
    rows = rotation.cos.shape[0]
    outside = (rotation.source < 0) | (rotation.source >= rows)
    source = rotation.source.clamp(0, rows - 1).long()
    cos, sin = rotation.cos[source], -rotation.sin[source]
    if rotation.target is not None:
        outside = outside | (rotation.target < 0) | (rotation.target >= rows)
        target = rotation.target.clamp(0, rows - 1).long()
        c, s = rotation.cos[target], rotation.sin[target]
        cos, sin = c * cos - s * sin, s * cos + c * sin
    return cos, sin, outside


def rotated(keys: Tensor, rotation: Rotation) -> Tensor:
    """Keys [B, H, M, D] turned from source to target, in float32 or better, rounded once."""
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    cos, sin, outside = turn(rotation._replace(cos=rotation.cos.to(dtype), sin=rotation.sin.to(dtype)))
    width = 2 * rotation.cos.shape[1]
    x = keys[..., :width].to(dtype)
    a, b = (x[..., 0::2], x[..., 1::2]) if rotation.interleaved else x.chunk(2, -1)
    pair = a * cos - b * sin, a * sin + b * cos
    x = torch.stack(pair, -1).flatten(-2) if rotation.interleaved else torch.cat(pair, -1)
    return torch.cat([x.to(keys.dtype), keys[..., width:]], -1).masked_fill(outside[..., None], 0)


def reference(
    keys: Tensor, values: Tensor, indices: Tensor, rotation: Rotation | None, out_keys: Tensor, out_values: Tensor, inplace: bool = False
) -> None:  # fmt: skip
    """Writes out[b, h, m] = in[b, h, indices[b, h, m]], zeros where the index is outside [0, T).

    keys [B, H, T, D], values [B, H, T, Dv]: last stride 1, any other strides, not necessarily the same dtype. indices int32
    [B, H, M] contiguous. out_keys [B, H, M, D], out_values [B, H, M, Dv] in the dtypes of keys and values, last stride 1. `inplace`:
    they are keys[:, :, :M] and values[:, :, :M], and each head's indices ascend, with the empty ones after the others.
    """
    empty = ((indices < 0) | (indices >= keys.shape[2]))[..., None]
    place = indices.clamp(0, max(keys.shape[2] - 1, 0))[..., None].long()
    picked = keys.gather(2, place.expand(*indices.shape, keys.shape[3]))
    if rotation is not None:
        picked = rotated(picked, rotation)
    picked_values = values.gather(2, place.expand(*indices.shape, values.shape[3]))
    out_keys.copy_(picked.masked_fill(empty, 0))
    out_values.copy_(picked_values.masked_fill(empty, 0))


def launched(keys, values, indices, rotation: Rotation | None, inplace: bool, backend: str | None) -> tuple[Tensor, Tensor]:
    """Gathered keys and values without the registered op; arguments are already checked."""
    slots = indices.shape[2]
    launch = resolve("kv_gather", keys, values, backend=backend)
    if inplace:
        out = keys[:, :, :slots], values[:, :, :slots]
    else:
        out = tuple(torch.empty((*indices.shape, t.shape[3]), dtype=t.dtype, device=t.device) for t in (keys, values))
    if keys.shape[2] == 0:
        return tuple(t.zero_() for t in out)
    if indices.numel():
        launch(keys, values, indices, rotation, *out, inplace)
    return out


@torch.library.custom_op("distilkernels::kv_gather", mutates_args=())
def _op(
    keys: Tensor, values: Tensor, indices: Tensor, cos: Tensor | None, sin: Tensor | None, source: Tensor | None, target: Tensor | None,
    interleaved: bool, backend: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rotation = None if cos is None else Rotation(cos, sin, source, target, interleaved)
    return launched(keys, values, indices, rotation, False, backend)


@_op.register_fake
def _(keys, values, indices, cos, sin, source, target, interleaved, backend):
    return tuple(t.new_empty((*indices.shape, t.shape[3])) for t in (keys, values))


def _gathered(keys, values, indices, rotation, backend):
    if plain_eager(keys, values):
        return launched(keys, values, indices, rotation, False, backend)
    return _op(keys, values, indices, *(rotation or (None, None, None, None, False)), backend)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keys, values, indices, rotation, backend):
        ctx.save_for_backward(indices, *([] if rotation is None else [t for t in rotation[:4] if t is not None]))
        ctx.interleaved, ctx.shapes = rotation is not None and rotation.interleaved, (keys.shape, values.shape)
        return _gathered(keys, values, indices, rotation, backend)

    @staticmethod
    def backward(ctx, *grads):
        indices, *tables = ctx.saved_tensors
        rotation = None
        if tables:
            cos, sin, source, target = (*tables, None)[:4]
            # the transpose of a rotation turns the other way
            rotation = Rotation(cos, -sin, source, target, ctx.interleaved)
        found = []
        for grad, shape, turned in zip(grads, ctx.shapes, (rotation, None)):
            if grad is not None:
                grad = rotated(grad, turned) if turned is not None else grad
                empty = ((indices < 0) | (indices >= shape[2]))[..., None]
                place = indices.clamp(0, max(shape[2] - 1, 0))[..., None].long().expand(grad.shape)
                grad = grad.new_zeros(shape).scatter_add_(2, place, grad.masked_fill(empty, 0)) if shape[2] else grad.new_zeros(shape)
            found.append(grad)
        return *found, None, None, None


def gather(
    keys: Tensor, values: Tensor, indices: Tensor, rotation: Rotation | None = None, *, inplace: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Keys [B, H, M, D] and values [B, H, M, Dv] at indices; arguments as in :func:`reference`, already checked.

    Differentiable in keys and values out of place; in place the results are views of them.
    """
    if inplace:
        found = launched(keys, values, indices, rotation, True, backend)
        # a graph that saved the cache notices that it was overwritten
        torch.autograd.graph.increment_version((keys, values))
        return found
    if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
        return _Gather.apply(keys, values, indices, rotation, backend)
    return _gathered(keys, values, indices, rotation, backend)
