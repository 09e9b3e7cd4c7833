"""A loss of this package against the PyTorch that a trainer would write for it: equal first, then time and memory."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import distilkernels as dk

Loss = Callable[[Tensor], Tensor]
"""``loss(logits) -> scalar``."""

REPEATS = 15


def eager_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def _forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    return 0.5 * (_forward_kl(log_p, log_m) + _forward_kl(log_q, log_m))


EAGER_DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}


def eager_topk_distill_loss(logits: Tensor, teacher: dk.TeacherTopK, labels: Tensor, divergence: str, ce_weight: float) -> Tensor:
    """K + 1 buckets and cross-entropy from one log_softmax; the tail is 1 − Σ q, its cheapest form."""
    log_q = logits.log_softmax(-1)
    on_ids = log_q.gather(-1, teacher.ids.long())
    tail = torch.log(-torch.expm1(on_ids.logsumexp(-1, keepdim=True)))
    log_p = torch.cat([teacher.logprobs, teacher.tail_logprob.unsqueeze(-1)], -1)
    rows = EAGER_DIVERGENCES[divergence](log_p, torch.cat([on_ids, tail], -1))
    return rows.mean() + ce_weight * F.nll_loss(log_q.flatten(0, -2), labels.flatten())


class Cost(NamedTuple):
    """Forward and backward of a loss: median milliseconds, and MiB at its peak beyond the logits it was given."""

    ms: float
    extra_mib: float


class LossCosts(NamedTuple):
    """The package's loss, its form that writes the gradient over the logits, and the eager one, on the same logits."""

    ours: Cost
    ours_inplace_mib: float
    eager: Cost
    value_error: float
    grad_error: float


def _gradient(loss: Loss, logits: Tensor) -> tuple[float, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.item(), leaf.grad


def _milliseconds(loss: Loss, logits: Tensor) -> float:
    leaf = logits.detach().requires_grad_()
    start = time.perf_counter()
    loss(leaf).backward()
    return (time.perf_counter() - start) * 1e3


def extra_mib(loss: Loss, logits: Tensor) -> float:
    """Peak of what is allocated during forward and backward beyond what was there before, gradient included.

    PyTorch's allocator reports each allocation to the profiler. A gradient in memory of its own that the allocator did
    not hand out (the package recycles large buffers on a CPU) is added in full.
    """
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        leaf = logits.detach().clone().requires_grad_()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss(leaf).backward()
        profiler.export_chrome_trace(str(trace))
        events = [e["args"] for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["Ev Idx"]):
        held += event["Bytes"]
        peak = max(peak, held)
    gradient = leaf.grad.untyped_storage()
    if gradient.data_ptr() not in {leaf.untyped_storage().data_ptr(), *(e["Addr"] for e in events)}:
        peak += gradient.nbytes()
    return peak / 2**20


def loss_costs(ours: Loss, ours_inplace: Loss, eager: Loss, logits: Tensor, repeats: int = REPEATS, tolerance: float = 1e-4) -> LossCosts:
    """Costs of `ours` and `eager` on the same logits, runs alternating so that a busy machine slows both.

    Raises ArithmeticError, before anything is timed, where values or gradients differ by more than `tolerance` (relative,
    gradients in the 2-norm).
    """
    (value, grad), (eager_value, eager_grad) = _gradient(ours, logits), _gradient(eager, logits)
    value_error = abs(value - eager_value) / abs(eager_value)
    grad_error = ((grad - eager_grad).norm() / eager_grad.norm()).item()
    if not max(value_error, grad_error) <= tolerance:
        raise ArithmeticError(f"the losses differ: value by {value_error:.1e}, gradient by {grad_error:.1e}, of {tolerance:.0e} allowed")
    del grad, eager_grad
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for loss, series in zip((ours, eager), times):
            series.append(_milliseconds(loss, logits))
    return LossCosts(
        Cost(statistics.median(times[0]), extra_mib(ours, logits)),
        extra_mib(ours_inplace, logits),
        Cost(statistics.median(times[1]), extra_mib(eager, logits)),
        value_error,
        grad_error,
    )
