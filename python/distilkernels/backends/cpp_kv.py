"""The C++ kernels on caches of keys and values: launchers and refusals of :mod:`.cpp`, which finds them here."""

from __future__ import annotations

import torch
from torch import Tensor

from ..primitives.kv_align import LOSSES, NORMALIZE
from ..primitives.window_importance import GROUP_REDUCE, WINDOW_REDUCE

try:
    from .. import _cpp
except ImportError:
    _cpp = None  # cpp says why

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
SERVED = ("window_importance", "key_redundancy", "kv_gather", "kv_align", "recurrence_update")
_EXCHANGED = _cpp is not None and _cpp.exchange_by(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
_FLOAT64_TOO = ("kv_gather", "recurrence_update")


def why_not(primitive: str, *tensors: Tensor) -> str | None:
    if primitive not in _FLOAT64_TOO and any(t.dtype == torch.float64 for t in tensors):
        return f"the C++ kernel of {primitive} computes in float32; float64 is the reference's"
    return None


def window_importance(queries, keys, start, stop, mask, query_mask, how, lse, out: Tensor, similarity=None) -> None:
    sums = (0, 0, 0), 0
    if similarity is not None:
        sums = _counted(similarity.start, similarity.stop, mask), similarity.out.data_ptr()
    _cpp.window_importance(
        _cache(queries), _cache(keys), _counted(start, stop, mask), _pointer(query_mask), how.scale, GROUP_REDUCE.index(how.group_reduce),
        WINDOW_REDUCE.index(how.window_reduce), how.causal, _pointer(lse), out.data_ptr(), *sums, torch.get_num_threads(),
    )  # fmt: skip


def key_redundancy(keys: Tensor, start: Tensor, stop: Tensor, mask: Tensor | None, threshold: float, out) -> None:
    _cpp.key_redundancy(_cache(keys), _counted(start, stop, mask), threshold, [_pointer(t) for t in out], torch.get_num_threads())


def kv_gather(keys: Tensor, values: Tensor, indices: Tensor, rotation, out_keys: Tensor, out_values: Tensor, inplace: bool = False) -> None:
    tables, rows, width, interleaved = (0, 0, 0, 0), 0, 0, False
    if rotation is not None:
        tables = tuple(_pointer(t) for t in rotation[:4])
        (rows, half), interleaved = rotation.cos.shape, rotation.interleaved
        width = 2 * half
    _cpp.kv_gather(
        _cache(keys), _cache(values), indices.data_ptr(), tables, rows, width, interleaved, _cache(out_keys), _cache(out_values), torch.get_num_threads()
    )


def kv_align(student, teacher, masks, how, coef: Tensor, sums: Tensor, grads) -> None:
    if not _EXCHANGED:
        student, teacher = ([_cache(t) for t in side] for side in (student, teacher))
    _cpp.kv_align(
        student, teacher, [(0, (0, 0, 0)) if m is None else (m.data_ptr(), m.stride()) for m in masks],
        [] if grads is None else [t.data_ptr() for t in grads], LOSSES.index(how.loss), how.beta, NORMALIZE.index(how.normalize), coef.data_ptr(),
        sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def recurrence_update(attention: Tensor, last_seen: Tensor, max_interval: Tensor, step: int, alpha: float) -> None:
    # PyTorch compares with the number of the attention's own dtype that is nearest to alpha
    alpha = torch.tensor(alpha, dtype=attention.dtype).item()
    _cpp.recurrence_update(
        _cache(attention), last_seen.shape[1], step, alpha, last_seen.data_ptr(), last_seen.stride()[:2], max_interval.data_ptr(),
        max_interval.stride()[:2], torch.get_num_threads(),
    )  # fmt: skip


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _counted(start: Tensor, stop: Tensor, mask: Tensor | None) -> tuple[int, int, int]:
    return start.data_ptr(), stop.data_ptr(), _pointer(mask)


def _cache(t: Tensor) -> Tensor | tuple:
    """What describes a tensor to C++: itself, or where PyTorch has no interface for that, numbers."""
    return t if _EXCHANGED else (_DTYPES[t.dtype], t.data_ptr(), (*t.shape, *t.stride()[:3]))
