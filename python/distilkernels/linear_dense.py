"""The dense teacher's loss behind both lm_heads: the logits of one chunk of tokens of each side are all that exists of [N, V]."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .dense import DenseDistillation, checked_sides
from .linear import active_rows, checked_linear, checked_plan, refusing_twice, scaled, scattered
from .primitives.boundary import functorch_refused, plain_eager
from .primitives.head import Head
from .primitives.linear_vocab_stats import Chunks, Gradients, Plan


class _Teacher:
    """A teacher's hidden states and lm_head, constants, and the plan of their GEMM."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan):
        self.hidden, self.weight, self.bias, self.plan = hidden, weight, bias, plan


def _walk(task: DenseDistillation, plan: Plan, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: _Teacher):
    """(student's chunks, and of each chunk: rows, hidden operand, student's logits, teacher's logits, the task on its rows)."""
    ours = Chunks(hidden, weight, bias, None, plan)
    theirs = Chunks(teacher.hidden, teacher.weight, teacher.bias, None, teacher.plan)
    return ours, ((rows, h, z, t, task.rows(rows)) for (rows, h, z), (_, _, t) in zip(ours, theirs))


class _LinearTotal(torch.autograd.Function):
    """Σ of the rows / count, with the gradients of hidden, weight and bias computed on the way: three GEMMs, and one of the teacher's."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher, task, plan, count, with_grad, with_stats):
        needs = tuple(with_grad and needed for needed in ctx.needs_input_grad[:3])
        ours, chunks = _walk(task, plan, hidden, weight, bias, teacher)
        grads = Gradients(hidden, weight, bias, ours, needs) if any(needs) else None
        total, plains, extras = hidden.new_zeros((), dtype=torch.float64), [], []
        for rows, h, z, t, part in chunks:
            x, y = z.unsqueeze(0), t.unsqueeze(0)
            if with_stats:
                extras.append(part.diagnostics(x, y))
            found, plain = part.sweep(x, y, x if grads is not None else None, 1 / count)
            total += found.sum() / count
            plains.append(plain)
            if grads is not None:
                grads.add(rows, h, z)
        ctx.save_for_backward(hidden, weight, bias)  # for what they require: a second derivative is refused by name
        ctx.grads = None if grads is None else grads.finished()
        ctx.dtypes, ctx.given = [None if t is None else t.dtype for t in (hidden, weight, bias)], False
        aux = (torch.cat(plains), *(torch.cat(parts) for parts in zip(*extras)))
        ctx.mark_non_differentiable(*aux)
        return total, *aux

    @staticmethod
    @refusing_twice
    def backward(ctx, upstream, *_):
        if ctx.given:
            raise RuntimeError("a second backward through linear_distill_loss needs retain_graph=True in the first: its gradient is given away")
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        ctx.given = not keep
        unscaled = upstream.device.type == "cpu" and plain_eager(upstream) and bool(upstream == 1)
        out = [None if g is None else scaled(g, None if unscaled else upstream, dtype, keep) for g, dtype in zip(ctx.grads, ctx.dtypes)]
        if not keep:
            ctx.grads = ()
        return *out, *(None,) * 6


class _LinearRows(torch.autograd.Function):
    """The rows themselves: both sides' logits are computed again in the backward, when the upstream gradient is known."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher, task, plan, with_stats):
        parts = []
        for _, _, z, t, part in _walk(task, plan, hidden, weight, bias, teacher)[1]:
            x, y = z.unsqueeze(0), t.unsqueeze(0)
            parts.append((*part.sweep(x, y), *(part.diagnostics(x, y) if with_stats else ())))
        ctx.save_for_backward(hidden, weight, bias)
        ctx.teacher, ctx.task, ctx.plan = teacher, task, plan
        found, *aux = (torch.cat(p) for p in zip(*parts))
        ctx.mark_non_differentiable(*aux)
        return found, *aux

    @staticmethod
    @refusing_twice
    def backward(ctx, upstream, *_):
        hidden, weight, bias = ctx.saved_tensors
        ours, chunks = _walk(ctx.task, ctx.plan, hidden, weight, bias, ctx.teacher)
        grads = Gradients(hidden, weight, bias, ours, ctx.needs_input_grad[:3])
        for rows, h, z, t, part in chunks:
            part.sweep(z.unsqueeze(0), t.unsqueeze(0), z.unsqueeze(0), upstream[rows])
            grads.add(rows, h, z)
        found = (None if g is None else g.to(like.dtype) for g, like in zip(grads.finished(), (hidden, weight, bias)))
        return *found, *(None,) * 4


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: str | Callable[[Tensor, Tensor], Tensor] = "forward_kl",
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | float | Tensor | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    valid_vocab: int | None = None,
    return_stats: bool = False,
    chunk_size: int | None = None,
    num_active: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str | None = None,
):
    """:func:`distill_loss` of the logits ``hidden Wᵀ + bias`` beside ``teacher_hidden W_tᵀ + teacher_bias``; neither is kept.

    Args:
        hidden: [..., H]; weight: [V, H]; bias: [V] or None.
        teacher_hidden: [..., H'] of the same tokens; teacher_weight: [V', H']; teacher_bias: [V'] or None. Constants.
        chunk_size, num_active, logits_dtype: see :func:`linear_row_loss`; two chunks of logits exist at once, one of each side.
        The others: see :func:`distill_loss`.

    Returns:
        As :func:`distill_loss`, with gradients for hidden, weight and bias. A scalar costs three GEMMs of the student and one of the
        teacher, forward and backward; reduction="none" computes both sides' logits again in the backward.

    Raises:
        As :func:`distill_loss` and :func:`linear_row_loss`.
    """
    lead, flat, vocab, head = checked_linear(hidden, weight, bias, temperature, logit_scale, softcap, valid_vocab, None)
    try:
        their_lead, theirs, their_vocab, _ = checked_linear(teacher_hidden, teacher_weight, teacher_bias, 1.0, 1.0, None, None, None)
    except (TypeError, ValueError) as wrong:
        raise type(wrong)(f"teacher: {wrong}") from None
    if their_lead != lead:
        raise ValueError(f"teacher_hidden must have the student's token shape {lead}; got {their_lead}")
    if teacher_hidden.device != hidden.device:
        raise ValueError(f"teacher_hidden must be on {hidden.device}, where hidden is; got {teacher_hidden.device}")
    sides = checked_sides(
        vocab, their_vocab, "teacher_weight", temperature, logit_scale, softcap, teacher_logit_scale, teacher_softcap, valid_vocab
    )
    task = DenseDistillation(
        lead, vocab, hidden.device, sides, divergence=divergence, scale_by_t2=scale_by_t2, token_weights=token_weights, labels=labels,
        ce_weight=ce_weight, ignore_index=ignore_index, reduction=reduction, num_items_in_batch=num_items_in_batch, backend=backend,
    )  # fmt: skip
    plan = checked_plan(("lse",), None, head, flat, weight, chunk_size, logits_dtype, backend, None)
    # the chunk holds the valid columns alone
    task = task.on_columns()
    columns = task.columns
    their_bias = None if teacher_bias is None else teacher_bias.detach()[:columns]
    their_plan = checked_plan(("lse",), None, Head(), theirs, teacher_weight, plan.chunk_size, None, backend, None)
    n = flat.shape[0]
    active = active_rows(None if task.used is None else task.used.double(), n, num_active) if reduction != "none" else None
    whole = task
    theirs = theirs.detach()
    if active is not None:
        flat, theirs, task = flat[active], theirs[active], task.rows(active)
    elif task.used is not None:
        # whatever a row that does not count holds must not meet d weight: 0·NaN is NaN in a GEMM
        flat = flat.masked_fill(~task.used[:, None], 0)
    teacher = _Teacher(theirs, teacher_weight.detach()[:columns], their_bias, their_plan)
    functorch_refused("linear_distill_loss")
    dtype = torch.float64 if plan.dtype == torch.float64 else torch.float32
    arguments = (flat, weight, bias, teacher, task, plan)
    if reduction == "none":
        found, *aux = _opaque(_LinearRows)(*arguments, return_stats)
        loss = found.view(lead).to(dtype)
    else:
        # the denominator is part of d logits, but for fp16 operands, which would underflow: there it follows the GEMMs
        late = plan.dtype == torch.float16
        total, *aux = _opaque(_LinearTotal)(*arguments, 1.0 if late else task.count, torch.is_grad_enabled(), return_stats)
        loss = (total / task.count if late else total).to(dtype)
    if not return_stats:
        return loss
    if active is not None:
        aux = [scattered(a, active, math.prod(lead)) for a in aux]
    return whole.with_stats(loss, *aux, lead)


def _opaque(function):
    """The function's apply; a compiled model breaks its graph at it."""
    return torch.compiler.disable(function.apply) if torch.compiler.is_compiling() else function.apply
