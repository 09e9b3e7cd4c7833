"""The Triton kernels that capture a teacher: topk_select and draw_rows.

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

from distilkernels import capture_samples, capture_topk
from distilkernels.primitives import draw_rows, topk_select
from distilkernels.primitives.head import Head
from distilkernels.primitives.philox import Stream, uniform53

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402
from distilkernels.kernels.draw_rows import uniform53 as device_uniform53  # noqa: E402
from distilkernels.kernels.draw_rows import uniforms as device_uniforms  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HERE = Path(__file__).parent
QWEN = 151_936
PLAIN = Head()


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run natively on the device")
@pytest.mark.parametrize(
    "file,selection",
    [
        # left out: float16, which is below; full rows; and the law over thousands of rows, which holds where the draws are the reference's
        ("test_capture.py", "triton-cpu and not cpu-float16 and not opcheck and not mean_gradient and not full_vocabulary"),
        ("test_triton_capture.py", "native"),
    ],
    ids=["capture", "seams"],
)
def test_under_the_interpreter(file, selection):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file), "-k", selection]
    ran = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0 and " passed" in ran.stdout and "skipped" not in ran.stdout.splitlines()[-1], ran.stdout[-4000:]


# ---------------------------------------------------------------------- the kernels' own seams, on either machine


def selected(logits, k, head=PLAIN, **configs):
    """(the kernels' TopK, the reference's in fp64), both on the CPU."""
    from distilkernels.kernels.topk_select import launches

    rows = logits.to(DEVICE)[None]
    got, exact = topk_select.allocate(rows, k), topk_select.allocate(logits[None].double(), k)
    for launch in launches(rows, head, got, **configs):
        launch.run()
    topk_select.reference(logits[None].double(), head, exact)
    return topk_select.TopK(*(t.cpu() for t in got)), exact


def assert_selected(got, exact, tolerance=2e-6):
    assert torch.equal(got.ids, exact.ids)
    for name in ("values", "lse", "tail_lse"):
        mine, true = getattr(got, name).double(), getattr(exact, name)
        torch.testing.assert_close(mine, true, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def narrow_tiles():
    """Several spans, steps, tiles and pieces at a few thousand columns."""
    from distilkernels.kernels.tiles import CONFIG

    return replace(CONFIG, step_bytes=1 << 10, span_bytes=1 << 12, widest=64)


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_seams_of_spans_tiles_and_pieces(dtype):
    """The largest entries, and ties of the K-th, on both sides of every cut; tiles and pieces all −inf; one −inf row."""
    vocab = 4096 + 333
    x = torch.randn(4, vocab).to(dtype)
    seams = [0, 7, 8, 31, 32, 63, 64, 255, 256, 1023, 1024, 2047, 2048, 4095, 4096, vocab - 1]
    x[0, seams] = 9.0
    x[1, 64:512] = -math.inf
    x[1, seams] = torch.arange(len(seams)).to(dtype) + 5
    x[2] = -math.inf
    x[3] = torch.arange(vocab) % 3
    for k in (1, 15, 40):
        assert_selected(*selected(x, k, tiles_config=narrow_tiles()))


@on_triton
@pytest.mark.parametrize("k", [2, 17, 300])
def test_native_infinities_and_nan(k):
    """+inf is first and makes lse infinite; a NaN anywhere, chosen tile or not, spoils its row and no other."""
    x = torch.randn(6, 1031)
    x[0, [5, 700]] = math.inf
    x[1, 1030] = math.inf
    x[2, x[2].argmin()] = math.nan
    x[3, x[3].argmax()] = math.nan
    x[4, :] = math.nan
    got, exact = selected(x, k, tiles_config=narrow_tiles())
    assert_selected(got, exact)
    assert got.lse.isinf().tolist() == [True, True, False, False, False, False] and got.tail_lse.isnan().tolist()[2:5] == [True] * 3


@on_triton
@pytest.mark.parametrize("head", [Head(logit_scale=-0.7, softcap=3.0), Head(0.5, 0.0, None, 901), Head(softcap=5.0, valid_vocab=77), Head(2.0, -1.0)], ids=str)
def test_native_heads(head):
    x = torch.randn(3, 1009, dtype=torch.float16) * 4
    assert_selected(*selected(x, 33, head, tiles_config=narrow_tiles()))


@on_triton
def test_native_spike_and_tiny_tail():
    """A tail far below the row's largest entry keeps its own scale, on every level."""
    x = torch.zeros(2, 2000)
    x[0, 1234] = 1e4
    x[1] = -300.0
    x[1, 5:9] = 0.0
    got, exact = selected(x, 4, tiles_config=narrow_tiles())
    assert_selected(got, exact, tolerance=1e-6)
    assert got.tail_lse[0] > 7 and got.tail_lse[1] < -290


def drawn(logits, draws, tau, head=PLAIN, **configs):
    """(the kernels' Draws, the reference's in fp64, u), all on the CPU."""
    from distilkernels.kernels.draw_rows import launches

    n = logits.shape[0]
    seeds, positions = torch.arange(n) * 7919 - 3, torch.arange(n) * 2**31
    rows = logits.to(DEVICE)[None]
    got, exact = draw_rows.allocate(rows, draws), draw_rows.allocate(logits[None].double(), draws)
    for launch in launches(rows, tau, seeds.to(DEVICE), positions.to(DEVICE), head, got, **configs):
        launch.run()
    draw_rows.reference(logits[None].double(), tau, seeds, positions, head, exact)
    return draw_rows.Draws(*(t.cpu() for t in got)), exact, draw_rows.uniforms(seeds, positions, draws)


@on_triton
@pytest.mark.parametrize("tau", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_native_draws_are_the_reference_s(dtype, tau):
    """Several groups of tiles and blocks of draws; stretches of −inf; weight in few places."""
    x = (torch.randn(4, 5003) * 2).to(dtype)
    x[1, 100:4000] = -math.inf
    x[2] = -math.inf
    x[2, [3, 5002]] = 1.0
    x[3, 4000] = 60.0
    got, exact, u = drawn(x, 37, tau, tiles_config=narrow_tiles())
    g = (tau * (x.double() - x.double().amax(-1, keepdim=True))).exp()
    cdf = torch.nn.functional.pad(g.cumsum(-1) / g.sum(-1, keepdim=True), (1, 0))
    chosen = got.ids.long()
    within = (u >= cdf.gather(1, chosen) - 1e-6) & (u <= cdf.gather(1, chosen + 1) + 1e-6)
    assert within.all() and (got.ids != exact.ids).sum() <= 2
    assert torch.equal(got.values.double(), x.double().gather(1, chosen)) and got.values.isfinite().all()
    for name in ("lse", "lse_tau"):
        torch.testing.assert_close(getattr(got, name), getattr(exact, name), rtol=1e-6, atol=1e-6)
    assert set(got.ids[2].tolist()) == {3, 5002} and set(got.ids[3].tolist()) == {4000}


@on_triton
def test_native_rows_without_a_distribution():
    x = torch.randn(4, 301)
    x[0, 300], x[1], x[2, 7] = math.nan, -math.inf, math.inf
    got, exact, _ = drawn(x, 3, 0.5, Head(temperature=2.0))
    assert torch.equal(got.ids, exact.ids) and (got.ids[:3] == -1).all() and got.values[:3].isnan().all()
    torch.testing.assert_close(got.lse, exact.lse, equal_nan=True)


@triton.jit
def _uniforms_kernel(seeds, positions, high, low, u, edges, STREAM: tl.constexpr, DRAWS: tl.constexpr, EDGES: tl.constexpr):
    row = tl.program_id(0)
    draw = tl.arange(0, DRAWS)
    tl.store(u + row * DRAWS + draw, device_uniforms(tl.load(seeds + row), tl.load(positions + row), draw, STREAM))
    edge = tl.arange(0, EDGES)
    tl.store(edges + edge, device_uniform53(tl.load(high + edge).to(tl.uint32), tl.load(low + edge).to(tl.uint32)))


@on_triton
def test_native_uniforms_to_the_bit():
    """Triton's generator with our counters, and all 53 bits: never 0, never 1."""
    seeds = torch.tensor([0, -1, 0x299F31D0_A4093822, 7, 2**63 - 1])
    positions = torch.tensor([0, -1, 2**40 + 3, 2**32, 5])
    high, low = torch.tensor([0, 2**32 - 1, 2**32 - 1, 1]), torch.tensor([0, 2**32 - 1, 0, 2**11])
    u, edges = torch.empty(5, 16, dtype=torch.float64, device=DEVICE), torch.empty(4, dtype=torch.float64, device=DEVICE)
    _uniforms_kernel[(5,)](*(t.to(DEVICE) for t in (seeds, positions, high, low)), u, edges, int(Stream.CAPTURE), 16, 4)
    assert torch.equal(u.cpu(), draw_rows.uniforms(seeds, positions, 16))
    assert torch.equal(edges.cpu(), uniform53(high, low)) and 0 < edges[0] and edges[1] < 1


@on_triton
def test_native_a_row_is_alone():
    """A row's bits do not depend on its neighbours, nor from one call to the next."""
    x = torch.randn(5, 3001)
    whole, again, alone = (selected(x[rows], 9, tiles_config=narrow_tiles())[0] for rows in (slice(0, 5), slice(0, 5), slice(3, 4)))
    for one, two, three in zip(whole, again, alone):
        assert torch.equal(one, two) and torch.equal(one[3:4], three)


# ----------------------------------------------------------------------------------------- ahead of time


def select_case(dtype, k, vocab=QWEN, head=PLAIN):
    from distilkernels.kernels.topk_select import launches

    x = torch.empty(1, 8192, vocab, dtype=dtype, device="meta")
    return launches(x, head, topk_select.allocate(x, k))


def draw_case(dtype, draws, tau=0.7, vocab=QWEN):
    from distilkernels.kernels.draw_rows import launches

    x, seeds = torch.empty(1, 8192, vocab, dtype=dtype, device="meta"), torch.empty(8192, dtype=torch.int64, device="meta")
    return launches(x, tau, seeds, seeds, PLAIN, draw_rows.allocate(x, draws))


VARIANTS = {
    "select-1-float16": lambda: select_case(torch.float16, 1),
    "select-64-bfloat16": lambda: select_case(torch.bfloat16, 64),
    "select-64-float32": lambda: select_case(torch.float32, 64),
    "select-64-odd_vocab": lambda: select_case(torch.bfloat16, 64, QWEN + 1),
    "select-64-softcap": lambda: select_case(torch.bfloat16, 64, head=Head(softcap=30.0)),
    "select-256": lambda: select_case(torch.bfloat16, 256),
    "select-1024": lambda: select_case(torch.bfloat16, 1024),
    "select-1024-short": lambda: select_case(torch.float32, 1024, 8192),
    "draw-64": lambda: draw_case(torch.bfloat16, 64),
    "draw-64-plain": lambda: draw_case(torch.float32, 64, 1.0),
    "draw-64-odd_vocab": lambda: draw_case(torch.bfloat16, 64, vocab=QWEN + 1),
    "draw-5000": lambda: draw_case(torch.bfloat16, 5000),
}


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_spills(variant, tmp_path, record_property):
    """What the launchers launch builds for sm_80, sm_90 and sm_100 without spilling, and the whole row is read 16 bytes at a time."""
    for launch, kernel, name in built(VARIANTS[variant](), tmp_path, record_property):
        if launch.kernel.__name__ == "_tiles_kernel":
            ptx = kernel.asm["ptx"]
            assert "odd" in variant or re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx), f"{name}: no 16-byte loads"
            # flushed subnormals would be ties
            assert not re.search(r"(max|setp)[\w.]*\.ftz", ptx), name


# ----------------------------------------------------------------------------------------------- on a device


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [1, 64, 256, 1024])
def test_qwen_rows(k, dtype):
    x = (torch.randn(5, QWEN) * 2.5).to(dtype)
    x[3] = x[3].round()
    x[4] = torch.arange(QWEN) / QWEN
    assert_selected(*selected(x, k))


@gpu
@pytest.mark.gpu
@pytest.mark.large
def test_addresses_beyond_2_to_31():
    """14,200 rows of 151,936 entries: the last rows."""
    x = torch.empty(14_200, QWEN, dtype=torch.bfloat16, device="cuda").normal_()
    got, alone = capture_topk(x, 64, backend="triton"), capture_topk(x[-3:].clone(), 64, backend="triton")
    exact = capture_topk(x[-3:].double().cpu(), 64, backend="reference")
    assert torch.equal(got.ids[-3:].cpu(), exact.ids) and torch.equal(got.logprobs[-3:], alone.logprobs)


@gpu
@pytest.mark.gpu
def test_no_synchronisation():
    """Selection and drawing queue without waiting for the device, and twice give the same bits."""
    x = torch.randn(512, QWEN, dtype=torch.bfloat16, device="cuda")
    seeds, positions = torch.arange(512, device="cuda"), torch.arange(512, device="cuda")

    def once():
        top = capture_topk(x, 64, backend="triton")
        samples = capture_samples(x, 16, tau=0.8, seed=seeds, positions=positions, backend="triton")
        return top.ids, top.logprobs, top.tail_logprob, samples.ids, samples.weights

    first = once()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second))
