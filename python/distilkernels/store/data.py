"""Reading a store into training: a dataset of documents or windows, and a collator that pads or packs them."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..teacher import TeacherTopK
from .reader import TopKReader
from .writer import checked_int

IGNORED = -100


class TopKDataset(Dataset):
    """Documents of a store, whole or cut into windows, with the teacher's rows beside the tokens.

    Item i is a dict of one stretch of T positions: ``input_ids`` int64 [T]; ``teacher`` TeacherTopK [T, K], where row t is
    the teacher's prediction of the token after position t (as a student's row t is: nothing is to be shifted) and positions
    without a stored row have empty slots, which losses give weight 0; ``labels`` int64 [T], the token after each position,
    −100 after the document's last; ``doc_id``; ``start``, the first position. Documents without tokens are no items.

    Args:
        store: a path or a TopKReader. Workers of a DataLoader, forked or spawned, open their own maps.
        tokens: for a store that holds no tokens: a mapping from document ids to token ids [L].
        length: positions per window, the last of a document may be shorter; None gives whole documents.
        doc_ids: the documents to take, in this order; default all.

    Raises:
        ValueError, TypeError, KeyError: a document has no tokens or fewer than its rows need. StoreError: a damaged store.
    """

    def __init__(
        self, store: TopKReader | str | os.PathLike, *, tokens: Mapping[str | int, Sequence[int] | Tensor] | None = None,
        length: int | None = None, doc_ids: Sequence[str | int] | None = None,
    ):  # fmt: skip
        self.reader = store if isinstance(store, TopKReader) else TopKReader(store)
        self.tokens = tokens
        self.length = None if length is None else checked_int("length", length, 1, 2**31 - 1)
        docs = self.reader.docs if doc_ids is None else list(doc_ids)
        sizes = np.array([self._num_tokens(doc_id) for doc_id in docs], np.int64)
        windows = (sizes > 0).astype(np.int64) if length is None else -(-sizes // length)
        self._docs = [doc_id for doc_id, n in zip(docs, windows) if n]
        self._sizes = sizes[windows > 0].tolist()
        self._starts = [0, *np.cumsum(windows[windows > 0]).tolist()]

    def _num_tokens(self, doc_id: str | int) -> int:
        n = self.reader.num_tokens(doc_id) if self.tokens is None else len(self.tokens[doc_id])
        needed = self.reader.first(doc_id) + self.reader.length(doc_id)
        if n is None:
            raise ValueError(f"tokens must be given: the store holds none of document {doc_id!r}")
        if n < needed:
            raise ValueError(f"tokens must hold at least {needed} of document {doc_id!r}, one for each row's position; got {n}")
        return n

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}); got {index}")
        index %= len(self)
        place = bisect_right(self._starts, index) - 1
        doc_id, size = self._docs[place], self._sizes[place]
        window = size if self.length is None else self.length
        start = (index - self._starts[place]) * window
        stop = min(start + window, size)
        following = self._token_ids(doc_id, start, min(stop + 1, size))
        labels = following[1:] if stop < size else torch.cat([following[1:], following.new_tensor([IGNORED])])
        return {
            "input_ids": following[: stop - start],
            "labels": labels,
            "teacher": self._teacher(doc_id, start, stop),
            "doc_id": doc_id,
            "start": start,
        }

    def _token_ids(self, doc_id: str | int, start: int, stop: int) -> Tensor:
        if self.tokens is None:
            return self.reader.token_ids(doc_id, start, stop)
        return torch.as_tensor(self.tokens[doc_id][start:stop], dtype=torch.int64)

    def _teacher(self, doc_id: str | int, start: int, stop: int) -> TeacherTopK:
        first, rows = self.reader.first(doc_id), self.reader.length(doc_id)
        begin, end = min(max(start - first, 0), rows), min(max(stop - first, 0), rows)
        teacher = self.reader.slice(doc_id, begin, end)
        if end - begin == stop - start:
            return teacher
        before = min(max(first - start, 0), stop - start)
        filled = TeacherTopK.pad([teacher], before + len(teacher), side="left")
        return TeacherTopK.pad([filled[0]], stop - start)[0]


@dataclass(frozen=True)
class TopKCollator:
    """Items of a :class:`TopKDataset` as one batch, a dict: for ``DataLoader(collate_fn=...)``, pin_memory=True included.

    ``input_ids``, ``attention_mask`` (1 at tokens), ``position_ids`` (from 0 in each item) and ``labels`` (−100 in padding),
    int64 [B, T]; ``teacher`` TeacherTopK [B, T, K], empty in padding; with packing also ``sequence_ids`` int64 [B, T], the
    number of the item within its row, −1 in padding: attention is to stay within equal numbers. All rows are aligned as in
    the dataset: the losses of this package take ``labels`` and ``teacher`` as they are, while a model that shifts labels
    itself must not be given these.

    Args:
        pad_token_id: the input id of padding, which is on the right.
        packing: items one behind another in rows of `max_length`, each in the first row that has room; without max_length in
            one row.
        max_length: T, so that every batch has one width; None takes the longest row's.

    Raises:
        ValueError: an item is longer than max_length (cut documents with ``TopKDataset(length=...)``).
    """

    pad_token_id: int
    packing: bool = False
    max_length: int | None = None

    def __call__(self, items: Sequence[dict]) -> dict[str, Tensor | TeacherTopK]:
        sizes = [len(item["input_ids"]) for item in items]
        if self.max_length is not None and max(sizes) > self.max_length:
            raise ValueError(f"items must have at most max_length={self.max_length} positions; got {max(sizes)}; TopKDataset(length=...) cuts documents")
        rows = self._packed(items, sizes) if self.packing else [[item] for item in items]
        longest = max(sum(len(item["input_ids"]) for item in row) for row in rows)
        shape = len(rows), self.max_length or longest
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "position_ids": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED),
        }
        if self.packing:
            batch["sequence_ids"] = torch.full(shape, -1)
        for r, row in enumerate(rows):
            start = 0
            for number, item in enumerate(row):
                n = len(item["input_ids"])
                place = r, slice(start, start + n)
                batch["input_ids"][place] = item["input_ids"]
                batch["attention_mask"][place] = 1
                batch["position_ids"][place] = torch.arange(n)
                batch["labels"][place] = item["labels"]
                if self.packing:
                    batch["sequence_ids"][place] = number
                start += n
        batch["teacher"] = TeacherTopK.pad([TeacherTopK.cat([item["teacher"] for item in row]) for row in rows], shape[1])
        return batch

    def _packed(self, items: Sequence[dict], sizes: Sequence[int]) -> list[list[dict]]:
        capacity = sum(sizes) if self.max_length is None else self.max_length
        rows: list[list[dict]] = []
        room: list[int] = []
        for item, n in zip(items, sizes):
            r = next((i for i, free in enumerate(room) if free >= n), len(rows))
            if r == len(rows):
                rows.append([])
                room.append(capacity)
            rows[r].append(item)
            room[r] -= n
        return rows
