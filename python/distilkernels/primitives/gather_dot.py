"""``gather_dot``: h · W[id] for the K ids of a row, without the vocabulary GEMM.

Bytes: N·K rows of the weight, 4·N·K·H (float32) at worst, against 4·V·H for the GEMM's operand and its 2·N·V·H FLOPs:
at N = 256, K = 64, H = 1,024 that is 67 MB read against 80 GFLOP.

Everything is linear in the products, so one primitive has three kernels: the products, Σ_k g·W[id] for d hidden, and a
segment sum over pairs sorted by id for d weight. Bias, head and masks act on [N, K] in plain PyTorch.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..backends import resolve
from .boundary import plain_eager, without_duplicates
from .head import Head
from .memory import lazy_zeros, recycled_empty


def _without_autocast(fn):
    """Autocast would round the float32 sums to 16 bits."""

    @functools.wraps(fn)
    def run(*tensors):
        with torch.autocast(tensors[0].device.type, enabled=False):
            return fn(*tensors)

    return run


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of operands of `dtype` accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------------- reference


@_without_autocast
def reference(hidden: Tensor, weight: Tensor, ids: Tensor, out: Tensor) -> None:
    """Writes out[n, k] = hidden[n] · weight[ids[n, k]]; 0 where the id is negative.

    hidden [N, H] has the operand dtype; the rows of weight [V, H] that are read are rounded to it. Both have last stride 1
    and any row stride. ids [N, K] contiguous, in [−1, V); out [N, K] contiguous in :func:`sum_dtype` of the operands.
    """
    rows = weight[ids.clamp(min=0).long()].to(hidden.dtype).to(out.dtype)
    out.copy_(torch.einsum("nh,nkh->nk", hidden.to(out.dtype), rows).masked_fill(ids < 0, 0))


@_without_autocast
def reference_hidden_grad(grad: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """Writes out[n] = Σ_k grad[n, k]·weight[ids[n, k]], rows rounded to the operand `dtype`; negative ids are skipped.

    grad [N, K] and out [N, H], contiguous, in :func:`sum_dtype` of `dtype`. A skipped slot's grad may hold anything.
    """
    rows = weight[ids.clamp(min=0).long()].to(dtype).to(grad.dtype)
    rows = rows.masked_fill((ids < 0).unsqueeze(-1), 0)
    out.copy_(torch.einsum("nk,nkh->nh", grad.masked_fill(ids < 0, 0), rows))


@_without_autocast
def reference_weight_grad(grad: Tensor, hidden: Tensor, order: Tensor, targets: Tensor, out: Tensor) -> None:
    """Writes out[u] = Σ grad[n, k]·hidden[n] over the pairs (n, k) of target u; rows of out that are no target are left.

    order [N·K] int64: the flat indices n·K + k of all pairs, sorted by id, stable, so that a sum has a fixed order.
    targets [N·K] int64: the row of out for each of them, ascending along `order`; negative ones are skipped.
    grad [N, K] contiguous in :func:`sum_dtype` of hidden's dtype, hidden [N, H] with last stride 1, out [U, H] contiguous
    in any floating dtype: rounded once.
    """
    k = grad.shape[1]
    order, targets = order[targets >= 0], targets[targets >= 0]
    if order.numel() == 0:
        return
    terms = grad.reshape(-1)[order, None] * hidden.to(grad.dtype)[order // k]
    touched, lengths = targets.unique_consecutive(return_counts=True)
    out[touched] = torch.segment_reduce(terms, "sum", lengths=lengths, axis=0).to(out.dtype)


# ---------------------------------------------------------------------------------------------- autograd


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def products(hidden: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, backend: str | None) -> Tensor:
    """hidden[n] · weight[ids[n, k]] in :func:`sum_dtype`, operands rounded to `dtype`; 0 where the id is negative."""
    hidden, weight, ids = _rows(hidden.to(dtype)), _rows(weight), ids.contiguous()
    out = torch.empty(ids.shape, dtype=sum_dtype(dtype), device=hidden.device)
    if out.numel():
        resolve("gather_dot", hidden, weight, ids, backend=backend)(hidden, weight, ids, out)
    return out


def hidden_grad(grad: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, to: torch.dtype, backend: str | None) -> Tensor:
    """d hidden [N, H] in the dtype `to`."""
    grad, weight, ids = grad.to(sum_dtype(dtype)).contiguous(), _rows(weight), ids.contiguous()
    shape = ids.shape[0], weight.shape[1]
    if ids.numel() == 0 or shape[1] == 0:
        return torch.zeros(shape, dtype=to, device=grad.device)
    out = torch.empty(shape, dtype=grad.dtype, device=grad.device)
    resolve("gather_dot_hidden_grad", grad, weight, ids, backend=backend)(grad, weight, ids, dtype, out)
    return out.to(to)


def weight_grad(
    grad: Tensor, hidden: Tensor, ids: Tensor, dtype: torch.dtype, to: torch.dtype, vocab: int, backend: str | None, sparse: bool = False
) -> Tensor:  # fmt: skip
    """d weight [V, H] in the dtype `to`; `sparse`: a coalesced COO tensor of the rows that have a pair."""
    grad, hidden = grad.to(sum_dtype(dtype)).contiguous(), _rows(hidden.to(dtype))
    targets, order = ids.reshape(-1).long().sort(stable=True)
    width = hidden.shape[1]
    if sparse:
        touched, targets = targets.unique_consecutive(return_inverse=True)
        skipped = int((touched < 0).sum())
        touched, targets = touched[skipped:], targets - skipped
        # room for as many rows as there are pairs, so that the next step's rows fit into the same memory
        room = min(order.numel(), vocab)
        out = recycled_empty((room, width), to, grad.device)[: touched.numel()]
    else:
        out = lazy_zeros((vocab, width), to, grad.device)
    if order.numel() and out.numel():
        resolve("gather_dot_weight_grad", grad, hidden, order, targets, out, backend=backend)(grad, hidden, order, targets, out)
    if sparse:
        return torch.sparse_coo_tensor(touched.unsqueeze(0), out, (vocab, width), is_coalesced=True, check_invariants=False)
    return out


def _save(ctx, hidden, weight, ids, dtype, backend, sparse) -> None:
    ctx.save_for_backward(hidden, weight, ids)
    ctx.dtype, ctx.backend, ctx.sparse = dtype, backend, sparse


def _gradients(ctx, grad: Tensor) -> list[Tensor | None]:
    """d hidden and d weight, each only if needed; through the registered ops where something intercepts."""
    hidden, weight, ids = ctx.saved_tensors
    plain, shared = plain_eager(grad, hidden, weight), (ids, ctx.dtype)
    found: list[Tensor | None] = [None, None]
    if ctx.needs_input_grad[0]:
        found[0] = (hidden_grad if plain else _op_hidden_grad)(grad, weight, *shared, hidden.dtype, ctx.backend)
    if ctx.needs_input_grad[1]:
        last = (weight.dtype, weight.shape[0], ctx.backend)
        found[1] = weight_grad(grad, hidden, *shared, *last, ctx.sparse) if plain else _op_weight_grad(grad, hidden, *shared, *last)
    return found


class _Once(torch.autograd.Function):
    """Identity whose own derivative is refused with a sentence."""

    @staticmethod
    def forward(grad, *inputs):
        return grad.detach() if grad.is_sparse else grad.view_as(grad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "gather_dot has no second derivative: its gradient is itself a kernel. Differentiate a plain PyTorch loss twice instead"
        )


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, dtype, backend, sparse):
        _save(ctx, hidden, weight, ids, dtype, backend, sparse)
        return products(hidden, weight, ids, dtype, backend)

    @staticmethod
    def backward(ctx, grad):
        twice = torch.is_grad_enabled()
        with torch.no_grad():
            found = _gradients(ctx, grad)
        if twice:
            found = [None if g is None else _Once.apply(g, grad, *ctx.saved_tensors[:2]) for g in found]
        return *found, None, None, None, None


class _Transformable(_GatherDot):
    """The same for torch.func, which wants setup_context."""

    @staticmethod
    def forward(hidden, weight, ids, dtype, backend, sparse):
        return products(hidden, weight, ids, dtype, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, *inputs)


# --------------------------------------------------------------------------------------------- torch.library


@torch.library.custom_op("distilkernels::gather_dot", mutates_args=())
def _op(hidden: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, backend: str | None) -> Tensor:
    return products(hidden, weight, ids, dtype, backend)


@_op.register_fake
def _(hidden, weight, ids, dtype, backend):
    return hidden.new_empty(ids.shape, dtype=sum_dtype(dtype))


@torch.library.custom_op("distilkernels::gather_dot_hidden_grad", mutates_args=())
def _op_hidden_grad(grad: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, to: torch.dtype, backend: str | None) -> Tensor:
    return hidden_grad(grad, weight, ids, dtype, to, backend)


@_op_hidden_grad.register_fake
def _(grad, weight, ids, dtype, to, backend):
    return grad.new_empty((ids.shape[0], weight.shape[1]), dtype=to)


@torch.library.custom_op("distilkernels::gather_dot_weight_grad", mutates_args=())
def _op_weight_grad(
    grad: Tensor, hidden: Tensor, ids: Tensor, dtype: torch.dtype, to: torch.dtype, vocab: int, backend: str | None
) -> Tensor:  # fmt: skip
    return weight_grad(grad, hidden, ids, dtype, to, vocab, backend)


@_op_weight_grad.register_fake
def _(grad, hidden, ids, dtype, to, vocab, backend):
    return grad.new_empty((vocab, hidden.shape[1]), dtype=to)


def _op_setup(ctx, inputs, output):
    _save(ctx, *inputs, False)


def _op_gradient(ctx, grad):
    return *_gradients(ctx, grad), None, None, None


_op.register_autograd(_op_gradient, setup_context=_op_setup)


# --------------------------------------------------------------------------------------------- calls


def _differentiable(hidden, weight, ids, dtype, backend, sparse) -> Tensor:
    if sparse and not plain_eager(hidden, weight, ids):
        raise ValueError("sparse_weight_grad=True needs eager mode, plain tensors and no torch.func: sparse gradients cannot be traced")
    if plain_eager(hidden, weight, ids, functorch=True):
        function = _GatherDot if plain_eager() else _Transformable
        return function.apply(hidden, weight, ids, dtype, backend, sparse)
    return _op(hidden, weight, ids, dtype, backend)


def gather_dot(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, bias: Tensor | None = None, head: Head, dtype: torch.dtype,
    backend: str | None = None, sparse_weight_grad: bool = False,
) -> Tensor:  # fmt: skip
    """The head's z at `ids` [N, K] of ``hidden Wᵀ + bias``, without that product; differentiable in all three.

    Args:
        hidden: [N, H].
        weight: [V, H]; only the rows at the ids are read, and rounded to `dtype`. No copy of it is made.
        ids: int32 or int64 [N, K], already in [−1, V) (see :func:`~.boundary.checked_ids`).
        bias: [V] or None.
        dtype: what hidden and weight are rounded to (the GEMM's operand dtype); products accumulate in float32, in
            float64 for float64.
        sparse_weight_grad: the weight's gradient is a coalesced sparse COO tensor with the touched rows only, as
            ``nn.Embedding(sparse=True)`` gives; on a GPU that waits for the number of rows.

    Returns:
        [N, K] float32 (float64 for float64); −inf for an empty slot (−1), a repeated id and from `valid_vocab` on.
        Gradients return in each input's own dtype, rounded once; the same bits whatever the number of threads.

    Raises:
        BackendError: `backend` cannot serve these tensors. ValueError: sparse_weight_grad under torch.compile or torch.func.
        RuntimeError: a second derivative is asked for.
    """
    distinct = without_duplicates(ids, head.columns(weight.shape[0]))
    x = _differentiable(hidden, weight, distinct, dtype, backend, sparse_weight_grad)
    if bias is not None:
        # a bias is one more column of the weight against a hidden of 1: its gradient is a segment sum as well
        x = x + _differentiable(x.new_ones(ids.shape[0], 1), bias.unsqueeze(1), distinct, x.dtype, backend, False)
    return head._replace(valid_vocab=None).apply(x).masked_fill(distinct < 0, -math.inf)
