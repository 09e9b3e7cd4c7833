"""Which implementation serves a primitive.

Every backend is a module with one function per primitive it has, under the primitive's name, and
``why_not(primitive, *tensors)``: None if it can serve these tensors, else the sentence the user reads.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from ..errors import BackendError

ORDER = ("cuda", "triton", "cpp", "reference")

PRIMITIVES = (
    "vocab_stats",
    "vocab_stats_backward",
    "pair_stats",
    "pair_stats_backward",
    "gather_dot",
    "gather_dot_hidden_grad",
    "gather_dot_weight_grad",
    "linear_vocab_stats",
    "linear_vocab_stats_backward",
    "topk_select",
    "draw_rows",
    "filter_rows",
    "sample_rows",
    "weigh_rows",
    "coin",
    "window_importance",
    "key_redundancy",
    "kv_gather",
    "kv_align",
    "recurrence_update",
)


@functools.cache
def module(name: str) -> ModuleType:
    """The backend's module, imported on first use: triton costs most of a second."""
    if name not in ORDER:
        raise ValueError(f"backend must be one of {', '.join(ORDER)}; got {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def resolve(primitive: str, *tensors: torch.Tensor | None, backend: str | None = None) -> Callable:
    """The function that serves `primitive` on these tensors.

    Walks ``ORDER`` and takes the first backend that does not refuse. An explicit `backend`, or the variable
    ``DISTILKERNELS_BACKEND``, names the one to use; its refusal is then a :class:`BackendError`.
    """
    tensors = tuple(t for t in tensors if t is not None)
    chosen = backend or os.environ.get("DISTILKERNELS_BACKEND")
    if chosen:
        reason = module(chosen).why_not(primitive, *tensors)
        if reason is not None:
            raise BackendError(f"backend {chosen!r} cannot serve {primitive}: {reason}")
        return getattr(module(chosen), primitive)
    for name in ORDER:
        if module(name).why_not(primitive, *tensors) is None:
            return getattr(module(name), primitive)
    raise AssertionError("the reference backend refuses nothing")


class Support(NamedTuple):
    """One row of the support table: `refusal` is None where the backend serves the primitive here."""

    primitive: str
    backend: str
    device: str
    dtype: str
    refusal: str | None


def support(devices: Sequence[str] | None = None) -> list[Support]:
    """Primitive × backend × device × dtype on this machine, with each refusal's sentence.

    `devices` defaults to the CPU and, where one is present, the CUDA device.
    """
    devices = devices or (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
    rows = []
    for primitive in PRIMITIVES:
        for name in ORDER:
            for device in devices:
                for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                    probe = torch.empty(1, 1, 8, dtype=dtype, device=device)
                    refusal = module(name).why_not(primitive, probe)
                    rows.append(Support(primitive, name, device, str(dtype).removeprefix("torch."), refusal))
    return rows
