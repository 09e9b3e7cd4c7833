"""CUDA C++: run on a CPU by the emulation in tests/cuda_on_cpu, compiled by NVRTC for three architectures, and its cache of machine code.

Where there is a CUDA device, tests/test_capture.py holds the same kernel to the same truth natively.
"""

from __future__ import annotations

import io
import math
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks.cases import CONTRACT
from test_capture import adversaries, assert_truth

from distilkernels import backends
from distilkernels.backends import cuda, nvrtc
from distilkernels.primitives.boundary import rows_of
from distilkernels.primitives.head import Head
from distilkernels.primitives.topk_select import TopK, allocate, top_k

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc" / "cuda"
EMULATION = ROOT / "tests" / "cuda_on_cpu"
COMPILER = shutil.which("g++") or shutil.which("c++")
SANITIZED = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QWEN = 151_936
PLAIN = Head()
# chosen so that the rows of these tests have tiles of one lane and of several
TILES = 100

emulated = pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="the emulation needs g++ and Linux")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Emulator:
    """Builds the kernel as a CPU program for each set of compile-time parameters, once, and runs it."""

    def __init__(self, folder: Path):
        self.folder, self.programs = folder, {}

    def program(self, defines: tuple, flags: tuple[str, ...], sources: Path) -> Path:
        key = (defines, flags, sources)
        if key not in self.programs:
            path = self.folder / f"topk_select-{len(self.programs)}"
            command = [COMPILER, "-std=c++17", "-g", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Werror", f"-I{EMULATION}", f"-I{sources}"]
            command += [f"-D{name}={value}" for name, value in defines] + [*flags, str(EMULATION / "topk_select.cpp"), "-o", str(path)]
            built = subprocess.run(command, capture_output=True, text=True)
            assert built.returncode == 0, built.stderr
            self.programs[key] = path
        return self.programs[key]

    def top_k(
        self, logits: torch.Tensor, k: int, head: Head = PLAIN, *, threads=64, tiles=TILES, seed=0, offset=0, flags=("-O2",), sources=SOURCES
    ) -> TopK:  # fmt: skip
        """What the kernel writes for logits [O, I, V] that start `offset` bytes after a 16-byte boundary."""
        launch = cuda.topk_select_launch(logits, head, allocate(logits, k), threads, tiles)
        defines = launch.defines if offset == 0 else tuple((n, 0 if n == "ALIGNED" else v) for n, v in launch.defines)
        arguments = map(repr, (launch.grid, *launch.arguments[1:8], seed, offset))
        storage = logits.flatten().view(torch.uint8) if logits.is_contiguous() else torch.tensor(logits.untyped_storage(), dtype=torch.uint8)
        command = [str(self.program(defines, flags, sources)), *arguments]
        ran = subprocess.run(command, input=storage.numpy().tobytes(), capture_output=True, timeout=300)
        assert ran.returncode == 0, ran.stderr.decode()[-4000:]
        n = launch.grid
        kinds = ((torch.float32, (n, k)), (torch.int32, (n, k)), (torch.float64, (n,)), (torch.float64, (n,)))
        out, at = [], 0
        for dtype, shape in kinds:
            size = math.prod(shape) * dtype.itemsize
            out.append(torch.frombuffer(bytearray(ran.stdout[at : at + size]), dtype=dtype).view(shape))
            at += size
        return TopK(*out)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("emulated"))


def assert_adversaries(emulator: Emulator, v: int, k: int, dtype: torch.dtype, **options) -> None:
    rows = adversaries(v, k, dtype)
    got = emulator.top_k(torch.stack(list(rows.values()))[None], k, **options)
    for i, name in enumerate(rows):
        mine = TopK(*(t[i : i + 1] for t in got))
        try:
            assert_truth(mine, rows[name][None], k, {})
        except AssertionError as reason:
            raise AssertionError(f"{name}: {reason}") from reason
        if mine.lse.isnan():
            assert mine.values.isnan().all(), name


# ------------------------------------------------------------------------------------- the kernel, on a CPU


@emulated
@pytest.mark.parametrize(
    "v,k,tiles,why",
    [
        (1531, 64, TILES, "two lanes to a tile, a tile that ends beyond the row"),
        (6007, 1000, 800, "fewer tiles than K and more candidates than there is room for: the bound is narrowed"),
        (515, 515, 32, "K = V"),
        (4096, 1, 16, "a tile as wide as a warp"),
        (70, 3, TILES, "shorter than a warp"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_adversarial_rows(emulator, dtype, v, k, tiles, why):
    assert_adversaries(emulator, v, k, dtype, tiles=tiles)


@emulated
@pytest.mark.parametrize("case", [c for c in CONTRACT if c.n and c.ids_dtype == torch.int64 and c.v > 1], ids=lambda c: c.name)
def test_contract(emulator, case):
    """Heads, strides and contents, as tests/test_capture.py has them."""
    dtype = DTYPES[CONTRACT.index(case) % 2]
    logits, head = case.logits(dtype), Head.checked(case.v, **case.head)
    assert_truth(emulator.top_k(rows_of(logits), min(case.k, case.v), head), logits, min(case.k, case.v), case.head)


@emulated
@pytest.mark.parametrize("head", [{"logit_scale": -0.5}, {"logit_scale": 0.0}, {"softcap": 0.1}, {"softcap": 2.0, "logit_scale": -3.0}], ids=str)
def test_the_order_is_that_of_the_raw_logits(emulator, head):
    logits = (torch.randn(3, 515, generator=torch.Generator().manual_seed(4)) * 3).to(torch.bfloat16)
    if head.get("logit_scale"):
        logits[1, ::3], logits[2, 400:] = -math.inf, math.inf
    if head.get("softcap"):
        # infinities are finite z there; under no softcap +∞ leaves no distribution
        assert_truth(emulator.top_k(logits[None], 17, Head.checked(515, **head)), logits, 17, head)
    else:
        assert_truth(emulator.top_k(logits[None, :2], 17, Head.checked(515, **head)), logits[:2], 17, head)


@emulated
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d).removeprefix("torch."))
def test_rows_off_a_boundary_and_sanitized(emulator, dtype):
    """Every alignment of the first row gives the same bits, and no load leaves the 16-byte granules of the logits."""
    logits = (torch.randn(1, 2, 1031, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    first = emulator.top_k(logits, 33, flags=SANITIZED)
    assert_truth(first, logits[0], 33, {})
    for offset in range(dtype.itemsize, 16, 4 if dtype == torch.float32 else 6):
        for mine, theirs in zip(emulator.top_k(logits, 33, offset=offset, flags=SANITIZED), first):
            assert torch.equal(mine, theirs)
    aligned = logits[..., :1024].contiguous()
    for mine, theirs in zip(emulator.top_k(aligned, 33), emulator.top_k(aligned, 33, offset=dtype.itemsize)):
        assert torch.equal(mine, theirs)


@emulated
@pytest.mark.parametrize("v,k,tiles", [(1031, 64, TILES), (5003, 1000, 700)])
def test_any_order_of_threads(emulator, v, k, tiles):
    """Sanitized, and the same bits whichever warp runs ahead between barriers."""
    assert_adversaries(emulator, v, k, torch.float32, tiles=tiles, flags=SANITIZED)
    logits = torch.randn(1, 2, v, generator=torch.Generator().manual_seed(2)).mul(4).round()
    first = emulator.top_k(logits, k, tiles=tiles, flags=SANITIZED)
    for seed in range(1, 4):
        for mine, theirs in zip(emulator.top_k(logits, k, tiles=tiles, seed=seed, flags=SANITIZED), first):
            assert torch.equal(mine, theirs)


@emulated
@pytest.mark.parametrize("function", ["find", "clear", "sort_descending"])
def test_a_missing_barrier_is_noticed(emulator, tmp_path, function):
    """The emulation itself: without the first barrier of these functions no order of threads would be safe."""
    source = shutil.copytree(SOURCES, tmp_path / "cuda") / "block.cuh"
    before, body = re.split(rf"(?<= {function}\()", source.read_text(), maxsplit=1)
    source.write_text(before + body.replace("__syncthreads();", "", 1))
    with pytest.raises(AssertionError):
        for seed in range(3):
            assert_adversaries(emulator, 1031, 64, torch.bfloat16, seed=seed, sources=source.parent)


@emulated
def test_full_vocabulary_as_launched(emulator):
    """The threads and tiles of a launch on a device."""
    logits = (torch.randn(1, QWEN, generator=torch.Generator().manual_seed(1)) * 3).to(torch.bfloat16)
    for k in (64, 1024):
        got = emulator.top_k(logits[None], k, threads=cuda._THREADS, tiles=cuda._TILES)
        assert_truth(got, logits, k, {})


# ------------------------------------------------------------------------------------------ ahead of time

VARIANTS = {
    "bfloat16": (torch.bfloat16, {}, QWEN),
    "float16": (torch.float16, {}, QWEN),
    "float32": (torch.float32, {}, QWEN),
    "bfloat16-odd": (torch.bfloat16, {}, QWEN + 1),
    "float32-odd": (torch.float32, {}, QWEN + 1),
    "short": (torch.bfloat16, {}, 32_000),
    "wide": (torch.float16, {}, 1_000_000),
    "negative": (torch.bfloat16, {"logit_scale": -1.0}, QWEN),
    "zero": (torch.bfloat16, {"logit_scale": 0.0}, QWEN),
    "softcap": (torch.bfloat16, {"softcap": 30.0, "temperature": 2.0}, QWEN),
    "softcap-odd": (torch.float32, {"softcap": 30.0}, QWEN + 1),
}


@pytest.fixture(scope="module")
def compiler():
    pytest.importorskip("cuda.core", reason="cuda-core is not installed (pip install 'distilkernels[cuda]')")
    try:
        return nvrtc.version()
    except RuntimeError as reason:
        pytest.skip(f"NVRTC is not installed: {reason}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_spills(compiler, variant, record_property):
    """What the launcher launches builds for sm_80, sm_90a and sm_100 without local memory, in static shared memory, at the occupancy it is meant for."""
    dtype, head, vocab = VARIANTS[variant]
    logits = torch.empty(1, 8192, vocab, dtype=dtype, device="meta")
    launch = cuda.topk_select_launch(logits, Head.checked(vocab, **head), allocate(logits, 64))
    for architecture in ("sm_80", "sm_90a", "sm_100"):
        log = io.StringIO()
        assert nvrtc.compiled(launch.name, architecture, dict(launch.defines), log)[:4] == b"\x7fELF"
        used = log.getvalue()
        record_property(f"{variant} {architecture}", used)
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in used, used
        registers, shared = (int(re.search(pattern, used)[1]) for pattern in (r"Used (\d+) registers", r"(\d+) bytes smem"))
        assert shared <= 48 * 1024 and registers * cuda._THREADS * cuda._BLOCKS <= 65_536, used


# --------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """A cache in an empty folder, over a compiler that only counts."""
    calls = []

    def compiled(name, architecture, defines, log=None):
        calls.append(defines)
        time.sleep(0.02)
        return b"machine code of " + repr(sorted(defines.items())).encode()

    monkeypatch.setattr(nvrtc, "compiled", compiled)
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    monkeypatch.setenv("DISTILKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    nvrtc._warn_uncached.cache_clear()
    return SimpleNamespace(calls=calls, folder=tmp_path / "cache")


def test_cache_compiles_once_for_each_content(counted, monkeypatch):
    code = nvrtc.cubin("topk_select", "sm_90", {"LOGIT": 1})
    assert nvrtc.cubin("topk_select", "sm_90", {"LOGIT": 1}) == code and len(counted.calls) == 1
    assert nvrtc.cubin("topk_select", "sm_90", {"LOGIT": 0}) != code
    nvrtc.cubin("topk_select", "sm_80", {"LOGIT": 1})
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 1))
    nvrtc.cubin("topk_select", "sm_90", {"LOGIT": 1})
    monkeypatch.setitem(nvrtc._OPTIONS, "fma", True)
    nvrtc.cubin("topk_select", "sm_90", {"LOGIT": 1})
    assert len(counted.calls) == 5 and len(list(counted.folder.iterdir())) == 5


def test_cache_follows_the_sources(counted, monkeypatch, tmp_path):
    sources = shutil.copytree(SOURCES, tmp_path / "sources")
    monkeypatch.setattr(nvrtc, "_sources", lambda: sources)
    nvrtc.cubin("topk_select", "sm_90", {})
    (sources / "mass.cuh").write_text((sources / "mass.cuh").read_text() + "\n")
    nvrtc.cubin("topk_select", "sm_90", {})
    assert len(counted.calls) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
def test_a_damaged_entry_is_compiled_again(counted, damage):
    code = nvrtc.cubin("topk_select", "sm_90", {})
    (entry,) = counted.folder.iterdir()
    content = entry.read_bytes()
    entry.write_bytes({"truncated": content[:-1], "empty": b"", "flipped": content[:-1] + bytes([content[-1] ^ 1])}[damage])
    assert nvrtc.cubin("topk_select", "sm_90", {}) == code and len(counted.calls) == 2
    assert entry.read_bytes() == content


def test_a_folder_that_cannot_be_written(counted):
    counted.folder.write_text("a file is in the way")
    with pytest.warns(UserWarning, match="cannot be kept in .*cache"):
        code = nvrtc.cubin("topk_select", "sm_90", {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nvrtc.cubin("topk_select", "sm_90", {}) == code
    assert len(counted.calls) == 2


def test_many_writers_leave_one_whole_entry(counted):
    codes = []
    writers = [threading.Thread(target=lambda: codes.append(nvrtc.cubin("topk_select", "sm_90", {}))) for _ in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(codes) == 8 and len(set(codes)) == 1
    assert [f.suffix for f in counted.folder.iterdir()] == [".cubin"]


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("DISTILKERNELS_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME" if sys.platform != "win32" else "LOCALAPPDATA", str(tmp_path))
    assert nvrtc.cache_folder() == tmp_path / "distilkernels"


# ------------------------------------------------------------------------------------------------ refusals


def test_refusals_are_sentences(monkeypatch):
    def probe(device="cuda:0", dtype=torch.float32, vocab=8):
        return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 1, vocab))

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(nvrtc, "why_not", lambda: "cuda-core is not installed")
    assert "no CUDA C++ kernel for vocab_stats: triton serves it" in cuda.why_not("vocab_stats", probe())
    assert "got a cpu tensor" in cuda.why_not("topk_select", torch.empty(1, 1, 8))
    assert "got torch.float64" in cuda.why_not("topk_select", probe(dtype=torch.float64))
    assert "up to 1,228,800 logits; got 1,228,801" in cuda.why_not("topk_select", probe(vocab=1_228_801))
    assert "cuda:0 has 7.5" in cuda.why_not("topk_select", probe())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert cuda.why_not("topk_select", probe()) == "cuda-core is not installed"
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert "ROCm" in cuda.why_not("topk_select", probe())


def test_what_is_missing_is_named(monkeypatch):
    def missing(name):
        return None if name == "cuda.core" else SimpleNamespace()

    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", missing)
    assert nvrtc.why_not.__wrapped__() == "cuda-core is not installed (pip install 'distilkernels[cuda]')"


def test_nothing_of_cuda_is_imported_for_cpu_tensors():
    code = (
        "import sys, torch, distilkernels as dk; dk.capture_topk(torch.randn(2, 9), 3); dk.backends.support(['cpu'])\n"
        "assert 'distilkernels.backends.cuda' in sys.modules and 'cuda.core' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# ---------------------------------------------------------------------------------------------- on a device


@pytest.fixture
def on_device():
    reason = backends.module("cuda").why_not("topk_select", torch.empty(1, 1, 8, device="cuda"))
    if reason:
        pytest.skip(reason)


@gpu
@pytest.mark.gpu
def test_streams_graphs_and_no_synchronisation(on_device):
    """Queued on the current stream without a wait, capturable, and the same bits each time."""
    x = torch.randn(300, QWEN, dtype=torch.bfloat16, device="cuda")
    first = top_k(x, 64, PLAIN, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            second = top_k(x, 64, PLAIN, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    still = x.clone()
    with torch.cuda.graph(graph):
        third = top_k(still, 64, PLAIN, "cuda")
    still.copy_(x.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(first, second, third):
        assert torch.equal(a, b) and torch.equal(a.flip(0), c)


@gpu
@pytest.mark.gpu
def test_bits_do_not_depend_on_alignment_or_batch(on_device):
    for dtype in DTYPES:
        storage = torch.randn(5 * 50_257 + 8, device="cuda").to(dtype)
        odd = storage[1 : 1 + 5 * 50_257].view(5, 50_257)
        whole = top_k(odd, 200, PLAIN, "cuda")
        for mine, theirs in zip(whole, top_k(odd[3:4].clone(), 200, PLAIN, "cuda")):
            assert torch.equal(mine[3:4], theirs)


@gpu
@pytest.mark.gpu
@pytest.mark.large
def test_addresses_beyond_2_to_31(on_device):
    x = torch.empty(14_200, QWEN, dtype=torch.bfloat16, device="cuda").normal_()
    got = top_k(x, 64, PLAIN, "cuda")
    assert_truth(TopK(*(t[-3:] for t in got)), x[-3:].cpu(), 64, {})
