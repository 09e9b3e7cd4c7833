"""``kv_align``: the distance between many pairs of tensors, and its gradient for the first of each pair, in one launch.

The pairs are the keys and values of every layer; each has its own pointers, shape and strides, so that nothing is stacked. Bytes:
student and teacher read once, the gradient written once. Statistics of a pair (`normalize`) take another look at it.

A pair's elements are its real ones, those of slots whose mask is True. With n of them, d = s − t:

    "mse" Σ d²     "l1" Σ |d|     "smooth_l1" Σ (d²/2β where |d| < β, else |d| − β/2)
    "cosine" Σ over real slots of 1 − s·t/(max(|s|, 1e-8)·max(|t|, 1e-8))

``normalize`` "layer_std": the sum is divided by σ_t ("l1", "smooth_l1") or σ_t² ("mse") of this pair's teacher.
"inputs": s and t are divided by their own σ first, and the gradient goes through σ_s too:

    ds_i = f′(u_i)/σ_s − (s_i − mean s)/((n − 1)·σ_s³)·Σ_j f′(u_j)·s_j,   u = s/σ_s − t/σ_t   (no second term where σ_s is clamped)

σ² is unbiased, Σ (x − mean)²/max(n − 1, 1), and σ is at least 1e-6. Cosine has no scale: both leave it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import resolve
from .boundary import Once, functorch_refused, plain_eager
from .memory import recycled_empties

LOSSES = ("mse", "l1", "smooth_l1", "cosine")
NORMALIZE = (None, "layer_std", "inputs")
STD_FLOOR = 1e-6
NORM_FLOOR = 1e-8


class Distance(NamedTuple):
    """One of :data:`LOSSES`, smooth_l1's β > 0, and one of :data:`NORMALIZE`."""

    loss: str = "smooth_l1"
    beta: float = 1.0
    normalize: str | None = None


def _clamped_std(x: Tensor, real: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the clamped unbiased std of the real elements."""
    mean = x.sum() / count.clamp(min=1)
    squares = (x - mean).masked_fill(~real, 0).square().sum()
    return mean, (squares / (count - 1).clamp(min=1)).sqrt().clamp(min=STD_FLOOR)


def _cosine(s: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and its gradient for s."""
    ns, nt = s.norm(dim=-1, keepdim=True), t.norm(dim=-1, keepdim=True).clamp(min=NORM_FLOOR)
    length = ns.clamp(min=NORM_FLOOR)
    cos = (s * t).sum(-1, keepdim=True) / (length * nt)
    along = torch.where(ns > NORM_FLOOR, cos * s / length.square(), 0)
    return (1 - cos[..., 0]).masked_fill(~mask, 0).sum(), along - t / (length * nt)


def _elementwise(d: Tensor, how: Distance) -> tuple[Tensor, Tensor]:
    if how.loss == "mse":
        return d.square(), 2 * d
    if how.loss == "l1":
        return d.abs(), d.sign()
    near = d.abs() < how.beta
    return torch.where(near, d.square() / (2 * how.beta), d.abs() - how.beta / 2), torch.where(near, d / how.beta, d.sign())


def reference(
    student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor | None], how: Distance, coef: Tensor, sums: Tensor,
    grads: Sequence[Tensor] | None,
) -> None:  # fmt: skip
    """Writes ``sums[i]``, the distance of pair i as above, and ``grads[i] = coef[i]·d sums[i]/d student[i]``.

    student[i], teacher[i]: one shape [B, H, M, D], which may differ from pair to pair; last stride 1, any other strides;
    dtypes may differ. masks[i]: bool [B, H, M], any strides (0 too), or None for all real. coef float64 [N], sums float64 [N],
    contiguous, on the pairs' device. grads[i]: student[i]'s shape and dtype, contiguous, zeros where masked; None: not wanted.
    Masked elements may hold anything, and so may a pair of coef 0: its gradient is zeros. float32 arithmetic, float64 where a tensor of the pair is float64.
    """
    for i, (s, t, mask) in enumerate(zip(student, teacher, masks)):
        dtype = torch.float64 if torch.float64 in (s.dtype, t.dtype) else torch.float32
        mask = torch.ones(s.shape[:3], dtype=torch.bool, device=s.device) if mask is None else mask
        real = mask[..., None].expand(s.shape)
        s, t = (x.to(dtype).masked_fill(~real, 0) for x in (s, t))
        count = real.sum()
        if how.loss == "cosine":
            total, grad = _cosine(s, t, mask)
        elif how.normalize == "inputs":
            mean, std = _clamped_std(s, real, count)
            total, slope = _elementwise(s / std - t / _clamped_std(t, real, count)[1], how)
            through = torch.where(std > STD_FLOOR, (slope * s).sum() / ((count - 1).clamp(min=1) * std**3), 0)
            total, grad = total.sum(), slope / std - (s - mean) * through
        else:
            total, grad = _elementwise(s - t, how)
            std = _clamped_std(t, real, count)[1] if how.normalize == "layer_std" else torch.ones_like(total.sum())
            scale = std**2 if how.loss == "mse" else std
            total, grad = total.sum() / scale, grad / scale
        sums[i] = total
        if grads is not None:
            grads[i].copy_((grad.double() * coef[i]).masked_fill(~real | (coef[i] == 0), 0))


def _empties(like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]


def launched(
    student, teacher, masks, how: Distance, coef: Tensor, want_grads: bool, backend: str | None, empties=recycled_empties
) -> tuple[Tensor, list[Tensor]]:
    # they are on one device, and their rows are dense
    launch = resolve("kv_align", *{t.dtype: t for t in (*student, *teacher)}.values(), backend=backend)
    grads = empties(student) if want_grads else None
    sums = torch.empty(len(student), dtype=torch.float64, device=coef.device)
    launch(student, teacher, masks, how, coef, sums, grads)
    return sums, grads or []


@torch.library.custom_op("distilkernels::kv_align", mutates_args=())
def _op(
    student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor], masked: Sequence[bool], loss: str, beta: float,
    normalize: str | None, coef: Tensor, want_grads: bool, backend: str | None,
) -> list[Tensor]:  # fmt: skip
    left = iter(masks)
    masks = [next(left) if m else None for m in masked]
    # an op's results share no storage
    sums, grads = launched(student, teacher, masks, Distance(loss, beta, normalize), coef, want_grads, backend, _empties)
    return [sums, *grads]


@_op.register_fake
def _(student, teacher, masks, masked, loss, beta, normalize, coef, want_grads, backend):
    grads = [s.new_empty(s.shape) for s in student] if want_grads else []
    return [coef.new_empty(len(student), dtype=torch.float64), *grads]


# --------------------------------------------------------------------------------------------- autograd


class _Distances(torch.autograd.Function):
    """Σ coef·sums, or the sums themselves, with the students' gradients computed on the way; coef has its own."""

    @staticmethod
    def forward(ctx, how, coef, dtype, each, teacher, masks, backend, with_grad, *student):
        needs = with_grad and any(ctx.needs_input_grad[-len(student) :])
        # fp16 would underflow with 1/n in it: there the factor comes after the upstream one, which holds the loss scale
        late = each or any(s.dtype == torch.float16 for s in student)
        coef = torch.ones_like(coef) if each else coef
        ctx.factor = coef if late else None
        run = launched if plain_eager(*student, *teacher) else _launched_op
        sums, ctx.grads = run(student, teacher, masks, how, (coef != 0).double() if late else coef, needs, backend)
        # only to say whose second derivative is refused: their values are not read again
        ctx.student = student
        ctx.given = False
        # the slope of coef
        ctx.sums = sums if ctx.needs_input_grad[1] else None
        return sums if each else _weighed(sums, coef).to(dtype)

    @staticmethod
    def backward(ctx, upstream):
        coef_grad = None if ctx.sums is None else ctx.sums * upstream
        if not any(ctx.needs_input_grad[8:]):
            return None, coef_grad, *(None,) * (6 + len(ctx.student))
        if ctx.given:
            raise RuntimeError("a second backward through an alignment loss needs retain_graph=True in the first: its gradient is given away")
        keep = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
        ctx.given = not keep
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad():
            grads = _scaled(ctx.grads, upstream, ctx.factor, keep)
        if twice:
            grads = [Once.apply(g, s, "an alignment loss") if s.requires_grad else None for g, s in zip(grads, ctx.student)]
            if coef_grad is not None:
                # which moves with every student
                coef_grad = Once.apply(coef_grad, next(s for s in ctx.student if s.requires_grad), "an alignment loss")
        if not keep:
            ctx.grads = ctx.student = ()
        return None, coef_grad, *(None,) * 6, *grads


def _weighed(sums: Tensor, coef: Tensor) -> Tensor:
    """Σ coef·sums, in which a pair of coef 0 may have any sum."""
    if sums.device.type == "cpu" and plain_eager(sums):
        total = torch.dot(sums, coef)
        if math.isfinite(total.item()):
            return total
    return torch.where(coef == 0, 0, sums * coef).sum()


def _scaled(grads: Sequence[Tensor], upstream: Tensor, factor: Tensor | None, keep: bool) -> list[Tensor]:
    """Each gradient times upstream, over its own memory unless it is to be kept."""
    if factor is not None:
        return [g * f if keep else g.mul_(f) for g, f in zip(grads, (upstream * factor).unbind())]
    # on a CPU the usual factor of 1 is seen without waiting for anything
    if upstream.device.type == "cpu" and plain_eager(upstream) and upstream.item() == 1:
        return [g.clone() if keep else g for g in grads]
    if not keep:
        torch._foreach_mul_(grads, upstream)
        return list(grads)
    return list(torch._foreach_mul(grads, upstream))


def _launched_op(student, teacher, masks, how: Distance, coef: Tensor, want_grads: bool, backend: str | None) -> tuple[Tensor, list[Tensor]]:
    given = [m for m in masks if m is not None]
    sums, *grads = _op(student, teacher, given, [m is not None for m in masks], *how, coef, want_grads, backend)
    return sums, grads


def distances(
    student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor | None], how: Distance, coef: Tensor, dtype: torch.dtype, *,
    each: bool = False, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Σ_i coef_i·sums_i as a scalar of `dtype`, or with `each` the sums themselves, float64 [N]; differentiable in the student and in coef.

    Arguments as in :func:`reference`, already checked. Attached to the graph of every student, whatever the masks.
    """
    functorch_refused("an alignment loss")
    student, teacher = ([t if t.is_contiguous() or t.stride(-1) == 1 else t.contiguous() for t in side] for side in (student, teacher))
    return _Distances.apply(how, coef, dtype, each, teacher, masks, backend, torch.is_grad_enabled(), *student)
