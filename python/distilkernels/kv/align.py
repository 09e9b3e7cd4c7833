"""Losses that pull a student's cache, or its hidden states, onto a teacher's: all layers in one launch."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..primitives.kv_align import LOSSES, NORMALIZE, Distance, distances
from .compress import CompressedKV
from .scores import are_keys, checked_keys
from .select import Rope, gather

REDUCTIONS = ("mean", "sum", "none")
Projection = Tensor | Callable[[Tensor], Tensor]


def alignment_loss(
    student: Any, teacher: Any, *, loss: str = "smooth_l1", beta: float = 1.0, normalize: str | None = None,
    mask: Tensor | Sequence[Tensor | None] | None = None, layer_weights: Sequence[float] | Tensor | None = None,
    layer_map: Sequence[int] | Mapping[int, int] | None = None,
    projections: Sequence[Projection | tuple[Projection, Projection] | None] | None = None, reduction: str = "mean", backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The distance between a student's keys and values and a teacher's compressed ones (KaVa, arXiv 2510.02312).

        L = Σ_l w_l·½·(mean loss(K_s, sg K_t) + mean loss(V_s, sg V_t)) / Σ_l w_l

    The mean is over real elements (slots whose mask is True), so the published form (1/2M)·‖·‖ₚᵖ, a sum over features, is D times
    this. The gradient goes to the student alone and is computed with the loss, for all layers at once; nothing is stacked.

    Args:
        student, teacher: a sequence of (keys, values) a layer, each [B, H, M, D] (values may have another width), or a
            transformers Cache. Dtypes may differ. A teacher's :class:`CompressedKV` brings the mask of its empty slots.
        loss: "mse", "l1", "smooth_l1" with `beta`, or "cosine" (1 − cos of each slot, mean over real slots).
        normalize: "layer_std" divides each layer's K and V loss by the std of its detached teacher (for "mse" by the variance; unbiased,
            over real elements, at least 1e-6), "inputs" divides both sides by their own std, with its gradient. Cosine has no
            scale: "layer_std" is refused there, "inputs" changes nothing.
        mask: bool [B, M], [B, H, M] or [L, B, H, M], or a sequence with one of the first two (or None) a student layer; True = real.
            Masked elements may hold anything, and empty slots of a :class:`CompressedKV` stay masked. All masked: 0, attached to the graph.
        layer_weights: one a student layer, floats or a tensor [L], which gets its gradient if it wants one.
        layer_map: the teacher layer of each student layer, as a sequence, or {student: teacher} for some of them. Default: one to one.
        projections: where heads or widths differ, one linear map a student layer (or a pair, for keys and for values; None: identity)
            of its H·D features to the teacher's H·D: a weight [H_t·D_t, H_s·D_s] or a module. They are trained: they are on the
            student's side of the stop-gradient. Masks are then those of the teacher's heads.
        reduction: "mean" as above, "sum" Σ_l w_l·…, or "none", one loss a layer.
        backend: "cuda", "triton", "cpp" or "reference"; None takes the first that serves the tensors.

    Returns:
        float32 scalar, or [L] for "none" (float64 where a tensor is float64).

    Raises:
        ValueError, TypeError: naming the argument. RuntimeError: a second derivative is asked for, or a torch.func transform.
        BackendError: `backend` cannot serve these tensors.
    """
    student, _ = _layers("student", student)
    teacher, teacher_masks = _layers("teacher", teacher)
    pairs = _paired(layer_map, len(student), len(teacher))
    projections = _checked_per_layer("projections", projections, len(student))
    masks = [None] * len(student) if mask is None else _masks(mask, len(student))
    left, right, slots, known = [], [], [], {}
    for s, t in pairs:
        ours, theirs = student[s], teacher[t]
        if projections[s] is not None:
            ours = _projected(ours, theirs, projections[s], s)
        for name, a, b in zip(("keys", "values"), ours, theirs):
            if a.shape != b.shape:
                raise ValueError(
                    f"student layer {s} and teacher layer {t} must have {name} of one shape, or a projection; got {tuple(a.shape)} and {tuple(b.shape)}"
                )
        real = None
        if masks[s] is not None or teacher_masks[t] is not None:
            # one mask of all layers is one tensor, so that its real slots are counted once
            key = id(masks[s]), id(teacher_masks[t]), ours[0].shape
            if key not in known:
                given, filled = (_checked_slots(m, ours[0]) for m in (masks[s], teacher_masks[t]))
                known[key] = filled if given is None else given if filled is None else given & filled
            real = known[key]
        slots += (real, real)
        left += ours
        right += theirs
    weights = _weights(layer_weights, [s for s, _ in pairs], len(student), left[0].device)
    return _aligned(left, right, slots, _distance(loss, beta, normalize), weights, 2, reduction, backend)


def hidden_alignment_loss(
    student_hidden: Sequence[Tensor], teacher_hidden: Sequence[Tensor], *, positions: Any, loss: str = "smooth_l1", beta: float = 1.0,
    normalize: str | None = "layer_std", layer_map: Sequence[int] | Mapping[int, int] | None = None, mask: Tensor | None = None,
    layer_weights: Sequence[float] | Tensor | None = None, reduction: str = "mean", backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The distance between hidden states at some tokens, meaned over layers; gradient to the student alone.

    * CODI: `positions` is the token before the answer in each sequence; smooth L1 (or L1, MSE) over the teacher's std.
    * Implicit CoT: student layer ℓ against the teacher at :func:`diagonal_positions`, with "mse" and "inputs".
    * System-1.5: as CODI with a `mask` of the tokens that have not left the network at each layer.

    Args:
        student_hidden, teacher_hidden: a sequence of [B, S, H] a layer, as ``output_hidden_states=True`` gives; lengths S may differ.
        positions: where to look, int [B], [B, P] or [L, B, P]; or a pair, the student's and the teacher's. −1 = nowhere.
        mask: bool [B, P] or [L, B, P]; True = compare.
        loss, beta, normalize, layer_map, layer_weights, reduction, backend: see :func:`alignment_loss`.

    Returns:
        float32 scalar, or [L] for "none" (float64 where a tensor is float64); 0 attached to the graph where nothing is compared.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    for name, hidden in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
        if isinstance(hidden, Tensor) or not isinstance(hidden, Sequence) or not hidden:
            raise TypeError(f"{name} must be a non-empty sequence of tensors [B, S, H]; got {type(hidden).__name__}")
        for h in hidden:
            if not isinstance(h, Tensor) or h.dim() != 3 or not h.is_floating_point():
                raise ValueError(f"{name} must hold floating point tensors [B, S, H]; got {tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__}")
    pairs = _paired(layer_map, len(student_hidden), len(teacher_hidden))
    layers, first = len(student_hidden), student_hidden[0]
    both = positions if isinstance(positions, (tuple, list)) else (positions, positions)
    if len(both) != 2:
        raise ValueError(f"positions must be a tensor or a pair of them, the student's and the teacher's; got {len(both)}")
    ours, theirs = (_per_layer(f"positions of the {who}", p, layers, first, torch.int64) for who, p in zip(("student", "teacher"), both))
    if ours.shape[2] != theirs.shape[2]:
        raise ValueError(f"positions of student and teacher must be as many; got {ours.shape[2]} and {theirs.shape[2]}")
    mask = torch.ones_like(ours, dtype=torch.bool) if mask is None else _per_layer("mask", mask, layers, first, torch.bool)
    left, right, slots = [], [], []
    for s, t in pairs:
        a, b = student_hidden[s], teacher_hidden[t].detach()
        if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2]:
            raise ValueError(f"student layer {s} and teacher layer {t} must share B and H; got {tuple(a.shape)} and {tuple(b.shape)}")
        left.append(_at("student", a, ours[s]))
        right.append(_at("teacher", b, theirs[s]))
        slots.append((mask[s] & (ours[s] >= 0) & (theirs[s] >= 0))[:, None])
    weights = _weights(layer_weights, [s for s, _ in pairs], layers, first.device)
    return _aligned(left, right, slots, _distance(loss, beta, normalize), weights, 1, reduction, backend)


def diagonal_positions(start: Tensor, stop: Tensor, num_layers: int) -> Tensor:
    """Implicit CoT's diagonal: int64 [L, B, 1], the token of layer ℓ, evenly from `start` to `stop` − 1 (int [B]) over the layers, rounded down."""
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1; got {num_layers}")
    layer = torch.arange(num_layers, device=start.device)[:, None]
    return (start.long() + (stop.long() - 1 - start.long()).clamp(min=0) * layer // max(num_layers - 1, 1))[..., None]


class AppendedKV(NamedTuple):
    """``keys`` [B, H, T + N, D], ``values`` [B, H, T + N, Dv] and the ``positions`` int64 [B, T + N] of their entries."""

    keys: Tensor
    values: Tensor
    positions: Tensor


def append_latents(
    keys: Tensor, values: Tensor, latent_k: Tensor, latent_v: Tensor, positions: Tensor, *, cached_positions: Tensor | None = None,
    rotate: Rope | None = None,
) -> AppendedKV:  # fmt: skip
    """A cache with N latent entries after its own, as cache augmentation has them (arXiv 2412.17747); differentiable in all four.

    Args:
        keys: [B, H, T, D]; values: [B, H, T, Dv].
        latent_k: [B, H, N, D], or [H, N, D] for every request; latent_v: likewise with Dv. Rounded to the cache's dtypes.
        positions: int [N] or [B, N]: the position ids of the latents. Attention sees an entry's position only through its key's
            rotation, so entries need not be in the order of their positions.
        cached_positions: int [B, T], those of the cache; default 0…T − 1.
        rotate: a :class:`Rope` (its source and target are not used): latent keys are given without rotation, and are turned to
            `positions`. None: they are as they should be cached.

    Returns:
        :class:`AppendedKV`: what attends to the cache next, and its position ids.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    checked_keys("keys", keys)
    checked_keys("values", values)
    b, heads, length, _ = keys.shape
    if values.shape[:3] != keys.shape[:3]:
        raise ValueError(f"values must share keys' [B, H, T] {tuple(keys.shape[:3])}; got {tuple(values.shape)}")
    if not isinstance(positions, Tensor):
        raise TypeError(f"positions must be an int tensor [N] or [B, N]; got {type(positions).__name__}")
    if positions.dtype not in (torch.int32, torch.int64) or positions.dim() not in (1, 2):
        raise ValueError(f"positions must be an int tensor [N] or [B, N]; got {positions.dtype} {tuple(positions.shape)}")
    count = positions.shape[-1]
    latents = []
    for name, latent, cache in (("latent_k", latent_k, keys), ("latent_v", latent_v, values)):
        want = (b, heads, count, cache.shape[3])
        latent = latent.expand(want) if latent.dim() == 3 and latent.shape == want[1:] else latent
        if tuple(latent.shape) != want:
            raise ValueError(f"{name} must have shape {want} or {want[1:]}; got {tuple(latent.shape)}")
        latents.append(latent)
    if positions.dim() == 2 and positions.shape[0] != b:
        raise ValueError(f"positions must have shape ({count},) or {(b, count)}; got {tuple(positions.shape)}")
    positions = positions.long().expand(b, count)
    if cached_positions is None:
        cached_positions = torch.arange(length, device=keys.device).expand(b, length)
    elif tuple(cached_positions.shape) != (b, length):
        raise ValueError(f"cached_positions must have shape {(b, length)}; got {tuple(cached_positions.shape)}")
    if rotate is not None and not isinstance(rotate, Rope):
        raise TypeError(f"rotate must be a Rope; got {type(rotate).__name__}")
    if rotate is not None:
        zero = torch.zeros(b, count, dtype=torch.int64, device=keys.device)
        turn = Rope(rotate.inv_freq, source=zero, target=positions, interleaved=rotate.interleaved, max_position=rotate.max_position)
        every = torch.arange(count, dtype=torch.int32, device=keys.device).expand(b, heads, count)
        latents = gather(*latents, every, rotate=turn)
    joined = (torch.cat([cache, latent.to(cache.dtype)], 2) for cache, latent in zip((keys, values), latents))
    return AppendedKV(*joined, torch.cat([cached_positions.long(), positions], 1))


# ----------------------------------------------------------------------------------------------


def _aligned(
    student: list[Tensor], teacher: list[Tensor], masks: list[Tensor | None], how: Distance, weights: list[float] | Tensor, parts: int,
    reduction: str, backend,
) -> Tensor:  # fmt: skip
    """Reduces the distances of `parts` pairs a layer."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    devices, dtypes = ({getattr(t, of) for t in (*student, *teacher)} for of in ("device", "dtype"))
    if len(devices) > 1:
        raise ValueError(f"all layers must be on one device; got {' and '.join(sorted(map(str, devices)))}")
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    # a slot's elements, and the parts a layer's mean is over
    units = [parts * (1 if how.loss == "cosine" else s.shape[3]) for s in student]
    if reduction == "none":
        ones = torch.ones(len(student), dtype=torch.float64, device=student[0].device)
        sums = distances(student, teacher, masks, how, ones, torch.float64, each=True, backend=backend)
        return (sums * _inverse(units, student, masks)).view(-1, parts).sum(-1).to(dtype)
    if isinstance(weights, Tensor):
        total = weights.sum() if reduction == "mean" else 1
        share = torch.where(total == 0, 0, weights / total) if reduction == "mean" else weights
        coef = _inverse(units, student, masks) * share.repeat_interleave(parts)
    else:
        total = sum(weights) if reduction == "mean" else 1
        coef = _inverse([u * total / weights[i // parts] if weights[i // parts] else 0 for i, u in enumerate(units)], student, masks)
    return distances(student, teacher, masks, how, coef, dtype, backend=backend)


def _inverse(units: Sequence[float], student: list[Tensor], masks: list[Tensor | None]) -> Tensor:
    """1/(unit·real slots) of each pair, float64, 0 where either is 0: few launches, and one copy to the device."""
    device, slots = student[0].device, [s.numel() // max(s.shape[3], 1) for s in student]
    if all(m is None for m in masks):
        return torch.tensor([1 / (u * n) if u * n else 0.0 for u, n in zip(units, slots)], dtype=torch.float64, device=device)
    each = {id(m): m for m in masks if m is not None}
    if len({m.shape for m in each.values()}) == 1:
        found = torch.stack(list(each.values())).flatten(1).sum(1).unbind()
    else:
        found = [m.sum() for m in each.values()]
    counts = dict(zip(each, found))
    whole = torch.tensor([(1 / u if u else 0.0, n) for u, n in zip(units, slots)], dtype=torch.float64, device=device)
    real = torch.stack([whole[i, 1] if m is None else counts[id(m)].double() for i, m in enumerate(masks)])
    return torch.where(real > 0, whole[:, 0] / real.clamp(min=1), 0)


def _distance(loss: str, beta: float, normalize: str | None) -> Distance:
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {', '.join(map(str, NORMALIZE))}; got {normalize!r}")
    if not isinstance(beta, numbers.Real) or not beta > 0:
        raise ValueError(f"beta must be positive; got {beta!r}")
    if loss == "cosine" and normalize == "layer_std":
        raise ValueError("normalize='layer_std' divides by a scale, and loss='cosine' has none: use normalize=None")
    return Distance(loss, float(beta), normalize)


def _layers(name: str, cache: Any) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor | None]]:
    """(keys, values) of every layer, and the masks of a :class:`CompressedKV`."""
    if hasattr(cache, "layers"):
        items = [(layer.keys, layer.values) for layer in cache.layers]
    elif isinstance(cache, Sequence) and not isinstance(cache, (str, Tensor)):
        items = list(cache)
    else:
        raise TypeError(f"{name} must be a sequence of (keys, values) or a transformers Cache; got {type(cache).__name__}")
    if not items:
        raise ValueError(f"{name} has no layers")
    layers, masks = [], []
    for i, item in enumerate(items):
        masks.append(item.selection.mask if isinstance(item, CompressedKV) else None)
        if not isinstance(item, (tuple, list, Sequence)) or len(item) < 2:
            raise TypeError(f"{name}[{i}] must be (keys, values); got {type(item).__name__}")
        keys, values = item[0], item[1]
        if not (are_keys(keys) and are_keys(values)):
            checked_keys(f"{name}[{i}]'s keys", keys)
            checked_keys(f"{name}[{i}]'s values", values)
        if keys.shape != values.shape and keys.shape[:3] != values.shape[:3]:
            raise ValueError(f"{name}[{i}]'s keys and values must share [B, H, M]; got {tuple(keys.shape)} and {tuple(values.shape)}")
        layers.append((keys, values))
    return layers, masks


def _paired(layer_map, students: int, teachers: int) -> list[tuple[int, int]]:
    if layer_map is None:
        if students != teachers:
            raise ValueError(f"layer_map must say which of the teacher's {teachers} layers each of the student's {students} follows; got None")
        return [(i, i) for i in range(students)]
    pairs = list(layer_map.items()) if isinstance(layer_map, Mapping) else list(enumerate(layer_map))
    if not isinstance(layer_map, Mapping) and len(pairs) != students:
        raise ValueError(f"layer_map must have one entry a student layer, {students}; got {len(pairs)}")
    for s, t in pairs:
        if not 0 <= s < students or not 0 <= t < teachers:
            raise ValueError(f"layer_map must go from [0, {students}) to [0, {teachers}); got {s}: {t}")
    if not pairs:
        raise ValueError("layer_map must not be empty")
    return pairs


def _checked_per_layer(name: str, given, layers: int) -> list:
    if given is None:
        return [None] * layers
    if not isinstance(given, Sequence | Tensor) or isinstance(given, str):
        raise TypeError(f"{name} must be a sequence, one entry a student layer; got {type(given).__name__}")
    given = list(given)
    if len(given) != layers:
        raise ValueError(f"{name} must have one entry a student layer, {layers}; got {len(given)}")
    return given


def _masks(mask, layers: int) -> list[Tensor | None]:
    if not isinstance(mask, Tensor):
        return _checked_per_layer("mask", mask, layers)
    return _checked_per_layer("mask", mask.unbind(), layers) if mask.dim() == 4 else [mask] * layers


def _checked_slots(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as bool [B, H, M] of the tensor it is for."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True = real; got {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}")
    b, heads, slots, _ = like.shape
    if tuple(mask.shape) not in ((b, slots), (b, 1, slots), (b, heads, slots)):
        raise ValueError(f"mask must have shape ({b}, {slots}) or ({b}, {heads}, {slots}); got {tuple(mask.shape)}")
    if mask.device != like.device:
        raise ValueError(f"mask must be on {like.device}, where the keys are; got {mask.device}")
    return (mask[:, None] if mask.dim() == 2 else mask).expand(b, heads, slots)


def _projected(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], projection, layer: int) -> list[Tensor]:
    if projection is None:
        return list(ours)
    both = projection if isinstance(projection, (tuple, list)) else (projection, projection)
    if len(both) != 2:
        raise ValueError(f"projections[{layer}] must be one map or a pair, for keys and for values; got {len(both)}")
    return [x if p is None else _mapped(x, t, p, layer) for x, t, p in zip(ours, theirs, both)]


def _mapped(x: Tensor, target: Tensor, projection: Projection, layer: int) -> Tensor:
    flat = x.transpose(1, 2).flatten(2)
    if isinstance(projection, Tensor):
        flat = torch.nn.functional.linear(flat.to(projection.dtype), projection)
    else:
        flat = projection(flat)
    width = target.shape[1] * target.shape[3]
    if flat.shape[-1] != width:
        raise ValueError(f"projections[{layer}] must map to the teacher's {target.shape[1]}·{target.shape[3]} = {width} features; got {flat.shape[-1]}")
    return flat.unflatten(-1, (target.shape[1], target.shape[3])).transpose(1, 2)


def _weights(given, used: list[int], layers: int, device: torch.device) -> list[float] | Tensor:
    """One for each student layer that is compared: floats, or float64 [L] of a tensor, whose values are not waited for."""
    if isinstance(given, Tensor):
        if tuple(given.shape) != (layers,):
            raise ValueError(f"layer_weights must have shape ({layers},), one a student layer; got {tuple(given.shape)}")
        return given.to(device, torch.float64)[used]
    given = [1.0] * layers if given is None else _checked_per_layer("layer_weights", given, layers)
    return [float(given[i]) for i in used]


def _per_layer(name: str, given: Tensor, layers: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[L, B, P] of positions or masks given as [B], [B, P] or [L, B, P]."""
    kinds = (torch.bool,) if dtype == torch.bool else (torch.int32, torch.int64)
    if not isinstance(given, Tensor) or given.dtype not in kinds:
        what = "a bool tensor" if dtype == torch.bool else "an int tensor"
        raise TypeError(f"{name} must be {what}; got {given.dtype if isinstance(given, Tensor) else type(given).__name__}")
    b = like.shape[0]
    shaped = given[:, None] if given.dim() == 1 else given
    if shaped.dim() not in (2, 3) or shaped.shape[-2] != b or (shaped.dim() == 3 and shaped.shape[0] != layers):
        raise ValueError(f"{name} must have shape ({b},), ({b}, P) or ({layers}, {b}, P); got {tuple(given.shape)}")
    return shaped.to(like.device, dtype).expand(layers, b, shaped.shape[-1])


def _at(who: str, hidden: Tensor, positions: Tensor) -> Tensor:
    """Hidden states [B, 1, P, H] at positions [B, P]."""
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling() and bool((positions >= hidden.shape[1]).any()):
        raise ValueError(f"positions of the {who} must be below its {hidden.shape[1]} tokens; got {int(positions.max())}")
    if hidden.shape[1] == 0:
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, 1))  # attached, for positions that are nowhere
    place = positions.clamp(0, hidden.shape[1] - 1)[..., None].expand(*positions.shape, hidden.shape[2])
    return hidden.gather(1, place)[:, None]
