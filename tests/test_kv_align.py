"""The alignment losses against a loop of torch's own over layers, on every backend; their gradients by gradcheck."""

from __future__ import annotations

import itertools
import math

import kv_listings as listing
import pytest
import torch
from servers import servers

from distilkernels import BackendError, backends, kv
from distilkernels.primitives import memory

KINDS = [(loss, normalize) for loss in ("mse", "l1", "smooth_l1", "cosine") for normalize in (None, "layer_std", "inputs")]
KINDS.remove(("cosine", "layer_std"))


def layers(count=3, shape=(2, 2, 7, 16), dv=24, dtype=torch.float64, device="cpu", seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    make = lambda i, d: (torch.randn(*shape[:3], d, generator=g, dtype=torch.float64) * scale + 0.3 * i).to(device, dtype)
    return [(make(i, shape[3]), make(-i, dv)) for i in range(count)]


def leaves(pairs):
    return [tuple(x.detach().clone().requires_grad_() for x in pair) for pair in pairs]


def flat(pairs):
    return [x for pair in pairs for x in pair]


def by_loop(student, teacher, masks, weights=None, **how):
    """The mean over layers of ½(K + V), one loss at a time."""
    weights = [1.0] * len(student) if weights is None else weights
    total = 0
    for (ks, vs), (kt, vt), m, w in zip(student, teacher, masks, weights):
        real = torch.ones(ks.shape[:3], dtype=torch.bool, device=ks.device) if m is None else m.expand(ks.shape[:3])
        total = total + w * 0.5 * (listing.distance(ks, kt.detach(), real, **how) + listing.distance(vs, vt.detach(), real, **how))
    return total / sum(weights)


@pytest.mark.parametrize("loss,normalize", KINDS)
@pytest.mark.parametrize("backend,device", servers("kv_align"))
def test_loss_and_gradient_are_the_loops(backend, device, loss, normalize):
    """Float32 and 16 bits against fp64; layers of different widths; empty slots that hold NaN; a teacher of another dtype."""
    f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    for dtype, teacher_dtype in ((f32, f32), (bf16, f32), (f16, bf16), (f64, f32)):
        student = layers(3, dtype=dtype, seed=1) + layers(2, (2, 3, 5, 33), 9, dtype, seed=2)
        teacher = layers(3, dtype=teacher_dtype, seed=3, scale=2) + layers(2, (2, 3, 5, 33), 9, teacher_dtype, seed=4)
        if backends.module(backend).why_not("kv_align", *(x.to(device) for x in (*flat(student), *flat(teacher)))) is not None:
            with pytest.raises(BackendError, match=backend):
                kv.alignment_loss([tuple(x.to(device) for x in p) for p in student], [tuple(x.to(device) for x in p) for p in teacher], backend=backend)
            continue
        masks = [torch.rand(k.shape[:3], generator=torch.Generator().manual_seed(5)) > 0.3 for k, _ in student]
        masks[1] = None
        exact = leaves([tuple(x.double() for x in pair) for pair in student])
        want = by_loop(exact, teacher, masks, loss=loss, beta=0.7, normalize=normalize)
        wanted = torch.autograd.grad(want, flat(exact))
        holed = [tuple(x if m is None else x.masked_fill(~m[..., None], math.nan) for x in pair) for pair, m in zip(student, masks)]
        mine = leaves([tuple(x.to(device) for x in pair) for pair in holed])
        theirs = [tuple((x if m is None else x.masked_fill(~m[..., None], math.inf)).to(device) for x in pair) for pair, m in zip(teacher, masks)]
        got = kv.alignment_loss(
            mine, theirs, loss=loss, beta=0.7, normalize=normalize, mask=[m if m is None else m.to(device) for m in masks], backend=backend
        )
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and got.shape == ()
        torch.testing.assert_close(got.double().cpu(), want.detach(), rtol=2e-6, atol=1e-9)
        grads = torch.autograd.grad(got, flat(mine))
        for g, w, m in zip(grads, wanted, [m for m in masks for _ in range(2)]):
            assert g.dtype == dtype
            rounding = {f32: 3e-6, f64: 1e-9, bf16: 4e-3, f16: 6e-4}[dtype]
            torch.testing.assert_close(g.double().cpu(), w, rtol=rounding, atol=rounding * float(w.abs().max()) * (1 if dtype.itemsize < 4 else 0.1))
            assert m is None or (g.cpu()[~m] == 0).all()


@pytest.mark.parametrize("loss,normalize", KINDS)
def test_gradcheck(loss, normalize):
    student, teacher = leaves(layers(2, (2, 1, 3, 4), 5)), layers(2, (2, 1, 3, 4), 5, seed=9)
    mask = torch.tensor([[True, False, True], [True, True, True]])

    def run(reduction, *tensors):
        pairs = list(zip(tensors[::2], tensors[1::2]))
        return kv.alignment_loss(pairs, teacher, loss=loss, beta=0.6, normalize=normalize, mask=mask, layer_weights=[1.0, 3.0], reduction=reduction)

    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(lambda *t, r=reduction: run(r, *t), flat(student))
    # an upstream factor, and clamped stds
    assert torch.autograd.gradcheck(lambda *t: run("mean", *t) ** 2 * 3, flat(student))


def test_constant_sides_have_a_clamped_std():
    """σ = 1e-6 there, and no gradient goes through it."""
    student, teacher = leaves([(torch.full((1, 1, 3, 4), 0.5, dtype=torch.float64), torch.randn(1, 1, 3, 4, dtype=torch.float64))]), layers(1, (1, 1, 3, 4), 4)
    want = 1e-6
    loss = kv.alignment_loss(student, teacher, loss="l1", normalize="inputs")
    grad = torch.autograd.grad(loss, student[0][0])[0]
    torch.testing.assert_close(grad, torch.full_like(grad, 0.5 / 12 / want))
    flat_teacher = [(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))]
    loss = kv.alignment_loss(student, flat_teacher, loss="mse", normalize="layer_std")
    torch.testing.assert_close(loss, by_loop(student, flat_teacher, [None], loss="mse") / 1e-12)


@pytest.mark.parametrize("backend,device", servers("kv_align"))
def test_layers_without_weight_and_constant_sides_in_float32(backend, device):
    student, teacher = leaves(layers(2, dtype=torch.float32, device=device)), layers(2, dtype=torch.float32, device=device, seed=3)
    broken = leaves([student[0], tuple(x * math.nan for x in student[1])])
    grads = torch.autograd.grad(kv.alignment_loss(broken, teacher, layer_weights=[1.0, 0.0], backend=backend), flat(broken))
    assert (grads[0] != 0).any() and all((g == 0).all() for g in grads[2:])
    constant = leaves([(torch.full((1, 1, 3, 4), 0.5, device=device), torch.randn(1, 1, 3, 4, device=device))])
    other = layers(1, (1, 1, 3, 4), 4, torch.float32, device)
    (grad,) = torch.autograd.grad(kv.alignment_loss(constant, other, loss="l1", normalize="inputs", backend=backend), constant[0][0])
    torch.testing.assert_close(grad, torch.full_like(grad, 0.5 / 12 / 1e-6))


def test_one_real_slot_has_no_unbiased_std():
    student, teacher = leaves([(torch.randn(1, 1, 2, 1), torch.randn(1, 1, 2, 1))]), [(torch.randn(1, 1, 2, 1), torch.randn(1, 1, 2, 1))]
    loss = kv.alignment_loss(student, teacher, normalize="layer_std", mask=torch.tensor([[True, False]]))
    assert loss.isfinite()


def test_reductions_weights_and_layer_maps():
    student, teacher = layers(3, seed=1), layers(5, seed=2)
    each = kv.alignment_loss(student, teacher, layer_map=[4, 0, 2], reduction="none")
    assert each.shape == (3,)
    chosen = [teacher[i] for i in (4, 0, 2)]
    for i in range(3):
        torch.testing.assert_close(each[i], by_loop(student[i : i + 1], chosen[i : i + 1], [None], loss="smooth_l1"))
    weights = [1.0, 0.0, 3.0]
    for given in (weights, torch.tensor(weights)):
        torch.testing.assert_close(kv.alignment_loss(student, chosen, layer_weights=given), (each[0] + 3 * each[2]) / 4)
        torch.testing.assert_close(kv.alignment_loss(student, chosen, layer_weights=given, reduction="sum"), each[0] + 3 * each[2])
    torch.testing.assert_close(kv.alignment_loss(student, teacher, layer_map={2: 2, 0: 4}, layer_weights=weights), (each[0] + 3 * each[2]) / 4)
    # a layer of weight 0 may hold anything; all weights 0 is 0, attached
    broken = leaves([student[0], tuple(x * math.nan for x in student[1]), student[2]])
    loss = kv.alignment_loss(broken, chosen, layer_weights=weights)
    loss.backward()
    assert loss.isfinite() and all((g.grad == 0).all() for g in broken[1]) and broken[0][0].grad.abs().max() > 0
    nothing = kv.alignment_loss(broken, chosen, layer_weights=[0.0] * 3)
    assert nothing == 0 and nothing.requires_grad


def test_large_gradients_share_recycled_memory():
    """Above 8 MB they lie in one buffer, which is given out again when the last of them is gone, and not before."""
    student, teacher = layers(4, (8, 8, 33, 128), 129, torch.float32, seed=1), layers(4, (8, 8, 33, 128), 129, torch.float32, seed=2)

    def gradients(scale: float):
        mine = leaves([tuple(x * scale for x in pair) for pair in student])
        return torch.autograd.grad(kv.alignment_loss(mine, teacher, loss="mse"), flat(mine))

    memory.release()
    first = gradients(1.0)
    shares = {g.untyped_storage().data_ptr() for g in first}
    assert len(shares) == 1 and all(g.data_ptr() % 64 == 0 and g.is_contiguous() and not g._is_view() for g in first)
    for g, s, t in zip(first, flat(student), flat(teacher)):
        torch.testing.assert_close(g, (s - t) / (4 * s.numel()))
    last, kept = first[-1], first[-1].clone()
    del first, g
    second = gradients(2.0)
    assert second[0].untyped_storage().data_ptr() not in shares and torch.equal(last, kept)
    version = second[1]._version
    second[0].zero_()
    assert second[1]._version == version, "each has its own version"
    again = second[0].untyped_storage().data_ptr()
    del second
    assert gradients(1.0)[0].untyped_storage().data_ptr() == again
    # accumulating into a leaf without a gradient takes the tensor itself
    mine = leaves(student)
    kv.alignment_loss(mine, teacher).backward()
    assert len({x.grad.untyped_storage().data_ptr() for x in flat(mine)}) == 1
    memory.release()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("loss,normalize", KINDS)
@pytest.mark.parametrize("backend,device", servers("kv_align"))
def test_an_all_masked_batch_is_an_attached_zero(backend, device, loss, normalize, dtype):
    student = leaves(layers(2, dtype=dtype, device=device))
    teacher = [tuple(x * math.nan for x in pair) for pair in layers(2, dtype=dtype, device=device)]
    mask = torch.zeros(2, 7, dtype=torch.bool, device=device)
    total = kv.alignment_loss(student, teacher, loss=loss, normalize=normalize, mask=mask, backend=backend)
    assert total == 0 and total.requires_grad
    total.backward()
    assert all((x.grad == 0).all() for x in flat(student))


def test_masks_of_every_shape():
    student, teacher = layers(2, seed=1), layers(2, seed=2)
    slots, heads = torch.rand(2, 7) > 0.4, torch.rand(2, 2, 7) > 0.4
    for mask, want in (
        (slots, [slots[:, None]] * 2), (heads, [heads] * 2), (torch.stack([heads, ~heads]), [heads, ~heads]), ([None, slots], [None, slots[:, None]])
    ):  # fmt: skip
        torch.testing.assert_close(kv.alignment_loss(student, teacher, mask=mask), by_loop(student, teacher, want, loss="smooth_l1"))


def test_a_compressed_teacher_brings_its_empty_slots():
    keys, values, latents = torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8), leaves([(torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8))])
    mask = torch.arange(20) < torch.tensor([20, 4])[:, None]
    teacher = kv.compress(None, keys, values, 6, method=kv.CosineOnly(), mask=mask)
    loss = kv.alignment_loss(latents, [teacher])
    torch.testing.assert_close(loss, by_loop(latents, [(teacher.keys, teacher.values)], [teacher.selection.mask], loss="smooth_l1"))
    loss.backward()
    assert (latents[0][0].grad[1, :, 4:] == 0).all() and (latents[0][0].grad[1, :, :4] != 0).any()
    # a mask of one's own takes more slots out, and brings no empty one back
    few = torch.arange(6) > torch.tensor([2, 1])[:, None]
    want = by_loop(latents, [(teacher.keys, teacher.values)], [teacher.selection.mask & few[:, None]], loss="smooth_l1")
    torch.testing.assert_close(kv.alignment_loss(latents, [teacher], mask=few), want)


def test_projections_are_trained_and_match_other_heads_and_widths():
    student, teacher = leaves(layers(2, (2, 2, 7, 8), 6, torch.float32)), layers(2, (2, 3, 7, 16), 4, torch.bfloat16)
    linear = [(torch.nn.Linear(16, 48), torch.nn.Linear(12, 12, bias=False)) for _ in range(2)]
    loss = kv.alignment_loss(student, teacher, projections=[linear[0], (linear[1][0].weight, linear[1][1])])
    split = lambda x, p, h: p(x.transpose(1, 2).flatten(2)).unflatten(-1, (h, -1)).transpose(1, 2)
    bare = torch.nn.Linear(16, 48, bias=False)
    bare.weight = linear[1][0].weight
    mapped = [
        (split(student[0][0], linear[0][0], 3), split(student[0][1], linear[0][1], 3)), (split(student[1][0], bare, 3), split(student[1][1], linear[1][1], 3))
    ]  # fmt: skip
    want = by_loop(mapped, [tuple(x.float() for x in pair) for pair in teacher], [None, None], loss="smooth_l1")
    torch.testing.assert_close(loss, want)
    for got, exact in zip(torch.autograd.grad(loss, [linear[0][0].weight, *flat(student)]), torch.autograd.grad(want, [linear[0][0].weight, *flat(student)])):
        torch.testing.assert_close(got, exact)
    # one tensor of keys and values needs one map
    kv.alignment_loss(layers(1, (1, 2, 3, 4), 4), layers(1, (1, 1, 3, 6), 6), projections=[torch.randn(6, 8, dtype=torch.float64)])


def test_transformers_caches():
    transformers = pytest.importorskip("transformers")
    pairs = {"student": leaves(layers(2, dtype=torch.float32)), "teacher": layers(2, dtype=torch.float32, seed=7)}
    caches = {}
    for name, data in pairs.items():
        caches[name] = transformers.DynamicCache()
        for i, (k, v) in enumerate(data):
            caches[name].update(k, v, i)
    loss = kv.alignment_loss(caches["student"], caches["teacher"])
    torch.testing.assert_close(loss, kv.alignment_loss(pairs["student"], pairs["teacher"]))
    assert torch.autograd.grad(loss, pairs["student"][0][0])[0].abs().max() > 0


def test_the_teacher_gets_no_gradient_and_strides_are_read():
    student, teacher = leaves(layers(1, dtype=torch.float32)), leaves(layers(1, dtype=torch.float32, seed=3))
    kv.alignment_loss(student, teacher).backward()
    assert teacher[0][0].grad is None and student[0][0].grad is not None
    turned = torch.randn(2, 7, 2, 16).requires_grad_()
    whole = torch.randn(2, 2, 30, 24).requires_grad_()
    strided = [(turned.transpose(1, 2), whole[:, :, 5:12])]
    want = kv.alignment_loss([tuple(x.contiguous() for x in strided[0])], teacher)
    got = kv.alignment_loss(strided, teacher)
    assert got == want
    for a, b in zip(torch.autograd.grad(got, (turned, whole)), torch.autograd.grad(want, (turned, whole))):
        assert torch.equal(a, b)


def test_second_backward_and_second_derivative():
    student, teacher = leaves(layers(2, dtype=torch.float32)), layers(2, dtype=torch.float32, seed=3)
    loss = kv.alignment_loss(student, teacher)
    first = torch.autograd.grad(loss, flat(student), retain_graph=True)
    again = torch.autograd.grad(loss * 2, flat(student))
    for a, b in zip(first, again):
        torch.testing.assert_close(2 * a, b)
    loss = kv.alignment_loss(student, teacher)
    (grad,) = torch.autograd.grad(loss, student[0][0], create_graph=True)
    with pytest.raises(RuntimeError, match="an alignment loss has no second derivative"):
        grad.sum().backward()


def test_layer_weights_are_differentiated():
    """Learned ones; a layer of weight 0 has a slope too. Their second derivative moves with the students, and is refused."""
    student, teacher, weights = leaves(layers(3)), layers(3, seed=3), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    run = lambda reduction, w, *t: kv.alignment_loss(list(zip(t[::2], t[1::2])), teacher, loss="mse", layer_weights=w, reduction=reduction)
    for reduction in ("mean", "sum"):
        assert torch.autograd.gradcheck(lambda *t, r=reduction: run(r, *t), (weights, *flat(student)))
        assert torch.autograd.gradcheck(lambda w, r=reduction: run(r, w, *(t.detach() for t in flat(student))), weights)
    (grad,) = torch.autograd.grad(run("sum", weights, *flat(student)), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="an alignment loss has no second derivative"):
        grad.sum().backward()


def test_functional_transforms_are_refused():
    student, teacher = layers(1)[0], layers(1, seed=2)
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(RuntimeError, match=r"an alignment loss does not run under torch\.func"):
            transform(lambda keys: kv.alignment_loss([(keys, student[1])], teacher))(student[0] if transform is torch.func.grad else student[0][None])


def test_float16_gradients_do_not_underflow():
    """1/n of a large layer is below float16's smallest number; under a loss scale the gradient is not."""
    student, teacher = leaves(layers(1, (4, 8, 64, 64), 64, torch.float16)), layers(1, (4, 8, 64, 64), 64, torch.float16, seed=4)
    scale = 2.0**14
    (grad,) = torch.autograd.grad(kv.alignment_loss(student, teacher, loss="l1") * scale, student[0][0])
    want = torch.sign(student[0][0] - teacher[0][0]).double() * scale * 0.5 / student[0][0].numel()
    torch.testing.assert_close(grad.double(), want.detach(), rtol=1e-3, atol=0)


def test_compiled_loss_is_the_eager_one():
    student, teacher = leaves(layers(2, dtype=torch.float32)), layers(2, dtype=torch.float32, seed=3)
    mask = torch.rand(2, 7) > 0.3
    run = lambda *t: kv.alignment_loss(list(zip(t[::2], t[1::2])), teacher, normalize="layer_std", mask=mask)
    eager, compiled = run(*flat(student)), torch.compile(run, fullgraph=True)(*flat(student))
    torch.testing.assert_close(eager, compiled)
    for a, b in zip(torch.autograd.grad(eager, flat(student)), torch.autograd.grad(compiled, flat(student))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend,device", servers("kv_align"))
def test_opcheck_and_determinism(backend, device):
    student, teacher = (flat(layers(2, dtype=torch.float32, device=device, seed=s)) for s in (1, 2))
    masks, coef = [torch.rand(2, 2, 7, device=device) > 0.3 for _ in range(2)], torch.rand(4, dtype=torch.float64, device=device)
    arguments = (student, teacher, masks, [True, False, False, True], "smooth_l1", 0.8, "inputs", coef, True, backend)
    torch.library.opcheck(torch.ops.distilkernels.kv_align.default, arguments)
    for a, b in zip(torch.ops.distilkernels.kv_align(*arguments), torch.ops.distilkernels.kv_align(*arguments)):
        assert torch.equal(a, b)


def test_every_loss_and_normalisation_has_a_case():
    from distilkernels.primitives.kv_align import LOSSES, NORMALIZE

    assert set(KINDS) == set(itertools.product(LOSSES, NORMALIZE)) - {("cosine", "layer_std")}


S, T = layers(2), layers(2, seed=1)


@pytest.mark.parametrize("call,error,match", [
    (lambda: kv.alignment_loss(S, T[:1]), ValueError, "layer_map must say which of the teacher's 1 layers"),
    (lambda: kv.alignment_loss(S, T, layer_map=[0]), ValueError, "layer_map must have one entry a student layer, 2; got 1"),
    (lambda: kv.alignment_loss(S, T, layer_map=[0, 2]), ValueError, r"layer_map must go from \[0, 2\) to \[0, 2\); got 1: 2"),
    (lambda: kv.alignment_loss(S, T, layer_map={}), ValueError, "layer_map must not be empty"),
    (lambda: kv.alignment_loss([], T), ValueError, "student has no layers"),
    (lambda: kv.alignment_loss(1, T), TypeError, "student must be a sequence"),
    (lambda: kv.alignment_loss([(S[0][0],)], T[:1]), TypeError, r"student\[0\] must be \(keys, values\)"),
    (lambda: kv.alignment_loss(S, layers(2, (2, 2, 6, 16))), ValueError, "must have keys of one shape, or a projection"),
    (lambda: kv.alignment_loss(S, T, loss="l2"), ValueError, "loss must be one of mse, l1, smooth_l1, cosine; got 'l2'"),
    (lambda: kv.alignment_loss(S, T, normalize="std"), ValueError, "normalize must be one of None, layer_std, inputs"),
    (lambda: kv.alignment_loss(S, T, loss="cosine", normalize="layer_std"), ValueError, "loss='cosine' has none"),
    (lambda: kv.alignment_loss(S, T, beta=0), ValueError, "beta must be positive"),
    (lambda: kv.alignment_loss(S, T, reduction="max"), ValueError, "reduction must be one of mean, sum, none"),
    (lambda: kv.alignment_loss(S, T, mask=torch.ones(2, 7)), TypeError, "mask must be a bool tensor"),
    (lambda: kv.alignment_loss(S, T, mask=torch.ones(2, 6).bool()), ValueError, r"mask must have shape \(2, 7\) or \(2, 2, 7\)"),
    (lambda: kv.alignment_loss(S, T, mask=[None]), ValueError, "mask must have one entry a student layer"),
    (lambda: kv.alignment_loss(S, T, mask=1), TypeError, "mask must be a sequence, one entry a student layer; got int"),
    (lambda: kv.alignment_loss(S, T, layer_weights=2.0), TypeError, "layer_weights must be a sequence"),
    (lambda: kv.alignment_loss(S, T, layer_weights=[1.0]), ValueError, "layer_weights must have one entry a student layer"),
    (lambda: kv.alignment_loss(S, T, projections=[torch.randn(3, 32).double(), None]), ValueError, r"projections\[0\] must map to the teacher's 2·16 = 32"),
])  # fmt: skip
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
