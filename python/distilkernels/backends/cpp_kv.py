"""The C++ kernels on caches of keys and values: launchers and refusals of :mod:`.cpp`, which finds them here."""

from __future__ import annotations

import torch
from torch import Tensor

from ..primitives.window_importance import GROUP_REDUCE, WINDOW_REDUCE

try:
    from .. import _cpp
except ImportError:
    _cpp = None  # cpp says why

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
SERVED = ("window_importance", "key_redundancy")
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


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _counted(start: Tensor, stop: Tensor, mask: Tensor | None) -> tuple[int, int, int]:
    return start.data_ptr(), stop.data_ptr(), _pointer(mask)


def _cache(t: Tensor) -> tuple:
    return _DTYPES[t.dtype], t.data_ptr(), (*t.shape, *t.stride()[:3])
