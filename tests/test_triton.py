"""The Triton kernels: under the interpreter on a CPU, on a device where there is one, and compiled ahead of time for three.

The interpreter is chosen when the kernels are imported, so its tests run in a process of their own; on a device the same
functions, and tests/test_contract.py, run natively in this one.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distilkernels import backends, vocab_stats
from distilkernels.primitives.head import Head
from distilkernels.primitives.statistics import WANTS
from distilkernels.primitives.vocab_stats import reference, reference_backward

triton = pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HERE = Path(__file__).parent
QWEN = 151_936
PLAIN = Head()

on_triton = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device; test_under_the_interpreter runs it on the CPU"
)
compiled = pytest.mark.skipif(INTERPRETED, reason="kernels are not compiled under the interpreter")
gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device")


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run natively on the device")
@pytest.mark.parametrize(
    "file,selection",
    [
        # one 16-bit dtype is enough there: float16 is in test_native_*. Left out: what costs minutes in an interpreter and is below
        ("test_contract.py", "triton-cpu and not cpu-float16 and not opcheck and not batch_invariance and not k_large-triton-cpu-bfloat16"),
        ("test_triton.py", "native"),
    ],
    ids=["contract", "seams"],
)
def test_under_the_interpreter(file, selection):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file), "-k", selection]
    ran = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0 and " passed" in ran.stdout and "skipped" not in ran.stdout.splitlines()[-1], ran.stdout[-4000:]


# ---------------------------------------------------------------------- the kernels' own seams, on either machine


def outputs(n, k, want, device, floats=torch.float32):
    """Tensors for the statistics of n rows and k slots, as the primitive allocates them."""
    names = [*want, "finite_count"] if "logit_sum" in want else list(want)
    per_slot, integer = ("gathered", "rank", "mass_above"), ("finite_count", "argmax", "rank")
    return {
        name: torch.empty(
            (n, k) if name in per_slot else n,
            dtype=torch.int64 if name in integer else floats if name in per_slot else torch.float64,
            device=device,
        )
        for name in names
        if k is not None or name not in (*per_slot, "tail_lse")
    }


def statistics(logits, ids, want=WANTS, head=PLAIN, thresholds=None, config=None):
    """(the kernels' outputs, the reference's in fp64) as dicts, both on the CPU."""
    from distilkernels.kernels.vocab_stats import CONFIG, forward_launches

    rows = logits.reshape(1, *logits.shape) if logits.dim() == 2 else logits
    ids = ids if ids is None else ids.contiguous()
    n, k = rows.shape[0] * rows.shape[1], None if ids is None else ids.shape[1]
    out, exact = outputs(n, k, want, DEVICE), outputs(n, k, want, "cpu", torch.float64)
    on_device = (rows.to(DEVICE), ids if ids is None else ids.to(DEVICE), thresholds if thresholds is None else thresholds.to(DEVICE))
    for launch in forward_launches(*on_device, head, out, config or CONFIG):
        launch.run()
    reference(rows.double(), ids, thresholds if thresholds is None else thresholds.double(), head, exact)
    return {name: t.cpu() for name, t in out.items()}, exact


def assert_close(got, exact, tolerance=2e-6):
    for name, value in exact.items():
        if value.is_floating_point():
            label = lambda text, name=name: f"{name}: {text}"
            torch.testing.assert_close(got[name].double(), value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=label)
        else:
            assert torch.equal(got[name], value), name


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_spans_of_a_row(dtype):
    """A row longer than a span, ids on both sides of every seam, the maximum twice in different spans, tiles all −inf."""
    from distilkernels.kernels.vocab_stats import CONFIG

    size = CONFIG.span(dtype.itemsize)
    span, tile = size["SPAN"], size["TILE"]
    vocab = span + 4 * tile + 17
    x = (torch.randn(2, vocab) * 3).to(dtype)
    x[0, 100 : 100 + 5 * tile] = -math.inf
    x[1, [span - 1, span]] = 30.0
    seams = [0, tile - 1, tile, 4 * tile - 1, 4 * tile, span - 1, span, vocab - 1]
    ids = torch.tensor([seams, seams[::-1]])
    assert_close(*statistics(x, ids), tolerance=1e-5)
    got, exact = statistics(x, None, want=("lse", "max", "argmax", "second"))
    assert_close(got, exact)
    assert got["argmax"][1] == span - 1


@on_triton
def test_native_both_orders_of_ids():
    """Counting and torch.sort give the same statistics, with repetitions, empty slots and ids out of range."""
    from distilkernels.kernels.vocab_stats import CONFIG

    x = torch.randn(3, 1009) * 3
    ids = torch.rand(3, 1009).argsort(1)[:, :21]
    ids[0, 3], ids[0, 9], ids[1, 5], ids[2, 7], ids[2, 8] = ids[0, 17], -1, ids[1, 2], 1009, 2**40
    counted, exact = statistics(x, ids)
    ordered, _ = statistics(x, ids, config=replace(CONFIG, counted_ids=0))
    assert_close(counted, exact)
    assert all(torch.equal(counted[name].nan_to_num(7), ordered[name].nan_to_num(7)) for name in counted)


@on_triton
def test_native_no_slots_and_thresholds():
    """K = 0 has a tail, which is everything; thresholds above, below and between; all of a row masked."""
    x = torch.randn(3, 131)
    x[2] = -math.inf
    assert_close(*statistics(x, torch.empty(3, 0, dtype=torch.int64), want=("lse", "tail_lse", "gathered", "rank")))
    ids = torch.tensor([[5, -1, 7, 8, 9]]).expand(3, 5).contiguous()
    bars = torch.tensor([[100.0, 0.0, -100.0, 0.5, 0.5]]).expand(3, 5).contiguous()
    assert_close(*statistics(x, ids, want=("lse", "tail_lse", "rank", "mass_above"), thresholds=bars))
    assert_close(*statistics(x, ids, want=("rank", "mass_above"), thresholds=bars))


@on_triton
def test_native_row_is_alone():
    """A row's bits do not depend on its neighbours, nor from one call to the next."""
    x = torch.randn(5, 1009)
    ids = torch.rand(5, 1009).argsort(1)[:, :3]
    whole, again, alone = (statistics(x[rows], ids[rows])[0] for rows in (slice(0, 5), slice(0, 5), slice(3, 4)))
    for name in whole:
        assert torch.equal(whole[name], again[name]) and torch.equal(whole[name][3:4], alone[name]), name


@on_triton
@pytest.mark.parametrize("head", [Head(), Head(0.7, 1.3, None, 5000), Head(1.5, 1.0, 8.0, None)], ids=["plain", "scaled", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_native_backward(dtype, head):
    """Every term; rows in place and fresh; a dead row that holds NaN; entries that win over the dense formula at span seams."""
    from distilkernels.kernels.vocab_stats_backward import CONFIG, backward_launch

    span = CONFIG.span_bytes // dtype.itemsize
    vocab = span + 1009
    x = torch.randn(2, 3, vocab).to(dtype)
    x[0, 0, 7] = -math.inf
    x[1, 1] = math.nan
    ids = torch.tensor([[0, -1, span - 1, span, vocab - 1]]).expand(6, 5).contiguous()
    ids = torch.where(ids < head.columns(vocab), ids, -1)
    entries = torch.randn(6, 5) + 100
    lse = head.apply(x.double()).logsumexp(-1).flatten()
    coef = torch.stack([lse, *torch.randn(4, 6).double(), lse * head.temperature], 1)
    coef[4, 1:5] = 0
    terms = ("linear", "constant", "t1")
    if head.softcap is not None:
        coef[:, 3], terms = 0, ("linear", "t1")
    exact = torch.empty(x.shape, dtype=torch.float64)
    reference_backward(x.double(), ids, entries.double(), coef, terms, head, exact)
    wide = torch.full((2, 3, vocab + 11), math.nan, dtype=dtype, device=DEVICE)
    wide[..., :vocab] = x
    in_place = wide[..., :vocab]
    fresh = torch.empty_like(x, device=DEVICE)
    for out in (fresh, in_place):
        backward_launch(in_place, ids.to(DEVICE), entries.to(DEVICE), coef.to(DEVICE), terms, head, out).run()
    assert torch.equal(fresh, in_place)
    assert not fresh[1, 1].isnan().any() and wide[..., vocab:].isnan().all()
    ulp = {torch.float32: 2e-6, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(fresh.double().cpu(), exact, rtol=ulp, atol=ulp)


# ------------------------------------------------------------------------------------------------ refusals


@compiled
def test_refusals_are_sentences():
    backend = backends.module("triton")
    assert "got a cpu tensor" in backend.why_not("vocab_stats", torch.empty(1, 1, 8))
    assert "no Triton kernel for window_scores" in backend.why_not("window_scores", torch.empty(1))
    code = (
        "import sys, torch, distilkernels as dk; dk.vocab_stats(torch.randn(2, 9)); dk.backends.support(['cpu'])\n"
        "assert 'triton' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "TRITON_INTERPRET": "0"}, timeout=120).returncode == 0


@on_triton
def test_native_refuses_double():
    with pytest.raises(backends.BackendError, match="float32, bfloat16 or float16"):
        vocab_stats(torch.randn(2, 9, device=DEVICE).double(), backend="triton")


# ----------------------------------------------------------------------------------------- ahead of time

LOSS = ("lse", "gathered", "tail_lse")
SIGNALS = ("lse", "expected_logit", "logit_sum", "max", "argmax", "second")
TEMPERED, CAPPED, PADDED = Head(temperature=2.0), Head(softcap=30.0), Head(valid_vocab=151_665)


def forward_case(dtype, want, k=64, head=PLAIN, vocab=QWEN):
    from distilkernels.kernels.vocab_stats import forward_launches

    x = torch.empty(1, 8192, vocab, dtype=dtype, device="meta")
    ids = torch.empty(8192, k, dtype=torch.int64, device="meta") if k else None
    return forward_launches(x, ids, None, head, outputs(8192, k or None, want, "meta"))


def backward_case(dtype, terms=(), k=64, head=PLAIN, vocab=QWEN):
    from distilkernels.kernels.vocab_stats_backward import backward_launch

    x = torch.empty(1, 8192, vocab, dtype=dtype, device="meta")
    ids, entries = torch.empty(8192, k, dtype=torch.int64, device="meta"), torch.empty(8192, k, device="meta")
    coef = torch.empty(8192, 6, dtype=torch.float64, device="meta")
    return [backward_launch(x, ids, entries, coef, terms, head, x)]


VARIANTS = {
    "loss-bfloat16": lambda: forward_case(torch.bfloat16, LOSS),
    "loss-float16": lambda: forward_case(torch.float16, LOSS),
    "loss-float32": lambda: forward_case(torch.float32, LOSS),
    "loss-padded": lambda: forward_case(torch.bfloat16, LOSS, head=PADDED),
    "loss-odd_vocab": lambda: forward_case(torch.bfloat16, LOSS, vocab=151_937),
    "loss-softcap": lambda: forward_case(torch.bfloat16, LOSS, head=CAPPED),
    "entropy": lambda: forward_case(torch.bfloat16, (*LOSS, "expected_logit")),
    "signals-bfloat16": lambda: forward_case(torch.bfloat16, SIGNALS, k=0),
    "signals-float32": lambda: forward_case(torch.float32, SIGNALS, k=0),
    "everything": lambda: forward_case(torch.bfloat16, WANTS, head=TEMPERED),
    "signals-1": lambda: forward_case(torch.bfloat16, (*SIGNALS, "gathered", "rank"), k=1),
    "rank-1": lambda: forward_case(torch.bfloat16, ("lse", "rank", "mass_above"), k=1),
    "rank-64": lambda: forward_case(torch.bfloat16, ("lse", "rank", "mass_above")),
    "backward-bfloat16": lambda: backward_case(torch.bfloat16),
    "backward-float16": lambda: backward_case(torch.float16),
    "backward-float32": lambda: backward_case(torch.float32),
    "backward-linear": lambda: backward_case(torch.bfloat16, ("linear", "constant", "t1"), head=TEMPERED),
    "backward-softcap": lambda: backward_case(torch.bfloat16, ("linear",), head=CAPPED),
}

_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int32: "*i32", torch.bool: "*i1", torch.int64: "*i64",
}  # fmt: skip


def ast_source(launch):
    """The launch as the JIT would specialise it: None and 1 are constants, multiples of 16 are known to be."""
    from triton.compiler import ASTSource

    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned:
            hints[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, hints)


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers and bytes of stack, shared and local memory, from the cuobjdump in triton's wheel."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}


def built(launches, folder: Path, record_property, capabilities=(80, 90, 100)):
    """Each launch for each target, as (launch, compiled kernel, a name for messages), once nothing of it spills into local memory."""
    from triton.backends.compiler import GPUTarget

    for launch in launches:
        assert {p.name for p in launch.kernel.params} == set(launch.arguments)
        for capability in capabilities:
            kernel = triton.compile(ast_source(launch), target=GPUTarget("cuda", capability, 32), options=launch.options)
            used = resources(kernel.asm["cubin"], folder)
            name = f"{launch.kernel.__name__} sm_{capability}"
            record_property(name, used)
            # some releases' ptxas parks one scalar on the stack, outside the loops, to fit one more block on a multiprocessor
            assert used["STACK"] <= 8 and used["LOCAL"] == 0, f"{name}: {used}"
            yield launch, kernel, name


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_spills(variant, tmp_path, record_property):
    """What the launchers launch at V = 151,936 builds for sm_80, sm_90 and sm_100 without spilling."""
    from triton.compiler import ASTSource

    if "constexprs" not in inspect.signature(ASTSource.__init__).parameters:
        pytest.skip("ahead-of-time signatures are written for triton ≥ 3.3")
    for launch, kernel, name in built(VARIANTS[variant](), tmp_path, record_property):
        ptx = kernel.asm["ptx"]
        if launch.kernel.__name__ in ("_pass_kernel", "_backward_kernel") and "odd" not in variant:
            assert re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx), f"{name}: no 16-byte loads"
        if launch.kernel.__name__ == "_backward_kernel":
            dense, entries = ptx.split("bar.sync", 1)
            assert re.search(r"st\.global[\w.:]*\.v4\.b32", dense) and "st.global" in entries, f"{name}: entries are not stored last"


# ----------------------------------------------------------------------------------------------- on a device


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_qwen_rows(dtype):
    """Every statistic at V = 151,936, K = 64."""
    x = (torch.randn(6, QWEN) * 2.5).to(dtype)
    x[:, ::9000] += 6
    ids = (x.float() + torch.randn(6, QWEN)).topk(64).indices
    assert_close(*statistics(x, ids), tolerance=1e-5)
    assert_close(*statistics(x, ids, head=Head(1.7, 0.9, None, 151_665)), tolerance=1e-5)


@gpu
@pytest.mark.gpu
@pytest.mark.large
def test_addresses_beyond_2_to_31():
    """14,200 rows of 151,936 entries: the last rows, forward, backward and in place."""
    n = 14_200
    x = torch.empty(n, QWEN, dtype=torch.bfloat16, device="cuda").normal_()
    ids = torch.randint(QWEN, (n, 64), device="cuda").sort(1).values
    last = x[-3:].double().cpu().requires_grad_()
    exact = vocab_stats(last, ids[-3:].cpu(), want=LOSS, backend="reference")
    (exact.lse + exact.tail_lse).sum().backward()
    leaf = x.requires_grad_()
    got = vocab_stats(leaf, ids, want=LOSS, backend="triton")
    torch.testing.assert_close(got.tail_lse[-3:].double().cpu(), exact.tail_lse, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad((got.lse + got.tail_lse).sum(), leaf)
    torch.testing.assert_close(grad[-3:].double().cpu(), last.grad, rtol=2.0**-7, atol=1e-12)


@gpu
@pytest.mark.gpu
def test_no_synchronisation_and_the_same_bits():
    """Forward and backward queue without waiting for the device, and twice give the same bits."""
    x = torch.randn(512, QWEN, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    ids = torch.randint(QWEN, (512, 64), device="cuda")

    def once():
        stats = vocab_stats(x, ids, want=(*LOSS, "expected_logit"), backend="triton")
        (grad,) = torch.autograd.grad((stats.lse - stats.tail_lse + stats.expected_logit).sum(), x)
        return stats.tail_lse, grad

    first = once()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second))
