"""Triton kernels on CUDA devices, or on a CPU under Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported)."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ..primitives.head import Head

_SERVED = ("vocab_stats", "vocab_stats_backward")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(primitive: str, *tensors: Tensor) -> str | None:
    """None if the Triton kernels serve `primitive` on these tensors, else why they do not. Imports no triton itself."""
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
        return f"Triton kernels take float32, bfloat16 or float16 logits; got {refused.pop()}"
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


def vocab_stats_backward(
    logits: Tensor, ids: Tensor | None, entries: Tensor | None, coef: Tensor, terms: tuple[str, ...], head: Head, out: Tensor
) -> None:
    from ..kernels.vocab_stats_backward import vocab_stats_backward as launch

    launch(logits, ids, entries, coef, terms, head, out)
