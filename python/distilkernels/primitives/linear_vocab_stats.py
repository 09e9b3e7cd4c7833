"""``vocab_stats`` of hidden Wᵀ, chunk by chunk: the logits of one chunk at a time are all that exists of [N, V].

Two drivers over the same chunk. :class:`RowsFromHidden` keeps the statistics and recomputes the logits in the backward
(four GEMMs): any gradient may arrive. The losses, whose gradient is known up to a factor, compute it in their forward
(three GEMMs; see :mod:`distilkernels.linear`). :class:`RowsFromTiles` has no chunk either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import module
from ..errors import BackendError
from .boundary import Once, functorch_refused, plain_eager
from .head import Head
from .head_gemm import HeadGemm
from .memory import recycled_empty
from .shard import VocabShard
from .vocab_stats import DIFFERENTIABLE, VocabStats, allocate, dense_coefficients, logits_grad, logits_grad_op, statistics, statistics_op


@dataclass(frozen=True, eq=False)
class Plan:
    """How N rows are reduced: which statistics, which head, how many tokens at a time, in which precision."""

    names: tuple[str, ...]
    head: Head
    chunk_size: int
    dtype: torch.dtype
    scratch: torch.dtype | None = None
    backend: str | None = None
    shard: VocabShard | None = None
    sparse_weight_grad: bool = False
    path: str = "chunked"

    def columns(self, weight: Tensor) -> int:
        """Columns that take part: the valid ones, or all of a shard's, whose head masks them."""
        return weight.shape[0] if self.shard is not None else self.head.columns(weight.shape[0])

    @property
    def local(self) -> Head:
        """The head on the logits that are computed here."""
        return self.head._replace(valid_vocab=None) if self.shard is None else self.shard.head(self.head)


class Chunks:
    """Walks the rows: ``for chunk in Chunks(...)`` computes a chunk's logits and statistics in one scratch buffer.

    `recycled` keeps that buffer for the next call, where nothing else is allocated that could use it: the pages of a fresh one
    cost a tenth of a fast GEMM.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, plan: Plan, recycled: bool = False):
        self.hidden, self.ids, self.plan = hidden, ids, plan
        self.n, self.vocab = hidden.shape[0], plan.columns(weight)
        self.gemm = HeadGemm(weight[: self.vocab], None if bias is None else bias[: self.vocab], plan.dtype, plan.scratch)
        rows = min(plan.chunk_size, self.n)
        empty = recycled_empty if recycled and plain_eager(hidden) else torch.empty
        self.scratch = empty((rows, self.vocab), dtype=self.gemm.scratch, device=hidden.device)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, hidden operand [C, H], logits [C, V])."""
        # no rows make one empty chunk, so that every result has its shape
        for start in range(0, max(self.n, 1), self.plan.chunk_size):
            rows = slice(start, min(start + self.plan.chunk_size, self.n))
            h = self.gemm.tokens(self.hidden[rows])
            z = self.scratch[: h.shape[0]]
            self.gemm.logits(h, z)
            yield rows, h, z

    def ids_of(self, rows: slice) -> Tensor | None:
        return None if self.ids is None else self.ids[rows]

    def statistics(self, rows: slice, z: Tensor) -> dict[str, Tensor]:
        """The chunk's statistics; with a shard those of the whole rows."""
        plan, z, ids = self.plan, z.unsqueeze(0), self.ids_of(rows)
        run = statistics_op if torch.compiler.is_compiling() else statistics
        if plan.shard is None:
            return run(z, ids, None, plan.names, plan.local, plan.backend)
        return plan.shard.statistics(run, z, ids, plan.names, plan.head, plan.backend)

    def to_gradient(self, rows: slice, z: Tensor, stats: dict[str, Tensor], grads: dict[str, Tensor]) -> Tensor:
        """Turns z into d z in place, from the gradients of the chunk's statistics."""
        plan, ids = self.plan, self.ids_of(rows)
        if plan.shard is not None:
            ids, stats = plan.shard.local_ids(ids), plan.shard.local_argmax(stats)
        ids, entries, coef, terms = dense_coefficients(stats, grads, ids, plan.local)
        sparse = set(grads) == {"gathered"}
        run = logits_grad_op if torch.compiler.is_compiling() else logits_grad
        return run(z.unsqueeze(0), ids, entries, coef, terms, plan.local, plan.backend, sparse, True)[0]


class Gradients:
    """d hidden, d weight and d bias, summed over chunks in the sum dtype; only those that are needed."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunks: Chunks, needs: tuple[bool, bool, bool]):
        gemm = chunks.gemm
        self.gemm, self.shard, self.started = gemm, chunks.plan.shard, False
        options = {"dtype": gemm.sum_dtype, "device": hidden.device}
        self.columns = chunks.vocab
        self.hidden = torch.empty(hidden.shape, **options) if needs[0] else None
        # one chunk needs no accumulator: the product is rounded once, to the weight's own dtype
        # (fp16 would overflow: its denominator comes after the product)
        alone = chunks.n <= chunks.plan.chunk_size and gemm.operand == weight.dtype and gemm.dtype != torch.float16
        self.weight = torch.empty(weight.shape, **(options | ({"dtype": weight.dtype} if alone else {}))) if needs[1] else None
        self.bias = torch.zeros(bias.shape, **options) if needs[2] and bias is not None else None
        if self.weight is not None:
            self.weight[self.columns :].zero_()

    def add(self, rows: slice, h: Tensor, dz: Tensor) -> None:
        """Adds a chunk's d z [C, V]."""
        if self.bias is not None:
            self.bias[: self.columns] += dz.sum(0, dtype=self.bias.dtype)
        if not self.gemm.tiled:
            dz = dz.to(self.gemm.operand)
        if self.hidden is not None:
            self.gemm.hidden_grad(dz, self.hidden[rows])
        if self.weight is not None:
            self.gemm.add_weight_grad(dz, h, self.weight[: self.columns], first=not self.started)
        self.started = True

    def finished(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.shard is not None and self.hidden is not None:
            self.shard.reduce_sum(self.hidden)
        return self.hidden, self.weight, self.bias


def refusing_twice(backward):
    """A backward whose gradients are computed without a graph and refuse to be differentiated again."""

    def run(ctx, *grads):
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with torch.no_grad():
            found = backward(ctx, *grads)
        if twice:
            source = next(t for t in ctx.saved_tensors if t is not None and t.requires_grad)
            found = tuple(None if g is None else Once.apply(g, source, "a linear-fused loss") for g in found)
        return found

    return run


class RowsFromHidden(torch.autograd.Function):
    """The statistics of hidden Wᵀ + bias with any upstream gradient: logits are recomputed in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, plan):
        chunks = Chunks(hidden, weight, bias, ids, plan)
        parts = [chunks.statistics(rows, z) for rows, _, z in chunks]
        outputs = {name: torch.cat([part[name] for part in parts]) if len(parts) > 1 else parts[0][name] for name in parts[0]}
        ctx.save_for_backward(hidden, weight, bias, ids, *(outputs[name] for name in outputs))
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for name, t in outputs.items() if name not in DIFFERENTIABLE))
        return tuple(outputs.values())

    @staticmethod
    @refusing_twice
    def backward(ctx, *grads):
        hidden, weight, bias, ids, *saved = ctx.saved_tensors
        plan = ctx.plan
        grads = {name: g for name, g in zip(plan.names, grads) if g is not None and name in DIFFERENTIABLE}
        if not grads:
            return None, None, None, None, None
        stats = dict(zip(plan.names, saved))
        chunks = Chunks(hidden, weight, bias, ids, plan)
        total = Gradients(hidden, weight, bias, chunks, ctx.needs_input_grad[:3])
        for rows, h, z in chunks:
            dz = chunks.to_gradient(rows, z, {k: v[rows] for k, v in stats.items()}, {k: v[rows] for k, v in grads.items()})
            total.add(rows, h, dz)
        found = zip(total.finished(), (hidden, weight, bias))
        return *(None if grad is None else grad.to(like.dtype) for grad, like in found), None, None


def _tile_kernel(primitive: str, hidden: Tensor, weight: Tensor, names: tuple[str, ...]):
    """The kernel that never writes logits, or a BackendError that says why it cannot serve."""
    triton = module("triton")
    reason = triton.why_not(primitive, hidden, weight, want=names)
    if reason is not None:
        raise BackendError(f"path='tiles' cannot serve this call: {reason}")
    return getattr(triton, primitive)


class RowsFromTiles(torch.autograd.Function):
    """The same statistics from a GEMM whose tiles are reduced in registers; tiles of logits are recomputed in the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, plan):
        h, w, b = _operands(hidden, weight, bias, plan)
        rows = torch.empty((1, h.shape[0], 0), dtype=torch.float32, device=h.device)
        outputs = allocate(rows, ids, plan.names)
        if h.shape[0]:
            _tile_kernel("linear_vocab_stats", h, w, plan.names)(h, w, b, ids, plan.local, outputs)
        ctx.save_for_backward(hidden, weight, bias, ids, *outputs.values())
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for name, t in outputs.items() if name not in DIFFERENTIABLE))
        return tuple(outputs.values())

    @staticmethod
    @refusing_twice
    def backward(ctx, *grads):
        hidden, weight, bias, ids, *saved = ctx.saved_tensors
        plan = ctx.plan
        grads = {name: g for name, g in zip(plan.names, grads) if g is not None and name in DIFFERENTIABLE}
        if not grads:
            return None, None, None, None, None
        ids, entries, coef, terms = dense_coefficients(dict(zip(plan.names, saved)), grads, ids, plan.local)
        h, w, b = _operands(hidden, weight, bias, plan)
        like = {"hidden": hidden, "weight": weight, "bias": bias}
        needed = [name for name, needs in zip(like, ctx.needs_input_grad) if needs and like[name] is not None]
        # columns from valid_vocab on take no part
        found = {name: torch.zeros_like(like[name]) if plan.columns(weight) < weight.shape[0] else torch.empty_like(like[name]) for name in needed}
        written = {name: t if name == "hidden" else t[: plan.columns(weight)] for name, t in found.items()}
        if h.shape[0]:
            _tile_kernel("linear_vocab_stats_backward", h, w, plan.names)(h, w, b, ids, entries, coef, terms, plan.local, written)
        return *(found.get(name) for name in like), None, None


def _operands(hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden, weight and bias on the valid columns, rounded to the GEMM's dtype, rows contiguous."""
    columns = plan.columns(weight)
    h, w = (t.to(plan.dtype) if t.stride(-1) == 1 else t.to(plan.dtype).contiguous() for t in (hidden, weight[:columns]))
    return h, w, None if bias is None else bias[:columns]


def linear_row_stats(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, want: tuple[str, ...], plan: Plan) -> VocabStats:
    """Flat, float64 statistics of hidden [N, H]; differentiable in hidden, weight and bias."""
    functorch_refused("linear_vocab_stats")
    function = RowsFromTiles if plan.path == "tiles" else RowsFromHidden
    found = dict(zip(plan.names, function.apply(hidden, weight, bias, ids, plan)))
    keep = set(want) | ({"finite_count"} if "logit_sum" in want else set())
    return VocabStats(**{name: t if name in DIFFERENTIABLE else t.detach() for name, t in found.items() if name in keep})
