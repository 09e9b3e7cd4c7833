"""The Triton kernels on caches: window_importance, key_redundancy, kv_gather, kv_align and recurrence_update.

As in test_triton.py: ``test_native_*`` run under the interpreter in a process of their own, or on a device where there is one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.test_triton import ast_source, compiled, resources

triton = pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HERE = Path(__file__).parent


# ----------------------------------------------------------------------------------------- ahead of time


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def gather_case(dtype, values_dtype=None, half=0, inplace=False, d=128, dv=128, target=True):
    from distilkernels.kernels.kv_gather import launch
    from distilkernels.primitives.kv_gather import Rotation

    keys, values, indices = meta(8, 8, 8192, d, dtype=dtype), meta(8, 8, 8192, dv, dtype=values_dtype or dtype), meta(8, 8, 2048, dtype=torch.int32)
    out = [x[:, :, :2048] if inplace else meta(8, 8, 2048, x.shape[3], dtype=x.dtype) for x in (keys, values)]
    table = meta(9000, half, dtype=torch.float32)
    rotation = Rotation(table, table, indices, indices if target else None, not target) if half else None
    return [launch(keys, values, indices, rotation, *out, inplace)]


def recurrence_case(dtype, width=1):
    from distilkernels.kernels.recurrence_update import launch

    state = meta(8, 8, 8192, dtype=torch.int32)
    return [launch(meta(8, 32, width, 8192, dtype=dtype), state, state, 1000, 5e-4)]


def align_case(loss, normalize=None, dtype=torch.bfloat16, teacher=None, d=128, grads=True):
    from distilkernels.kernels.kv_align import launches
    from distilkernels.primitives.kv_align import Distance

    pairs = [meta(8, 8, 24, d, dtype=dtype) for _ in range(64)]
    others = [meta(8, 8, 24, d, dtype=teacher or dtype) for _ in range(64)]
    masks = [meta(8, 8, 24, dtype=torch.bool)] * 64
    double = meta(64, dtype=torch.float64)
    return launches(pairs, others, masks, Distance(loss, 0.7, normalize), double, double, pairs if grads else None)


VARIANTS = {
    "gather": lambda: gather_case(torch.bfloat16),
    "gather-in_place": lambda: gather_case(torch.float32, inplace=True),
    "gather-rotated": lambda: gather_case(torch.bfloat16, half=64),
    "gather-partly-in_place": lambda: gather_case(torch.float16, torch.float32, 16, inplace=True, d=80, dv=96, target=False),
    "align-smooth_l1": lambda: align_case("smooth_l1"),
    "align-inputs": lambda: align_case("mse", "inputs"),
    "align-layer_std": lambda: align_case("l1", "layer_std", torch.float32, torch.float16),
    "align-cosine": lambda: align_case("cosine", None, torch.float16, torch.float32),
    "align-odd_width": lambda: align_case("smooth_l1", "layer_std", d=1537, grads=False),
    "recurrence": lambda: recurrence_case(torch.float32),
    "recurrence-prefill": lambda: recurrence_case(torch.bfloat16, 32),
}
# kernels bound by memory, which should read it 16 bytes at a time
_WIDE = ("_gather_kernel", "_recurrence_kernel", "_terms_kernel", "_moments_kernel")


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_spills(variant, tmp_path, record_property):
    """What the launchers launch builds for sm_80, sm_90 and sm_100 without spilling, and whole rows are read 16 bytes at a time."""
    from triton.backends.compiler import GPUTarget

    for launch in VARIANTS[variant]():
        assert {p.name for p in launch.kernel.params} == set(launch.arguments)
        for capability in (80, 90, 100):
            kernel = triton.compile(ast_source(launch), target=GPUTarget("cuda", capability, 32), options=launch.options)
            used = resources(kernel.asm["cubin"], tmp_path)
            name = f"{launch.kernel.__name__} sm_{capability}"
            record_property(name, used)
            # some releases' ptxas parks one scalar on the stack, see test_triton.py
            assert used["STACK"] <= 8 and used["LOCAL"] == 0, f"{name}: {used}"
            if launch.kernel.__name__ in _WIDE and "odd" not in variant:
                assert re.search(r"(ld\.global[\w.:]*\.v4\.b32|cp\.async\.cg)", kernel.asm["ptx"]), f"{name}: no 16-byte loads"
