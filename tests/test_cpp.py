"""The C++ kernels against the fp64 reference, on every instruction set of this machine."""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from distilkernels.backends import cpp
from distilkernels.primitives.head import Head
from distilkernels.primitives.vocab_stats import VocabStats, allocate, reference, reference_backward

pytestmark = pytest.mark.skipif(cpp._cpp is None, reason="distilkernels._cpp is not built")

ROOT = Path(__file__).parent.parent
ISAS = cpp.available_isas() if cpp._cpp is not None else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EVERYTHING = VocabStats._fields
INTEGERS = ("finite_count", "argmax", "rank")

SHAPES = {
    "one column": (1, 3, 1, 1),
    "narrower than a vector, K = V": (2, 1, 3, 3),
    "one row, prime V": (1, 1, 1009, 7),
    "prime V, K = 1": (1, 5, 4099, 1),
    "more ids than a comparison loop is good for": (1, 3, 5000, 300),
    "K = V": (1, 2, 257, 257),
    "a block past the chunk": (1, 2, 4096 + 64, 5),
}
HEADS = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "scale": dict(logit_scale=-0.3, temperature=2.0),
    "softcap": dict(softcap=30.0, temperature=0.5),
    "valid columns": dict(valid_vocab=-1),  # one fewer than V
}


def head_of(name: str, vocab: int) -> Head:
    options = dict(HEADS[name])
    if options.get("valid_vocab") == -1:
        options["valid_vocab"] = max(1, vocab - 1)
    return Head.checked(vocab, **options)


def rows(outer, inner, vocab, k, dtype, spread=3.0, seed=0):
    """Logits [O, I, V] with −inf entries, and ids [N, K] with an empty slot, one out of range and a duplicate."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(outer, inner, vocab, generator=g) * spread).to(dtype)
    x[-1, -1, 1::3] = -math.inf
    ids = torch.stack([torch.randperm(vocab, generator=g)[:k] for _ in range(outer * inner)])
    if k > 2:
        ids[0, 1], ids[-1, 2], ids[-1, 0] = -1, ids[-1, 1], vocab
    return x, ids


def stats(launch, x, ids, head, names=EVERYTHING, thresholds=None):
    if ids is None:
        names = tuple(name for name in names if name not in ("gathered", "tail_lse", "rank", "mass_above"))
    out = allocate(x, ids, names)
    for t in out.values():
        t.fill_(-12345)
    launch(x, ids, thresholds, head, out)
    return out


def assert_as_good(name, ours, same_dtype, truth, scale, slack):
    """Error against truth no worse than same-dtype PyTorch's plus `slack` of `scale`; NaN and infinities where truth has them."""
    ours, same_dtype, truth = ours.double(), same_dtype.double(), truth.double()
    torch.testing.assert_close(ours.isnan(), truth.isnan(), msg=lambda m: f"{name}: NaN\n{m}")
    wild = truth.isinf() | truth.isnan()
    assert torch.equal(ours[wild].nan_to_num(7.0), truth[wild].nan_to_num(7.0)), name
    error, peer = ((t - truth).abs().masked_fill(wild, 0) for t in (ours, same_dtype))
    peer = peer.masked_fill(peer.isnan(), 0)
    allowed = peer.amax() + slack * scale.masked_fill(wild, 0).nan_to_num(0)
    assert (error <= allowed).all(), f"{name}: off by {(error - allowed).max().item():.3g} more than allowed"


def assert_statistics(x, ids, head, ours, expected=None):
    same, truth = expected or (stats(reference, x, ids, head), stats(reference, x.double(), ids, head))
    slack = 1e-13 if x.dtype == torch.float64 else 1e-6
    z = head.apply(x.double()).view(-1, x.shape[-1])
    mass = torch.where(z.isfinite(), z.abs(), 0).sum(-1)
    # the tanh of a kernel may order two neighbouring logits differently from truth
    approximate = head.softcap is not None and x.dtype != torch.float64
    for name in ours:
        if name in INTEGERS:
            if name == "finite_count" and not truth["lse"].isnan().any():
                assert torch.equal(ours[name], truth[name])
            elif name != "finite_count" and not approximate:
                assert torch.equal(ours[name], same[name]), name
        elif name == "mass_above":
            if not approximate:
                assert_as_good(name, ours[name], same[name], truth[name], torch.ones_like(truth[name]), max(slack, 1e-12) * 4)
        else:
            scale = mass.nan_to_num(0) if name == "logit_sum" else truth[name].abs().clamp(min=1)
            assert_as_good(name, ours[name], same[name], truth[name], scale, slack)


@functools.cache
def statistics_case(shape, dtype, name, spread):
    """Rows and what the reference says of them, once for all instruction sets."""
    (x, ids), head = rows(*shape, dtype, spread), head_of(name, shape[2])
    return x, ids, head, (stats(reference, x, ids, head), stats(reference, x.double(), ids, head))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_statistics(isa, dtype, shape):
    for name, spread in itertools.product(HEADS, (3.0, 60.0) if shape[3] < 300 else (3.0,)):
        x, ids, head, expected = statistics_case(shape, dtype, name, spread)
        ours = stats(cpp.vocab_stats, x, ids.int() if name == "plain" else ids, head)
        assert_statistics(x, ids, head, ours, expected)


def test_full_vocabulary(isa):
    x, ids, head, expected = statistics_case((1, 2, 151_936, 16), torch.float32, "plain", 3.0)
    assert_statistics(x, ids, head, stats(cpp.vocab_stats, x, ids, head), expected)


def test_without_ids(isa):
    x, _ = rows(2, 3, 1009, 1, torch.float32)
    ours = stats(cpp.vocab_stats, x, None, Head())
    truth = stats(reference, x.double(), None, Head())
    for name in ours:
        torch.testing.assert_close(ours[name], truth[name], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_only_what_is_asked_for(isa):
    """Each output alone gives the bits it has among all: what is computed beside it does not matter beyond rounding."""
    x, ids = rows(1, 3, 1009, 7, torch.float32)
    together = stats(cpp.vocab_stats, x, ids, Head(temperature=0.5))
    for name in EVERYTHING:
        alone = stats(cpp.vocab_stats, x, ids, Head(temperature=0.5), (name,))
        torch.testing.assert_close(alone[name], together[name], rtol=1e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_spoils_its_row_only(isa, dtype):
    x, ids = rows(1, 4, 1009, 7, dtype)
    clean = stats(cpp.vocab_stats, x, ids, Head())
    spoiled = x.clone()
    spoiled[0, 1, 700] = math.nan
    spoiled[0, 2, ids[2, 3]] = math.nan  # a NaN at an id is hidden from the sweep
    ours = stats(cpp.vocab_stats, spoiled, ids, Head())
    for name, t in ours.items():
        if name in ("argmax", "rank"):
            assert (t[1:3] == -1).all(), name
        elif name == "gathered":
            assert t[1:3].isnan().all()
        elif name != "finite_count":
            assert t[1:3].isnan().all(), name
        for r in (0, 3):
            assert torch.equal(t[r].nan_to_num(0), clean[name][r].nan_to_num(0)), name


def test_masked_rows(isa):
    """All −inf: lse −inf, max −inf at column 0, nothing finite. S covering every finite column: tail −inf."""
    x = torch.full((1, 2, 70), -math.inf)
    x[0, 1, 3], x[0, 1, 66] = 1.0, 2.0
    out = stats(cpp.vocab_stats, x, torch.tensor([[3, 66], [66, 3]]), Head())
    assert out["lse"][0] == -math.inf and out["max"][0] == -math.inf and out["argmax"][0] == 0 and out["finite_count"][0] == 0
    assert out["tail_lse"].tolist() == [-math.inf, -math.inf]
    torch.testing.assert_close(out["lse"][1], torch.tensor([1.0, 2.0], dtype=torch.float64).logsumexp(0))
    assert out["rank"][1].tolist() == [0, 1] and out["argmax"][1] == 66


def test_ties_take_the_lowest_id(isa):
    x = torch.zeros(1, 2, 9001)
    x[0, :, [5, 4100, 9000]] = 7.0
    ids = torch.tensor([[4100], [5]])  # the tie with an id is settled outside the sweep
    assert stats(cpp.vocab_stats, x, ids, Head(), ("argmax",))["argmax"].tolist() == [5, 5]
    assert stats(cpp.vocab_stats, x, ids, Head(), ("rank",))["rank"].tolist() == [[0], [0]]


def test_tail_at_a_mass_of_1e_8(isa):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 50_021, generator=g)
    ids = torch.tensor([[7, 49_999], [0, 50_020]])
    x[0].scatter_(1, ids, x[0].logsumexp(-1, keepdim=True).expand(2, 2) + 18.4)
    out = stats(cpp.vocab_stats, x, ids, Head(), ("lse", "tail_lse"))
    truth = stats(reference, x.double(), ids, Head(), ("lse", "tail_lse"))
    assert (out["tail_lse"] - out["lse"]).max() < math.log(1e-8)
    assert (out["tail_lse"] - truth["tail_lse"]).abs().max() < 1e-5


@pytest.mark.parametrize("order", ["ascending", "descending", "alternating", "shuffled"])
def test_spreads_of_1e4(isa, order):
    """The reference of a one-pass log-sum-exp is wrong by thousands of nats here, at its start or at its end."""
    v = 20_011
    ramp = torch.linspace(-1e4, 1e4, v)
    shuffled = ramp[torch.randperm(v, generator=torch.Generator().manual_seed(0))]
    alternating = torch.stack([ramp, ramp.flip(0)], 1).flatten()[:v]
    x = {"ascending": ramp, "descending": ramp.flip(0), "alternating": alternating, "shuffled": shuffled}[order].view(1, 1, v)
    ids = torch.tensor([[0, v // 2, v - 1]])
    assert_statistics(x, ids, Head(), stats(cpp.vocab_stats, x, ids, Head()))


def test_thresholds_replace_the_gathered_logits(isa):
    x, ids = rows(1, 3, 1009, 7, torch.float32)
    thresholds = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)) * 4
    ours = stats(cpp.vocab_stats, x, ids, Head(), ("lse", "rank", "mass_above"), thresholds)
    truth = stats(reference, x, ids, Head(), ("lse", "rank", "mass_above"), thresholds)
    assert torch.equal(ours["rank"], truth["rank"])
    torch.testing.assert_close(ours["mass_above"], truth["mass_above"], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_layouts(isa):
    """logits[:, :-1], three-level strides, and rows that start off any alignment are read in place."""
    base = torch.randn(3, 5, 1013, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(1000, (12, 4), generator=torch.Generator().manual_seed(1))
    for x in (base[:, :-1], base[:, 1:, 3:1010], base.transpose(0, 1)[:4], base[:, :4, 1:]):
        ours = stats(cpp.vocab_stats, x, ids, Head())
        packed = stats(cpp.vocab_stats, x.contiguous(), ids, Head())
        assert all(torch.equal(ours[n].nan_to_num(0), packed[n].nan_to_num(0)) for n in ours)
        coef = torch.rand(12, 6, dtype=torch.float64)
        fresh, strided = torch.empty(x.shape), torch.full_like(base, 7.0)
        view = strided.as_strided(x.shape, x.stride(), x.storage_offset())
        entries = torch.randn(12, 4)
        for out in (fresh, view):
            cpp.vocab_stats_backward(x, _distinct(ids), entries, coef, (), Head(), out)
        assert torch.equal(fresh, view)
        untouched = torch.full_like(base, 1.0)
        untouched.as_strided(x.shape, x.stride(), x.storage_offset()).zero_()
        assert (strided[untouched == 1] == 7).all()


def _distinct(ids):
    from distilkernels.primitives.boundary import without_duplicates

    return without_duplicates(ids, int(ids.max()) + 1)


def test_no_rows(isa):
    x = torch.empty(1, 0, 11)
    cpp.vocab_stats(x, torch.empty(0, 3, dtype=torch.int64), None, Head(), {"lse": torch.empty(0, dtype=torch.float64)})
    cpp.vocab_stats_backward(x, None, None, torch.empty(0, 6, dtype=torch.float64), (), Head(), torch.empty(1, 0, 11))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_and_threads_do_not_change_a_bit(isa, dtype, threads):
    x, ids = rows(1, 9, 40_009, 5, dtype)
    coef = torch.rand(9, 6, dtype=torch.float64)
    entries = torch.randn(9, 5)

    def both(x, ids, coef, entries):
        out = stats(cpp.vocab_stats, x, ids, Head())
        grad = torch.empty_like(x)
        cpp.vocab_stats_backward(x, _distinct(ids), entries, coef, ("linear", "constant"), Head(), grad)
        return [*out.values(), grad[0]]

    threads(1)
    one = both(x, ids, coef, entries)
    threads(3)
    for a, b in zip(one, both(x, ids, coef, entries)):
        assert torch.equal(a.nan_to_num(0), b.nan_to_num(0))
    for r in (0, 8):
        for a, b in zip(one, both(x[:, r : r + 1], ids[r : r + 1], coef[r : r + 1], entries[r : r + 1])):
            assert torch.equal(a[r : r + 1].nan_to_num(0), b.nan_to_num(0))


# ------------------------------------------------------------------------------------------------ backward


def gradient(launch, x, ids, entries, coef, terms, head, out):
    launch(x, ids, entries, coef, terms, head, out)
    return out


@functools.cache
def backward_case(shape, dtype, name, terms):
    x, ids = rows(*shape, dtype)
    n, head, ids = shape[0] * shape[1], head_of(name, shape[2]), _distinct(ids)
    g = torch.Generator().manual_seed(1)
    coef = torch.zeros(n, 6, dtype=torch.float64)
    coef[:, 0] = head.apply(x.double()).logsumexp(-1).view(n)
    coef[:, 1] = torch.randn(n, generator=g)
    for column, term in ((2, "linear"), (3, "constant"), (4, "t1")):
        if term in terms:
            coef[:, column] = torch.randn(n, generator=g)
    if "t1" in terms:
        coef[:, 5] = head.apply(x.double(), temperature=1.0).logsumexp(-1).view(n)
    entries = torch.randn(n, shape[3], generator=g, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    call = (ids, entries, coef, terms, head)
    same = gradient(reference_backward, x, *call, torch.empty_like(x))
    truth = gradient(reference_backward, x.double(), *call, torch.empty_like(x, dtype=torch.float64))
    z = head.apply(x.double())
    return x, call, same, truth, z[z.isfinite()].abs().max().item()


@pytest.mark.parametrize("terms", [(), ("linear",), ("constant",), ("linear", "constant", "t1")], ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(isa, dtype, terms):
    # one unit in the last place of what is stored, or 1e-6 of the row's largest entry in float: more where the
    # roundings of z itself (tanh, two products) are more
    slack = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for shape, name in itertools.product(SHAPES.values(), HEADS):
        x, call, same, truth, largest = backward_case(shape, dtype, name, terms)
        ours = gradient(cpp.vocab_stats_backward, x, *call, torch.full_like(x, 7.0))
        of_row = dtype in (torch.float32, torch.float64)
        scale = truth.abs().amax(-1, keepdim=True).expand_as(truth) if of_row else truth.abs().clamp(min=2.0**-14)
        assert_as_good(f"{shape} {name}", ours, same, truth, scale, max(slack, 4 * largest * 2**-24) if dtype == torch.float32 else slack)
        inplace = x.clone()
        gradient(cpp.vocab_stats_backward, inplace, *call, inplace)
        assert torch.equal(inplace.nan_to_num(), ours.nan_to_num())


def test_backward_writes_zeros_without_reading(isa):
    """A row nothing is asked of may hold NaN; columns from valid_vocab on get 0; a masked logit gets exactly 0."""
    x = torch.randn(1, 3, 137)
    x[0, 1] = math.nan
    x[0, 2, ::5] = -math.inf
    coef = torch.tensor([[5.0, 1, 1, 1, 1, 5], [math.nan, 0, 0, 0, 0, math.nan], [5, 1, 1, 1, 1, 5]], dtype=torch.float64)
    ids, entries = torch.tensor([[2], [3], [-1]]), torch.tensor([[4.0], [5.0], [6.0]])
    head = Head(valid_vocab=130)
    out = torch.full_like(x, math.nan)
    cpp.vocab_stats_backward(x, ids, entries, coef, ("linear", "constant", "t1"), head, out)
    assert out[0, 0, 2] == 4 and out[0, 1, 3] == 5 and out[0, 1].count_nonzero() == 1
    assert out[..., 130:].count_nonzero() == 0 and out[0, 2, ::5].count_nonzero() == 0 and out.isfinite().all()


# ------------------------------------------------------------------------------------------------ host behaviour


def _fastest(call, repeats=9):
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def test_wide_rows_are_not_slower(isa, threads):
    """Denormal exponentials, and references that must move, cost ten times without care; 2 is for a noisy machine."""
    threads(1)
    narrow = torch.randn(1, 16, 30_011)
    coef = torch.zeros(16, 6, dtype=torch.float64)
    coef[:, 1] = 1
    times = {}
    for name, x in {"narrow": narrow, "wide": narrow * 30}.items():
        out = allocate(x, None, ("lse",))
        grad = torch.empty_like(x)

        def call(x=x, out=out, grad=grad):
            cpp.vocab_stats(x, None, None, Head(), out)
            coef[:, 0] = out["lse"]
            cpp.vocab_stats_backward(x, None, None, coef, (), Head(), grad)

        times[name] = _fastest(call)
    assert times["wide"] < 2 * times["narrow"], times


def test_floating_point_mode_is_restored():
    x = torch.randn(1, 64, 4099)
    cpp.vocab_stats(x, None, None, Head(), allocate(x, None, ("lse",)))
    tiny = torch.full((4,), 1e-40)
    assert ((tiny * 0.5) > 0).all()


def _in_child(x, lse, one_thread):
    if one_thread:
        torch.set_num_threads(1)
    out = allocate(x, None, ("lse",))
    cpp.vocab_stats(x, None, None, Head(), out)
    raise SystemExit(0 if torch.equal(out["lse"], lse) else 3)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
@pytest.mark.parametrize("one_thread", [True, False])
def test_a_forked_child_does_not_hang(threads, one_thread):
    """A data loader forks after the parent has used OpenMP; its pool has no threads in the child."""
    threads(2)
    x = torch.randn(1, 64, 4099)
    out = allocate(x, None, ("lse",))
    cpp.vocab_stats(x, None, None, Head(), out)
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(x, out["lse"], one_thread))
    child.start()
    child.join(30)
    hung = child.is_alive()
    if hung:
        child.kill()
    assert not hung and child.exitcode == 0


def test_refusals_are_sentences():
    x = torch.randn(1, 2, 8)
    assert cpp.why_not("vocab_stats", x) is None
    assert "last stride" in cpp.why_not("vocab_stats", x.transpose(1, 2))
    assert "float32" in cpp.why_not("vocab_stats", x.int())
    assert "meta" in cpp.why_not("vocab_stats", x.to("meta"))
    assert "no C++ kernel" in cpp.why_not("no_such_primitive", x)
    with pytest.raises(ValueError, match="isa must be one of"):
        cpp.set_isa("mmx")


def test_sanitizers(tmp_path):
    """csrc/cpu under the address and undefined-behaviour sanitizers, as a program of its own on exact-size buffers."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-O0", "-g0", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    built = subprocess.run([compiler, *flags, str(probe), "-o", str(tmp_path / "probe")], capture_output=True)
    if built.returncode or subprocess.run([tmp_path / "probe"]).returncode:
        pytest.skip("the compiler lacks the sanitizers")
    if not subprocess.run([compiler, *flags, "-fopenmp", str(probe), "-o", str(tmp_path / "probe")], capture_output=True).returncode:
        flags.append("-fopenmp")
    csrc = ROOT / "csrc" / "cpu"
    sources = [*sorted(csrc.glob("kernels_*.cpp")), csrc / "isa.cpp", csrc / "sanitize" / "main.cpp", csrc / "sanitize" / "kv.cpp"]
    compiling = [
        subprocess.Popen([compiler, *flags, "-c", str(s), "-o", str(tmp_path / f"{s.stem}.o")], stderr=subprocess.PIPE, text=True)
        for s in sources
    ]
    for process in compiling:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    program = tmp_path / "sanitized"
    subprocess.run([compiler, *flags, *map(str, tmp_path.glob("*.o")), "-o", str(program)], check=True)
    # threads that wait do not spin: on a busy machine each of thousands of launches would take a time slice
    ran = subprocess.run([program], capture_output=True, text=True, timeout=180, env=os.environ | {"OMP_WAIT_POLICY": "passive"})
    assert ran.returncode == 0 and "clean" in ran.stdout, ran.stdout + ran.stderr
