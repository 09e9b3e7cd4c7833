"""Triton kernels on CUDA devices, or on a CPU under Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from ..primitives.draw_rows import Draws
from ..primitives.filter_rows import Filters
from ..primitives.head import Head
from ..primitives.pair_stats import Sides
from ..primitives.sample_rows import Drawn, Noise, Operand
from ..primitives.topk_select import TopK
from . import triton_kv
from .triton_kv import key_redundancy, kv_align, kv_gather, recurrence_update, window_importance  # noqa: F401

_SERVED = (
    "vocab_stats", "vocab_stats_backward", "gather_dot", "gather_dot_hidden_grad", "gather_dot_weight_grad",
    "pair_stats", "pair_stats_backward", "linear_vocab_stats", "linear_vocab_stats_backward",
    "topk_select", "draw_rows", "filter_rows", "sample_rows", "weigh_rows", "coin", *triton_kv.SERVED,
)  # fmt: skip
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(primitive: str, *tensors: Tensor, want: Iterable[str] = ()) -> str | None:
    """None if the Triton kernels serve `primitive` on these tensors, else why they do not. Imports no triton itself.

    `want` names the statistics asked of linear_vocab_stats, whose first two tensors are hidden and weight.
    """
    if primitive not in _SERVED:
        return f"there is no Triton kernel for {primitive}"
    devices = {t.device for t in tensors}
    if len(devices) != 1:
        return f"the tensors must be on one device; got {', '.join(sorted(map(str, devices))) or 'no tensors'}"
    device = devices.pop()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return f"Triton kernels run on CUDA tensors, and on CPU tensors only under TRITON_INTERPRET=1; got a {device.type} tensor"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'distilkernels[triton]')"
    refused = {t.dtype for t in tensors if t.is_floating_point()}.difference(_DTYPES)
    if refused:
        return f"Triton kernels take float32, bfloat16 or float16 {'caches' if primitive in triton_kv.SERVED else 'logits'}; got {refused.pop()}"
    if primitive in triton_kv.SERVED and (reason := triton_kv.why_not(primitive, *tensors)) is not None:
        return reason
    if primitive.startswith("linear_vocab_stats"):
        if len({t.dtype for t in tensors[:2]}) > 1:
            return f"hidden and weight must have one dtype to be tiles of one GEMM; got {tensors[0].dtype} and {tensors[1].dtype}"
        ranked = [name for name in ("rank", "mass_above") if name in tuple(want)]
        if ranked:
            return (
                f"{' and '.join(ranked)} compare every logit of a row with K of them, which are not known before the tiles that "
                "hold them; the chunked path has them"
            )
        if "second" in tuple(want):
            return "second needs a tile without its largest entries beside the tile; the chunked path has it"
    if device.type == "cuda" and not interpreted:
        if torch.version.hip is not None:
            return "the Triton kernels are written and tested for NVIDIA devices; this is a ROCm build of torch"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"Triton kernels need compute capability 8.0 or newer; {device} has {major}.{minor}"
    return None


def vocab_stats(logits: Tensor, ids: Tensor | None, thresholds: Tensor | None, head: Head, out: dict[str, Tensor]) -> None:
    from ..kernels.vocab_stats import vocab_stats as launch

    launch(logits, ids, thresholds, head, out)


def vocab_stats_backward(logits: Tensor, ids: Tensor | None, entries: Tensor | None, coef: Tensor, terms: tuple[str, ...], head: Head, out: Tensor) -> None:
    from ..kernels.vocab_stats_backward import vocab_stats_backward as launch

    launch(logits, ids, entries, coef, terms, head, out)


def pair_stats(logits: Tensor, teacher: Tensor, w: Tensor | None, sides: Sides, out: Tensor) -> None:
    from ..kernels.pair_stats import pair_stats as launch

    launch(logits, teacher, w, sides, out)


def pair_stats_backward(logits: Tensor, teacher: Tensor, coef: Tensor, sides: Sides, second: str, out: Tensor) -> None:
    from ..kernels.pair_stats import pair_stats_backward as launch

    launch(logits, teacher, coef, sides, second, out)


def gather_dot(hidden: Tensor, weight: Tensor, ids: Tensor, out: Tensor) -> None:
    from ..kernels.gather_dot import gather_dot as launch

    launch(hidden, weight, ids, out)


def gather_dot_hidden_grad(grad: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    from ..kernels.gather_dot import gather_dot_hidden_grad as launch

    launch(grad, weight, ids, dtype, out)


def gather_dot_weight_grad(grad: Tensor, hidden: Tensor, order: Tensor, targets: Tensor, out: Tensor) -> None:
    from ..kernels.gather_dot import gather_dot_weight_grad as launch

    launch(grad, hidden, order, targets, out)


def linear_vocab_stats(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, head: Head, out: dict[str, Tensor]) -> None:
    from ..kernels.linear_vocab_stats import linear_vocab_stats as launch

    launch(hidden, weight, bias, ids, head, out)


def linear_vocab_stats_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, entries: Tensor | None, coef: Tensor,
    terms: tuple[str, ...], head: Head, grads: dict[str, Tensor], skip: float | None = None, skip_weight: float = 0.0,
) -> None:  # fmt: skip
    from ..kernels.linear_vocab_stats_backward import linear_vocab_stats_backward as launch

    launch(hidden, weight, bias, ids, entries, coef, terms, head, grads, skip, skip_weight)


def topk_select(logits: Tensor, head: Head, out: TopK) -> None:
    from ..kernels.topk_select import topk_select as launch

    launch(logits, head, out)


def draw_rows(logits: Tensor, tau: float, seeds: Tensor, positions: Tensor, head: Head, out: Draws) -> None:
    from ..kernels.draw_rows import draw_rows as launch

    launch(logits, tau, seeds, positions, head, out)


def filter_rows(logits: Tensor, columns: int, filters: Filters, out: dict[str, Tensor], rows: Tensor | None = None) -> None:
    from ..kernels.filter_rows import filter_rows as launch

    launch(logits, columns, filters, out, rows)


def sample_rows(
    first: Operand, second: Operand | None, scale: Tensor | None, mode: str, columns: int, vocab: int, noise: Noise, out: Drawn
) -> None:
    from ..kernels.sample_rows import sample_rows as launch

    launch(first, second, scale, mode, columns, vocab, noise, out)


def weigh_rows(first: Operand, second: Operand | None, scale: Tensor | None, mode: str, columns: int, out: Tensor) -> None:
    from ..kernels.sample_rows import weigh_rows as launch

    launch(first, second, scale, mode, columns, out)


def coin(seeds: Tensor, positions: Tensor, offsets: Tensor, stream: int, out: Tensor) -> None:
    from ..kernels.coin import coin as launch

    launch(seeds, positions, offsets, stream, out)
