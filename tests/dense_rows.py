"""Rows of dense teachers and students for tests, and the losses on them in plain PyTorch."""

from __future__ import annotations

import torch

import distilkernels as dk

F64 = torch.float64
# one of each way through the code: sums of both rows, sums of a second look (mixtures, distances, balances), blocks of rows
WAYS = ("reverse_kl", "jsd", "total_variation", "todi", "adaptive_kl")


def rows(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * scale


def plain(z, t, divergence, temperature=1.0):
    found = dk.divergences.resolve(divergence)
    return found((t / temperature).log_softmax(-1), (z / temperature).log_softmax(-1)) * temperature**2


def value_and_grad(loss, *leaves):
    return loss.detach(), torch.autograd.grad(loss.sum(), leaves)
