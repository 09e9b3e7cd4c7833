"""The Triton kernels that propose and verify: filter_rows, sample_rows and weigh_rows.

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
from tests.test_decoding_primitives import definition, filters_for, noise_for
from tests.test_triton import built, compiled, gpu, on_triton

from distilkernels.primitives.filter_rows import Filtered, Filters, allocate, filtered
from distilkernels.primitives.sample_rows import Drawn, Noise, Operand, drawn, mass, reference, reference_mass, uniform32, uniforms_at

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402
from distilkernels.kernels.sample_rows import exponential as device_exponential  # noqa: E402
from distilkernels.kernels.sample_rows import uniform32 as device_uniform32  # noqa: E402
from distilkernels.kernels.sample_rows import uniforms as device_uniforms  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HERE = Path(__file__).parent
QWEN = 151_936
INF, NAN = math.inf, math.nan


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run natively on the device")
@pytest.mark.parametrize(
    "file,selection",
    [
        # one dtype: the others, and cuts of a row, are in test_native_*. Left out too: contents and views that those or other cases have
        ("test_decoding_primitives.py", "triton-cpu and cpu-float32 and not ascending and not block and not transposed and not four_d"),
        ("test_decoding_primitives.py", "triton-cpu and (coin or ties or residual_of_equal or equal_uniforms or no_draws)"),
        ("test_triton_decoding.py", "native"),
    ],
    ids=["primitives", "equals", "seams"],
)
def test_under_the_interpreter(file, selection):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file), "-k", selection]
    ran = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0 and " passed" in ran.stdout and "skipped" not in ran.stdout.splitlines()[-1], ran.stdout[-4000:]


# ---------------------------------------------------------------------- the kernels' own seams, on either machine


def law_by_kernel(x, filters, columns=None, **configs):
    """What the kernels make of rows x [N, V], on the CPU."""
    from distilkernels.kernels.filter_rows import launches

    rows, out = x.to(DEVICE)[None], allocate(x.to(DEVICE)[None])
    for launch in launches(rows, columns or x.shape[1], Filters(*(t.to(DEVICE) for t in filters)), out, **configs):
        launch.run()
    return Filtered(filters.temperature, **{name: t.cpu() for name, t in out.items()})


def narrow():
    """Several spans, steps and tiles at a few thousand columns, and several steps through the chosen ones."""
    from distilkernels.kernels.filter_rows import CONFIG
    from distilkernels.kernels.tiles import CONFIG as TILES

    return {"tiles_config": replace(TILES, step_bytes=1 << 10, span_bytes=1 << 12, widest=64), "config": replace(CONFIG, step=64)}


def filters_of(n, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    values = (torch.as_tensor(v) for v in (temperature, top_k, top_p, min_p))
    return Filters(*(v.to(torch.int64 if i == 1 else torch.float64).expand(n).contiguous() for i, v in enumerate(values)))


def assert_law(got, x, filters, tolerance=2e-6):
    """The same columns, and the numbers to `tolerance`."""
    exact, wide = definition(x, x.shape[1], filters), x.double()
    assert torch.equal(got.argmax, exact.argmax)
    assert torch.equal(wide >= got.bar.double()[:, None], wide >= exact.bar[:, None])
    for name in ("lse", "lse_all", "expected"):
        torch.testing.assert_close(getattr(got, name), getattr(exact, name), rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_bars_at_the_seams(dtype):
    """Bars among equals on both sides of every cut, in rows with empty tiles, of both signs, far from 0."""
    vocab, seams = 2048 + 333, [0, 31, 32, 63, 64, 255, 256, 511, 512, 1023, 1024, 2047, 2048, 2048 + 332]
    x = torch.randn(6, vocab, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, seams] = 9.0
    x[1, 64:2000] = -INF
    x[2] = torch.arange(vocab) % 3
    x[3] = -200 - x[3].abs()
    x[4] = -INF
    x[4, seams] = torch.arange(len(seams)).to(dtype)
    x[5] = 0.0
    x[5, 1::2] = -0.0
    for k in (1, len(seams), 700):
        filters = filters_of(6, top_k=k)
        assert_law(law_by_kernel(x, filters, **narrow()), x, filters)


@on_triton
@pytest.mark.parametrize("temperature", [0.25, 3.0])
def test_native_nuclei(temperature):
    """Masses that flat, peaked and clustered rows reach within, at and behind one column; each filter alone and all of them."""
    x = torch.randn(5, 1801, generator=torch.Generator().manual_seed(2))
    x[1] *= 12
    x[2, 1000:1003] = 7.0
    x[3] = -3e4 - x[3].abs()
    x[4] = -INF
    x[4, [5, 1799]] = 1.0
    for filters in (
        filters_of(5, temperature, top_p=[0.9, 0.5, 0.3, 0.999, 0.4]),
        filters_of(5, temperature, top_p=[1e-9, 0.0, 0.97, 0.01, 0.6]),
        filters_of(5, temperature, min_p=[0.05, 1e-7, 0.5, 0.3, 1.0]),
        filters_of(5, temperature, [300, 2, 4, 1500, 1], [0.7, 0.9, 0.8, 0.5, 0.9], [0.0, 0.2, 0.0, 1e-3, 0.5]),
    ):
        # e^{x/T} at 3e4 is known to 2e-3 · 2⁻²³ / T
        assert_law(law_by_kernel(x, filters, **narrow()), x, filters, tolerance=1e-5)


@on_triton
def test_native_rows_without_a_law():
    """A NaN anywhere, +inf, or nothing but −inf spoil their own row, filtered or not; T = 0 keeps the largest."""
    x = torch.randn(8, 1031, generator=torch.Generator().manual_seed(3))
    x[0, x[0].argmin()], x[1, 1030], x[2], x[3, [7, 700]] = NAN, INF, -INF, 9.0
    x[5, x[5].argmax()], x[6] = NAN, NAN
    for filters in (filters_of(8), filters_of(8, top_k=5, top_p=0.5), filters_of(8, temperature=0.0), filters_of(8, [0.0, 1.0] * 4, min_p=0.1)):
        got = law_by_kernel(x, filters, **narrow())
        assert_law(got, x, filters)
        assert got.bar.isnan().tolist() == got.lse.isnan().tolist() == [True, True, True, False, False, True, True, False] and got.argmax[3] == 7


def operand(x, rows, filters):
    """Rows of x under the definition's law, for the kernels and, in fp64, for the reference."""
    law = definition(x, x.shape[1], filters).at(rows.clamp(min=0))
    exact = Operand(x.double()[None], rows, law)
    return Operand(x.to(DEVICE)[None], rows.to(DEVICE), Filtered(*(t.to(DEVICE) for t in law._replace(bar=law.bar.float())))), exact


def race(one, two, scale, mode, columns, vocab, noise, **config):
    """((Drawn, Σ w) of the kernels, the same of the reference), on the CPU."""
    from distilkernels.kernels.sample_rows import sample_launches, weigh_launches

    def outputs(device, dtype):
        r = one[1].rows.shape[0]
        integers = [torch.empty(r, dtype=torch.int64, device=device) for _ in range(2)]
        out = Drawn(integers[0], torch.empty(r, dtype=dtype, device=device), integers[1], torch.empty(r, dtype=torch.bool, device=device))
        return out, torch.empty(r, dtype=torch.float64, device=device)

    (got, total), (exact, exact_total) = outputs(DEVICE, torch.float32), outputs("cpu", torch.float64)
    on_device = Noise(*(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in noise))
    second, c = None if two is None else two[0], None if scale is None else scale.to(DEVICE)
    for launch in sample_launches(one[0], second, c, mode, columns, vocab, on_device, got, **config):
        launch.run()
    for launch in weigh_launches(one[0], second, c, mode, columns, total, **config):
        launch.run()
    second = None if two is None else two[1]
    reference(one[1], second, scale, mode, columns, vocab, noise, exact)
    reference_mass(one[1], second, scale, mode, columns, exact_total)
    return (Drawn(*(t.cpu() for t in got)), total.cpu()), (exact, exact_total)


def short_spans():
    from distilkernels.kernels.sample_rows import CONFIG

    return {"config": replace(CONFIG, tile=128, span=256, rank_tile=128, rank_span=512)}


@on_triton
@pytest.mark.parametrize("mode", ["plain", "residual", "gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_draws_are_the_reference_s(dtype, mode):
    """Many spans: of no weight, of weights that cannot win and are passed over, and of the ones that do; rows −1 on either side."""
    g = torch.Generator().manual_seed(4)
    x = (torch.randn(4, 901, generator=g) * 3).to(dtype)
    x[1, :800] -= 40
    x[2] = torch.randint(-2, 3, (901,), generator=g).to(dtype)
    y = (x.float() + torch.randn(4, 901, generator=g)).to(dtype)
    rows, others = torch.tensor([0, 1, 2, 3, -1, 0, 1, 2]), torch.tensor([0, 1, 2, 3, 0, -1, 0, 2])
    one, two, scale = operand(x, rows, filters_for(4, 15, "cpu")), None, None
    if mode != "plain":
        two = operand(y, others, filters_of(4, top_k=[0, 40, 0, 0]))
        scale = torch.linspace(0.2, 1.0, 8, dtype=torch.float64) if mode == "residual" else None
        rows = torch.where(others < 0, -1, rows) if mode == "gate" else rows
        one = one if mode == "residual" else operand(x, rows, filters_for(4, 2, "cpu"))
    (got, total), (exact, exact_total) = race(one, two, scale, mode, 901, 880, noise_for(8, "cpu", torch.arange(8) % 6), **short_spans())
    assert torch.equal(got.compared, exact.compared) and (got.token == exact.token).float().mean() > 0.9
    same = got.token == exact.token
    assert torch.equal(got.rank[same], exact.rank[same]) and torch.equal(got.value[same].double().nan_to_num(), exact.value[same].nan_to_num())
    assert got.token[rows < 0].eq(-1).all() and got.value[rows < 0].isnan().all()
    torch.testing.assert_close(total, exact_total, rtol=1e-5, atol=1e-6)


@on_triton
def test_native_argmax_draws_and_empty_residuals():
    """A draw at T = 0 is the argmax and nothing of P is left at it; what has no weight is drawn from Q."""
    x = torch.randn(3, 700, generator=torch.Generator().manual_seed(5))
    rows, scale = torch.arange(3), torch.ones(3, dtype=torch.float64)
    one = operand(x, rows, filters_of(3, [0.0, 0.0, 1.0]))
    two = operand(x, rows, filters_of(3, [0.0, 1.0, 1.0]))
    (got, total), (exact, exact_total) = race(one, two, scale, "residual", 700, 700, noise_for(3, "cpu"), **short_spans())
    assert got.token[:2].equal(x[:2].argmax(-1)) and got.compared.tolist() == [False, True, False] and torch.equal(got.token, exact.token)
    assert got.rank[:2].eq(0).all() and total[[0, 2]].eq(0).all()
    torch.testing.assert_close(total, exact_total, rtol=1e-6, atol=0)


@triton.jit
def _noise_kernel(seeds, positions, offsets, streams, u, words, edges, clocks, TILE: tl.constexpr, START: tl.constexpr, WORDS: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, TILE)
    seed, position, offset, stream = tl.load(seeds + row), tl.load(positions + row), tl.load(offsets + row), tl.load(streams + row)
    tl.store(u + row * TILE + column, device_uniforms(seed, position, offset, stream, START, TILE))
    word = tl.arange(0, WORDS)
    edge = device_uniform32(tl.load(words + word).to(tl.uint32))
    tl.store(edges + word, edge)
    tl.store(clocks + word, device_exponential(edge))


@on_triton
def test_native_noise_to_the_bit():
    """Triton's generator under our counters, all of uniform32's ends, and −log1p(−u) to 4e-7 of itself everywhere, near 0 too."""
    seeds = torch.tensor([0, -1, 0x299F31D0_A4093822, 2**63 - 1])
    positions, offsets, streams = torch.tensor([0, -1, 2**40 + 3, 2**32 - 1]), torch.tensor([0, 7, 2**31, 2**32 + 9]), torch.tensor([0, 6, 3, 4])
    g = torch.Generator().manual_seed(6)
    words = torch.randint(0, 2**32, (4096,), generator=g) >> torch.randint(0, 32, (4096,), generator=g)
    words[2048:3000] = 2**32 - 1 - words[2048:3000]
    # 1 − √½, where the exponent changes
    words[3000:3600] = int((1 - math.sqrt(0.5)) * 2**32) + torch.arange(-300, 300)
    words[:8] = torch.tensor([0, 1, 2, 2**32 - 1, 2**32 - 2**8, 2**31, 2**31 - 1, 2**24 + 1])
    u, edges, clocks = (torch.empty(shape, device=DEVICE) for shape in ((4, 64), 4096, 4096))
    _noise_kernel[(4,)](*(t.to(DEVICE) for t in (seeds, positions, offsets, streams)), u, words.to(DEVICE), edges, clocks, 64, 100, 4096)
    expected = uniforms_at(Noise(seeds, positions, offsets, streams), 164)[:, 100:]
    assert torch.equal(u.cpu(), expected) and torch.equal(edges.cpu(), uniform32(words))
    assert 0 < edges[0] and edges[3] < 1
    exact = -torch.log1p(-uniform32(words).double())
    assert ((clocks.cpu() - exact).abs() / exact).max() < 4e-7


@on_triton
def test_native_a_row_is_alone():
    """A row's bits do not depend on its neighbours, nor from one call to the next, nor on how the row is cut for a race."""
    x = torch.randn(5, 1501, generator=torch.Generator().manual_seed(7))
    filters = filters_for(5, 14, "cpu")
    whole, again = law_by_kernel(x, filters, **narrow()), law_by_kernel(x, filters, **narrow())
    alone = law_by_kernel(x[3:4], Filters(*(t[3:4] for t in filters)), **narrow())
    for one, two, three in zip(whole, again, alone):
        assert torch.equal(one, two) and torch.equal(one[3:4], three)
    noise, rows = noise_for(5, "cpu"), torch.arange(5)
    (got, total), _ = race(operand(x, rows, filters), None, None, "plain", 1501, 1501, noise, **short_spans())
    (uncut, _), _ = race(operand(x, rows, filters), None, None, "plain", 1501, 1501, noise)
    part = Noise(*(t[3:4] for t in noise[:3]), noise.stream)
    (single, weight), _ = race(operand(x, rows[3:4], filters), None, None, "plain", 1501, 1501, part, **short_spans())
    assert all(torch.equal(one, two) and torch.equal(one[3:4], three) for one, two, three in zip(got, uncut, single)) and weight == total[3]


# ----------------------------------------------------------------------------------------- ahead of time


def meta(n, dtype=torch.float64):
    return torch.empty(n, dtype=dtype, device="meta")


def filter_case(dtype, vocab=QWEN, some=False):
    from distilkernels.kernels.filter_rows import launches

    x, n = torch.empty(64, 9, vocab, dtype=dtype, device="meta"), 64 if some else 576
    rows = meta(n, torch.int64) if some else None
    return launches(x, vocab, Filters(meta(n), meta(n, torch.int64), meta(n), meta(n)), allocate(x, rows), chosen_rows=rows)


def coin_case():
    from distilkernels.kernels.coin import coin_launch

    return [coin_launch(*(meta(512, torch.int64) for _ in range(3)), 1, meta(512))]


def draw_case(dtype, mode="plain", vocab=QWEN, other=None, stream=4):
    from distilkernels.kernels.sample_rows import sample_launches, weigh_launches

    def integers():
        return meta(64, torch.int64)

    def side(rows, dtype):
        return Operand(torch.empty(64, rows, vocab, dtype=dtype, device="meta"), integers(), Filtered(*(meta(64) for _ in range(5)), integers()))

    def of_floats(side):
        return side._replace(law=side.law._replace(bar=meta(64, torch.float32)))

    one, two = of_floats(side(9, dtype)), None if mode == "plain" else of_floats(side(8, other or dtype))
    scale = meta(64) if mode == "residual" else None
    out = Drawn(integers(), meta(64, torch.float32), integers(), meta(64, torch.bool))
    noise = Noise(integers(), integers(), integers(), stream)
    return sample_launches(one, two, scale, mode, vocab, vocab, noise, out) + weigh_launches(one, two, scale, mode, vocab, meta(64))


VARIANTS = {
    "filter-bfloat16": lambda: filter_case(torch.bfloat16),
    "filter-float32": lambda: filter_case(torch.float32),
    "filter-odd_vocab": lambda: filter_case(torch.float16, QWEN + 1),
    "filter-some_rows": lambda: filter_case(torch.bfloat16, some=True),
    "filter-one_column": lambda: filter_case(torch.float32, 1),
    "coin": coin_case,
    "draw-plain": lambda: draw_case(torch.bfloat16, stream=1),
    "draw-residual": lambda: draw_case(torch.bfloat16, "residual"),
    "draw-residual-mixed": lambda: draw_case(torch.float32, "residual", other=torch.bfloat16, stream=meta(64, torch.int64)),
    "draw-residual-odd_vocab": lambda: draw_case(torch.bfloat16, "residual", QWEN + 1),
    "draw-gate": lambda: draw_case(torch.float32, "gate"),
    "draw-one_column": lambda: draw_case(torch.float32, "residual", 1),
}


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_spills(variant, tmp_path, record_property):
    """What the launchers launch builds for sm_80, sm_90 and sm_100 without spilling, and whole rows are read 16 bytes at a time."""
    for launch, kernel, name in built(VARIANTS[variant](), tmp_path, record_property):
        if launch.kernel.__name__ in ("_records_kernel", "_race_kernel", "_rank_kernel"):
            ptx = kernel.asm["ptx"]
            assert "odd" in variant or "one" in variant or re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx), f"{name}: no 16-byte loads"
            # flushed subnormals would be ties
            assert not re.search(r"(max|setp)[\w.]*\.ftz", ptx), name


# ----------------------------------------------------------------------------------------------- on a device


@gpu
@pytest.mark.gpu
def test_no_synchronisation():
    """Filters, weights and draws queue without waiting for the device, twice give the same bits, and are captured in a graph."""
    x, y = (torch.randn(64, 9, QWEN, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    filters = Filters(*(t.cuda() for t in filters_for(576, 0, "cpu")))
    rows, scale = torch.arange(64, device="cuda") * 9, torch.ones(64, dtype=torch.float64, device="cuda")
    noise = noise_for(64, "cuda")

    def once():
        law = filtered(x, QWEN, filters, "triton")
        first, second = Operand(x, rows, law.at(rows)), Operand(y, rows, law.at(rows))
        compared = {"second": second, "scale": scale, "mode": "residual", "backend": "triton"}
        return *law, *drawn(first, noise, QWEN, **compared), mass(first, QWEN, **compared)

    first = once()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        third = once()
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(first, second, third):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.nan_to_num(), c.nan_to_num())
