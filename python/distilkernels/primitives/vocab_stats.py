"""``vocab_stats``: everything that a loss, a signal or an acceptance test needs to know of a row of logits.

Notation of the package: z the transformed logits of a row (see :class:`~.head.Head`), q = softmax(z), S the row's ids.
Whatever is built on the statistics, the gradient is one formula (:func:`dense_coefficients`), so kernels
never learn which loss they serve:

    dz_v = e^{d_v}·(A + B·d_v) + C·[z_v finite] + D·e^{T·z_v − lse_t1},   d_v = z_v − ref,       v ∉ S

and K exact entries on S, which plain PyTorch computes from the gathered logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..backends import resolve
from .boundary import Once, checked_ids, plain_eager, rows_of, without_duplicates
from .head import Head
from .memory import recycled_empty
from .shard import VocabShard, vocabulary
from .statistics import DEFAULT_WANT, DIFFERENTIABLE, INTEGER, PER_SLOT, VocabStats, checked_want, computed


def row_dtype(device: torch.device) -> torch.dtype:
    """Row statistics are kept in double: N numbers, and a float lse would limit the gradient to 4.5e-7 relative."""
    return torch.float32 if device.type == "mps" else torch.float64


def allocate(logits: Tensor, ids: Tensor | None, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Empty outputs for rows like those of logits [O, I, V]."""
    n = logits.shape[0] * logits.shape[1]
    slot_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    out = {}
    for name in names:
        shape = (n, ids.shape[1]) if name in PER_SLOT else (n,)
        dtype = torch.int64 if name in INTEGER else slot_dtype if name in PER_SLOT else row_dtype(logits.device)
        out[name] = torch.empty(shape, dtype=dtype, device=logits.device)
    return out


# ---------------------------------------------------------------------------------------------- reference


def gather_logits(logits: Tensor, ids: Tensor, head: Head) -> Tensor:
    """z at distinct `ids` [N, K] of `logits` [O, I, V]; −inf at −1 and on masked columns. O(N·K): V is not touched."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    index = ids.clamp(min=0).long().view(*logits.shape[:2], ids.shape[1])
    z = head._replace(valid_vocab=None).apply(logits.gather(2, index).to(dtype)).view(ids.shape)
    return z.masked_fill((ids < 0) | (ids >= head.columns(logits.shape[2])), -math.inf)


def reference(logits: Tensor, ids: Tensor | None, thresholds: Tensor | None, head: Head, out: dict[str, Tensor]) -> None:
    """Writes the statistics named by `out`'s keys. The definition, in fp64 for fp64 logits and fp32 otherwise.

    logits [O, I, V] with last stride 1; ids [N, K] contiguous, N = O·I; `thresholds` [N, K] replaces the gathered z
    in rank and mass_above (vocabulary-parallel rows know them before this rank's columns are read).
    """
    vocab = logits.shape[2]
    raw = logits.reshape(-1, vocab)
    raw = raw if raw.dtype == torch.float64 else raw.float()
    z = head.apply(raw)
    bad = z.isnan().any(-1)
    values: dict[str, Tensor] = {"lse": z.logsumexp(-1)}
    finite = z.isfinite()
    if "expected_logit" in out:
        values["expected_logit"] = ((z - values["lse"][:, None]).exp() * z.masked_fill(z == -math.inf, 0)).sum(-1)
    if "logit_sum" in out:
        values["logit_sum"] = torch.where(finite, z, 0.0).sum(-1).masked_fill(bad, math.nan)
        values["finite_count"] = finite.sum(-1)
    if "lse_t1" in out:
        values["lse_t1"] = head.apply(raw, temperature=1.0).logsumexp(-1)
    if not {"max", "argmax", "second"}.isdisjoint(out):
        values["max"] = z.amax(-1)
        # torch.argmax may return any of several equal maxima
        lowest = (z == values["max"][:, None]).int().argmax(-1)
        values["argmax"] = lowest.masked_fill(bad, -1)
        values["second"] = z.scatter(1, lowest[:, None], -math.inf).amax(-1).masked_fill(bad, math.nan)
    if ids is not None:
        distinct = without_duplicates(ids, vocab)
        gathered = gather_logits(logits, distinct, head)
        values["gathered"] = gathered.masked_fill(bad[:, None] & (distinct >= 0), math.nan)
        if "tail_lse" in out:
            outside = torch.cat([z, z.new_empty(z.shape[0], 1)], -1)
            outside = outside.scatter_(1, torch.where(distinct < 0, vocab, distinct).long(), -math.inf)[:, :vocab]
            values["tail_lse"] = outside.logsumexp(-1).masked_fill(bad, math.nan)
        if "rank" in out or "mass_above" in out:
            bar = gathered if thresholds is None else thresholds
            q = (z - values["lse"][:, None]).exp()
            rank, above = torch.empty_like(bar, dtype=torch.int64), torch.empty_like(bar)
            for slot in range(ids.shape[1]):
                higher = z > bar[:, slot, None]
                rank[:, slot] = higher.sum(-1)
                above[:, slot] = torch.where(higher, q, 0.0).sum(-1)
            values["rank"] = rank.masked_fill((distinct < 0) | bad[:, None], -1)
            values["mass_above"] = above.masked_fill((distinct < 0) | bad[:, None], math.nan)
    for name, target in out.items():
        target.copy_(values[name])


def reference_backward(
    logits: Tensor, ids: Tensor | None, entries: Tensor | None, coef: Tensor, terms: tuple[str, ...], head: Head, out: Tensor
) -> None:
    """Writes d logits: the dense formula of the module's page times dz/dx, then `entries` at `ids`.

    coef fp64 [N, 6] holds ref, A, B, C, D, lse_t1; `terms` names which of "linear" (B), "constant" (C), "t1" (D) can be
    nonzero. A row with A = B = C = D = 0 is written as zeros whatever it holds, NaN included. ids [N, K] are distinct
    where not negative (others are skipped); entries [N, K] are d x, not d z. `out` [O, I, V] may be `logits` itself.
    """
    vocab = logits.shape[2]
    raw = logits.reshape(-1, vocab)
    raw = raw if raw.dtype == torch.float64 else raw.float()
    z = head.apply(raw)
    ref, a, b, c, d, lse_t1 = coef.unsqueeze(-1).unbind(1)
    distance = (z - ref).to(z.dtype)
    weight = distance.exp()
    grad = weight * a
    if "linear" in terms:
        grad = grad + weight * (b * distance.masked_fill(distance == -math.inf, 0))
    if "constant" in terms:
        grad = grad + c * z.isfinite()
    if "t1" in terms:
        grad = grad + d * (head.apply(raw, temperature=1.0) - lse_t1).exp()
    grad = grad * head.chain(z)
    grad = torch.where((a == 0) & (b == 0) & (c == 0) & (d == 0), 0.0, grad)
    if head.valid_vocab is not None:
        grad[:, head.valid_vocab :] = 0
    if ids is not None:
        inside = torch.where(ids < 0, vocab, ids).long()
        grad = torch.cat([grad, grad.new_empty(grad.shape[0], 1)], -1).scatter_(1, inside, entries.to(grad.dtype))[:, :vocab]
    out.copy_(grad.view(out.shape))


# ---------------------------------------------------------------------------------------------- autograd


def _maximum_as_slot(stats: dict[str, Tensor], grads: dict[str, Tensor], ids: Tensor | None):
    """(stats, grads, ids) in which the maximum is the logit of a slot: of the one that has its id already, or of one more."""
    top, best, slope = stats["max"], stats["argmax"], grads["max"]
    rest = {name: t for name, t in grads.items() if name != "max"}
    if ids is None:
        return stats | {"gathered": top.masked_fill(best < 0, -math.inf)[:, None]}, rest | {"gathered": slope[:, None]}, best[:, None]
    gathered = stats["gathered"]
    match = (ids == best[:, None]) & (gathered > -math.inf)
    fresh = (best >= 0) & ~match.any(-1)
    of_slots = torch.where(match, slope[:, None], 0.0)
    if "gathered" in rest:
        of_slots = of_slots + rest["gathered"]
    tail = rest.get("tail_lse")
    if tail is not None:
        # the new slot is one of the tail's columns, whose entry would have had this
        slope = slope + torch.where(fresh & (tail != 0), tail * (top - stats["tail_lse"]).exp(), 0.0)
    slots = torch.cat([gathered, top.masked_fill(~fresh, -math.inf)[:, None].to(gathered.dtype)], 1)
    ids = torch.cat([ids.long(), best.masked_fill(~fresh, -1)[:, None]], 1)
    return stats | {"gathered": slots}, rest | {"gathered": torch.cat([of_slots, slope[:, None]], 1)}, ids


def dense_coefficients(stats: dict[str, Tensor], grads: dict[str, Tensor], ids: Tensor | None, head: Head):
    """(ids, entries, coef, terms) of the backward kernel from the gradients of the statistics.

    On tail entries the reference point is tail_lse, not lse: e^{z − tail_lse} ≤ 1 there, so no coefficient overflows
    when the tail is tiny. Products with a zero upstream gradient are zero even where the row holds NaN.
    """
    if "max" in grads:
        stats, grads, ids = _maximum_as_slot(stats, grads, ids)
    upstream = next(iter(grads.values()))
    zero = upstream.new_zeros(upstream.shape[0], dtype=row_dtype(upstream.device))
    g = {name: grads.get(name) for name in DIFFERENTIABLE}
    g_lse, g_mu, tail = g["lse"], g["expected_logit"], g["tail_lse"]
    # the reference of a term that is not asked for: far above, so that its exponentials are 0 and not 0·∞
    far = zero + 1e30
    lse, mu = stats.get("lse", far), stats.get("expected_logit")

    def of_softmax(at: Tensor) -> Tensor:
        """The factor of q_v at an entry whose z is `at` ([N] or [N, K])."""
        wide = (lambda t: t) if at.dim() == 1 else (lambda t: t.unsqueeze(-1))
        factor = torch.zeros_like(at) if g_lse is None else wide(g_lse).expand_as(at)
        return factor if g_mu is None else factor + torch.where(wide(g_mu) == 0, 0.0, wide(g_mu) * (1 + at - wide(mu)))

    if tail is None:
        ref, a, b = lse, of_softmax(lse), zero if g_mu is None else g_mu
    else:
        tail_lse = stats["tail_lse"]
        covered = tail_lse == -math.inf
        ref = torch.where(covered, lse, tail_lse)
        q_tail = (tail_lse - lse).exp()
        dense = of_softmax(ref)
        a = torch.where(covered, 0.0, tail) + torch.where(dense == 0, 0.0, q_tail * dense)
        b = zero if g_mu is None else torch.where(g_mu == 0, 0.0, q_tail * g_mu)
    c = zero if g["logit_sum"] is None else g["logit_sum"]
    d = zero if g["lse_t1"] is None else g["lse_t1"] * head.temperature
    lse_t1 = far if g["lse_t1"] is None else stats["lse_t1"]
    coef = torch.stack([ref, a, b, c, d, lse_t1], 1).to(zero.dtype)
    terms = tuple(
        term for term, of in (("linear", g_mu), ("constant", g["logit_sum"]), ("t1", g["lse_t1"])) if of is not None
    )
    if ids is None:
        return None, None, coef, terms

    z = stats["gathered"].to(zero.dtype)
    # entries at −inf get no gradient: empty slots, repeated ids and masked columns are skipped by the kernel
    ids = ids.masked_fill(stats["gathered"] == -math.inf, -1)
    at = z.masked_fill(z == -math.inf, 0)
    factor = of_softmax(at)
    entries = torch.where(factor == 0, 0.0, (at - lse[:, None]).exp() * factor)
    if g["gathered"] is not None:
        entries = entries + g["gathered"]
    if g["logit_sum"] is not None:
        entries = entries + c[:, None]
    if g["lse_t1"] is not None:
        entries = entries + torch.where(d[:, None] == 0, 0.0, d[:, None] * (at * head.temperature - lse_t1[:, None]).exp())
    chain = head.chain(at)
    # a slope that is NaN belongs to a NaN row: where nothing is asked of it, it gives nothing
    entries = entries * chain if isinstance(chain, float) else torch.where(entries == 0, 0.0, entries * chain)
    return ids, entries.to(stats["gathered"].dtype), coef, terms


def statistics(
    logits: Tensor, ids: Tensor | None, thresholds: Tensor | None, names: tuple[str, ...], head: Head, backend: str | None
) -> dict[str, Tensor]:
    """The named statistics of logits [O, I, V], flat, rows in double."""
    if names == ("gathered",):
        if backend is not None:
            resolve("vocab_stats", logits, ids, backend=backend)  # for its refusal: no kernel is needed
        return {"gathered": gather_logits(logits, without_duplicates(ids, logits.shape[2]), head)}
    launch = resolve("vocab_stats", logits, ids, backend=backend)
    out = allocate(logits, ids, names)
    if logits.numel():
        launch(logits, ids, thresholds, head, out)
    if "finite_count" in out:
        out["finite_count"].masked_fill_(out["logit_sum"].isnan(), -1)
    return out


def logits_grad(
    logits: Tensor, ids, entries, coef: Tensor, terms, head: Head, backend: str | None, sparse: bool, inplace: bool
) -> Tensor:  # fmt: skip
    """d logits [O, I, V]; `sparse`: nothing but the entries can be nonzero, so the vocabulary axis is not read."""
    if sparse:
        out = (logits if inplace else recycled_empty(tuple(logits.shape), logits.dtype, logits.device)).zero_()
        slots = (*logits.shape[:2], ids.shape[1])
        # an addition, so that a skipped slot may aim at column 0 with a zero
        return out.scatter_add_(2, ids.clamp(min=0).long().view(slots), entries.masked_fill(ids < 0, 0).to(out.dtype).view(slots))
    out = logits if inplace else recycled_empty(tuple(logits.shape), logits.dtype, logits.device)
    if logits.numel():
        resolve("vocab_stats_backward", logits, ids, backend=backend)(logits, ids, entries, coef, terms, head, out)
    return out


def _save(ctx, logits, ids, names, head, backend, inplace, outputs: dict[str, Tensor], shard: VocabShard | None = None) -> None:
    if shard is not None:
        outputs = shard.local_argmax(outputs)
    saved = [name for name in ("lse", "gathered", "tail_lse", "expected_logit", "lse_t1", "max", "argmax") if name in outputs]
    ctx.save_for_backward(logits, ids, *(outputs[name] for name in saved))
    ctx.saved_names, ctx.names, ctx.head, ctx.backend, ctx.inplace = saved, names, head, backend, inplace


def _prepare(ctx, logits, ids, names, head, backend, inplace, outputs: dict[str, Tensor], shard: VocabShard | None = None) -> None:
    _save(ctx, logits, ids, names, head, backend, inplace, outputs, shard)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(t for name, t in outputs.items() if name not in DIFFERENTIABLE))


def _grad_of_logits(ctx, saved_tensors, grads, launch) -> Tensor | None:
    logits, ids, *saved = saved_tensors
    grads = {name: g for name, g in zip(ctx.names, grads) if g is not None and name in DIFFERENTIABLE}
    if not grads:
        return None
    ids, entries, coef, terms = dense_coefficients(dict(zip(ctx.saved_names, saved)), grads, ids, ctx.head)
    sparse = set(grads) == {"gathered"}
    return launch(logits, ids, entries, coef, terms, ctx.head, ctx.backend, sparse, ctx.inplace)


class _VocabStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, thresholds, names, head, backend, inplace, shard):
        if shard is None:
            outputs = statistics(logits, ids, thresholds, names, head, backend)
            _prepare(ctx, logits, ids, names, head, backend, inplace, outputs)
        else:
            outputs = shard.statistics(statistics, logits, ids, names, head, backend)
            _prepare(ctx, logits, shard.local_ids(ids), names, shard.head(head), backend, inplace, outputs, shard)
        return tuple(outputs.values())

    @staticmethod
    def backward(ctx, *grads):
        twice = torch.is_grad_enabled()
        with torch.no_grad():
            saved = ctx.saved_tensors
            grad = _grad_of_logits(ctx, saved, grads, logits_grad if plain_eager(saved[0]) else logits_grad_op)
            if grad is not None and ctx.inplace:
                torch.autograd.graph.increment_version(saved[0])
                grad = grad.detach()
        if twice and grad is not None and plain_eager(saved[0]):
            grad = Once.apply(grad, saved[0], "vocab_stats")
        return grad, *(None,) * 7


class _Transformable(_VocabStats):
    """The same for torch.func, which wants setup_context; binding its arguments costs 100 µs a call, so not for all."""

    @staticmethod
    def forward(logits, ids, thresholds, names, head, backend, inplace, shard):
        return tuple(statistics(logits, ids, thresholds, names, head, backend).values())

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        logits, ids, _, names, head, backend, inplace, _ = inputs
        _prepare(ctx, logits, ids, names, head, backend, inplace, dict(zip(names, outputs)))


# --------------------------------------------------------------------------------------------- torch.library


def _head_of(temperature, logit_scale, softcap, valid_vocab) -> Head:
    return Head(temperature, logit_scale, softcap, valid_vocab)


@torch.library.custom_op("distilkernels::vocab_stats", mutates_args=())
def _op(
    logits: Tensor, ids: Tensor | None, thresholds: Tensor | None, names: str,
    temperature: float, logit_scale: float, softcap: float | None, valid_vocab: int | None, backend: str | None,
) -> list[Tensor]:  # fmt: skip
    head = _head_of(temperature, logit_scale, softcap, valid_vocab)
    return list(statistics(logits, ids, thresholds, tuple(names.split(",")), head, backend).values())


@_op.register_fake
def _(logits, ids, thresholds, names, temperature, logit_scale, softcap, valid_vocab, backend):
    return list(allocate(logits, ids, tuple(names.split(","))).values())


@torch.library.custom_op("distilkernels::vocab_stats_backward", mutates_args=())
def _op_backward(
    logits: Tensor, ids: Tensor | None, entries: Tensor | None, coef: Tensor, terms: str, sparse: bool,
    temperature: float, logit_scale: float, softcap: float | None, valid_vocab: int | None, backend: str | None,
) -> Tensor:  # fmt: skip
    head = _head_of(temperature, logit_scale, softcap, valid_vocab)
    return logits_grad(logits, ids, entries, coef, tuple(t for t in terms.split(",") if t), head, backend, sparse, False)


@_op_backward.register_fake
def _(logits, ids, entries, coef, terms, sparse, temperature, logit_scale, softcap, valid_vocab, backend):
    return logits.new_empty(logits.shape)


def _op_setup(ctx, inputs, output):
    logits, ids, _, names, *head, backend = inputs
    names = tuple(names.split(","))
    _save(ctx, logits, ids, names, _head_of(*head), backend, False, dict(zip(names, output)))


def statistics_op(logits, ids, thresholds, names, head, backend) -> dict[str, Tensor]:
    """:func:`statistics` through the registered op, for what traces."""
    return dict(zip(names, _op(logits, ids, thresholds, ",".join(names), *head, backend)))


def logits_grad_op(logits, ids, entries, coef, terms, head, backend, sparse, inplace) -> Tensor:
    """:func:`logits_grad` through the registered op, never in place."""
    return _op_backward(logits, ids, entries, coef, ",".join(terms), sparse, *head, backend)


def _op_gradient(ctx, grads):
    return (_grad_of_logits(ctx, ctx.saved_tensors, grads, logits_grad_op), *(None,) * 8)


_op.register_autograd(_op_gradient, setup_context=_op_setup)


# --------------------------------------------------------------------------------------------- calls


def _sharded(*arguments):
    """Collectives on tensors that the caller owns: a compiled model breaks its graph here."""
    return torch.compiler.disable(_VocabStats.apply)(*arguments)


def _overlaps(rows: Tensor) -> bool:
    """Whether two rows of [O, I, V] may share memory, as those of an expanded tensor do."""
    if torch.compiler.is_compiling() or rows.numel() == 0:
        return False
    extent = rows.shape[2]
    for size, stride in sorted(zip(rows.shape[:2], rows.stride()[:2]), key=lambda axis: axis[1]):
        if size > 1:
            if stride < extent:
                return True
            extent += (size - 1) * stride
    return False


def checked_inplace(rows: Tensor) -> None:
    """ValueError where writing over rows [O, I, V] would write over one through another."""
    if _overlaps(rows):
        raise ValueError(f"inplace_backward needs logits whose rows do not share memory; got strides {rows.stride()} for shape {tuple(rows.shape)}")


def row_stats(
    logits: Tensor, ids: Tensor | None, want: tuple[str, ...], head: Head, *,
    thresholds: Tensor | None = None, backend: str | None = None, inplace_backward: bool = False, shard: VocabShard | None = None,
) -> VocabStats:  # fmt: skip
    """Statistics of logits [..., V] at ids [N, K], flat ([N] and [N, K]), rows in fp64. Arguments are already checked."""
    names = computed(want, ids is not None)
    if not names:
        return VocabStats()
    rows = rows_of(logits)
    if inplace_backward:
        checked_inplace(rows)
    if shard is not None:
        values = _sharded(rows, ids, thresholds, names, head, backend, inplace_backward, shard)
    elif plain_eager(logits, ids, functorch=True):
        function = _VocabStats if plain_eager() else _Transformable
        values = function.apply(rows, ids, thresholds, names, head, backend, inplace_backward, None)
    else:
        values = statistics_op(rows, ids, thresholds, names, head, backend).values()
    found = dict(zip(names, values))
    return VocabStats(**{
        name: t if name in DIFFERENTIABLE else t.detach()
        for name, t in found.items()
        if name in want or (name == "finite_count" and "logit_sum" in want)
    })  # fmt: skip


def checked_logits(logits: Tensor, name: str = "logits") -> Tensor:
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(logits).__name__}")
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., V] with V ≥ 1; got {tuple(logits.shape)}")
    return logits


def vocab_stats(
    logits: Tensor, ids: Tensor | None = None, *, want: Iterable[str] = DEFAULT_WANT, temperature: float = 1.0,
    logit_scale: float = 1.0, softcap: float | None = None, valid_vocab: int | None = None, shard: VocabShard | None = None,
    backend: str | None = None,
) -> VocabStats:  # fmt: skip
    """Statistics of every row of logits in one read, differentiable; see :class:`VocabStats` for the names.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, any strides (a last stride of 1 is read in place).
        ids: int32 or int64 [..., K], distinct within a row, −1 for an empty slot.
        want: which statistics; only these are computed. The default is lse alone where there are no ids.
        temperature, logit_scale, softcap, valid_vocab: z = softcap·tanh(logit_scale·x/softcap)/temperature, with
            columns from `valid_vocab` on −inf.
        shard: this rank's columns of a vocabulary-parallel row; ids and valid_vocab then count the whole vocabulary.
        backend: "cuda", "triton", "cpp" or "reference"; None takes the first that serves the tensors.

    Returns:
        VocabStats in float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value, naming the argument; on a CPU also an id out of range.
        BackendError: `backend` cannot serve these tensors, with the reason.
    """
    checked_logits(logits)
    vocab = vocabulary(logits.shape[-1], shard)
    head = Head.checked(vocab, temperature, logit_scale, softcap, valid_vocab)
    want = checked_want(want, ids is not None)
    lead = tuple(logits.shape[:-1])
    if ids is not None:
        ids = checked_ids(ids, lead, vocab, logits.device)
    stats = row_stats(logits, ids, want, head, backend=backend, shard=shard)
    return VocabStats(*(t if t is None else presented(t, logits.dtype).view((*lead, *t.shape[1:])) for t in stats))


def presented(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What users see: float32, or float64 for float64 inputs."""
    return t if not t.is_floating_point() or dtype == torch.float64 else t.float()
