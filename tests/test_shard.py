"""Vocabulary-parallel losses: two and four gloo ranks give the single process's loss and gradients."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import distilkernels as dk

N, V, H, K = 9, 101, 16, 6
EVERYTHING = ("lse", "gathered", "tail_lse", "expected_logit", "logit_sum", "lse_t1", "max", "argmax", "second", "rank", "mass_above")
HEAD = dict(temperature=1.3, softcap=5.0, logit_scale=0.7)
EVEN = {2: [0, 51, 101], 4: [0, 26, 51, 76, 101]}
UNEVEN = {2: [0, 3, 101], 4: [0, 70, 71, 90, 101]}


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, N // 3, H, generator=g).to(dtype)
    weight, bias = torch.randn(V, H, generator=g).to(dtype), torch.randn(V, generator=g).to(dtype)
    return hidden, weight, bias, torch.randn(3, N // 3, V, generator=g, dtype=torch.float64) * 2


def scenarios():
    """(name, teacher, options): what differs between them is where the ids lie and what is asked."""
    _, _, _, t = inputs()
    spread = dk.capture_topk(t, K, temperature=1.5)
    one = dk.capture_topk(t[..., :30], K, temperature=1.5)  # every id on the first shard, mostly
    labels = torch.arange(N).view(3, N // 3) * 11
    labels[0, 0] = -100
    ids = spread.ids.clone()
    ids[0, 1, 2], ids[1, 0] = -1, -1
    ragged = dk.TeacherTopK(ids, spread.logprobs, None, 1.5)
    every = dict(labels=labels, ce_weight=0.3, return_stats=True, token_weights=torch.linspace(0, 2, N).view(3, N // 3))
    return [
        ("bucket", spread, {}),
        ("one_shard", one, {"divergence": "jsd"}),
        ("everything", spread, every | {"divergence": "reverse_kl", "softcap": 6.0}),
        ("valid_vocab", one, {"valid_vocab": 60, "divergence": "skew_forward_kl"}),
        ("renormalize", spread, {"tail": "renormalize", "divergence": "reverse_kl"}),
        ("ragged", ragged, {"tail": "drop", "reduction": "none"}),
    ]


def losses(hidden, weight, bias, shard):
    """[loss, d hidden, d weight, d bias or d logits] of every scenario, on logits and fused, gradients by one backward."""
    found = {}
    for name, teacher, options in scenarios():
        for fused in (False, True):
            h, w, b = (t.clone().requires_grad_() for t in (hidden, weight, bias))
            if fused:
                got = dk.linear_topk_distill_loss(h, w, teacher, bias=b, temperature=1.5, chunk_size=4, shard=shard, **options)
                leaves = (h, w, b)
            else:
                z = (h @ w.t() + b).detach().requires_grad_()
                got = dk.topk_distill_loss(z, teacher, temperature=1.5, shard=shard, **options)
                leaves = (z,)
            loss, stats = got if isinstance(got, tuple) else (got, ())
            grads = torch.autograd.grad((loss * torch.linspace(1, 2, loss.numel()).view(loss.shape)).sum(), leaves)
            found[name, fused] = [loss.detach(), *(s.double() for s in stats)], grads
    return found


def token_signals(hidden, weight, bias, shard):
    """Signals on logits and fused, and the gradients of those that have one."""
    ids = torch.arange(N).view(3, N // 3) * 7 % V
    z = (hidden @ weight.t() + bias).detach().requires_grad_()
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    calls = ((dk.signals.from_logits(z, ids, shard=shard), (z,)), (dk.signals.from_hidden(h, w, ids, bias=bias, chunk_size=4, shard=shard), (h, w)))
    return [([t.detach() for t in s], torch.autograd.grad((s.logprob + s.entropy + s.confidence + s.self_certainty).sum(), of)) for s, of in calls]


def worker(rank, world, port, cuts, dtype_name, out):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    hidden, weight, bias, _ = inputs(getattr(torch, dtype_name))
    start, stop = cuts[rank], cuts[rank + 1]
    shard = dk.VocabShard(start, stop)
    found = losses(hidden, weight[start:stop], bias[start:stop], shard)
    z = hidden @ weight.t() + bias
    z[2, 1, 5] = float("nan")
    ids = torch.rand(3, N // 3, V, generator=torch.Generator().manual_seed(1)).argsort(-1)[..., :K]
    ids[0, 0, 1], ids[0, 0, 3] = -1, ids[0, 0, 0]
    found["stats"] = dk.vocab_stats(z[..., start:stop], ids, want=EVERYTHING, shard=shard, **HEAD)
    confidence = lambda stats: stats.max - stats.lse
    z = (hidden @ weight.t() + bias)[..., start:stop].detach().requires_grad_()
    h, w = hidden.clone().requires_grad_(), weight[start:stop].clone().requires_grad_()
    found["of maximum"] = [
        torch.autograd.grad(dk.row_loss(z, None, confidence, want=("lse", "max"), shard=shard), z)[0],
        *torch.autograd.grad(dk.linear_row_loss(h, w, None, confidence, want=("lse", "max"), shard=shard), (h, w)),
    ]
    found["signal"] = dk.linear_token_logprobs(hidden, weight[start:stop], ids[..., 0].clamp(min=0), bias=bias[start:stop], entropy=True, shard=shard)
    found["signals"] = token_signals(hidden, weight[start:stop], bias[start:stop], shard)
    with pytest.raises(ValueError, match="temperatures has no vocabulary-parallel form"):
        dk.signals.from_logits(z, temperatures=(1.0, 2.0), shard=shard)
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("cuts", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_ranks_equal_one_process(world, cuts, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (world, port, cuts[world], "float32", str(tmp_path)), nprocs=world)
    hidden, weight, bias, _ = inputs()
    whole = losses(hidden, weight, bias, None)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in range(world)]

    def close(got, want):
        assert (got.double() - want.double()).norm() <= 1e-6 * want.double().norm() + 1e-9

    for (name, fused), (values, grads) in whole.items():
        parts = [rank[name, fused] for rank in ranks]
        for part in parts:
            for got, want in zip(part[0], values):
                close(got, want)
        if fused:
            for part in parts:
                close(part[1][0], grads[0])
            close(torch.cat([part[1][1] for part in parts]), grads[1])
            close(torch.cat([part[1][2] for part in parts]), grads[2])
        else:
            close(torch.cat([part[1][0] for part in parts], -1), grads[0])

    z = hidden @ weight.t() + bias
    z[2, 1, 5] = float("nan")
    ids = torch.rand(3, N // 3, V, generator=torch.Generator().manual_seed(1)).argsort(-1)[..., :K]
    ids[0, 0, 1], ids[0, 0, 3] = -1, ids[0, 0, 0]
    want = dk.vocab_stats(z, ids, want=EVERYTHING, **HEAD)
    confidence = lambda stats: stats.max - stats.lse
    leaf, h, w = (t.clone().requires_grad_() for t in (hidden @ weight.t() + bias, hidden, weight))
    (dz,) = torch.autograd.grad(dk.row_loss(leaf, None, confidence, want=("lse", "max")), leaf)
    dh, dw = torch.autograd.grad(dk.linear_row_loss(h, w, None, confidence, want=("lse", "max")), (h, w))
    parts = [rank["of maximum"] for rank in ranks]
    close(torch.cat([part[0] for part in parts], -1), dz)
    for part in parts:
        close(part[1], dh)
    close(torch.cat([part[2] for part in parts]), dw)
    (on_logits, (dz,)), (fused, (dh, dw)) = token_signals(hidden, weight, bias, None)
    parts = [rank["signals"] for rank in ranks]
    close(torch.cat([part[0][1][0] for part in parts], -1), dz)
    close(torch.cat([part[1][1][1] for part in parts]), dw)
    for part in parts:
        close(part[1][1][0], dh)
        for got, exact in zip((*part[0][0], *part[1][0]), (*on_logits, *fused)):
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
    for rank in ranks:
        for name in (*EVERYTHING, "finite_count"):
            torch.testing.assert_close(getattr(rank["stats"], name), getattr(want, name), rtol=1e-5, atol=1e-5, equal_nan=True)
        for got, exact in zip(rank["signal"], dk.linear_token_logprobs(hidden, weight, ids[..., 0].clamp(min=0), bias=bias, entropy=True)):
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)


def test_a_shard_needs_its_group_and_its_columns():
    with pytest.raises(ValueError, match="init_process_group"):
        dk.VocabShard(0, 5)
    with pytest.raises(TypeError, match="shard must be a VocabShard"):
        dk.vocab_stats(torch.randn(2, 5), shard=(0, 5))
