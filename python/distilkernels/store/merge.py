"""Several stores as one, and what a store holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import manifest as manifests
from .manifest import Manifest
from .reader import TopKReader
from .shard import ROWS, Content
from .writer import TopKWriter, checked_int


def merge(
    paths: Sequence[str | os.PathLike], out: str | os.PathLike, *, flush_tokens: int = 65_536, progress: Callable[[int, int], object] | None = None
) -> Manifest:
    """Copies the documents of several stores into a new one, in order. Blocks are verified and copied as they are: no
    log-prob is rounded again. Small shards are joined until they hold `flush_tokens` rows.

    Args:
        paths: stores of one k, vocab_size, temperature, max_logprob_error, teacher and tokenizer_hash. The first one's
            metadata is kept.
        out: the new store's folder, empty or missing.
        progress: called as progress(documents copied, documents) after each shard read.

    Raises:
        ValueError: the stores differ, or two hold one document id; nothing is written then. StoreError: a damaged store, or
        `out` cannot be written.
    """
    flush_tokens = checked_int("flush_tokens", flush_tokens, 1, 2**31 - 1)
    readers = [TopKReader(path) for path in paths]
    if not readers:
        raise ValueError("paths must name at least one store; got none")
    first = readers[0]
    holder: dict[str | int, Path] = {}
    for reader in readers:
        difference = first.manifest.difference(reader.manifest)
        if difference:
            raise ValueError(f"paths must be stores of one kind: {difference} ({first.path} and {reader.path})")
        for doc_id in reader:
            if doc_id in holder:
                raise ValueError(f"paths must hold distinct documents; {doc_id!r} is in {holder[doc_id]} and {reader.path}")
            holder[doc_id] = reader.path
    m = first.manifest
    writer = TopKWriter(
        out, m.k, m.vocab_size, temperature=m.temperature, max_logprob_error=m.max_logprob_error, teacher=m.teacher,
        tokenizer_hash=m.tokenizer_hash, metadata=m.metadata,
    )  # fmt: skip
    with writer:
        waiting: list[Content] = []
        copied = 0
        for reader in readers:
            for content in reader.contents():
                waiting.append(content)
                copied += len(content.doc_ids)
                if sum(int(c.documents[:, ROWS].sum()) for c in waiting) >= flush_tokens:
                    writer.append_content(_joined(waiting))
                    waiting = []
                if progress is not None:
                    progress(copied, len(holder))
        if waiting:
            writer.append_content(_joined(waiting))
    return writer.manifest


def _joined(contents: Sequence[Content]) -> Content:
    return Content(
        [doc_id for c in contents for doc_id in c.doc_ids],
        np.concatenate([c.documents for c in contents]),
        [block for c in contents for block in c.blocks],
        [block for c in contents for block in c.token_blocks],
    )


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds and what it costs.

    Attributes:
        documents, rows, tokens, shards: counts; rows are the teacher's, tokens the ids stored beside them.
        row_bytes, token_bytes, table_bytes, manifest_bytes: sizes of the parts, checksums included.
        unfinished: names of files that a writer began and did not publish.
    """

    manifest: Manifest
    documents: int
    rows: int
    tokens: int
    shards: int
    row_bytes: int
    token_bytes: int
    table_bytes: int
    manifest_bytes: int
    unfinished: tuple[str, ...]

    @property
    def bytes_per_row(self) -> float:
        """All bytes but those of the token ids, per teacher row; 0 in an empty store."""
        return (self.row_bytes + self.table_bytes + self.manifest_bytes) / self.rows if self.rows else 0.0


def info(path: str | os.PathLike) -> StoreInfo:
    """What a store holds; StoreError where it is damaged (rows and tokens themselves are not looked at)."""
    with TopKReader(path) as reader:
        parts = reader.part_bytes()
        return StoreInfo(
            reader.manifest, len(reader), reader.tokens, reader.stored_tokens, reader.shards, parts["rows"], parts["tokens"], parts["tables"],
            (reader.path / manifests.NAME).stat().st_size, tuple(reader.unfinished),
        )  # fmt: skip
