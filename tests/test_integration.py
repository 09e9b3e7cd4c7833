"""What surrounds a loss in a training run: compile, autocast, accumulation, views, workers, 2^31 elements."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import distilkernels as dk
from distilkernels import backends

IDS = torch.arange(5).expand(2, 6, 5)
CPP = pytest.mark.skipif(backends.module("cpp").why_not("vocab_stats", torch.empty(1, 1, 8)) is not None, reason="the C++ extension is not built")


def student(seed=0, dtype=torch.float32):
    return torch.randn(2, 6, 41, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


TEACHER = dk.capture_topk(student(1).detach(), 5)


@pytest.mark.parametrize("options", [
    dict(divergence="jsd"), dict(tail="renormalize", divergence="reverse_kl"), dict(divergence="adaptive_kl", return_stats=True),
    dict(labels=torch.arange(12).view(2, 6), ce_weight=0.5, token_weights=torch.rand(2, 6), softcap=9.0), dict(reduction="none", divergence="todi"),
], ids=lambda o: "+".join(map(str, o)))  # fmt: skip
def test_compile_fullgraph(options):
    def step(z):
        out = dk.topk_distill_loss(z * 1.5, TEACHER, **options)
        return (out[0] if isinstance(out, tuple) else out).sum()

    a, b = student(), student()
    eager = step(a)
    eager.backward()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(b)
    compiled.backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(a.grad, b.grad)


def test_compile_inductor():
    """One whole compile through inductor, with the statistics of a user's own row loss."""

    def step(z):
        return dk.row_loss(z * 2, IDS, lambda s: s.lse - s.gathered[:, 0] + s.entropy, want=("lse", "gathered", "expected_logit"))

    a, b = student(), student()
    step(a).backward()
    torch.compile(step, fullgraph=True)(b).backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Under autocast the logits come in 16 bits; the loss is that of those logits, in float32."""
    head = torch.nn.Linear(8, 41)
    hidden = torch.randn(2, 6, 8)
    with torch.autocast("cpu", dtype=dtype):
        z = head(hidden)
        loss = dk.topk_distill_loss(z, TEACHER)
    assert z.dtype == dtype and loss.dtype == torch.float32
    torch.testing.assert_close(loss, dk.topk_distill_loss(z.detach().double(), TEACHER).float())
    loss.backward()
    assert head.weight.grad.dtype == torch.float32 and head.weight.grad.isfinite().all()


def test_no_grad_and_requires_grad():
    with torch.no_grad():
        assert not dk.topk_distill_loss(student(), TEACHER).requires_grad
    assert not dk.topk_distill_loss(student().detach(), TEACHER).requires_grad
    with torch.inference_mode():
        assert dk.topk_distill_loss(student(), TEACHER) > 0


def test_logits_used_twice():
    z = student()
    y = z * 1.0
    (dk.topk_distill_loss(y, TEACHER) + dk.token_logprobs(y, IDS[..., 0]).mean()).backward()
    a, b = student(), student()
    dk.topk_distill_loss(a, TEACHER).backward()
    dk.token_logprobs(b, IDS[..., 0]).mean().backward()
    torch.testing.assert_close(z.grad, a.grad + b.grad)


def test_gradients_accumulate():
    z = student()
    for _ in range(2):
        dk.topk_distill_loss(z, TEACHER).backward()
    once = student()
    dk.topk_distill_loss(once, TEACHER).backward()
    torch.testing.assert_close(z.grad, 2 * once.grad)


@pytest.mark.parametrize("view", [
    lambda x: x[:, :-1], lambda x: x.transpose(0, 1), lambda x: x[..., ::2], lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x[0],
], ids=["shifted", "batch_second", "every_other", "vocab_not_last", "one"])  # fmt: skip
def test_views(view):
    z = student()
    x = view(z)
    teacher = dk.capture_topk(torch.randn(x.shape), 5)
    loss = dk.topk_distill_loss(x, teacher)
    plain = dk.topk_distill_loss(x.detach().contiguous().clone(), teacher)
    torch.testing.assert_close(loss, plain)
    loss.backward()
    leaf = x.detach().contiguous().clone().requires_grad_()
    dk.topk_distill_loss(leaf, teacher).backward()
    want = torch.zeros_like(z)
    view(want).copy_(leaf.grad)
    torch.testing.assert_close(z.grad, want)


def test_in_place_backward_through_a_model():
    """The gradient that reaches the head's weight is the same, and the logits' memory holds d logits afterwards."""
    hidden = torch.randn(2, 6, 8)
    grads = []
    for inplace in (False, True):
        torch.manual_seed(1)
        head = torch.nn.Linear(8, 41, bias=False)
        z = head(hidden)
        dk.topk_distill_loss(z, TEACHER, inplace_backward=inplace).backward()
        grads.append(head.weight.grad)
    assert torch.equal(*grads)
    torch.testing.assert_close(torch.einsum("btv,bth->vh", z.detach(), hidden), grads[0])


def test_a_second_derivative_is_refused_with_a_sentence():
    z = student()
    (g,) = torch.autograd.grad(dk.topk_distill_loss(z, TEACHER), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(g.sum(), z)


def test_functorch_grad():
    z = student().detach()
    got = torch.func.grad(lambda x: dk.topk_distill_loss(x, TEACHER))(z)
    leaf = student()
    dk.topk_distill_loss(leaf, TEACHER).backward()
    torch.testing.assert_close(got, leaf.grad)


@pytest.mark.parametrize("fn", [
    lambda z, ids, t: dk.vocab_stats(z, ids, temperature=t).lse.sum(), lambda z, ids, t: dk.token_logprobs(z, ids, temperature=t).sum(),
    lambda z, ids, t: dk.topk_distill_loss(z, dk.capture_topk(z.flip(-1), 4, temperature=t), temperature=t),
], ids=["vocab_stats", "token_logprobs", "topk_distill_loss"])  # fmt: skip
def test_compile_with_dynamic_shapes_and_temperatures(fn):
    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, v, t in ((3, 40, 1.0), (5, 61, 2.0), (2, 40, 0.7)):
        z, ids = torch.randn(n, v), torch.arange(n * 3).view(n, 3)
        torch.testing.assert_close(compiled(z, ids, t), fn(z, ids, t))


def large(seed):
    """A gradient of 10 MB, above the size from which memory is recycled."""
    z = torch.randn(64, 40_000, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    dk.vocab_stats(z).lse.sum().backward()
    return z.grad


def test_recycled_memory_is_given_out_once():
    from distilkernels.primitives import memory

    memory.release()
    first = large(0)
    kept, address = first.clone(), first.data_ptr()
    assert large(1).data_ptr() != address  # .grad of a living leaf
    view = first[3:4].view(-1)
    array = view.numpy()
    del first, view
    others = [large(i).data_ptr() for i in range(2, 5)]
    assert address not in others and np.array_equal(array, kept[3].numpy())
    assert others[1] == others[2], "the last buffer is warm again"
    memory.release()


def test_recycled_memory_after_a_fork():
    """A child has its own: pages of the parent's gradients stay the parent's, and a lock held at the fork does not hang it."""
    import os
    import threading

    from distilkernels.primitives import memory

    del_me = large(0)
    del del_me
    mine = large(1)
    before = mine.clone()
    threads = torch.get_num_threads()
    with memory._lock:
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                mine.zero_()
                os._exit(0 if threading.main_thread() and large(2).isfinite().all() else 1)
            except BaseException:
                os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(mine, before) and torch.get_num_threads() == threads


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.set_num_threads(1)
        return dk.topk_distill_loss(student(index).detach(), TEACHER)


def test_workers_forked_after_parallel_kernels():
    """A child forked from a process that has run OpenMP regions must not hang in one."""
    big = torch.randn(64, 20_000)
    dk.vocab_stats(big)
    loader = torch.utils.data.DataLoader(Rows(), num_workers=2, multiprocessing_context="fork", timeout=60)
    got = torch.cat(list(loader))
    want = torch.stack([Rows()[i] for i in range(4)])
    torch.testing.assert_close(got, want)


@CPP
def test_more_than_2_to_the_31_elements():
    """Rows 2^31 elements apart: lazily zeroed memory, of which only the rows are ever written."""
    v, k = 5003, 7
    stride = 2**31 + 11
    memory = torch.from_numpy(np.zeros(stride * 2 + v, np.int16)).view(torch.bfloat16)
    logits = memory.as_strided((3, v), (stride, 1))
    rows = torch.randn(3, v).bfloat16()
    logits.copy_(rows)
    teacher = dk.capture_topk(torch.randn(3, v), k)
    a, b = logits.detach().requires_grad_(), rows.clone().requires_grad_()
    loss = dk.topk_distill_loss(a, teacher, inplace_backward=True)
    want = dk.topk_distill_loss(b, teacher)
    assert torch.equal(loss, want)
    (in_place,) = torch.autograd.grad(loss, a)
    (grad,) = torch.autograd.grad(want, b)
    assert torch.equal(in_place, grad) and in_place.data_ptr() == memory.data_ptr()


def test_import_is_light():
    """Neither triton nor transformers, and well under a second beyond torch."""
    code = """
        import sys, time, torch
        start = time.perf_counter()
        import distilkernels as dk
        took = time.perf_counter() - start
        dk.topk_distill_loss(torch.randn(2, 9), dk.capture_topk(torch.randn(2, 9), 3))
        assert not {"triton", "transformers", "matplotlib", "pandas"} & set(sys.modules), sorted(sys.modules)
        print(took)
    """
    took = min(float(subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True).stdout) for _ in range(2))
    assert took < 0.8


def test_python_dash_m_prints_the_table():
    out = subprocess.run([sys.executable, "-m", "distilkernels"], capture_output=True, text=True, check=True).stdout
    for word in ("distilkernels", "torch", "C++ kernels", "vocab_stats", "reference", "Refusals"):
        assert word in out
