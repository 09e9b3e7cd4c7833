"""The C++ kernels on caches: the shared tests on every instruction set, and what only these kernels could get wrong."""

from __future__ import annotations

import itertools

import kv_listings as listing
import pytest
import test_kv_align as align
import test_kv_lazy as lazy
import test_kv_methods as methods
import test_kv_scores as scores
import test_kv_select as chosen
import torch
from benchmarks.measure import peak_extra_bytes

from distilkernels import kv
from distilkernels.backends import cpp, cpp_kv
from distilkernels.primitives.key_redundancy import launched as redundancy

pytestmark = pytest.mark.skipif(cpp._cpp is None, reason="distilkernels._cpp is not built")
ISAS = cpp.available_isas() if cpp._cpp is not None else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_shared_scores(isa):
    """The tests that every backend takes, which elsewhere run on the best instruction set alone."""
    for shape, dtype in itertools.product(scores.SHAPES[:3], DTYPES):
        scores.test_importance_of_every_kind("cpp", "cpu", shape, dtype)
        for kind in scores.KINDS:
            scores.test_redundancy_is_the_published_one("cpp", "cpu", shape, kind, dtype)
    scores.test_spans_masks_and_padded_queries("cpp", "cpu")
    for group_reduce in ("max_probs", "mean_probs", "none"):
        scores.test_a_given_lse_saves_a_pass_and_changes_nothing("cpp", "cpu", group_reduce, torch.float32)
    for kind in scores.KINDS:
        scores.test_redundancy_with_padding_and_spans("cpp", "cpu", kind)
        methods.test_methods_keep_what_their_listings_keep("cpp", "cpu", kind, torch.bfloat16)
    scores.test_large_and_small_16_bit_keys("cpp", "cpu", torch.float16)
    scores.test_any_strides("cpp", "cpu")
    scores.test_the_last_neighbour_rule("cpp", "cpu")


def test_shared_alignment(isa):
    for loss, normalize in align.KINDS:
        align.test_loss_and_gradient_are_the_loops("cpp", "cpu", loss, normalize)


def test_shared_gather_and_recurrence(isa):
    for dtype in (*DTYPES, torch.float64):
        chosen.test_gather_is_exact("cpp", "cpu", dtype)
        lazy.test_several_steps_at_once_are_the_steps_one_by_one("cpp", "cpu", dtype)
        for interleaved in (False, True):
            chosen.test_rotation("cpp", "cpu", interleaved, dtype)
    chosen.test_gather_in_place("cpp", "cpu")
    chosen.test_rotation_in_place_and_outside_its_table("cpp", "cpu")


@pytest.mark.parametrize("kind", ["random", "clustered", "duplicated", "few"])
def test_last_neighbours_are_those_of_all_pairs(isa, kind):
    """Many panels, with neighbours and without; "few": one key in ten has one, so both scans find some."""
    t, d, threshold = 700, 48, 0.5
    keys = listing.keys_of("random" if kind == "few" else kind, 2, 2, t, d)
    if kind == "few":
        places = torch.randperm(t)[:70]
        keys[:, :, places[:35]] = keys[:, :, places[35:]] + 0.3 * torch.randn(2, 2, 35, d)
    mask = torch.rand(2, t) > 0.1
    start, stop = torch.tensor([0, 100], dtype=torch.int32), torch.tensor([t, t - 3], dtype=torch.int32)
    got = redundancy(keys, start, stop, mask, threshold, True, True, "cpp")
    want = redundancy(keys.double(), start, stop, mask, threshold, True, True, "reference")
    same = got.last == want.last
    # a pair may lie on the threshold to a float's precision
    for b, h, i in (~same).nonzero().tolist():
        unit = torch.nn.functional.normalize(keys[b, h].double(), dim=-1)
        j = max(int(got.last[b, h, i]), int(want.last[b, h, i]))
        assert abs(float(unit[i] @ unit[j]) - threshold) < 1e-6
    assert same.float().mean() > 0.999
    torch.testing.assert_close(got.cosine[same].double(), want.cosine[same], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.similarity.double(), want.similarity, rtol=1e-5, atol=1e-4)


def test_importance_of_more_queries_than_are_held_at_once(isa):
    """Chunks of queries add up; logits that rise along the keys move the maximum in every tile."""
    queries, keys = torch.randn(1, 12, 131, 32), torch.randn(1, 2, 3001, 32)
    toward = torch.nn.functional.normalize(queries.mean((1, 2)), dim=-1)
    for slope in (0.0, 40.0, -40.0):
        cached = keys + torch.linspace(0, slope, 3001)[:, None] * toward
        for group_reduce, window_reduce in (("max_logits", "mean"), ("max_probs", "max"), ("none", "sum"), ("mean_probs", "mean")):
            options = {"group_reduce": group_reduce, "window_reduce": window_reduce}
            got = kv.window_importance(queries, cached, **options, backend="cpp")
            want = listing.importance(queries, cached, **options)
            worst = ((got.double() - want) / want.amax(-1, keepdim=True)).abs().max()
            assert worst < 2e-5, (slope, options, float(worst))  # large logits, to a float's precision


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widths_that_end_within_a_word_or_a_vector(isa, dtype):
    """Two 16-bit entries are multiplied at once: the last may have no other, and what follows a row is not its own."""
    for width in (1, 7, 33, 66):
        queries, keys = torch.randn(2, 6, 3, width + 1).to(dtype)[..., :width], torch.randn(2, 2, 53, width + 3).to(dtype)
        keys[..., width:] = float("nan")
        keys = keys[..., :width]
        scores.close(kv.window_importance(queries, keys, backend="cpp"), listing.importance(queries, keys))
        scores.close(kv.key_redundancy(keys, backend="cpp"), listing.kava_redundancy(keys))


def test_the_same_bits_whatever_the_threads_and_the_batch(isa, threads):
    queries, keys = torch.randn(2, 8, 9, 64), listing.keys_of("clustered", 2, 4, 517, 64)
    student, teacher = ([(torch.randn(2, 3, 40, 64), torch.randn(2, 3, 40, 64)) for _ in range(5)] for _ in range(2))
    found = []
    for count in (1, 2, 3):
        threads(count)
        leaves = align.leaves(student)
        loss = kv.alignment_loss(leaves, teacher, normalize="inputs", backend="cpp")
        attention = kv.window_importance(queries, keys, backend="cpp")
        start, stop = torch.zeros(2, dtype=torch.int32), torch.full((2,), 517, dtype=torch.int32)
        likeness = redundancy(keys, start, stop, None, 0.5, True, True, "cpp")
        found.append([loss.detach(), *torch.autograd.grad(loss, align.flat(leaves)), attention, *likeness])
        assert torch.equal(kv.window_importance(queries[1:], keys[1:], backend="cpp"), attention[1:])
    for others in zip(*found):
        assert all(torch.equal(others[0], x) for x in others[1:])


def test_numbers_describe_a_cache_as_well_as_the_tensor_itself(monkeypatch):
    """PyTorch from 2.10 on describes its tensors to C; what older ones give instead makes the same results."""

    def results():
        keys = torch.randn(2, 3, 40, 72, generator=torch.Generator().manual_seed(0)).transpose(1, 2)[..., :65]
        found = []
        for dtype in DTYPES:
            x = keys.to(dtype)
            found += [kv.window_importance(x[:, :, 1:], x, backend="cpp"), kv.key_redundancy(x, mode="rkv", backend="cpp")]
            found += kv.gather(x, x[..., 3:], torch.tensor([[[1, 2, -1]]] * 2), backend="cpp")
            found.append(kv.alignment_loss([(x, x)], [(x * 2, x + 1)], normalize="inputs", backend="cpp"))
        tracker = kv.RecurrenceTracker(alpha=0.5)
        tracker.update(keys.double(), 3)
        return [*found, tracker.max_interval]

    described = results()
    monkeypatch.setattr(cpp_kv, "_EXCHANGED", False)
    assert cpp._cpp.exchange_by(None) is False and cpp._cpp.exchange_by("no capsule") is False
    for a, b in zip(described, results()):
        assert torch.equal(a, b)
    assert cpp._cpp.exchange_by(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)) == hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def test_denormals_count_where_numbers_are_moved_or_compared(isa):
    tiny = torch.full((1, 2, 9, 64), 1e-40)
    out = kv.gather(tiny, tiny, kv.select(torch.rand(1, 2, 9), 4), backend="cpp")
    assert all(torch.equal(x, tiny[:, :, :4]) for x in out)
    state = [torch.zeros(1, 2, 9, dtype=torch.int32) for _ in range(2)]
    cpp.recurrence_update(tiny[..., :9], *state, 5, 0.0)
    assert (state[0] == 5 + 8).all()


def test_no_pairs_in_memory():
    """[T, T] of one head would be 256 MiB, [W, T] of all heads 32 MiB."""
    queries, keys = torch.randn(1, 16, 64, 32), torch.randn(1, 2, 8192, 32)
    kv.key_redundancy(keys[:, :, :64], mode="rkv", backend="cpp")
    for run in (lambda: kv.key_redundancy(keys, mode="rkv", backend="cpp"), lambda: kv.window_importance(queries, keys, backend="cpp")):
        peak = peak_extra_bytes(run, "cpu")
        assert peak is None or peak < 24 * 2**20


def test_refusals_of_caches():
    x = torch.randn(1, 2, 3, 4)
    assert "float64 is the reference's" in cpp.why_not("kv_align", x, x.double())
    assert cpp.why_not("kv_gather", x.double()) is None and cpp.why_not("recurrence_update", x.double()) is None
    assert cpp.why_not("window_importance", x.bfloat16(), x.bfloat16()) is None
    assert "last stride" in cpp.why_not("key_redundancy", x.transpose(2, 3))
