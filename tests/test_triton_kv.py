"""The Triton kernels on caches: window_importance, key_redundancy, kv_gather, kv_align and recurrence_update.

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

import kv_listings as listing
import pytest
import torch
from tests.test_triton import built, compiled, gpu, on_triton

from distilkernels.primitives.key_redundancy import Redundancy
from distilkernels.primitives.key_redundancy import launched as redundant
from distilkernels.primitives.key_redundancy import reference as redundancy
from distilkernels.primitives.kv_align import Distance
from distilkernels.primitives.kv_align import launched as aligned
from distilkernels.primitives.kv_align import reference as alignment
from distilkernels.primitives.kv_gather import Rotation, gather
from distilkernels.primitives.kv_gather import reference as gathered
from distilkernels.primitives.window_importance import Scoring, Similarity
from distilkernels.primitives.window_importance import launched as window_scores
from distilkernels.primitives.window_importance import reference as importance

triton = pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HERE = Path(__file__).parent


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run natively on the device")
@pytest.mark.parametrize(
    "file,selection",
    [
        ("test_kv_scores.py", "triton-cpu and (published and 80 and clustered and not float64 or neighbour or pad_in or 16_bit)"),
        ("test_kv_select.py", "triton-cpu and not opcheck and not False-torch.bfloat16"),
        ("test_kv_align.py", "triton-cpu and loops and (None or mse)"),
        ("test_kv_scores.py", "triton-cpu and given_lse and mean_probs and bfloat16"),
        ("test_kv_lazy.py", "triton-cpu and at_once"),
        ("test_triton_kv.py", "native"),
    ],
    ids=["redundancy", "gather", "alignment", "importance", "recurrence", "seams"],
)
def test_under_the_interpreter(file, selection):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file), "-k", selection]
    ran = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0 and " passed" in ran.stdout and "skipped" not in ran.stdout.splitlines()[-1], ran.stdout[-4000:]


# ---------------------------------------------------------------------- the kernels' own seams, on either machine


def on_device(*tensors):
    return [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in tensors]


def spans(t):
    """Starts and stops of two requests, a mask, and the span of the cosine sums, which is another."""
    integers = lambda *values: torch.tensor(values, dtype=torch.int32)
    mask = torch.rand(2, t, generator=torch.Generator().manual_seed(1)) > 0.1
    return integers(0, 7), integers(t, t - 9), mask, integers(3, 0), integers(t - 1, t)


def importance_by_kernel(queries, keys, how, lse=None, window_mask=None, similar=True, request=slice(None), **config):
    """(scores, cosine sums) of the kernels with short chunks, and of the reference in fp64."""
    from distilkernels.kernels.window_importance import CONFIG, launches

    start, stop, mask, near_start, near_stop = (x[request] for x in spans(keys.shape[2]))
    heads = queries.shape[1] if how.group_reduce == "none" else keys.shape[1]
    config = replace(CONFIG, **{"chunk": 64, "keys": 32, "queries": 32, "float_tile": 32, "float_step": 16} | config)
    found = []
    for kernel, device, dtype in ((True, DEVICE, torch.float32), (False, "cpu", torch.float64)):
        out, sums = (torch.empty(keys.shape[0], n, keys.shape[2], dtype=dtype, device=device) for n in (heads, keys.shape[1]))
        similarity = Similarity(near_start.to(device), near_stop.to(device), sums) if similar else None
        arguments = [start, stop, mask, window_mask]
        if kernel:
            for launch in launches(*on_device(queries, keys, *arguments), how, *on_device(lse), out, similarity, config):
                launch.run()
        else:
            importance(queries.double(), keys.double(), *arguments, how, None if lse is None else lse.double(), out, similarity)
        found.append((out.cpu(), sums.cpu()))
    return found


def assert_scores(got, exact, similar=True):
    worst = ((got[0].double() - exact[0]).abs() / exact[0].amax(-1, keepdim=True).clamp(min=1e-9)).max()
    assert worst < 4e-6, float(worst)
    if similar:
        torch.testing.assert_close(got[1].double(), exact[1], rtol=1e-5, atol=2e-5)


@on_triton
@pytest.mark.parametrize(
    "how,dtype,d,config",
    [
        (("max_logits", "mean", True), torch.bfloat16, 80, {}),
        (("max_probs", "max", False), torch.float32, 80, {}),
        # rows of no alignment, and of more features than pass through the registers at once: the cosine sums have passes of their own
        (("none", "sum", False), torch.bfloat16, 75, {}),
        (("mean_probs", "mean", True), torch.float16, 80, {"widest": 64, "wide_step": 32}),
    ],
    ids=["whole_rows", "float32", "odd_rows", "wide_rows"],
)  # fmt: skip
def test_native_chunks_of_keys_and_blocks_of_queries(how, dtype, d, config):
    """Several of both, a group that is no power of two, padding, a causal window, and the cosine sums of another span."""
    g = torch.Generator().manual_seed(2)
    queries, keys = (torch.randn(2, 6, 9, d, generator=g) * 2).to(dtype), torch.randn(2, 2, 103, d, generator=g).to(dtype)
    heard = torch.rand(2, 9, generator=g) > 0.3
    got, exact = importance_by_kernel(queries, keys, Scoring(0.11, *how), window_mask=heard, **config)
    assert_scores(got, exact)


@on_triton
def test_native_rising_logits_and_the_sums_beside_a_given_lse():
    """Maxima that move in every chunk by more than a float's exponent; with an lse the cosine sums have passes of their own."""
    g = torch.Generator().manual_seed(3)
    queries, keys = torch.randn(2, 2, 3, 64, generator=g), torch.randn(2, 1, 103, 64, generator=g)
    toward = torch.nn.functional.normalize(queries.mean((1, 2)), dim=-1)[:, None, None]
    for slope in (300.0, -300.0):
        cached = (keys + torch.linspace(0, slope, 103)[:, None] * toward).bfloat16()
        got, exact = importance_by_kernel(queries.bfloat16(), cached, Scoring(1.0, "max_logits"))
        # logits of a thousand are known to 6e-5
        assert ((got[0].double() - exact[0]).abs() / exact[0].amax(-1, keepdim=True)).max() < 5e-4 and not got[0].isnan().any()
    lse = torch.randn(2, 2, 3, generator=g) + 5
    lse[1, 0, 2] = -math.inf
    got, exact = importance_by_kernel(queries, keys, Scoring(0.2, "max_probs"), lse)
    assert_scores(got, exact)


@on_triton
def test_native_a_request_is_alone():
    """The same bits twice, and without the other request."""
    queries, keys = torch.randn(2, 4, 9, 64).bfloat16(), torch.randn(2, 2, 203, 64).bfloat16()
    how = Scoring(0.2, "max_probs")
    (whole, _), (again, _), (alone, _) = (
        importance_by_kernel(queries[r], keys[r], how, request=r) for r in (slice(None), slice(None), slice(1, 2))
    )  # fmt: skip
    for a, b, c in zip(whole, again, alone):
        assert torch.equal(a, b) and torch.equal(a[1:], c)


@on_triton
@pytest.mark.parametrize("kind", ["random", "clustered", "few"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_last_neighbours_are_those_of_all_pairs(kind, dtype):
    """Several tiles and chunks, with neighbours and without; "few": one key in ten has one, and rows have no alignment."""
    from distilkernels.kernels.key_redundancy import CONFIG, launches

    t, d, threshold = 203, 45 if kind == "few" else 48, 0.5
    keys = listing.keys_of("random" if kind == "few" else kind, 2, 2, t, d)
    if kind == "few":
        places = torch.randperm(t, generator=torch.Generator().manual_seed(4))[:34]
        keys[:, :, places[:17]] = keys[:, :, places[17:]] + 0.3 * torch.randn(2, 2, 17, d)
    keys = keys.to(dtype)
    start, stop, mask, _, _ = spans(t)
    found = []
    for device, floats in ((DEVICE, torch.float32), ("cpu", torch.float64)):
        make = lambda kind, device=device: torch.empty(2, 2, t, dtype=kind, device=device)
        out = Redundancy(make(floats), make(torch.int32), make(floats))
        if floats == torch.float32:
            for launch in launches(*on_device(keys, start, stop, mask), threshold, out, replace(CONFIG, chunk=128, columns=64, float_step=16)):
                launch.run()
        else:
            redundancy(keys.double(), start, stop, mask, threshold, out)
        found.append(Redundancy(*(x.cpu() for x in out)))
    got, want = found
    same = got.last == want.last
    # a pair may lie on the threshold to a float's precision
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    for b, h, i in (~same).nonzero().tolist():
        assert abs(float(unit[b, h, i] @ unit[b, h, max(int(got.last[b, h, i]), int(want.last[b, h, i]))]) - threshold) < 1e-6
    assert same.float().mean() > 0.999
    torch.testing.assert_close(got.cosine[same].double(), want.cosine[same], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.similarity.double(), want.similarity, rtol=1e-5, atol=1e-4)


@on_triton
@pytest.mark.parametrize("how", [("smooth_l1", None), ("mse", "inputs"), ("l1", "layer_std"), ("cosine", None)], ids=str)
def test_native_tiles_of_a_pair(how):
    """Pairs of three shapes and two pairs of dtypes, more tiles than programs, rows wider than a tile, no mask beside a mask."""
    from distilkernels.kernels.kv_align import CONFIG, launches

    shapes = [(2, 3, 11, 40), (1, 2, 5, 130), (2, 1, 7, 8)]
    g = torch.Generator().manual_seed(5)
    make = lambda dtype: [(torch.randn(shape, generator=g) * 2 + 1).to(dtype) for shape in shapes]
    student, teacher = make(torch.float32) + make(torch.bfloat16), make(torch.float32) + make(torch.float32)
    masks = [None if i % 2 else torch.rand(s.shape[:3], generator=g) > 0.3 for i, s in enumerate(student)]
    coef = torch.tensor([0.5, 1.0, 0.0, 3.0, 1.0, 0.25], dtype=torch.float64)
    distance = Distance(how[0], 0.7, how[1])
    grads, sums = [torch.empty_like(s, device=DEVICE) for s in student], torch.empty(6, dtype=torch.float64, device=DEVICE)
    config = replace(CONFIG, tile=512, widest=64, programs=9)
    sides = on_device(*student), on_device(*teacher), on_device(*masks)
    for launch in launches(*sides, distance, coef.to(DEVICE), sums, grads, config):
        launch.run()
    exact, wanted = torch.empty(6, dtype=torch.float64), [torch.empty_like(s, dtype=torch.float64) for s in student]
    alignment([s.double() for s in student], [x.double() for x in teacher], masks, distance, coef, exact, wanted)
    torch.testing.assert_close(sums.cpu(), exact, rtol=2e-6, atol=1e-6)
    for got, want in zip(grads, wanted):
        slack = 4e-3 if got.dtype == torch.bfloat16 else 3e-6
        torch.testing.assert_close(got.double().cpu(), want, rtol=slack, atol=slack * float(want.abs().max()) * (1 if slack > 1e-3 else 0.1))


@on_triton
def test_native_a_head_is_compacted_over_itself():
    """Many chunks in place, turned and not, in rows that overlap what is read next."""
    from distilkernels.kernels.kv_gather import CONFIG, launch

    t, m, d = 97, 61, 24
    keys, values = torch.randn(2, 2, t, d), torch.randn(2, 2, t, 40).bfloat16()
    indices = torch.stack([torch.randperm(t)[:m].sort().values for _ in range(4)]).view(2, 2, m).int()
    indices[1, 1, 50:] = -1
    table = torch.arange(t)[:, None] * torch.tensor([1.0, 0.3, 0.1])
    to = torch.arange(m, dtype=torch.int32).expand(2, 2, m).contiguous()
    for rotation in (None, Rotation(table.cos(), table.sin(), indices.clamp(min=0), to, False)):
        want = [torch.empty(2, 2, m, x.shape[3], dtype=x.dtype) for x in (keys, values)]
        gathered(keys, values, indices, rotation, *want)
        k, v = (x.to(DEVICE).clone() for x in (keys, values))
        turned = rotation and Rotation(*on_device(*rotation))
        config = replace(CONFIG, inplace_chunk_bytes=512)
        launch(k, v, indices.to(DEVICE), turned, k[:, :, :m], v[:, :, :m], True, config).run()
        torch.testing.assert_close(k[:, :, :m].cpu(), want[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(v[:, :, :m].cpu(), want[1]) and torch.equal(k[:, :, m:].cpu(), keys[:, :, m:])


# ----------------------------------------------------------------------------------------- ahead of time


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def gather_case(dtype, values_dtype=None, half=0, inplace=False, d=128, dv=128, target=True):
    from distilkernels.kernels.kv_gather import launch

    keys, values, indices = meta(8, 8, 8192, d, dtype=dtype), meta(8, 8, 8192, dv, dtype=values_dtype or dtype), meta(8, 8, 2048, dtype=torch.int32)
    out = [x[:, :, :2048] if inplace else meta(8, 8, 2048, x.shape[3], dtype=x.dtype) for x in (keys, values)]
    table = meta(9000, half, dtype=torch.float32)
    rotation = Rotation(table, table, indices, indices if target else None, not target) if half else None
    return [launch(keys, values, indices, rotation, *out, inplace)]


def recurrence_case(dtype, width=1):
    from distilkernels.kernels.recurrence_update import launch

    state = meta(8, 8, 8192, dtype=torch.int32)
    return [launch(meta(8, 32, width, 8192, dtype=dtype), state, state, 1000, 5e-4)]


def importance_case(dtype, group_reduce, window=32, groups=4, d=128, similar=True, causal=False, given=False):
    from distilkernels.kernels.window_importance import launches

    span, mask, sums = meta(8, dtype=torch.int32), meta(8, 8192, dtype=torch.bool), meta(8, 8, 8192, dtype=torch.float32)
    queries, keys = meta(8, 8 * groups, window, d, dtype=dtype), meta(8, 8, 8192, d, dtype=dtype)
    lse = meta(8, 8 * groups, window, dtype=torch.float32) if given else None
    out = meta(8, 8 * groups if group_reduce == "none" else 8, 8192, dtype=torch.float32)
    how = Scoring(0.1, group_reduce, "mean", causal)
    return launches(queries, keys, span, span, mask, meta(8, window, dtype=torch.bool), how, lse, out, Similarity(span, span, sums) if similar else None)


def redundancy_case(dtype, d=128, masked=True):
    from distilkernels.kernels.key_redundancy import launches

    from distilkernels.primitives.key_redundancy import Redundancy

    floats, span = meta(8, 8, 8192, dtype=torch.float32), meta(8, dtype=torch.int32)
    out = Redundancy(floats, meta(8, 8, 8192, dtype=torch.int32), floats)
    return launches(meta(8, 8, 8192, d, dtype=dtype), span, span, meta(8, 8192, dtype=torch.bool) if masked else None, 0.5, out)


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
    "redundancy": lambda: redundancy_case(torch.bfloat16),
    "redundancy-padded": lambda: redundancy_case(torch.bfloat16, 80),
    "redundancy-float32": lambda: redundancy_case(torch.float32, masked=False),
    "redundancy-widest": lambda: redundancy_case(torch.float16, 256)[-1:],
    "importance-max_logits": lambda: importance_case(torch.bfloat16, "max_logits"),
    "importance-max_probs": lambda: importance_case(torch.bfloat16, "max_probs", 64, d=80),
    "importance-mean_probs": lambda: importance_case(torch.float16, "mean_probs", 8, 7, d=256),
    "importance-none": lambda: importance_case(torch.bfloat16, "none", causal=True, given=True)[-1:],
    "importance-float32": lambda: importance_case(torch.float32, "max_logits", 8),
    "recurrence": lambda: recurrence_case(torch.float32),
    "recurrence-prefill": lambda: recurrence_case(torch.bfloat16, 32),
}
# where registers were shortest, on the device where they were
CORNERS = {
    "redundancy-no_alignment": (80, lambda: redundancy_case(torch.bfloat16, 70, masked=False)[-1:]),
    "redundancy-float32-no_alignment": (100, lambda: redundancy_case(torch.float32, 33, masked=False)[-1:]),
    "redundancy-wider": (80, lambda: redundancy_case(torch.bfloat16, 512)[-1:]),
    "importance-few_queries": (100, lambda: importance_case(torch.bfloat16, "max_probs", 8, d=64)),
    "importance-blocks": (100, lambda: importance_case(torch.bfloat16, "mean_probs", 64, d=64, causal=True)),
    "importance-no_alignment": (100, lambda: importance_case(torch.bfloat16, "none", d=70, causal=True)),
    "importance-float32-widest": (80, lambda: importance_case(torch.float32, "none", d=256, causal=True)),
}
# kernels bound by memory, which should read it 16 bytes at a time
_WIDE = ("_gather_kernel", "_recurrence_kernel", "_terms_kernel", "_moments_kernel", "_unit_kernel", "_similarity_kernel")


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_spills(variant, tmp_path, record_property):
    """What the launchers launch builds for sm_80, sm_90 and sm_100 without spilling, and whole rows are read 16 bytes at a time."""
    for launch, kernel, name in built(VARIANTS[variant](), tmp_path, record_property):
        if launch.kernel.__name__ in _WIDE and "odd" not in variant:
            assert re.search(r"(ld\.global[\w.:]*\.v4\.b32|cp\.async\.cg)", kernel.asm["ptx"]), f"{name}: no 16-byte loads"


@compiled
@pytest.mark.parametrize("corner", CORNERS)
def test_corners_compile_without_spills(corner, tmp_path, record_property):
    capability, launches = CORNERS[corner]
    assert list(built(launches(), tmp_path, record_property, (capability,)))


# ----------------------------------------------------------------------------------------------- on a device


@gpu
@pytest.mark.gpu
def test_no_synchronisation():
    """Scores, a gather and an alignment with its table of addresses queue without waiting for the device; twice the same bits."""
    queries, keys = torch.randn(2, 32, 32, 128, dtype=torch.bfloat16, device="cuda"), torch.randn(2, 8, 4097, 128, dtype=torch.bfloat16, device="cuda")
    start, stop = torch.zeros(2, dtype=torch.int32, device="cuda"), torch.full((2,), 4097, dtype=torch.int32, device="cuda")
    indices = torch.arange(0, 4097, 4, dtype=torch.int32, device="cuda").expand(2, 8, -1).contiguous()
    coef = torch.ones(4, dtype=torch.float64, device="cuda")

    def once():
        scores, sums = window_scores(queries, keys, start, stop, None, None, Scoring(0.1), None, (start, stop), "triton")
        near = redundant(keys, start, stop, None, 0.5, True, True, "triton")
        k, v = gather(keys, keys, indices, backend="triton")
        total, grads = aligned([k, v] * 2, [v, k] * 2, [None] * 4, Distance("mse", 1.0, "inputs"), coef, True, "triton")
        return [scores, sums, *near, k, v, total, *grads]

    first = once()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second))
