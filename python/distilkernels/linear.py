"""Losses fused with the lm_head: [tokens, vocab] is never kept.

:func:`linear_row_loss` runs the epilogue of :func:`row_loss` chunk by chunk: logits of one chunk, their statistics, the
epilogue and its gradient, d logits over the logits, two GEMMs. The gradient is computed in the forward, so a training
step costs three GEMMs. Every other loss here is a caller of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .losses import TopKDistillation, logprob_epilogue
from .primitives.boundary import checked_ids, functorch_refused, plain_eager, without_duplicates
from .primitives.gather_dot import gather_dot
from .primitives.head import Head
from .primitives.head_gemm import default_chunk_size
from .primitives.linear_vocab_stats import Chunks, Gradients, Plan, linear_row_stats, refusing_twice
from .primitives.shard import CopiedToShards, SummedOverShards, VocabShard, vocabulary
from .primitives.vocab_stats import DEFAULT_WANT, DIFFERENTIABLE, VocabStats, checked_want, computed, presented
from .row_loss import checked_reduction, checked_rows, checked_weights, denominator, flat_per_token, for_epilogue, in_token_shape, reduced
from .teacher import TeacherTopK


def linear_row_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor | None,
    fn: Callable[..., Tensor],
    *,
    per_token: Sequence[Tensor] = (),
    want: Iterable[str] = DEFAULT_WANT,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items_in_batch: int | float | Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    shard: VocabShard | None = None,
    has_aux: bool = False,
    chunk_size: int | None = None,
    num_active: int | None = None,
    logits_dtype: torch.dtype | None = None,
    sparse_weight_grad: bool = False,
    path: str = "chunked",
    backend: str | None = None,
):
    """Any loss that depends on the rows of ``hidden Wᵀ + bias`` through their statistics, without those rows.

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64.
        weight: [V, H], the lm_head; its dtype may differ (float32 master weights): GEMMs run in the autocast dtype, else
            in the promoted one. dW accumulates in float32 and returns in the weight's dtype.
        ids, fn, per_token, want, token_weights, reduction, num_items_in_batch, has_aux, temperature, logit_scale,
            softcap, valid_vocab, shard, backend: see :func:`row_loss`. `fn` runs once per chunk, so it must not close over
            per-token tensors or any that requires grad (a ValueError): hand them in by `per_token`.
        bias: [V] or None.
        chunk_size: tokens whose logits exist at once; default 256 on a CPU, 4,096 on a GPU.
        num_active: on a GPU, how many rows have a weight other than 0: the others are sorted away and cost no GEMM (a number
            that is too small drops rows). On a CPU they are counted and left out. Not with reduction="none", which has all.
        logits_dtype: of the logits scratch: float32, or the 16-bit dtype of the GEMMs, which halves it and rounds every
            logit to 2⁻⁹ (bf16) or 2⁻¹² (fp16) of its size, as a model's own logits are. The default is float32 where the
            GEMM gives float32 (CUDA, torch ≥ 2.8; float32 operands; CPUs without a fast 16-bit GEMM), else 16 bits.

        sparse_weight_grad: where `want` is "gathered" alone, d weight is a sparse tensor of the rows at the ids, as
            ``nn.Embedding(sparse=True)`` gives; elsewhere every row has a gradient, and asking is a ValueError.
        path: "chunked", or "tiles" for a Triton GEMM whose tiles of logits are reduced in registers and recomputed in the
            backward: 8·N·V·H FLOPs instead of 6, no room for a chunk needed. Triton only; no second, rank, mass_above
            or shard.

    Returns:
        As :func:`row_loss`. A scalar's gradient is computed in the forward: three GEMMs, two or one where weight or hidden
        is frozen, one without grad. With reduction="none" logits are recomputed in the backward: four GEMMs. Where `want`
        is "gathered" alone there is no vocabulary GEMM at all.

    Raises:
        ValueError, TypeError: naming the argument. BackendError: `backend` cannot serve the chunk. RuntimeError: a second
        backward through the same scalar.
    """
    lead, flat, vocab, head = checked_linear(hidden, weight, bias, temperature, logit_scale, softcap, valid_vocab, shard)
    if not callable(fn):
        raise TypeError(f"fn must be a function of the statistics; got {type(fn).__name__}")
    if ids is not None:
        ids = checked_ids(ids, lead, vocab, hidden.device)
    want = checked_want(want, ids is not None)
    weights = checked_weights(token_weights, lead, hidden.device)
    per_token = [flat_per_token("per_token", t, lead, hidden.device) for t in per_token]
    checked_reduction(reduction)
    plan = checked_plan(want, ids, head, flat, weight, chunk_size, logits_dtype, backend, shard, sparse_weight_grad, path)

    n, count = flat.shape[0], denominator(weights, flat.shape[0], reduction, num_items_in_batch)
    active = active_rows(weights, n, num_active) if reduction != "none" else None
    if active is not None:
        flat, weights = flat[active], weights[active]
        ids = None if ids is None else ids[active]
        per_token = [t[active] for t in per_token]
    elif weights is not None:
        # whatever a row of weight 0 holds must not meet d weight: 0·NaN is NaN in a GEMM
        flat = flat.masked_fill((weights == 0)[:, None], 0)

    if reduction == "none" or path == "tiles" or plan.names in ((), ("gathered",)):
        stats = statistics_of(flat, weight, bias, ids, want, plan)
        shape = lead if active is None else (flat.shape[0],)
        result = reduced(stats, fn, per_token, weights, shape, reduction, count, has_aux, plan.dtype)
        if active is None or not has_aux:
            return result
        return result[0], in_token_shape([scattered(a, active, n) for a in result[1]], lead)

    functorch_refused("linear_row_loss")
    # the denominator is part of d logits, but for fp16 operands, which would underflow: there it follows the GEMMs
    before = 1.0 if plan.dtype == torch.float16 else count
    total, *aux = _LinearRowLoss.apply(flat, weight, bias, ids, weights, fn, has_aux, plan, before, torch.is_grad_enabled(), *per_token)
    dtype = torch.float64 if plan.dtype == torch.float64 else torch.float32
    loss = (total / count if plan.dtype == torch.float16 else total).to(dtype)
    if active is not None:
        aux = [scattered(a, active, n) for a in aux]
    return (loss, in_token_shape(aux, lead)) if has_aux else loss


def scattered(part: Tensor, active: Tensor, n: int) -> Tensor:
    """Rows [A, ...] at their places among N; 0 in the rows that were left out."""
    return part.new_zeros(n, *part.shape[1:]).index_copy(0, active, part)


def epilogue_gradient(value: Callable, leaves: dict):
    """({gradients of the leaves}, (value, aux)); inside another autograd function's forward, so on a graph of its own.

    Tensors that `value` closes over would get no gradient: one that wants one is refused.
    """
    if torch.compiler.is_compiling():
        return torch.func.grad_and_value(value, has_aux=True)(leaves)
    # hooks of a surrounding checkpoint or offloading are about the caller's graph
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        own = {"stats": {k: t.detach().requires_grad_() for k, t in leaves["stats"].items()},
               "per_token": [t.detach().requires_grad_() for t in leaves["per_token"]]}  # fmt: skip
        flat = [*own["stats"].values(), *own["per_token"]]
        part, aux = value(own)
        if not part.requires_grad:
            return {"stats": {}, "per_token": [torch.zeros_like(t) for t in leaves["per_token"]]}, (part, aux)
        strangers = graph_leaves(part) - {id(t) for t in flat}
        if strangers:
            raise ValueError("fn closes over a tensor that requires grad, which would get none here: hand it in by per_token, or detach it")
        slopes = torch.autograd.grad(part, flat, allow_unused=True)
    used = {k: g for k, g in zip(own["stats"], slopes) if g is not None}
    rest = [torch.zeros_like(t) if g is None else g for t, g in zip(own["per_token"], slopes[len(own["stats"]) :])]
    return {"stats": used, "per_token": rest}, (part.detach(), aux)


def graph_leaves(root: Tensor) -> set[int]:
    """The ids of the leaf tensors that a tensor's graph leads to."""
    found, seen, todo = set(), set(), [root.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [following for following, _ in node.next_functions]
    return found


class _LinearRowLoss(torch.autograd.Function):
    """Σ of the weighted rows over `count`, with its gradient computed on the way."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, weights, fn, has_aux, plan, count, with_grad, *per_token):
        needs = tuple(with_grad and needed for needed in ctx.needs_input_grad)
        first = len(needs) - len(per_token)
        differentiated = [i for i in range(len(per_token)) if needs[first + i]]
        needs = needs[:3]
        chunks = Chunks(hidden, weight, bias, ids, plan)
        grads = Gradients(hidden, weight, bias, chunks, needs) if any(needs) or differentiated else None
        total = hidden.new_zeros((), dtype=torch.float64)
        aux_parts, per_token_grads = [], []
        for rows, h, z in chunks:
            stats = chunks.statistics(rows, z)
            some = [t[rows] for t in per_token]
            w = None if weights is None else weights[rows]

            def value(leaves, rows=rows, some=some, stats=stats, w=w):
                given = list(some)
                for i, t in zip(differentiated, leaves["per_token"]):
                    given[i] = t
                found = fn(for_epilogue(VocabStats(**(stats | leaves["stats"])), w), *given)
                found, aux = found if has_aux else (found, ())
                return checked_rows(found, w, rows.stop - rows.start).sum() / count, aux

            leaves = {"stats": {k: v for k, v in stats.items() if k in DIFFERENTIABLE}, "per_token": [some[i] for i in differentiated]}
            if grads is None:
                part, aux = value(leaves)
            else:
                slopes, (part, aux) = epilogue_gradient(value, leaves)
                per_token_grads.append(slopes["per_token"])
                if any(needs):
                    grads.add(rows, h, chunks.to_gradient(rows, z, stats, slopes["stats"]) if slopes["stats"] else z.zero_())
            total += part.detach()
            aux_parts.append([a.detach() for a in aux])
        ctx.save_for_backward(hidden, weight, bias)  # for what they require: a second derivative is refused by name
        ctx.grads = None if grads is None else (*grads.finished(), *(torch.cat(parts) for parts in zip(*per_token_grads)))
        ctx.differentiated, ctx.arguments, ctx.given = [first + i for i in differentiated], first + len(per_token), False
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)] + [per_token[i].dtype for i in differentiated]
        aux = [torch.cat(parts) for parts in zip(*aux_parts)]
        ctx.mark_non_differentiable(*aux)
        return total, *aux

    @staticmethod
    @refusing_twice
    def backward(ctx, upstream, *_):
        if ctx.grads is None:
            return (None,) * ctx.arguments
        if ctx.given:
            raise RuntimeError("a second backward through a linear-fused loss needs retain_graph=True in the first: its gradient is given away")
        keep = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
        ctx.given = not keep
        # on a CPU the usual factor of 1 is seen without waiting for anything, and saves a pass over dW
        unscaled = upstream.device.type == "cpu" and plain_eager(upstream) and bool(upstream == 1)
        out = [None if g is None else scaled(g, None if unscaled else upstream, dtype, keep) for g, dtype in zip(ctx.grads, ctx.dtypes)]
        if not keep:
            ctx.grads = ()
        full = out[:3] + [None] * (ctx.arguments - 3)
        for i, g in zip(ctx.differentiated, out[3:]):
            full[i] = g
        return tuple(full)


def scaled(grad: Tensor, factor: Tensor | None, dtype: torch.dtype, keep: bool) -> Tensor:
    """grad·factor in `dtype`, in one pass; over grad's own memory unless it is to be kept."""
    if factor is None:
        return grad.to(dtype, copy=keep)
    if grad.dtype == dtype and not keep:
        return grad.mul_(factor)
    return torch.mul(grad, factor, out=torch.empty(grad.shape, dtype=dtype, device=grad.device))


def checked_linear(
    hidden, weight, bias, temperature, logit_scale, softcap, valid_vocab, shard
) -> tuple[tuple[int, ...], Tensor, int, Head]:
    """(token shape, hidden [N, H], vocabulary size, head), or an error that names the argument."""
    for name, t in (("hidden", hidden), ("weight", weight), *([] if bias is None else [("bias", bias)])):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(t).__name__}")
        if hasattr(t, "placements"):
            raise TypeError(f"{name} is a DTensor: distilkernels.nn.DistillHead runs the loss on a sharded or replicated lm_head")
        if t.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {t.dtype}")
        if t.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device}, where hidden is; got {t.device}")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape [V, H] with V ≥ 1; got {tuple(weight.shape)}")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden must have shape [..., {weight.shape[1]}] to match weight's {tuple(weight.shape)}; got {tuple(hidden.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape ({weight.shape[0]},); got {tuple(bias.shape)}")
    lead = tuple(hidden.shape[:-1])
    vocab = vocabulary(weight.shape[0], shard)
    head = Head.checked(vocab, temperature, logit_scale, softcap, valid_vocab)
    return lead, hidden.reshape(math.prod(lead), hidden.shape[-1]), vocab, head


def gemm_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on, else the type that both promote to."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(hidden.dtype, weight.dtype)


def checked_plan(
    want, ids, head: Head, hidden: Tensor, weight: Tensor, chunk_size, logits_dtype, backend, shard, sparse_weight_grad=False, path="chunked"
) -> Plan:
    dtype = gemm_dtype(hidden, weight)
    if logits_dtype not in (None, torch.float32, dtype) or (dtype == torch.float64 and logits_dtype == torch.float32):
        raise ValueError(f"logits_dtype must be None, float32 or the dtype of the GEMMs, {dtype}; got {logits_dtype}")
    if chunk_size is None:
        chunk_size = default_chunk_size(hidden.shape[0], hidden.device)
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size must be an int; got {type(chunk_size).__name__}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}")
    names = computed(want, ids is not None)
    if sparse_weight_grad and names != ("gathered",):
        raise ValueError(f"sparse_weight_grad needs a loss of the gathered logits alone (tail='renormalize'); this one needs {', '.join(names)}")
    if path not in ("chunked", "tiles"):
        raise ValueError(f"path must be 'chunked' or 'tiles'; got {path!r}")
    if path == "tiles" and shard is not None:
        raise ValueError("path='tiles' has no vocabulary-parallel form: a shard needs path='chunked'")
    return Plan(names, head, chunk_size, dtype, logits_dtype, backend, shard, sparse_weight_grad, path)


def active_rows(weights: Tensor | None, n: int, num_active: int | None) -> Tensor | None:
    """Indices of the rows that cost GEMMs, ascending, or None for all. Counting on a GPU would wait for it: `num_active` says."""
    if num_active is not None and (isinstance(num_active, bool) or not isinstance(num_active, int) or not 0 <= num_active <= n):
        raise ValueError(f"num_active must be an int in [0, {n}]; got {num_active!r}")
    if weights is None or n == 0:
        return None
    if weights.device.type == "cpu" and not torch.compiler.is_compiling():
        active = weights.nonzero()[:, 0]
        return None if active.numel() == n else active
    if num_active is None or num_active == n:
        return None
    return (weights == 0).to(torch.int8).argsort(stable=True)[:num_active]


def statistics_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, want: tuple[str, ...], plan: Plan) -> VocabStats:
    """Flat, differentiable statistics; for the gathered logits alone there is no vocabulary GEMM."""
    if plan.names != ("gathered",):
        return linear_row_stats(hidden, weight, bias, ids, want, plan)
    if plan.shard is not None:
        return VocabStats(gathered=gathered_over_shards(hidden, weight, bias, ids, plan))
    z = gather_dot(hidden, weight, ids, bias=bias, head=plan.head, dtype=plan.dtype, backend=plan.backend,
                   sparse_weight_grad=plan.sparse_weight_grad)  # fmt: skip
    return VocabStats(gathered=z)


def gathered_over_shards(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, plan: Plan) -> Tensor:
    """z at ids [N, K] of a vocabulary-parallel lm_head: each rank's products, added up before softcap and temperature."""
    shard, head = plan.shard, plan.head
    distinct = without_duplicates(ids, vocabulary(weight.shape[0], shard) if head.valid_vocab is None else head.valid_vocab)
    local = shard.local_ids(distinct)
    x = gather_dot(CopiedToShards.apply(hidden, shard), weight, local, bias=bias, head=Head(), dtype=plan.dtype, backend=plan.backend,
                   sparse_weight_grad=plan.sparse_weight_grad)  # fmt: skip
    x = SummedOverShards.apply(x.masked_fill(local < 0, 0), shard)
    return head._replace(valid_vocab=None).apply(x).masked_fill(distinct < 0, -math.inf)


def linear_vocab_stats(
    hidden: Tensor, weight: Tensor, ids: Tensor | None = None, *, want: Iterable[str] = DEFAULT_WANT, bias: Tensor | None = None,
    temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None, valid_vocab: int | None = None,
    shard: VocabShard | None = None, chunk_size: int | None = None, logits_dtype: torch.dtype | None = None, path: str = "chunked",
    backend: str | None = None,
) -> VocabStats:  # fmt: skip
    """:func:`vocab_stats` of ``hidden Wᵀ + bias``, differentiable in hidden, weight and bias; [N, V] is never kept.

    Logits exist one chunk at a time and are recomputed in the backward (four GEMMs in all). Arguments, results and errors
    are those of :func:`linear_row_loss` and :func:`vocab_stats`.
    """
    lead, flat, vocab, head = checked_linear(hidden, weight, bias, temperature, logit_scale, softcap, valid_vocab, shard)
    want = checked_want(want, ids is not None)
    if ids is not None:
        ids = checked_ids(ids, lead, vocab, hidden.device)
    plan = checked_plan(want, ids, head, flat, weight, chunk_size, logits_dtype, backend, shard, path=path)
    stats = statistics_of(flat, weight, bias, ids, want, plan) if plan.names else VocabStats()
    return VocabStats(*(t if t is None else presented(t, plan.dtype).view((*lead, *t.shape[1:])) for t in stats))


def linear_topk_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: TeacherTopK,
    *,
    bias: Tensor | None = None,
    divergence: str | Callable[[Tensor, Tensor], Tensor] = "forward_kl",
    tail: str = "bucket",
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
    valid_vocab: int | None = None,
    shard: VocabShard | None = None,
    return_stats: bool = False,
    chunk_size: int | None = None,
    num_active: int | None = None,
    logits_dtype: torch.dtype | None = None,
    sparse_weight_grad: bool = False,
    path: str = "chunked",
    backend: str | None = None,
):
    """:func:`topk_distill_loss` of the logits ``hidden Wᵀ + bias``, which are never kept.

    Args:
        hidden: [..., H]; weight: [V, H]; bias: [V] or None.
        chunk_size, num_active, logits_dtype, sparse_weight_grad, path: see :func:`linear_row_loss`.
        The others: see :func:`topk_distill_loss`. tail="renormalize" without labels and statistics has no vocabulary GEMM.

    Returns:
        As :func:`topk_distill_loss`, with gradients for hidden, weight and bias.

    Raises:
        As :func:`topk_distill_loss` and :func:`linear_row_loss`.
    """
    lead, _, vocab, head = checked_linear(hidden, weight, bias, temperature, logit_scale, softcap, valid_vocab, shard)
    epilogue = TopKDistillation(
        teacher, lead, vocab, hidden.device, divergence=divergence, tail=tail, temperature=head.temperature,
        scale_by_t2=scale_by_t2, token_weights=token_weights, labels=labels, ce_weight=ce_weight, ignore_index=ignore_index,
        return_stats=return_stats, reduction=reduction, num_items_in_batch=num_items_in_batch,
    )  # fmt: skip
    result = linear_row_loss(
        hidden, weight, epilogue.ids_in(lead), epilogue, per_token=epilogue.per_token_in(lead), want=epilogue.want, bias=bias,
        token_weights=epilogue.weights.view(lead), reduction=reduction, num_items_in_batch=epilogue.denominator,
        shard=shard, has_aux=return_stats, chunk_size=chunk_size, num_active=num_active, logits_dtype=logits_dtype,
        sparse_weight_grad=sparse_weight_grad, path=path, backend=backend, **head._asdict(),
    )  # fmt: skip
    return epilogue.finish(result)


def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, entropy: bool = False, bias: Tensor | None = None, temperature: float = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, valid_vocab: int | None = None, shard: VocabShard | None = None,
    chunk_size: int | None = None, logits_dtype: torch.dtype | None = None, backend: str | None = None,
):  # fmt: skip
    """:func:`token_logprobs` of the logits ``hidden Wᵀ + bias``, which are recomputed in the backward, not kept.

    Returns:
        log-probs in the shape of `ids` ([...] or [..., K]), or (log-probs, entropy [...]); float32 (float64 for float64).
        Arguments and errors: see :func:`token_logprobs` and :func:`linear_row_loss`.
    """
    ids, want, epilogue = logprob_epilogue(ids, hidden.dim(), entropy)
    return linear_row_loss(
        hidden, weight, ids, epilogue, want=want, reduction="none", bias=bias, temperature=temperature, logit_scale=logit_scale,
        softcap=softcap, valid_vocab=valid_vocab, shard=shard, chunk_size=chunk_size, logits_dtype=logits_dtype, backend=backend,
    )  # fmt: skip
