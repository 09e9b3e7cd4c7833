"""The C++ kernels on CPU tensors: ``csrc/cpu`` behind the launchers' signatures. Passes pointers and no more."""

from __future__ import annotations

import torch
from torch import Tensor

from ..primitives.pair_stats import SECOND
from . import cpp_kv
from .cpp_kv import key_redundancy, kv_align, kv_gather, recurrence_update, window_importance  # noqa: F401

try:
    from .. import _cpp
except ImportError as reason:
    _cpp, _missing = None, str(reason)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_TAKEN = (*_DTYPES, torch.int32, torch.int64)
_OUTPUTS = (
    "lse", "gathered", "tail_lse", "expected_logit", "logit_sum", "finite_count", "lse_t1", "max", "argmax", "second", "rank", "mass_above",
)  # fmt: skip
_SERVED = (
    "vocab_stats", "vocab_stats_backward", "pair_stats", "pair_stats_backward", "gather_dot", "gather_dot_hidden_grad", "gather_dot_weight_grad",
    "topk_select", "draw_rows", "filter_rows", "sample_rows", "weigh_rows", "coin", *cpp_kv.SERVED,
)  # fmt: skip
_MODES = {"plain": 0, "residual": 1, "gate": 2}


def why_not(primitive: str, *tensors: Tensor) -> str | None:
    if primitive not in _SERVED:
        return f"there is no C++ kernel for {primitive}"
    if _cpp is None:
        return f"the extension is not built ({_missing}); `pip install -e . --no-build-isolation` builds it and needs g++ or clang"
    for t in tensors:
        if t.device.type != "cpu":
            return f"the C++ kernels serve CPU tensors; got {t.device}"
        if t.dtype not in (_DTYPES if t is tensors[0] and primitive != "coin" else _TAKEN):
            return f"numbers must be float32, bfloat16, float16 or float64; got {t.dtype}"
        if t.is_floating_point() and t.stride(-1) != 1 and t.shape[-1] > 1:
            return f"the last stride must be 1; got {t.stride(-1)}"
    if primitive in ("sample_rows", "weigh_rows") and len({t.dtype == torch.float64 for t in tensors}) > 1:
        return f"of two rows that are compared both or none must be float64; got {tensors[0].dtype} and {tensors[1].dtype}"
    if primitive.startswith("pair_stats") and len({t.dtype == torch.float64 for t in tensors[:2]}) > 1:
        return f"both sides must be float64 or neither; got {tensors[0].dtype} and {tensors[1].dtype}"
    return cpp_kv.why_not(primitive, *tensors) if primitive in cpp_kv.SERVED else None


def vocab_stats(logits: Tensor, ids: Tensor | None, thresholds: Tensor | None, head, out: dict[str, Tensor]) -> None:
    if logits.numel() == 0:
        return
    if ids is not None:
        ids = ids.contiguous()
    if thresholds is not None:
        thresholds = thresholds.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).contiguous()
    _cpp.vocab_stats(
        _DTYPES[logits.dtype], logits.data_ptr(), _shape(logits), _ids(ids), 0 if thresholds is None else thresholds.data_ptr(),
        _head(head, logits.shape[2]), torch.get_num_threads(), [out[name].data_ptr() if name in out else 0 for name in _OUTPUTS],
    )  # fmt: skip


def vocab_stats_backward(
    logits: Tensor, ids: Tensor | None, entries: Tensor | None, coef: Tensor, terms: tuple[str, ...], head, out: Tensor
) -> None:
    if logits.numel() == 0:
        return
    coef = coef.contiguous()
    if ids is not None:
        ids, entries = ids.contiguous(), entries.contiguous()
    _cpp.vocab_stats_backward(
        _DTYPES[logits.dtype], logits.data_ptr(), _shape(logits), _ids(ids), 0 if ids is None else entries.data_ptr(),
        ids is not None and entries.dtype == torch.float64, coef.data_ptr(), "constant" in terms or "t1" in terms,
        _head(head, logits.shape[2]), torch.get_num_threads(), out.data_ptr(), _shape(out),
    )  # fmt: skip


def pair_stats(logits: Tensor, teacher: Tensor, w: Tensor | None, sides, out: Tensor) -> None:
    if w is not None:
        w = w.contiguous()
    _cpp.pair_stats(
        _side(logits, sides.student, logits), _side(teacher, sides.teacher, logits), sides.with_t1, SECOND.index(sides.looks_for(w)),
        0 if w is None else w.data_ptr(), torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip


def pair_stats_backward(logits: Tensor, teacher: Tensor, coef: Tensor, sides, second: str, out: Tensor) -> None:
    coef = coef.contiguous()
    _cpp.pair_stats_backward(
        _side(logits, sides.student, logits), _side(teacher, sides.teacher, logits), coef.data_ptr(), sides.with_t1,
        SECOND.index(second), torch.get_num_threads(), out.data_ptr(), _shape(out),
    )  # fmt: skip


def gather_dot(hidden: Tensor, weight: Tensor, ids: Tensor, out: Tensor) -> None:
    _cpp.gather_dot(_matrix(hidden), _matrix(weight), _ids(ids), torch.get_num_threads(), out.data_ptr())


def gather_dot_hidden_grad(grad: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    _cpp.gather_dot_hidden_grad(
        _DTYPES[dtype], grad.data_ptr(), _matrix(weight), _ids(ids), ids.shape[0], torch.get_num_threads(), out.data_ptr()
    )


def gather_dot_weight_grad(grad: Tensor, hidden: Tensor, order: Tensor, targets: Tensor, out: Tensor) -> None:
    _cpp.gather_dot_weight_grad(
        grad.data_ptr(), grad.shape[1], _matrix(hidden), order.data_ptr(), targets.data_ptr(), order.numel(),
        torch.get_num_threads(), _matrix(out),
    )  # fmt: skip


def topk_select(logits: Tensor, head, out) -> None:
    _cpp.topk_select(
        _DTYPES[logits.dtype], logits.data_ptr(), _shape(logits), _head(head, logits.shape[2]), out.ids.shape[1],
        torch.get_num_threads(), [t.data_ptr() for t in out],
    )  # fmt: skip


def draw_rows(logits: Tensor, tau: float, seeds: Tensor, positions: Tensor, head, out) -> None:
    seeds, positions = seeds.contiguous(), positions.contiguous()
    _cpp.draw_rows(
        _DTYPES[logits.dtype], logits.data_ptr(), _shape(logits), _head(head, logits.shape[2]), tau, seeds.data_ptr(), positions.data_ptr(),
        out.ids.shape[1], torch.get_num_threads(), [t.data_ptr() for t in out],
    )  # fmt: skip


def filter_rows(logits: Tensor, columns: int, filters, out: dict[str, Tensor], rows: Tensor | None = None) -> None:
    filters, rows = [t.contiguous() for t in filters], None if rows is None else rows.contiguous()
    _cpp.filter_rows(
        _DTYPES[logits.dtype], logits.data_ptr(), _shape(logits), columns, [t.data_ptr() for t in filters],
        0 if rows is None else rows.data_ptr(), out["lse"].numel(), torch.get_num_threads(),
        [out[name].data_ptr() for name in ("bar", "lse", "lse_all", "expected", "argmax")],
    )  # fmt: skip


def sample_rows(first, second, scale: Tensor | None, mode: str, columns: int, vocab: int, noise, out) -> None:
    first, second = _contiguous(first), _contiguous(second)
    scale = None if scale is None else scale.contiguous()
    stream = noise.stream.contiguous() if isinstance(noise.stream, Tensor) else int(noise.stream)
    places = [t.contiguous() for t in (noise.seeds, noise.positions, noise.offsets)]
    given = [t.data_ptr() for t in places] + [stream.data_ptr() if isinstance(stream, Tensor) else 0]
    _cpp.sample_rows(
        _MODES[mode], _operand(first), _operand(second), 0 if scale is None else scale.data_ptr(), first.rows.shape[0], columns, vocab,
        given, 0 if isinstance(stream, Tensor) else stream, torch.get_num_threads(), [t.data_ptr() for t in out],
    )  # fmt: skip


def weigh_rows(first, second, scale: Tensor | None, mode: str, columns: int, out: Tensor) -> None:
    first, second = _contiguous(first), _contiguous(second)
    scale = None if scale is None else scale.contiguous()
    _cpp.weigh_rows(
        _MODES[mode], _operand(first), _operand(second), 0 if scale is None else scale.data_ptr(), first.rows.shape[0], columns,
        torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip


def coin(seeds: Tensor, positions: Tensor, offsets: Tensor, stream: int, out: Tensor) -> None:
    _cpp.coin(seeds.data_ptr(), positions.data_ptr(), offsets.data_ptr(), stream, out.numel(), out.data_ptr())


def isa() -> str:
    """The instruction set in use: "avx512bf16", "avx512", "avx2" or "baseline"."""
    return _built().isa()


def set_isa(name: str) -> None:
    """Uses the kernels of another instruction set from now on; ValueError if this machine has no such."""
    if not _built().set_isa(name):
        raise ValueError(f"isa must be one of {', '.join(available_isas())} on this machine; got {name!r}")


def available_isas() -> list[str]:
    """The instruction sets of this machine that the kernels are compiled for, best first."""
    return _built().available_isas()


def openmp() -> bool:
    """Whether the extension was built with OpenMP; without, it runs on one thread."""
    return _built().openmp


def _built():
    if _cpp is None:
        raise RuntimeError(f"the C++ extension is not built: {_missing}")
    return _cpp


def _shape(t: Tensor) -> tuple[int, ...]:
    return (*t.shape, *t.stride()[:2])


def _side(t: Tensor, head, logits: Tensor) -> tuple:
    """One side of a pair of rows; the columns are the student's."""
    return _DTYPES[t.dtype], t.data_ptr(), _shape(t), _head(head, logits.shape[2])


def _matrix(t: Tensor) -> tuple[int, ...]:
    return _DTYPES[t.dtype], t.data_ptr(), *t.shape, t.stride(0)


def _ids(ids: Tensor | None) -> tuple[int, bool, int]:
    return (0, False, 0) if ids is None else (ids.data_ptr(), ids.dtype == torch.int64, ids.shape[1])


def _head(head, vocab: int) -> tuple[float, float, float, int]:
    return head.temperature, head.logit_scale, head.softcap or 0.0, head.columns(vocab)


def _contiguous(operand):
    """Kept by the caller while its pointers are in use."""
    return None if operand is None else operand._replace(rows=operand.rows.contiguous(), law=type(operand.law)(*(t.contiguous() for t in operand.law)))


def _operand(operand) -> tuple:
    if operand is None:
        return 0, 0, (0, 1, 0, 0, 0), (0, 0, 0, 0, 0)
    law = operand.law
    pointers = [t.data_ptr() for t in (operand.rows, law.temperature, law.bar, law.lse, law.argmax)]
    return _DTYPES[operand.logits.dtype], operand.logits.data_ptr(), _shape(operand.logits), pointers
