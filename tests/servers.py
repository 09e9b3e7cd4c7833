"""Which backends a test of a primitive runs on here."""

from __future__ import annotations

import pytest
import torch

from distilkernels import backends


def servers(primitive: str) -> list:
    """(backend, device) pairs that run here; the others are shown as skips with the sentence of their refusal."""
    pairs = []
    for name in ("reference", "cpp", "triton"):
        reason = backends.module(name).why_not(primitive, torch.empty(1, 1, 8))
        # the Triton test files run these tests again under the interpreter
        if not (reason and name == "triton"):
            pairs.append(pytest.param(name, "cpu", id=f"{name}-cpu", marks=[pytest.mark.skip(reason=reason)] if reason else []))
    if torch.cuda.is_available():
        probe = torch.empty(1, 1, 8, device="cuda")
        pairs += [
            pytest.param(name, "cuda", id=f"{name}-cuda")
            for name in ("reference", "triton", "cuda")
            if backends.module(name).why_not(primitive, probe) is None
        ]
    return pairs
