"""Where eager calls may skip the ``torch.library`` boundary, and checks that every primitive shares."""

from __future__ import annotations

import math

import numpy as np
import torch

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def plain_eager(*tensors: torch.Tensor | None, functorch: bool = False) -> bool:
    """True where nothing traces or intercepts: no compile, no dispatch or functorch mode, no tensor subclass.

    A registered op with an autograd formula costs more host time a call than an autograd.Function, and torch.func
    accepts only the latter (`functorch=True` lets it pass).
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and (functorch or torch._C._functorch.peek_interpreter_stack() is None)
        and _PLAIN.issuperset(map(type, tensors))
    )


def rows_of(logits: torch.Tensor) -> torch.Tensor:
    """Logits [..., V] as a view [O, I, V] whose last stride is 1: kernels take two row strides.

    So ``logits[:, :-1]`` is read in place. Only layouts that two strides cannot describe are copied.
    """
    *lead, vocab = logits.shape
    if logits.stride(-1) != 1 and vocab > 1:
        logits = logits.contiguous()
    if plain_eager(logits):
        for split in range(len(lead) + 1):
            try:
                return logits.view(math.prod(lead[:split]), math.prod(lead[split:]), vocab)
            except RuntimeError:
                continue
    return logits.reshape(1, -1, vocab)


def checked_ids(ids: torch.Tensor, lead: tuple[int, ...], vocab_size: int, device: torch.device, name: str = "ids") -> torch.Tensor:
    """Ids [..., K] as a contiguous [N, K]; errors name the argument, and on a CPU the row and the id out of range."""
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64; got {ids.dtype}")
    if ids.device != device:
        raise ValueError(f"{name} must be on {device}, where the logits are; got {ids.device}")
    if ids.dim() == 0 or tuple(ids.shape[:-1]) != tuple(lead):
        raise ValueError(f"{name} must have shape {(*lead, 'K')} to match the logits' rows; got {tuple(ids.shape)}")
    ids = ids.reshape(math.prod(lead), ids.shape[-1]).contiguous()
    if device.type == "cpu" and ids.numel() and plain_eager(ids):
        check_range(ids, vocab_size, name)
    return ids


def check_range(ids: torch.Tensor, vocab_size: int, name: str = "ids", nothing: int = -1) -> None:
    """ValueError with the first place outside [0, vocab_size) that is not `nothing`. Reads values: on a GPU this waits."""
    low, high = ids.aminmax()
    if low < min(nothing, 0) or high >= vocab_size or nothing < -1:
        bad = ((ids < 0) & (ids != nothing)) | (ids >= vocab_size)
        if bad.any():
            place = bad.nonzero()[0].tolist()
            what = "an empty slot" if nothing == -1 else "an ignored token"
            raise ValueError(f"{name}{place} is {int(ids[tuple(place)])}; {name} must be in [0, {vocab_size}) or {nothing} for {what}")


def without_duplicates(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Ids [N, K] with every repetition after the first, and everything out of range, replaced by −1."""
    ordered, order = ids.sort(dim=-1, stable=True)
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    invalid = torch.empty_like(repeated).scatter_(1, order, repeated) | (ids < 0) | (ids >= vocab_size)
    return ids.masked_fill(invalid, -1)


def distinct_ids(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """:func:`without_duplicates` for checked ids: on a CPU a look first, since they nearly always are distinct already."""
    if ids.device.type == "cpu" and plain_eager(ids):
        ordered = np.sort(ids.detach().numpy(), axis=-1)
        if not ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            return ids
    return without_duplicates(ids, vocab_size)


class Once(torch.autograd.Function):
    """Identity on a gradient that is a kernel's; a derivative of it is refused with a sentence."""

    @staticmethod
    def forward(ctx, grad, source, name):
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.name} has no second derivative: its gradient is itself a kernel. Differentiate a plain PyTorch loss twice instead")


def functorch_refused(name: str) -> None:
    """RuntimeError where a torch.func transform is active and `name` cannot serve it."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(f"{name} does not run under torch.func transforms: use autograd, or the loss on logits")
