"""The Triton kernels on caches of keys and values: launchers of :mod:`.triton`, which finds them here."""

from __future__ import annotations

from torch import Tensor

SERVED = ("window_importance", "key_redundancy", "kv_gather", "kv_align", "recurrence_update")
_WIDEST = 256


def why_not(primitive: str, *tensors: Tensor) -> str | None:
    if primitive in ("window_importance", "key_redundancy") and tensors[0].shape[-1] > _WIDEST:
        return f"a tile of keys holds whole rows of at most {_WIDEST} features; got {tensors[0].shape[-1]}"
    return None


def window_importance(queries, keys, start, stop, mask, query_mask, how, lse, out: Tensor, similarity=None) -> None:
    from ..kernels.window_importance import window_importance as launch

    launch(queries, keys, start, stop, mask, query_mask, how, lse, out, similarity)


def key_redundancy(keys: Tensor, start: Tensor, stop: Tensor, mask: Tensor | None, threshold: float, out) -> None:
    from ..kernels.key_redundancy import key_redundancy as launch

    launch(keys, start, stop, mask, threshold, out)


def kv_gather(keys: Tensor, values: Tensor, indices: Tensor, rotation, out_keys: Tensor, out_values: Tensor, inplace: bool = False) -> None:
    from ..kernels.kv_gather import kv_gather as launch

    launch(keys, values, indices, rotation, out_keys, out_values, inplace)


def kv_align(student, teacher, masks, how, coef: Tensor, sums: Tensor, grads) -> None:
    from ..kernels.kv_align import kv_align as launch

    launch(student, teacher, masks, how, coef, sums, grads)


def recurrence_update(attention: Tensor, last_seen: Tensor, max_interval: Tensor, step: int, alpha: float) -> None:
    from ..kernels.recurrence_update import recurrence_update as launch

    launch(attention, last_seen, max_interval, step, alpha)
