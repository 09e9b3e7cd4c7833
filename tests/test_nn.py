"""``dk.nn.DistillHead`` under FSDP2, vocabulary-parallel DTensors, checkpointing, accumulation and compile."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.checkpoint import checkpoint

import distilkernels as dk
from distilkernels.nn import DistillHead

V, H, K = 53, 8, 4


class Student(torch.nn.Module):
    """Embedding, one layer, a head that returns the loss."""

    def __init__(self, checkpointed=False, **options):
        super().__init__()
        self.embedding = torch.nn.Embedding(V, H)
        self.layer = torch.nn.Sequential(torch.nn.Linear(H, H), torch.nn.GELU())
        self.head = DistillHead(torch.nn.Linear(H, V), temperature=1.5, chunk_size=4, **options)
        self.checkpointed = checkpointed

    def hidden(self, tokens):
        x = self.embedding(tokens)
        return checkpoint(self.layer, x, use_reentrant=False) if self.checkpointed else self.layer(x)

    def forward(self, tokens, teacher, **options):
        return self.head(self.hidden(tokens), teacher, **options)


def batch(seed=0, rows=4):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, V, (rows, 5), generator=g), dk.capture_topk(torch.randn(rows, 5, V, generator=g) * 2, K, temperature=1.5)


def student(**options):
    torch.manual_seed(3)
    return Student(**options)


def plain(model, tokens, teacher, **options):
    """The same loss on logits that exist."""
    return dk.topk_distill_loss(model.head.lm_head(model.hidden(tokens)), teacher, temperature=1.5, **options)


def grads(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_equals_the_loss_on_logits(checkpointed):
    model = student(checkpointed=checkpointed)
    tokens, teacher = batch()
    got = grads(model, model(tokens, teacher, divergence="jsd"))
    want = grads(model, plain(model, tokens, teacher, divergence="jsd"))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-7)


def test_tied_weights_accumulate_both_gradients():
    model = student()
    model.head.lm_head.weight = model.embedding.weight
    tokens, teacher = batch()
    got = grads(model, model(tokens, teacher))
    want = grads(model, plain(model, tokens, teacher))
    torch.testing.assert_close(got["embedding.weight"], want["embedding.weight"], rtol=1e-5, atol=1e-7)


def test_accumulation_over_microbatches():
    model = student()
    tokens, teacher = batch()
    whole = grads(model, model(tokens, teacher, num_items_in_batch=20))
    model.zero_grad()
    for i in range(0, 4, 2):
        model(tokens[i : i + 2], teacher[i : i + 2], num_items_in_batch=20).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_compiled_model(tail):
    model = student()
    tokens, teacher = batch()
    want = grads(model, model(tokens, teacher, tail=tail))
    got = grads(model, torch.compile(model, backend="aot_eager", fullgraph=True)(tokens, teacher, tail=tail))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-7)


def test_any_linear_loss():
    model = student()
    tokens, _ = batch()
    head = DistillHead(model.head.lm_head, dk.linear_token_logprobs)
    got = head(model.hidden(tokens), tokens)
    want = model.head.lm_head(model.hidden(tokens)).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(got, want)
    assert "linear_token_logprobs" in repr(head)
    with pytest.raises(TypeError, match="lm_head must have a weight"):
        DistillHead(torch.nn.GELU())


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def join(rank, at):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{at}", rank=rank, world_size=2)
    torch.set_num_threads(1)


def fsdp_worker(rank, at, out):
    join(rank, at)
    from torch.distributed.fsdp import fully_shard

    model = student()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for module in (model.layer, model.head, model):
        fully_shard(module, mesh=mesh)
    tokens, teacher = batch()
    mine = slice(2 * rank, 2 * rank + 2)
    model(tokens[mine], teacher[mine]).backward()
    torch.save({name: p.grad.full_tensor() for name, p in model.named_parameters()}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_fsdp2(tmp_path):
    """Two data-parallel ranks with half the batch each: the averaged gradient is that of the whole batch."""
    mp.spawn(fsdp_worker, (port(), str(tmp_path)), nprocs=2)
    model = student()
    tokens, teacher = batch()
    want = grads(model, plain(model, tokens, teacher))
    for rank in range(2):
        for name, grad in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(grad, want[name], rtol=1e-5, atol=1e-7)


def tensor_parallel_worker(rank, at, out):
    join(rank, at)
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model = student()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    lm_head = model.head.lm_head
    for name in ("weight", "bias"):
        setattr(lm_head, name, torch.nn.Parameter(distribute_tensor(getattr(lm_head, name).detach(), mesh, [Shard(0)])))
    tokens, teacher = batch()
    found = {}
    for tail in ("bucket", "renormalize"):
        for replicated in (False, True):
            model.zero_grad()
            hidden = model.hidden(tokens)
            if replicated:
                from torch.distributed.tensor import DTensor

                hidden = DTensor.from_local(hidden, mesh, [Replicate()])
            loss = model.head(hidden, teacher, tail=tail)
            loss.backward()
            assert lm_head.weight.grad.placements == (Shard(0),)
            full = {name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad) for name, p in model.named_parameters()}
            found[tail, replicated] = loss.detach(), full
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def test_a_vocabulary_parallel_dtensor(tmp_path):
    """V = 53 on two ranks: 27 and 26 columns."""
    mp.spawn(tensor_parallel_worker, (port(), str(tmp_path)), nprocs=2)
    model = student()
    tokens, teacher = batch()
    for rank in range(2):
        for (tail, _), (loss, found) in torch.load(tmp_path / f"{rank}.pt").items():
            want = plain(model, tokens, teacher, tail=tail)
            torch.testing.assert_close(loss, want)
            for name, grad in grads(model, want).items():
                torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7)
