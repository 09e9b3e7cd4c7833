"""Documents as padded batches of similar lengths."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .documents import Document


class Tokens(NamedTuple):
    """A document's ids int64 [T], under its name."""

    id: str
    tokens: np.ndarray


def encoded(documents: list[Document], tokenize: Callable[[list[str]], list[list[int]]], num_inputs: int) -> list[Tokens]:
    """Token ids of each document; ValueError for an id that the model does not have, naming the document's place."""
    texts = [d.content for d in documents if isinstance(d.content, str)]
    ids = iter(tokenize(texts) if texts else [])
    out = []
    for document in documents:
        tokens = np.array(next(ids), dtype=np.int64) if isinstance(document.content, str) else document.content
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < num_inputs:
            bad = int(np.flatnonzero((tokens < 0) | (tokens >= num_inputs))[0])
            raise ValueError(f"{document.place}: token {bad} is {tokens[bad]}; the model has ids below {num_inputs}")
        out.append(Tokens(document.id, tokens))
    return out


def windows(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while window := list(itertools.islice(items, size)):
        yield window


def bucketed(documents: list[Tokens], batch_tokens: int) -> Iterator[list[Tokens]]:
    """Groups of similar length, longest first, each with count · longest ≤ `batch_tokens` (a longer document goes alone)."""
    group: list[Tokens] = []
    for document in sorted(documents, key=lambda d: -len(d.tokens)):
        if group and (len(group) + 1) * len(group[0].tokens) > batch_tokens:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def padded(documents: list[Tokens]) -> tuple[Tensor, Tensor]:
    """Ids int64 [B, T], filled with 0 on the right, and the mask bool [B, T] of what is no filling."""
    lengths = torch.tensor([len(d.tokens) for d in documents])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask] = torch.from_numpy(np.concatenate([d.tokens for d in documents]))
    return ids, mask
