"""The recipes of docs/systems.md: one namespace for each heading, and what the plain forms of the tests share."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parent.parent / "docs" / "systems.md"
SECTION = re.compile(r"^### (.*?)\n(.*?)(?=^##|\Z)", flags=re.M | re.S)
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.M | re.S)


def slug(heading: str) -> str:
    return re.sub(r"\W+", "_", heading.lower()).strip("_")


def recipes() -> dict[str, str]:
    """Source by slug."""
    return {slug(heading): "\n".join(BLOCK.findall(body)) for heading, body in SECTION.findall(PAGE.read_text())}


class Recipe:
    """The functions that one section defines."""

    def __init__(self, name: str):
        page = PAGE.read_text()
        namespace: dict = {}
        exec(compile(BLOCK.search(page).group(1), str(PAGE), "exec"), namespace)
        known = set(namespace)
        exec(compile(recipes()[name], str(PAGE), "exec"), namespace)
        self.__dict__.update({key: value for key, value in namespace.items() if key not in known})


def f64(*shape, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64) * scale


def at(log_p, ids):
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def masked_mean(x, mask):
    """Over all tokens of the mask, of values that may be anything outside it."""
    return x[mask.bool()].mean()


def ragged(b=3, length=6):
    """A mask of different lengths, one of them 1."""
    return (torch.arange(length) < torch.tensor([length, 1, 4, 3, 5][:b])[:, None]).long()


def entropy(z):
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def certainty(z):
    return -z.log_softmax(-1).mean(-1) - torch.tensor(float(z.shape[-1]), dtype=z.dtype).log()


def ppo(new, old, a, low=0.2, high=0.2):
    r = (new - old.detach()).exp()
    return torch.minimum(r * a, r.clamp(1 - low, 1 + high) * a)


def same(got, want, leaves=(), rtol=1e-9):
    """The value, and its gradients for the leaves."""
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-10)
    if leaves:
        upstream = torch.linspace(0.5, 1.5, want.numel(), dtype=want.dtype).view(want.shape)
        ours = torch.autograd.grad(got, leaves, upstream)
        theirs = torch.autograd.grad(want, leaves, upstream)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-10)
            assert b.norm() > 0
