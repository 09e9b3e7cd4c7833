"""``gather_dot`` against fp64: every backend that runs here × dtype, its three gradients, and the same numbers as vocab_stats."""

from __future__ import annotations

import math

import pytest
import torch

from distilkernels import BackendError, backends, vocab_stats
from distilkernels.backends import cpp
from distilkernels.primitives.boundary import without_duplicates
from distilkernels.primitives.gather_dot import gather_dot
from distilkernels.primitives.head import Head

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = Head()


def servers() -> list:
    """(backend, device) pairs that run here; the others are shown as skips with the sentence of their refusal."""
    pairs = []
    for name in ("reference", "cpp", "triton"):
        reason = backends.module(name).why_not("gather_dot", torch.empty(1, 8), torch.empty(1, 8))
        # test_triton.py runs Triton under its interpreter
        if not (reason and name == "triton"):
            pairs.append(pytest.param(name, "cpu", id=f"{name}-cpu", marks=[pytest.mark.skip(reason=reason)] if reason else []))
    if torch.cuda.is_available():
        pairs += [pytest.param(name, "cuda", id=f"{name}-cuda") for name in ("reference", "triton")]
    return pairs


SERVERS = servers()
HERE = [pytest.param(*p.values[:1], id=p.id, marks=p.marks) for p in SERVERS if p.values[1] == "cpu"]

# N, V, H, K
SHAPES = {
    "H = 1": (3, 11, 1, 4),
    "H narrower than a vector": (5, 37, 7, 3),
    "H past whole blocks": (4, 101, 1024 + 3, 9),
    "K = 1": (6, 53, 65, 1),
    "K = V": (2, 19, 33, 19),
    "one row": (1, 53, 130, 5),
    "more pairs of an id than slots": (70, 5, 20, 3),
}
HEADS = {
    "plain": {},
    "softcap": dict(softcap=5.0, temperature=0.7, logit_scale=1.5),
    "valid columns": dict(valid_vocab=-2),  # two fewer than V
}


def head_of(name: str, vocab: int) -> Head:
    options = dict(HEADS[name])
    if options.get("valid_vocab") == -2:
        options["valid_vocab"] = max(1, vocab - 2)
    return Head.checked(vocab, **options)


def case(n, vocab, width, k, *, seed=0, dtype=torch.float64, weight_dtype=None):
    """hidden, weight, bias and ids with an empty and a repeated slot."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64).to(weight_dtype or dtype)
    bias = torch.randn(vocab, generator=g, dtype=torch.float64).to(weight_dtype or dtype)
    ids = torch.randint(vocab, (n, k), generator=g)
    if k > 2:
        ids[0, 1], ids[-1, 2] = -1, ids[-1, 0]
    return hidden, weight, bias, ids


def truth_of(hidden, weight, bias, ids, head, dtype):
    """The definition in fp64, dense, on operands rounded to `dtype`: differentiable."""
    wide = [t if t is None else t.double() for t in (hidden.to(dtype), weight.to(dtype), bias)]
    x = wide[0] @ wide[1].T
    if bias is not None:
        x = x + wide[2]
    z = head.apply(x)
    distinct = without_duplicates(ids.cpu(), weight.shape[0]).to(ids.device)
    return z.gather(1, distinct.clamp(min=0).long()).masked_fill(distinct < 0, -math.inf)


def loss_of(z):
    """A smooth loss whose gradient is different at every finite entry."""
    slope = torch.linspace(0.5, 1.5, z.numel(), dtype=torch.float64, device=z.device).view(z.shape)
    return (torch.where(z.isfinite(), z, 0).double() * slope).sin().sum()


def run(call, hidden, weight, bias):
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    z = call(*leaves)
    return z.detach(), torch.autograd.grad(loss_of(z), [t for t in leaves if t is not None])


def assert_as_good(name, ours, peer, truth, slack):
    """Infinities in place; the worst error no more than same-dtype PyTorch's plus `slack` of the largest value."""
    ours, peer, truth = (t.detach().double().cpu() for t in (ours, peer, truth))
    assert torch.equal(ours == -math.inf, truth == -math.inf) and not ours.isnan().any(), name
    finite = truth.isfinite()
    if finite.any():
        error, other = ((t - truth)[finite].abs().max() for t in (ours, peer))
        assert error <= other + slack * truth[finite].abs().max().clamp(min=1), f"{name}: {error:.3g} > {other:.3g}"


SLACK = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def check(backend, device, shape, name, dtype, hidden_dtype, weight_dtype, with_bias, id_dtype=torch.int64):
    hidden, weight, bias, ids = (t.to(device) for t in case(*shape, dtype=hidden_dtype, weight_dtype=weight_dtype))
    ids, bias, head = ids.to(id_dtype), bias if with_bias else None, head_of(name, shape[1])
    truth, exact = run(lambda *a: truth_of(*a, ids, head, dtype), hidden.double(), weight.double(), None if bias is None else bias.double())
    reference = lambda h, w, b, serve="reference": gather_dot(h, w, ids, bias=b, head=head, dtype=dtype, backend=serve)
    peer, same = run(reference, hidden, weight, bias)
    z, grads = run(lambda *a: reference(*a, serve=backend), hidden, weight, bias)
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_good("z", z, peer, truth, SLACK[torch.float64 if dtype == torch.float64 else torch.float32])
    for of, grad, other, right in zip(("hidden", "weight", "bias"), grads, same, exact):
        leaf = {"hidden": hidden, "weight": weight, "bias": bias}[of]
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
        # one rounding to what is stored; the slope of loss_of is taken at a float32 z
        slack = SLACK[leaf.dtype] if dtype == torch.float64 else max(SLACK[leaf.dtype], 1e-5)
        assert_as_good(f"d {of}", grad, other, right, slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend,device", SERVERS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(shape, backend, device, dtype):
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(BackendError, match="float64"):
            check(backend, device, shape, "plain", dtype, dtype, dtype, False)
        return
    for name in HEADS:
        check(
            backend,
            device,
            shape,
            name,
            dtype,
            dtype,
            dtype,
            with_bias=name != "plain",
            id_dtype=torch.int32 if name == "plain" else torch.int64,
        )


@pytest.mark.parametrize(
    "hidden_dtype,weight_dtype,dtype",
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),  # float32 master weights under autocast
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.float16),
        (torch.float32, torch.bfloat16, torch.float32),  # promotion
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float16, torch.bfloat16),  # rounded to fewer bits, of more range
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.bfloat16),
    ],
    ids=lambda d: str(d).removeprefix("torch."),
)
@pytest.mark.parametrize("backend,device", SERVERS)
def test_mixed_dtypes(backend, device, hidden_dtype, weight_dtype, dtype):
    if backend == "triton" and torch.float64 in (hidden_dtype, weight_dtype, dtype):
        return
    for shape in ((5, 37, 7, 3), (4, 101, 1024 + 3, 9)):
        check(backend, device, shape, "softcap", dtype, hidden_dtype, weight_dtype, True)


@pytest.mark.parametrize("isa", cpp.available_isas() if cpp._cpp is not None else [])
def test_every_instruction_set(isa):
    best = cpp.isa()
    cpp.set_isa(isa)
    try:
        for dtype in DTYPES:
            for shape in ((5, 37, 7, 3), (70, 5, 20, 3), (4, 101, 1024 + 3, 9)):
                check("cpp", "cpu", shape, "softcap", dtype, dtype, dtype, True)
        for weight_dtype in DTYPES:
            check("cpp", "cpu", (4, 101, 260, 9), "plain", torch.bfloat16, torch.float32, weight_dtype, False)
    finally:
        cpp.set_isa(best)


@pytest.mark.parametrize("backend,device", SERVERS)
def test_weight_rows_are_rounded_as_torch_rounds(backend, device):
    """H = 1 and hidden = 1 show a single operand: ties, the largest values, and what overflows float16."""
    row = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 65519.0, 65520.0, -1e-7, 3.3895e38, 0.0], device=device)
    ids = torch.arange(8, device=device).view(1, 8)
    for dtype in (torch.bfloat16, torch.float16):
        z = gather_dot(torch.ones(1, 1, device=device), row.view(8, 1), ids, head=PLAIN, dtype=dtype, backend=backend)
        assert torch.equal(z[0], row.to(dtype).float())


@pytest.mark.parametrize("backend,device", SERVERS)
def test_strided_rows_are_read_in_place(backend, device):
    base_h, base_w, _, ids = (t.to(device) for t in case(6, 23, 40, 4, dtype=torch.float32))
    for cut in (slice(0, 37), slice(3, 40), slice(0, 40, 2)):
        h, w = base_h[:, cut], base_w[:, cut]
        ours = run(lambda *a: gather_dot(a[0], a[1], ids, head=PLAIN, dtype=torch.float32, backend=backend), h, w, None)
        packed = run(
            lambda *a: gather_dot(a[0], a[1], ids, head=PLAIN, dtype=torch.float32, backend=backend), h.contiguous(), w.contiguous(), None
        )
        assert torch.equal(ours[0], packed[0]) and all(torch.equal(a, b) for a, b in zip(ours[1], packed[1]))
        assert torch.equal(gather_dot(h, w, ids, head=PLAIN, dtype=torch.float32, backend=backend), packed[0])


@pytest.mark.parametrize("backend,device", SERVERS)
@pytest.mark.parametrize("n,k", [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("sparse", [False, True])
def test_nothing_to_do(backend, device, n, k, sparse):
    h, w = torch.randn(n, 7, device=device, requires_grad=True), torch.randn(5, 7, device=device, requires_grad=True)
    ids = torch.zeros(n, k, dtype=torch.int64, device=device)
    z = gather_dot(h, w, ids, head=PLAIN, dtype=torch.float32, backend=backend, sparse_weight_grad=sparse)
    assert z.shape == (n, k)
    dh, dw = torch.autograd.grad(z.sum(), (h, w))
    dw = dw.to_dense() if sparse else dw
    assert dh.shape == h.shape and dw.shape == w.shape and dh.count_nonzero() == 0 and dw.count_nonzero() == 0


@pytest.mark.parametrize("backend,device", SERVERS)
def test_all_slots_empty(backend, device):
    h, w = torch.randn(3, 7, device=device, requires_grad=True), torch.randn(5, 7, device=device, requires_grad=True)
    z = gather_dot(h, w, torch.full((3, 2), -1, device=device), head=PLAIN, dtype=torch.float32, backend=backend, sparse_weight_grad=True)
    assert (z == -math.inf).all()
    dh, dw = torch.autograd.grad(loss_of(z), (h, w))
    assert dh.count_nonzero() == 0 and dw._nnz() == 0


@pytest.mark.parametrize("backend,device", SERVERS)
def test_a_skipped_slot_reads_nothing(backend, device):
    """Row 0 of the weight, where a careless kernel would look for an empty slot, holds NaN; so does the slot's gradient."""
    hidden, weight, _, ids = (t.to(device) for t in case(3, 11, 20, 4, dtype=torch.float32))
    ids[ids == 0] = 3
    weight[0] = math.nan
    z, grads = run(lambda h, w, _: gather_dot(h, w, ids, head=PLAIN, dtype=torch.float32, backend=backend), hidden, weight, None)
    assert not z.isnan().any() and all(g.isfinite().all() for g in grads)
    grad = torch.where(ids < 0, math.nan, 1.0).float()
    out = torch.empty(3, 20, device=device)
    backends.resolve("gather_dot_hidden_grad", grad, weight, ids, backend=backend)(grad, weight, ids, torch.float32, out)
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", HERE)
def test_gradcheck(backend):
    if backend == "triton":
        return
    hidden, weight, bias, ids = case(4, 13, 6, 5)
    for name in HEADS:
        options = dict(head=head_of(name, 13), dtype=torch.float64, backend=backend)
        call = lambda h, w, b, o=options: gather_dot(h, w, ids, bias=b, **o).nan_to_num(neginf=0)
        assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in (hidden, weight, bias)])


@pytest.mark.parametrize("backend,device", SERVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_weight_gradient(backend, device, dtype):
    """The touched rows of the dense gradient, bit for bit, ids ascending; usable by SparseAdam and by accumulation."""
    hidden, weight, _, ids = (t.to(device) for t in case(9, 301, 35, 6, dtype=dtype))
    head = head_of("valid columns", 301)
    ids[2, 3] = 300
    dense, sparse = (
        run(
            lambda h, w, _, s=s: gather_dot(h, w, ids, head=head, dtype=dtype, backend=backend, sparse_weight_grad=s), hidden, weight, None
        )[1]
        for s in (False, True)
    )
    assert torch.equal(sparse[0], dense[0]) and torch.equal(sparse[1].to_dense(), dense[1])
    assert sparse[1].is_coalesced() and sparse[1].dtype == dtype and sparse[1].shape == weight.shape
    distinct = without_duplicates(ids, 299)
    assert torch.equal(sparse[1].indices()[0], distinct[distinct >= 0].unique())
    leaf = weight.detach().requires_grad_()
    for _ in range(2):
        loss_of(gather_dot(hidden, leaf, ids, head=head, dtype=dtype, backend=backend, sparse_weight_grad=True)).backward()
    torch.testing.assert_close(leaf.grad.to_dense(), 2 * dense[1])


@pytest.mark.parametrize("backend,device", SERVERS)
def test_only_what_is_needed(backend, device, monkeypatch):
    hidden, weight, bias, ids = (t.to(device) for t in case(3, 11, 20, 4, dtype=torch.float32))
    served = []
    real = backends.resolve
    monkeypatch.setattr("distilkernels.primitives.gather_dot.resolve", lambda name, *a, **k: served.append(name) or real(name, *a, **k))
    for frozen, expected in (("weight", ["gather_dot_hidden_grad"]), ("hidden", ["gather_dot_weight_grad"]), ("both", [])):
        h, w = hidden.clone().requires_grad_(frozen == "weight"), weight.clone().requires_grad_(frozen == "hidden")
        z = gather_dot(h, w, ids, head=PLAIN, dtype=torch.float32, backend=backend)
        served.clear()
        if frozen == "both":
            assert not z.requires_grad
        else:
            loss_of(z).backward()
        assert served == expected
    # a bias alone needs neither product's gradient
    b = bias.clone().requires_grad_()
    loss_of(gather_dot(hidden, weight, ids, bias=b, head=PLAIN, dtype=torch.float32, backend=backend)).backward()
    assert served == ["gather_dot", "gather_dot", "gather_dot_weight_grad"] and b.grad.isfinite().all()


@pytest.mark.parametrize("backend,device", SERVERS)
def test_determinism_and_batch_invariance(backend, device):
    """Ids that repeat in every row, large enough for threads: the same bits alone, again, and on another number of threads."""
    hidden, weight, bias, ids = (t.to(device) for t in case(97, 50, 130, 11, dtype=torch.float32))

    def call(rows=slice(None), sparse=False):
        options = dict(head=PLAIN, dtype=torch.float32, backend=backend, sparse_weight_grad=sparse)
        return run(lambda h, w, b: gather_dot(h[rows], w, ids[rows], bias=b, **options), hidden, weight, bias)

    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            found.append(call())
        sparse = call(sparse=True)
    finally:
        torch.set_num_threads(before)
    if backend == "reference":
        return  # PyTorch's own reductions make no such promise
    for z, grads in found[1:]:
        assert torch.equal(z, found[0][0]) and all(torch.equal(a, b) for a, b in zip(grads, found[0][1]))
    assert torch.equal(sparse[1][1].to_dense(), found[0][1][1])
    assert torch.equal(call(slice(40, 41))[0], found[0][0][40:41])


@pytest.mark.parametrize("backend,device", SERVERS)
def test_long_sums(backend, device):
    """4,096 pairs of one id, all of one sign: the error of a float sum stays below 1e-5 of it."""
    n, width = 4096, 19
    h = torch.rand(n, width, generator=torch.Generator().manual_seed(0)).to(device)
    w = torch.zeros(3, width, device=device, requires_grad=True)
    z = gather_dot(h, w, torch.ones(n, 1, dtype=torch.int64, device=device), head=PLAIN, dtype=torch.float32, backend=backend)
    (dw,) = torch.autograd.grad(z.sum(), w)
    torch.testing.assert_close(dw[1].double(), h.double().sum(0), rtol=1e-5, atol=0)
    assert dw[[0, 2]].count_nonzero() == 0


@pytest.mark.parametrize("backend,device", SERVERS)
def test_equals_vocab_stats(backend, device):
    hidden, weight, bias, ids = (t.to(device) for t in case(7, 211, 96, 12, dtype=torch.float32))
    head = dict(softcap=8.0, temperature=2.0, logit_scale=0.5, valid_vocab=200)
    direct = lambda h, w, b: vocab_stats(h @ w.T + b, ids, want="gathered", **head).gathered
    ours = lambda h, w, b: gather_dot(h, w, ids, bias=b, head=Head.checked(211, **head), dtype=torch.float32, backend=backend)
    (a, grads_a), (b, grads_b) = run(direct, hidden, weight, bias), run(ours, hidden, weight, bias)
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    for x, y in zip(grads_a, grads_b):
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend,device", SERVERS)
def test_opcheck(backend, device):
    hidden, weight, _, ids = (t.to(device) for t in case(3, 11, 20, 4, dtype=torch.float32))
    ops, dtype = torch.ops.distilkernels, torch.float32
    for n in (3, 0):
        h, some, grad = hidden[:n].clone(), ids[:n], torch.randn(n, 4, device=device)
        torch.library.opcheck(ops.gather_dot.default, (h.requires_grad_(), weight.clone().requires_grad_(), some, dtype, backend))
        h = h.detach()
        torch.library.opcheck(ops.gather_dot_hidden_grad.default, (grad, weight, some, dtype, torch.bfloat16, backend))
        torch.library.opcheck(ops.gather_dot_weight_grad.default, (grad, h, some, dtype, torch.bfloat16, 11, backend))


@pytest.mark.parametrize("backend,device", SERVERS)
def test_compile(backend, device):
    hidden, weight, bias, ids = (t.to(device) for t in case(5, 31, 24, 4, dtype=torch.float32))
    call = lambda h, w, b: gather_dot(h, w, ids, bias=b, head=Head(softcap=5.0), dtype=torch.bfloat16, backend=backend)
    z, grads = run(call, hidden, weight, bias)
    compiled, compiled_grads = run(torch.compile(call, fullgraph=True, backend="aot_eager"), hidden, weight, bias)
    torch.testing.assert_close(compiled, z)
    for a, b in zip(compiled_grads, grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", HERE)
def test_torch_func(backend):
    hidden, weight, bias, ids = case(5, 31, 24, 4, dtype=torch.float32)
    call = lambda h, w, b: gather_dot(h, w, ids, bias=b, head=PLAIN, dtype=torch.float32, backend=backend)
    _, grads = run(call, hidden, weight, bias)
    found = torch.func.grad(lambda *a: loss_of(call(*a)), argnums=(0, 1, 2))(hidden, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(found, grads))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_second_derivative_is_refused(sparse):
    hidden, weight, _, ids = case(3, 11, 8, 2, dtype=torch.float32)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    loss = loss_of(gather_dot(h, w, ids, head=PLAIN, dtype=torch.float32, sparse_weight_grad=sparse))
    dh, dw = torch.autograd.grad(loss, (h, w), create_graph=True)
    for grad in (dh, dw.to_dense()):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(grad.sum(), h, retain_graph=True)
    # a graph that is only kept is no second derivative
    assert torch.equal(dh.detach(), torch.autograd.grad(loss_of(gather_dot(h, w, ids, head=PLAIN, dtype=torch.float32)), h)[0])


def test_sparse_gradients_cannot_be_traced():
    hidden, weight, _, ids = case(3, 11, 8, 2, dtype=torch.float32)
    call = lambda h: gather_dot(h, weight, ids, head=PLAIN, dtype=torch.float32, sparse_weight_grad=True).sum()
    with pytest.raises(ValueError, match="cannot be traced"):
        torch.func.grad(call)(hidden)


def test_ids_out_of_range_are_not_read():
    """Callers check ids on a CPU; on a GPU nobody can without waiting. Either way they count as empty."""
    hidden, weight, _, ids = case(2, 11, 8, 3, dtype=torch.float32)
    ids[0, 0], ids[1, 1] = 11, 2**40
    z = gather_dot(hidden, weight, ids, head=PLAIN, dtype=torch.float32)
    assert z[0, 0] == -math.inf and z[1, 1] == -math.inf
    if cpp._cpp is not None:
        out, far = torch.empty(2, 3), torch.empty(2, 8)
        cpp.gather_dot(hidden, weight, ids, out)
        assert out[0, 0] == 0 and out[1, 1] == 0
        cpp.gather_dot_hidden_grad(torch.ones(2, 3), weight, ids, torch.float32, far)
        assert far.isfinite().all()
