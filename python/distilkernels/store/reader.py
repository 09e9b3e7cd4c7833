"""Reading a store of teacher rows, by document and by slice, from any number of processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import StoreError
from ..teacher import TeacherTopK
from .manifest import TEMPORARY, Manifest
from .shard import HAS_TAIL, HAS_TOKENS, ROWS, TOKENS, Content, Shard, num_shards

# Maps held open at once; Linux allows a process 65,530.
_MAPPED = 16_384


class TopKReader:
    """The documents of a store at the moment of opening; :meth:`refresh` looks for more.

    Rows are decoded from memory-mapped files. The first read of a block (256 rows, about 55 KB at K = 64) compares its
    checksum, about 10 µs; later reads of that block by this reader do not. A reader may be pickled, forked and used from several
    threads; a copy sees the documents that the original saw.

    Args:
        path: the store's folder.

    Raises:
        StoreError: there is no store, or it is damaged: with the file and byte offset.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._open(None)

    def _open(self, shards: int | None) -> None:
        self.manifest = Manifest.read(self.path)
        self._mapped: dict[int, Shard] = {}
        self._place: dict[str | int, int] = {}
        self._docs: list[str | int] = []
        # per document: shard, first row in it, first token in it, rows, tokens, first position, flags
        self._index = np.zeros((0, 7), np.int64)
        self._shards = 0
        self._extend(num_shards(self.path, self.manifest) if shards is None else shards)

    def _extend(self, shards: int) -> None:
        tables, docs, place = [self._index], [], {}
        for index in range(self._shards, shards):
            shard = self._shard(index)
            documents = shard.documents
            table = np.empty((len(documents), 7), np.int64)
            table[:, 0] = index
            for column, counted in ((1, ROWS), (2, TOKENS)):
                table[:, column] = np.cumsum(documents[:, counted]) - documents[:, counted]
            table[:, 3:] = documents
            tables.append(table)
            for doc_id in shard.doc_ids:
                if doc_id in self._place or doc_id in place:
                    raise StoreError(f"document {doc_id!r} is in the store twice", shard.path)
                place[doc_id] = len(self._docs) + len(docs)
                docs.append(doc_id)
        self._index = np.concatenate(tables)
        self._docs += docs
        self._place |= place
        self._shards = max(shards, self._shards)

    def _shard(self, index: int) -> Shard:
        shard = self._mapped.get(index)
        if shard is None:
            while len(self._mapped) >= _MAPPED:
                self._mapped.pop(next(iter(self._mapped)), None)
            shard = self._mapped[index] = Shard(self.path, index, self.manifest)
        return shard

    def refresh(self) -> int:
        """Looks for documents flushed since; returns how many there are. StoreError where the store was overwritten."""
        manifest = Manifest.read(self.path)
        if manifest.store != self.manifest.store:
            raise StoreError("the store was overwritten with another since it was opened", self.path)
        before = len(self._docs)
        self.manifest = manifest
        self._extend(num_shards(self.path, manifest))
        return len(self._docs) - before

    def __len__(self) -> int:
        """Documents."""
        return len(self._docs)

    def __contains__(self, doc_id: str | int) -> bool:
        return doc_id in self._place

    def __iter__(self) -> Iterator[str | int]:
        return iter(self._docs)

    @property
    def docs(self) -> list[str | int]:
        """Document ids in the order they were appended."""
        return list(self._docs)

    @property
    def tokens(self) -> int:
        """Teacher rows of all documents."""
        return int(self._index[:, 3].sum())

    @property
    def lengths(self) -> np.ndarray:
        """Teacher rows per document, int64, in the order of `docs`."""
        return self._index[:, 3].copy()

    @property
    def stored_tokens(self) -> int:
        """Token ids stored beside the rows."""
        return int(self._index[:, 4].sum())

    @property
    def shards(self) -> int:
        """Files of rows, one a flush."""
        return self._shards

    @property
    def unfinished(self) -> list[str]:
        """Names of files that a writer began and did not publish: one is at work, or it crashed and they were lost."""
        return sorted(name for name in os.listdir(self.path) if name.endswith(TEMPORARY))

    def __getitem__(self, doc_id: str | int) -> TeacherTopK:
        """All rows of a document; KeyError where there is no such document. See :meth:`slice`."""
        return self.slice(doc_id)

    def slice(self, doc_id: str | int, start: int = 0, stop: int | None = None) -> TeacherTopK:
        """Rows [start, stop) of a document, clamped as Python slices are.

        Returns:
            TeacherTopK: int32 ids [T, K] as stored; float32 logprobs within the store's max_logprob_error of what was
            appended, −inf where they were; float32 tail_logprob [T], or None where none was appended. Slots are in the order
            of the appended log-probs, which the decoded ones follow: among slots that decode to one value the earlier was
            the more probable. Empty slots, −1, are last.

        Raises:
            KeyError: no such document. StoreError: damaged bytes.
        """
        shard, row, _, rows, _, _, flags = self._entry(doc_id)
        start, stop, _ = slice(start, stop).indices(rows)
        n, k = max(0, stop - start), self.manifest.k
        ids, logprobs, tail = np.empty((n, k), np.int32), np.empty((n, k), np.float32), np.empty(n, np.float32)
        self._shard(shard).read_rows(row + start, row + start + n, ids, logprobs, tail)
        with_tail = torch.from_numpy(tail) if flags & HAS_TAIL else None
        return TeacherTopK(torch.from_numpy(ids), torch.from_numpy(logprobs), with_tail, self.manifest.temperature)

    def token_ids(self, doc_id: str | int, start: int = 0, stop: int | None = None) -> Tensor | None:
        """Tokens [start, stop) stored beside the rows, int64, or None where the document has none."""
        shard, _, token, _, tokens, _, flags = self._entry(doc_id)
        if not flags & HAS_TOKENS:
            return None
        start, stop, _ = slice(start, stop).indices(tokens)
        return torch.from_numpy(self._shard(shard).read_tokens(token + start, token + max(start, stop)))

    def first(self, doc_id: str | int) -> int:
        """The position of the document's row 0 among its tokens."""
        return self._entry(doc_id)[5]

    def length(self, doc_id: str | int) -> int:
        """Rows of a document."""
        return self._entry(doc_id)[3]

    def num_tokens(self, doc_id: str | int) -> int | None:
        """Tokens stored beside a document's rows, or None."""
        entry = self._entry(doc_id)
        return entry[4] if entry[6] & HAS_TOKENS else None

    def _entry(self, doc_id: str | int) -> list[int]:
        place = self._place.get(doc_id)
        if place is None:
            raise KeyError(f"the store has no document {doc_id!r}")
        return self._index[place].tolist()

    def contents(self) -> Iterator[Content]:
        """The shards, verified, as a writer would publish them again."""
        for index in range(self._shards):
            yield self._shard(index).content()

    def part_bytes(self) -> dict[str, int]:
        """Sizes in bytes over all shards of "tables" (with headers and checksums), "tokens" and "rows"."""
        total = {"tables": 0, "tokens": 0, "rows": 0}
        for index in range(self._shards):
            for name, size in self._shard(index).part_bytes.items():
                total[name] += size
        return total

    def damage(self, progress: Callable[[int, int], object] | None = None) -> list[StoreError]:
        """Reads and decodes every block, those verified before too.

        Args:
            progress: called as progress(shards done, shards) after each shard.

        Returns:
            One StoreError per damaged block, with file and offset; [] if the store is sound.
        """
        found: list[StoreError] = []
        for index in range(self._shards):
            # opened anew: the head may have been damaged since
            found += Shard(self.path, index, self.manifest).damage()
            if progress is not None:
                progress(index + 1, self._shards)
        return found

    def verify(self, progress: Callable[[int, int], object] | None = None) -> None:
        """Raises the first of :meth:`damage`, saying how many there are."""
        found = self.damage(progress)
        if found:
            first = found[0]
            more = f" (and {len(found) - 1} more damaged blocks)" if len(found) > 1 else ""
            raise StoreError(first.args[0] + more, first.file, first.offset)

    def __getstate__(self) -> dict:
        return {"path": self.path, "shards": self._shards, "store": self.manifest.store}

    def __setstate__(self, state: dict) -> None:
        self.path = state["path"]
        self._open(state["shards"])
        if self.manifest.store != state["store"]:
            raise StoreError("the store was overwritten with another since the reader was pickled", self.path)

    def close(self) -> None:
        """Drops the maps; a later read opens them again."""
        self._mapped.clear()

    def __enter__(self) -> TopKReader:
        return self

    def __exit__(self, *_) -> None:
        self.close()
