"""The Triton kernels that start from hidden states: gather_dot, and linear_vocab_stats without logits.

As in test_triton.py: ``test_native_*`` run under the interpreter in a process of their own, or on a device where there is one.
The truth is hidden·Wᵀ in fp64, its statistics and gradients by the references of vocab_stats, and fp64 GEMMs.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from tests.test_triton import assert_close, built, compiled, gpu, on_triton, outputs

from distilkernels import backends
from distilkernels.primitives import gather_dot
from distilkernels.primitives.head import Head
from distilkernels.primitives.statistics import WANTS
from distilkernels.primitives.vocab_stats import dense_coefficients, reference, reference_backward

triton = pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
HERE = Path(__file__).parent
PLAIN = Head()
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TILED = tuple(name for name in WANTS if name not in ("second", "rank", "mass_above"))
LOSS = ("lse", "gathered", "tail_lse")
# what one rounding to the dtype moves a number by; the interpreter truncates bfloat16 where a device rounds
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0 ** (-7 if INTERPRETED else -8), torch.float16: 2.0**-11}


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same tests run natively on the device")
@pytest.mark.parametrize(
    "file,selection",
    [("test_triton_linear.py", "native"), ("test_gather_dot.py", "triton-cpu and float32 and not bfloat16 and values"),
     ("test_linear_tiles.py", "equal_chunks")],
    ids=["seams", "gather_dot", "losses"],
)
def test_under_the_interpreter(file, selection):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file), "-k", selection]
    ran = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0 and " passed" in ran.stdout and "skipped" not in ran.stdout.splitlines()[-1], ran.stdout[-4000:]


# ------------------------------------------------------------------------------------------ linear_vocab_stats


def tiny():
    """Several row blocks, spans, tiles and panels at a few hundred columns; tl.dot takes no less than 16."""
    from distilkernels.kernels.linear_vocab_stats import Config

    return Config(block_m=16, block_n=32, block_h=16, stages=2, num_warps=4, group=2, span=64, panel=64)


def problem(n, vocab, h, k, dtype=torch.float32, bias=True):
    """hidden, weight and bias whose logits spread over some ±6; ids with a repeated and an empty slot where there is room."""
    hidden, weight = torch.randn(n, h).to(dtype), (torch.randn(vocab, h) * 2 / math.sqrt(h)).to(dtype)
    ids = torch.rand(n, vocab).argsort(1)[:, :k].contiguous() if k is not None else None
    if k is not None and k > 2:
        ids[0, 1], ids[-1, 0] = ids[0, 2], -1
    return hidden, weight, torch.randn(vocab) if bias else None, ids


def logits_of(hidden, weight, bias):
    x = hidden.double() @ weight.double().T
    return x if bias is None else x + bias.double()


def to_device(*tensors):
    return [t if t is None else t.to(DEVICE) for t in tensors]


def forward(hidden, weight, bias, ids, head=PLAIN, want=TILED, config=None):
    from distilkernels.kernels.linear_vocab_stats import forward_launches

    out = outputs(hidden.shape[0], None if ids is None else ids.shape[1], want, DEVICE)
    for launch in forward_launches(*to_device(hidden, weight, bias, ids), head, out, config):
        launch.run()
    return {name: t.cpu() for name, t in out.items()}


def truth(hidden, weight, bias, ids, head=PLAIN, want=TILED):
    exact = outputs(hidden.shape[0], None if ids is None else ids.shape[1], want, "cpu", torch.float64)
    reference(logits_of(hidden, weight, bias)[None], ids, None, head, exact)
    return exact


HEADS = {
    "plain": PLAIN,
    "scaled": Head(temperature=0.7, logit_scale=1.3),
    "softcap": Head(temperature=1.5, softcap=8.0),
    "valid": Head(valid_vocab=70),
}
# (N, V, H, K): why
SHAPES = {
    "one_row": (1, 29, 7, 1),  # V prime and below a tile, H below a step and odd
    "blocks": (37, 211, 65, 5),  # three row blocks, four spans, H one past a step
    "covered": (17, 67, 64, 67),  # every column an id: the tail is empty; H of whole steps
    "empty": (5, 101, 33, 0),  # K = 0 has a tail, which is everything
    "no_ids": (3, 67, 16, None),
}


@on_triton
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_native_statistics(dtype, shape):
    """Products of 16-bit operands are exact in float32, so every dtype meets the same tolerance."""
    case = problem(*shape, dtype)
    assert_close(forward(*case, config=tiny()), truth(*case), tolerance=1e-5)


@on_triton
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_native_heads(head):
    """Ids on both sides of the seams of tiles, spans and valid columns; bias of −inf; no bias; ids in int32."""
    hidden, weight, bias, _ = problem(6, 131, 20, 0)
    ids = torch.tensor([[0, 31, 32, 63, 64, 69, 70, 127, 130, -1]]).repeat(6, 1)
    ids[1] = ids[1].flip(0)
    bias[[5, 40, 64]] = -math.inf
    assert_close(forward(hidden, weight, bias, ids, head, config=tiny()), truth(hidden, weight, bias, ids, head), tolerance=1e-5)
    ids = ids.to(torch.int32)
    assert_close(forward(hidden, weight, None, ids, head, LOSS, tiny()), truth(hidden, weight, None, ids, head, LOSS), tolerance=1e-5)


@on_triton
def test_native_default_configuration():
    """The configuration that the launcher chooses, and strided operands."""
    wide, weight, bias, ids = problem(9, 1031, 40, 7)
    hidden, weight = wide[:, 3:27], torch.cat([weight, weight], 1)[:, 5:29]
    out = outputs(9, 7, TILED, DEVICE)
    backends.module("triton").linear_vocab_stats(*to_device(hidden, weight, bias, ids), PLAIN, out)
    assert_close({name: t.cpu() for name, t in out.items()}, truth(hidden, weight, bias, ids), tolerance=1e-5)


@on_triton
def test_native_row_is_alone():
    """A row's bits do not depend on its neighbours, and a NaN in one stays there; an accurate tail of mass 1e-7."""
    hidden, weight, bias, ids = problem(21, 211, 24, 4)
    whole = forward(hidden, weight, bias, ids, config=tiny())
    poisoned = hidden.clone()
    poisoned[7, 3] = math.nan
    sick = forward(poisoned, weight, bias, ids, config=tiny())
    alone = forward(hidden[18:19], weight, bias, ids[18:19], config=tiny())
    others = torch.arange(21) != 7
    for name in whole:
        assert torch.equal(whole[name][18:19], alone[name]) and torch.equal(whole[name][others], sick[name][others]), name
    assert sick["argmax"][7] == -1 and all(sick[name][7].isnan().all() for name in whole if name not in ("argmax", "finite_count"))
    heavy = bias.clone()
    heavy[ids[0]] += 25
    assert_close(forward(hidden[:1], weight, heavy, ids[:1], config=tiny()), truth(hidden[:1], weight, heavy, ids[:1]), tolerance=2e-6)


def backward(hidden, weight, bias, ids, entries, coef, terms, head=PLAIN, names=("hidden", "weight", "bias"), config=None, **skips):
    from distilkernels.kernels.linear_vocab_stats_backward import backward_launches

    like = {"hidden": hidden, "weight": weight, "bias": torch.empty(weight.shape[0])}
    grads = {name: torch.empty(like[name].shape, device=DEVICE) for name in names}
    for name in grads:
        if name != "hidden":
            grads[name][head.columns(weight.shape[0]) :] = 0
    arguments = to_device(hidden, weight, bias, ids, entries, coef)
    for launch in backward_launches(*arguments, terms, head, grads, config=config or tiny(), **skips):
        launch.run()
    return {name: t.cpu() for name, t in grads.items()}


def exact_gradients(hidden, weight, bias, ids, entries, coef, terms, head=PLAIN):
    """(gradients, Σ of the absolute terms of each) in fp64."""
    x = logits_of(hidden, weight, bias)
    dz = torch.empty(1, *x.shape, dtype=torch.float64)
    reference_backward(x[None], ids, None if entries is None else entries.double(), coef, terms, head, dz)
    dz, h, w = dz[0], hidden.double(), weight.double()
    products = lambda dz, h, w: {"hidden": dz @ w, "weight": dz.T @ h, "bias": dz.sum(0)}
    return products(dz, h, w), products(dz.abs(), h.abs(), w.abs())


def assert_gradients(got, exact, sizes, dtype):
    """dz is rounded to the dtype once, sums are float32: each entry to that share of its absolute terms."""
    for name, value in got.items():
        share = 4e-6 + (0 if name == "bias" else ROUNDING[dtype])
        error = (value.double() - exact[name]).abs() - share * sizes[name]
        assert error.max() <= 1e-6 and not value.isnan().any(), f"{name}: {error.max():.3g} beyond its rounding"


def random_backward(shape, dtype, head, softcapped=False):
    case = problem(*shape, dtype)
    n, vocab, _, k = shape
    lse = head.apply(logits_of(*case[:3])).logsumexp(-1)
    coef = torch.stack([lse, *torch.randn(4, n).double(), head.apply(logits_of(*case[:3]), temperature=1.0).logsumexp(-1)], 1)
    terms = ("linear", "t1") if head.softcap else ("linear", "constant", "t1")
    if head.softcap:
        coef[:, 3] = 0
    ids = case[3]
    if ids is not None:
        # as dense_coefficients leaves them: distinct, valid or −1
        ids = torch.where(ids < head.columns(vocab), ids, -1)
        ids[0, 1 : min(k, 3)] = -1
    return *case[:3], ids, None if k is None else torch.randn(n, k), coef, terms


@on_triton
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_native_gradients(dtype, head):
    """Every term and entry, three row blocks and four panels."""
    case = random_backward((37, 211, 65, 5), dtype, head)
    assert_gradients(backward(*case, head), *exact_gradients(*case, head), dtype)


@on_triton
@pytest.mark.parametrize("shape", [SHAPES["one_row"], SHAPES["covered"], SHAPES["no_ids"]], ids=["one_row", "covered", "no_ids"])
def test_native_gradients_of_shapes(shape):
    case = random_backward(shape, torch.float32, PLAIN)
    assert_gradients(backward(*case), *exact_gradients(*case), torch.float32)


@on_triton
def test_native_gradients_asked_for():
    """Each alone has the bits that it has among the others; twice the same bits; a dead row of NaN gives zeros."""
    case = random_backward((21, 131, 24, 4), torch.float16, PLAIN)
    together, again = backward(*case), backward(*case)
    for name in together:
        assert torch.equal(together[name], again[name]) and torch.equal(together[name], backward(*case, names=(name,))[name]), name
    hidden, coef, entries = case[0].clone(), case[5].clone(), case[4].clone()
    hidden[3], coef[3], entries[3] = math.nan, math.nan, 0
    coef[3, 1:5] = 0
    found = backward(hidden, *case[1:4], entries, coef, case[6], names=("hidden", "bias"))
    others = torch.arange(21) != 3
    assert (found["hidden"][3] == 0).all() and not found["bias"].isnan().any()
    assert torch.equal(found["hidden"][others], together["hidden"][others])


@on_triton
def test_native_launcher_outputs():
    """Outputs in 16 bits are the float32 ones rounded; columns beyond valid_vocab are zeros; no rows give zeros."""
    head = Head(valid_vocab=70)
    hidden, weight, bias, ids, entries, coef, terms = random_backward((9, 101, 24, 4), torch.float16, head)
    launch = backends.module("triton").linear_vocab_stats_backward
    found = []
    for dtype in (torch.float32, torch.float16):
        shapes = {"hidden": hidden.shape, "weight": weight.shape, "bias": bias.shape}
        grads = {name: torch.empty(shape, dtype=dtype, device=DEVICE) for name, shape in shapes.items()}
        launch(*to_device(hidden, weight, bias, ids, entries, coef), terms, head, grads)
        found.append(grads)
    for name, wide in found[0].items():
        assert torch.equal(wide.half(), found[1][name]), name
    assert (found[0]["weight"][70:] == 0).all() and (found[0]["bias"][70:] == 0).all()
    launch(*to_device(hidden[:0], weight, bias, ids[:0], entries[:0], coef[:0]), terms, head, found[0])
    assert (found[0]["weight"] == 0).all() and (found[0]["bias"] == 0).all()


@on_triton
def test_native_skipped_tiles():
    """Default: d hidden within the rounding of the row's largest entry, d weight exact. Infinite: nothing counts."""
    from distilkernels.kernels.linear_vocab_stats_backward import default_skip

    hidden, weight, _, ids = problem(37, 211, 24, 5, torch.bfloat16)
    ids[:, :] = torch.arange(5) * 7
    bias = torch.full((211,), -14.0)
    bias[:64] = 0
    lse = logits_of(hidden, weight, bias).logsumexp(-1)
    zero = torch.zeros(37, dtype=torch.float64)
    coef = torch.stack([lse, zero + 0.5, zero, zero, zero, zero], 1)
    case = hidden, weight, bias, ids, torch.rand(37, 5) + 0.5, coef, ()
    usual, exact, none = backward(*case), backward(*case, skip=0.0), backward(*case, skip=math.inf, skip_weight=math.inf)
    assert not torch.equal(usual["hidden"], exact["hidden"])
    bound = 211 * default_skip(torch.bfloat16, 211) * case[4].amax(1, keepdim=True) * weight.float().abs().amax()
    assert ((usual["hidden"] - exact["hidden"]).abs() <= bound).all()
    assert torch.equal(usual["weight"], exact["weight"]) and (exact["weight"][64:] != 0).any()
    assert (none["hidden"] == 0).all() and (none["weight"] == 0).all() and torch.equal(none["bias"], exact["bias"])
    assert default_skip(torch.float32, 211) == 0


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_loss(dtype):
    """From the statistics of the tiles through dense_coefficients to gradients: a bucket loss with an entropy, against autograd in fp64."""
    hidden, weight, bias, ids = problem(19, 211, 33, 5, dtype)
    head = Head(temperature=1.3)
    leaves = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    z = head.apply(logits_of(*leaves))
    outside = z.scatter(1, ids.clamp(min=0), -math.inf)
    outside[-1, 0 if -1 not in ids[-1, 1:] else -1] = z[-1, 0] if 0 not in ids[-1, 1:] else -math.inf
    lse = z.logsumexp(-1)
    slope = torch.randn(19).double()
    some = torch.zeros_like(z, dtype=torch.bool).scatter(1, ids.clamp(min=0), True)
    some[-1, 0] = 0 in ids[-1, 1:]
    mu = (z.softmax(-1) * z).sum(-1)
    (slope * (lse - mu) + outside.logsumexp(-1) + 0.3 * torch.where(some, z, 0).sum(-1)).sum().backward()

    want = ("lse", "gathered", "tail_lse", "expected_logit")
    stats = forward(hidden, weight, bias, ids, head, want, tiny())
    ones = torch.ones(19, dtype=torch.float64)
    upstream = {"lse": slope, "expected_logit": -slope, "tail_lse": ones, "gathered": torch.full((19, 5), 0.3)}
    ids, entries, coef, terms = dense_coefficients(stats, upstream, ids, head)
    got = backward(hidden, weight, bias, ids, entries, coef, terms, head)
    _, sizes = exact_gradients(hidden, weight, bias, ids, entries, coef, terms, head)
    assert_gradients(got, {name: t.grad for name, t in zip(("hidden", "weight", "bias"), leaves)}, sizes, dtype)


# --------------------------------------------------------------------------------------------------- gather_dot


@on_triton
@pytest.mark.parametrize("h", [7, 1027], ids=["H_below_a_vector", "H_past_a_block"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_native_gather_dot(dtype, h):
    """Products and both gradients; more slots than a program takes, an id in every row, empty slots whose gradient is NaN."""
    n, vocab, k = 21, 31, 11
    hidden, weight, _, ids = problem(n, vocab, h, k, dtype)
    ids[:, 4] = 17
    grad = torch.randn(n, k).masked_fill(ids < 0, math.nan)
    targets, order = ids.reshape(-1).sort(stable=True)
    wide = lambda *shape: torch.empty(shape, dtype=torch.float64)
    shapes = {"gather_dot": (n, k), "gather_dot_hidden_grad": (n, h), "gather_dot_weight_grad": (vocab, h)}
    arguments = {
        "gather_dot": (hidden, weight, ids),
        "gather_dot_hidden_grad": (grad, weight, ids, dtype),
        "gather_dot_weight_grad": (grad, hidden, order, targets),
    }
    serve = backends.module("triton")
    for name, shape in shapes.items():
        got, exact = torch.zeros(shape, device=DEVICE), torch.zeros(wide(*shape).shape, dtype=torch.float64)
        given = arguments[name]
        getattr(serve, name)(*[t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in given], got)
        double = [torch.float64 if t is dtype else t.double() if t.is_floating_point() else t for t in given]
        getattr(gather_dot, name.replace("gather_dot", "reference", 1))(*double, exact)
        torch.testing.assert_close(got.double().cpu(), exact, rtol=1e-5, atol=1e-5 * math.sqrt(h), msg=name)


# ----------------------------------------------------------------------------------------------------- refusals


@compiled
def test_refusals_are_sentences():
    refuse = backends.module("triton").why_not
    assert "got a cpu tensor" in refuse("linear_vocab_stats", torch.empty(1, 8), torch.empty(2, 8))


@on_triton
def test_native_refusals():
    refuse = backends.module("triton").why_not
    hidden, weight = torch.empty(1, 8, device=DEVICE), torch.empty(2, 8, device=DEVICE)
    assert refuse("linear_vocab_stats", hidden, weight, want=LOSS) is None
    assert "one dtype" in refuse("linear_vocab_stats", hidden, weight.bfloat16())
    assert "rank and mass_above" in refuse("linear_vocab_stats", hidden, weight, want=("lse", "rank", "mass_above"))
    assert "second needs a tile" in refuse("linear_vocab_stats", hidden, weight, want=("lse", "second"))
    assert "float64" in refuse("gather_dot", hidden.double(), weight.double())


# ------------------------------------------------------------------------------------------------ ahead of time

N, V, H, K = 8192, 151_936, 4096, 64


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def forward_case(major, dtype, want=LOSS, head=PLAIN, h=H):
    from distilkernels.kernels.linear_vocab_stats import config_for, forward_launches, heavy

    config = config_for(dtype, major, heavy(want, head))
    ids, out = meta(N, K, dtype=torch.int64), outputs(N, K, want, "meta")
    return forward_launches(meta(N, h, dtype=dtype), meta(V, h, dtype=dtype), None, ids, head, out, config)[-2:]


def backward_case(major, dtype, terms=(), head=PLAIN, h=H):
    """The first two panels: d hidden is written in one and added to in the other."""
    from distilkernels.kernels.linear_vocab_stats import config_for
    from distilkernels.kernels.linear_vocab_stats_backward import backward_launches, heavy

    config = config_for(dtype, major, heavy(terms, head))
    grads = {"hidden": meta(N, h), "weight": meta(V, h, dtype=dtype), "bias": meta(V, dtype=dtype)}
    operands = meta(N, h, dtype=dtype), meta(V, h, dtype=dtype), meta(V, dtype=dtype)
    rest = meta(N, K, dtype=torch.int64), meta(N, K), meta(N, 6, dtype=torch.float64)
    return islice(backward_launches(*operands, *rest, terms, head, grads, config=config), 8)


def gather_case(dtype):
    from distilkernels.kernels.gather_dot import dot_launch, hidden_grad_launch, weight_grad_launch

    hidden, weight, ids = meta(N, H, dtype=dtype), meta(V, H), meta(N, K, dtype=torch.int64)
    order = meta(N * K, dtype=torch.int64)
    return [
        dot_launch(hidden, weight, ids, meta(N, K)),
        hidden_grad_launch(meta(N, K), weight, ids, dtype, meta(N, H)),
        weight_grad_launch(meta(N, K), hidden, order, order, meta(V, H, dtype=dtype)),
    ]


TEMPERED, CAPPED = Head(temperature=2.0), Head(softcap=30.0, temperature=2.0)
EVERY_TERM = ("linear", "constant", "t1")
VARIANTS = {
    "loss": lambda major: forward_case(major, torch.bfloat16),
    "entropy": lambda major: forward_case(major, torch.float16, (*LOSS, "expected_logit"), TEMPERED, h=896),
    "everything": lambda major: forward_case(major, torch.bfloat16, TILED, CAPPED),
    "everything-float32": lambda major: forward_case(major, torch.float32, TILED, CAPPED),
    "backward": lambda major: backward_case(major, torch.bfloat16),
    "backward-entropy": lambda major: backward_case(major, torch.float16, ("linear",), TEMPERED, h=896),
    "backward-everything": lambda major: backward_case(major, torch.bfloat16, EVERY_TERM, CAPPED),
    "backward-float32": lambda major: backward_case(major, torch.float32, EVERY_TERM, CAPPED),
    "gather_dot": lambda major: gather_case(torch.bfloat16),
}
_TENSOR_CORES = {8: "mma.sync", 9: "wgmma.mma_async", 10: "tcgen05.mma"}


@compiled
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_without_spills(variant, tmp_path, record_property):
    """What the launchers launch at V = 151,936 and H = 4,096 builds for sm_80, sm_90 and sm_100, on tensor cores where 16-bit."""
    for major in (8, 9, 10):
        for launch, kernel, name in built(VARIANTS[variant](major), tmp_path, record_property, (major * 10,)):
            if launch.kernel.__name__ in ("_span_kernel", "_panel_kernel", "_product_kernel") and "float32" not in variant:
                ptx = kernel.asm["ptx"]
                assert _TENSOR_CORES[major] in ptx and "cp.async" in ptx, name
                # what one block may have: 163 KB on sm_80, 227 on the others
                assert kernel.metadata.shared <= (163 if major == 8 else 227) * 1024, f"{name}: {kernel.metadata.shared} bytes"


# -------------------------------------------------------------------------------------------------- on a device


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_qwen_rows(dtype):
    """V = 151,936, K = 64 and the launchers' own configurations, forward and backward."""
    hidden, weight, bias, ids = problem(200, V, 512, K, dtype)
    assert_close(forward(hidden, weight, bias, ids), truth(hidden, weight, bias, ids), tolerance=2e-5)
    case = random_backward((200, V, 512, K), dtype, PLAIN)
    exact = exact_gradients(*case)
    launch = backends.module("triton").linear_vocab_stats_backward
    grads = {"hidden": torch.empty(200, 512), "weight": torch.empty(V, 512), "bias": torch.empty(V)}
    grads = {name: t.to(DEVICE) for name, t in grads.items()}
    launch(*to_device(*case[:6]), case[6], PLAIN, grads)
    assert_gradients({name: t.cpu() for name, t in grads.items()}, *exact, dtype)


def device_case(n, h, vocab=V):
    hidden = torch.randn(n, h, device="cuda").bfloat16()
    weight = (torch.randn(vocab, h, device="cuda") * 2 / math.sqrt(h)).bfloat16()
    ids = torch.randint(vocab, (n, K), device="cuda")
    grads = {"hidden": torch.empty(n, h, device="cuda"), "weight": torch.empty_like(weight)}

    def once():
        out = outputs(n, K, LOSS, "cuda")
        backends.module("triton").linear_vocab_stats(hidden, weight, None, ids, PLAIN, out)
        upstream = {"lse": torch.ones_like(out["lse"]), "tail_lse": -torch.ones_like(out["lse"])}
        found = dense_coefficients(out, upstream, ids, PLAIN)
        backends.module("triton").linear_vocab_stats_backward(hidden, weight, None, *found, PLAIN, grads)
        return out["tail_lse"], *(g.clone() for g in grads.values())

    return hidden, weight, once


@gpu
@pytest.mark.gpu
def test_no_synchronisation_and_the_same_bits():
    *_, once = device_case(1000, 512)
    first = once()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@gpu
@pytest.mark.gpu
@pytest.mark.large
def test_speed_and_memory(capsys):
    """Peak memory beside the outputs at N = 8,192, V = 151,936, H = 4,096; times are printed, beside cuBLAS's GEMMs."""
    from triton.testing import do_bench

    n, h = 8192, 4096
    hidden, weight, once = device_case(n, h)
    once()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    once()
    extra = torch.cuda.max_memory_allocated() - before
    copies = n * h * 4 + V * h * 2
    out, ids = outputs(n, K, LOSS, "cuda"), torch.randint(V, (n, K), device="cuda")
    forward_ms = do_bench(lambda: backends.module("triton").linear_vocab_stats(hidden, weight, None, ids, PLAIN, out))
    both_ms, rows = do_bench(once), hidden[:1024]
    gemm_ms = do_bench(lambda: torch.mm(rows, weight.T)) * n / 1024
    with capsys.disabled():
        print(f"\nforward {forward_ms:.1f} ms, with backward {both_ms:.1f} ms; one cuBLAS GEMM {gemm_ms:.1f} ms; extra {extra / 2**20:.0f} MiB")
    assert extra - copies < 2**28
