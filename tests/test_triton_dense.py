"""The Triton kernels of pairs of rows.

As in test_triton.py: ``test_native_*`` run under the interpreter in a process of their own, or on a device where there is one.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.test_triton import built, compiled, gpu, on_triton

from distilkernels.primitives.head import Head
from distilkernels.primitives.pair_stats import Sides, coefficients, pair_stats, reference, reference_backward

triton = pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HERE = Path(__file__).parent
QWEN = 151_936
F64 = torch.float64


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run natively on the device")
@pytest.mark.parametrize(
    "file,selection",
    [
        # one 16-bit dtype, and layouts and lengths in float32 alone: the other, and mixed ones, are in test_native_*
        (
            "test_pair_stats.py",
            "triton-cpu and not cpu-float16 and not opcheck and not batch_invariance and not float64"
            " and not (cpu-bfloat16 and (ascending or block or transposed or four_d or cold or equal))",
        ),
        ("test_triton_dense.py", "native"),
    ],
    ids=["contract", "seams"],
)
def test_under_the_interpreter(file, selection):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file), "-k", selection]
    ran = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0 and " passed" in ran.stdout and "skipped" not in ran.stdout.splitlines()[-1], ran.stdout[-4000:]


# ---------------------------------------------------------------------- the kernels' own seams, on either machine


def narrow():
    """Several spans of several steps at two thousand columns."""
    from distilkernels.kernels.pair_stats import CONFIG

    return replace(CONFIG, num_warps=1, span_bytes=1 << 12)


SIDES = {
    "plain": Sides(Head(), Head()),
    "heads": Sides(Head(1.5, -0.7, 9.0, 2041), Head(1.5, 0.9, None), with_t1=True),
    "scaled": Sides(Head(0.7, 1.3, None, None), Head(0.7, 1.0, 11.0), with_t1=True),
}
VALID = Sides(Head(valid_vocab=151_669), Head())
LOOKS = {"plain": ("", "power", "distance"), "heads": ("mixture", "power", "balance"), "scaled": ("", "mixture", "distance")}
DTYPES = ((torch.float32, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.float16))


def pair(vocab, dtypes):
    """Rows whose maxima lie in different spans, spans all −inf on one side and on both, rows that differ by a constant."""
    z, t = torch.randn(6, vocab) * 3, torch.randn(6, vocab) * 3
    z[0, 1023], z[0, 1024], t[0, vocab - 1] = 20.0, 19.0, 25.0
    z[1, :1100], t[1, 1100:1900] = -math.inf, -math.inf
    z[2, 1024:2048] = t[2, 1000:2048] = -math.inf
    t[3] = z[3] + 30
    z[4, 1500], t[5, 7] = math.nan, math.nan
    return z.to(dtypes[0]).view(2, 3, vocab), t.to(dtypes[1]).view(3, 2, vocab)


@on_triton
@pytest.mark.parametrize("name,dtypes", list(zip(SIDES, DTYPES)), ids=SIDES)
def test_native_spans_of_a_row(name, dtypes):
    from distilkernels.kernels.pair_stats import forward_launches

    (z, t), sides = pair(2057, dtypes), SIDES[name]
    if sides.student.valid_vocab is not None:
        z[..., sides.student.valid_vocab :] = t[..., sides.student.valid_vocab :] = math.nan  # read and not used
    w = torch.tensor([0.5, 0.1, 0.9, 1e-4, 0.5, 0.5], dtype=F64)
    for second in LOOKS[name]:
        mixture, sides = w if second else None, sides._replace(second=second)
        exact, out = torch.empty(6, 11, dtype=F64), torch.empty(6, 11, dtype=F64, device=DEVICE)
        reference(z.double(), t.double(), mixture, sides, exact)
        on_device = None if mixture is None else mixture.to(DEVICE)
        for launch in forward_launches(z.to(DEVICE), t.to(DEVICE), on_device, sides, out, narrow()):
            launch.run()
        got = out.cpu()
        # a NaN stays on its side, but for what both have
        assert not got[4, [1, 5]].isnan().any() and not got[5, [0, 4, 6]].isnan().any()
        assert got[4, [0, 2, 3, 4, 7, 8]].isnan().all() and got[5, [1, 2, 3, 5, 7, 8]].isnan().all()
        if second == "distance":
            got[3, 10] = exact[3, 10]  # signs of zeros
        torch.testing.assert_close(got[:4], exact[:4], rtol=2e-5, atol=2e-5)
        if name == "plain":
            # KL of row 3 is 0: what its gap of 30 loses is not 30's rounding
            assert abs(got[3, 2] - got[3, 1] + got[3, 0]) < 1e-6


@on_triton
@pytest.mark.parametrize("name,dtypes", list(zip(SIDES, DTYPES)), ids=SIDES)
def test_native_backward(name, dtypes):
    """Every term; in place and fresh; a row that nothing is asked of and one that asks nothing of its teacher, NaN there."""
    from distilkernels.kernels.pair_stats import backward_launch

    (z, t), sides = pair(2057, dtypes), SIDES[name]
    z, t = z.nan_to_num(0.5, neginf=-40), t.nan_to_num(0.5, neginf=-40)
    if sides.student.valid_vocab is not None:
        z[..., sides.student.valid_vocab :] = t[..., sides.student.valid_vocab :] = math.nan  # read and not used
    w = torch.tensor([0.5, 0.1, 0.9, 1e-4, 0.5, 0.5], dtype=F64)
    for second in LOOKS[name]:
        mixture, sides = w if second else None, sides._replace(second=second)
        out, exact = torch.empty(6, 11, dtype=F64), torch.empty(z.shape, dtype=F64)
        reference(z.double(), t.double(), mixture, sides, out)
        coef = coefficients(torch.cat([out, torch.zeros(6, 2, dtype=F64)], 1), torch.randn(6, 10, dtype=F64), mixture, sides)
        coef[4, 2:7], coef[4, 8:11] = 0, 0
        coef[5, 4:6], coef[5, 8:11], coef[5, 1] = 0, 0, math.nan
        reference_backward(z.double(), t.double(), coef, sides, second, exact)
        x, y = z.clone(), t.clone()
        x[1, 1], y[2] = math.nan, math.nan
        wide = torch.full((2, 3, 2070), math.nan, dtype=z.dtype, device=DEVICE)
        wide[..., :2057] = x
        in_place, fresh = wide[..., :2057], torch.empty_like(z, device=DEVICE)
        for target in (fresh, in_place):
            backward_launch(in_place, y.to(DEVICE), coef.to(DEVICE), sides, second, target, narrow()).run()
        assert torch.equal(fresh, in_place) and wide[..., 2057:].isnan().all()
        step = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[z.dtype]
        if second == "distance":
            fresh[1, 0], exact[1, 0] = 0, 0  # signs of zeros
        torch.testing.assert_close(fresh.double().cpu(), exact, rtol=step, atol=1e-5)


@on_triton
def test_native_row_is_alone():
    """A row's bits do not depend on its neighbours, nor from one call to the next."""
    z, t, w = torch.randn(4, 1031, device=DEVICE), torch.randn(4, 1031, device=DEVICE), torch.full((4,), 0.3, dtype=F64, device=DEVICE)
    whole, again, alone = (pair_stats(z[r], t[r], None, w[r], SIDES["scaled"], backend="triton") for r in (slice(0, 4), slice(0, 4), slice(2, 3)))
    assert torch.equal(whole, again) and torch.equal(whole[2:3], alone)


@on_triton
def test_native_logarithm_near_1():
    """KL to the mixture of rows that differ by 1e-3: every logarithm is of a number near 1, and their sum is 1e-7."""
    t = torch.randn(3, 2003) * 2 + 20
    z = t + 1e-3 * torch.randn(3, 2003)
    w = torch.tensor([0.5, 0.1, 0.9], dtype=F64)
    got = pair_stats(z.to(DEVICE), t.to(DEVICE), None, w.to(DEVICE), SIDES["plain"], backend="triton").cpu()
    exact = pair_stats(z.double(), t.double(), None, w, SIDES["plain"], backend="reference")
    assert exact[:, 7:9].max() < 7e-7
    assert (got - exact)[:, 7:9].abs().max() < 2e-7


# ----------------------------------------------------------------------------------------- ahead of time


def sides_named(name, second):
    return (VALID if name == "valid" else SIDES[name])._replace(second=second)


def rows_of(dtypes, vocab):
    return [torch.empty(1, 8192, vocab, dtype=dtype, device="meta") for dtype in dtypes]


def forward_case(dtypes, sides="plain", second="", vocab=QWEN):
    from distilkernels.kernels.pair_stats import forward_launches

    w = torch.empty(8192, dtype=F64, device="meta") if second else None
    return forward_launches(*rows_of(dtypes, vocab), w, sides_named(sides, second), torch.empty(8192, 11, dtype=F64, device="meta"))


def backward_case(dtypes, sides="plain", second="", vocab=QWEN):
    from distilkernels.kernels.pair_stats import backward_launch

    z, t = rows_of(dtypes, vocab)
    return [backward_launch(z, t, torch.empty(8192, 12, dtype=F64, device="meta"), sides_named(sides, second), second, z)]


F32, BF16 = (torch.float32,) * 2, (torch.bfloat16,) * 2
VARIANTS = {
    "forward-float32": lambda: forward_case(F32),
    "mixture-bfloat16": lambda: forward_case(BF16, second="mixture"),
    "mixture-softcap-odd": lambda: forward_case(BF16, "heads", "mixture"),
    "forward-mixed-odd": lambda: forward_case(DTYPES[1], "scaled", "mixture", 151_937),
    "power-bfloat16": lambda: forward_case(BF16, second="power")[2:],
    "distance-float32": lambda: forward_case(F32, second="distance")[2:],
    "forward-valid-columns": lambda: forward_case(BF16, "valid", "mixture"),
    "backward-valid-columns": lambda: backward_case(BF16, "valid", "mixture"),
    "backward-float32": lambda: backward_case(F32),
    "balance-bfloat16": lambda: forward_case(BF16, second="balance")[2:],
    "backward-power": lambda: backward_case(BF16, second="power"),
    "backward-balance": lambda: backward_case(BF16, second="balance"),
    "backward-distance-odd": lambda: backward_case(F32, "heads", "distance"),
    "backward-mixture": lambda: backward_case(BF16, second="mixture"),
    "backward-softcap-odd": lambda: backward_case(F32, "heads", "mixture"),
    "backward-mixed-odd": lambda: backward_case(DTYPES[1], "scaled", "mixture", 151_937),
}


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_spills(variant, tmp_path, record_property):
    """What the launchers launch at V = 151,936 builds for sm_80, sm_90 and sm_100 without spilling.

    Where the rows' widths are a multiple of 16 it reads 16 bytes at a time, however many columns are valid.
    """
    for launch, kernel, name in built(VARIANTS[variant](), tmp_path, record_property):
        if "row" not in launch.kernel.__name__ and "odd" not in variant:
            wide = re.findall(r"ld\.global[\w.:]*\.v4\.b32", kernel.asm["ptx"])
            assert len(wide) >= 2, f"{name}: no 16-byte loads of both rows"
            assert not re.search(r"ld\.global[\w.:]*\.[bu]16", kernel.asm["ptx"]), f"{name}: some loads are of one entry"


# ----------------------------------------------------------------------------------------------- on a device


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_qwen_rows(dtype):
    """Statistics and d logits at V = 151,936, with a mixture."""
    z, t = (torch.randn(6, QWEN) * 2.5).to(dtype), (torch.randn(6, QWEN) * 2.5).to(dtype)
    w, sides, upstream = torch.full((6,), 0.4, dtype=F64), SIDES["scaled"], torch.randn(6, 10, dtype=F64)
    exact = z.double().requires_grad_()
    want = pair_stats(exact, t.double(), None, w, sides, backend="reference")
    leaf = z.cuda().requires_grad_()
    got = pair_stats(leaf, t.cuda(), None, w.cuda(), sides, backend="triton")
    torch.testing.assert_close(got.detach().cpu(), want.detach(), rtol=1e-5, atol=1e-5)
    (a,), (b,) = torch.autograd.grad(got, leaf, upstream.cuda()), torch.autograd.grad(want, exact, upstream)
    torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=(2e-6 if dtype == torch.float32 else 2.0**-8) * float(b.abs().max()))
