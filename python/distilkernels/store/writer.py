"""Appending documents of teacher rows to a store."""

from __future__ import annotations

import json
import numbers
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import StoreError
from ..primitives.head import checked_positive
from ..teacher import TeacherTopK
from . import manifest as manifests
from . import shard as shards
from .codec import block_scale, encode, largest_logprob
from .lock import NAME as LOCK_NAME
from .lock import WriterLock
from .manifest import TEMPORARY, Manifest, sync_folder
from .shard import BLOCK_ROWS, Block, Content, Shard, num_shards, shard_name, token_blocks, write_shard

_MODES = ("create", "resume", "overwrite")


class TopKWriter:
    """Appends documents to a store: a folder with a manifest and one immutable file per flush.

    A document is in the store once :meth:`flush` has returned; a crash at any moment leaves those documents readable, and
    the next writer removes the unfinished file. One writer at a time; any number of readers.

    Args:
        path: the store's folder; made where missing.
        k: slots per row, in [1, vocab_size]. Rows with fewer are filled with empty slots.
        vocab_size: ids are in [0, vocab_size); below 2^31.
        temperature: of the teacher's softmax; every appended teacher must have it.
        max_logprob_error: nats, in [1e-5, 1]: how far a finite log-prob may come back from what was appended.
        teacher, tokenizer_hash: what produced the rows, for the manifest. metadata: a dict that JSON can hold.
        flush_tokens: rows after which :meth:`append` flushes by itself, ≥ 1. They are held in memory at 8·k bytes each.
        mode: "create" refuses a folder that holds a store; "resume" continues one (properties must agree) or makes one;
            "overwrite" deletes the store that is there.

    Raises:
        ValueError, TypeError: naming the argument. StoreError: another writer, a store already there, a folder of other
        files, a damaged store, a full disk.
    """

    def __init__(
        self, path: str | os.PathLike, k: int, vocab_size: int, *, temperature: float = 1.0, max_logprob_error: float = 1e-3,
        teacher: str | None = None, tokenizer_hash: str | None = None, metadata: dict | None = None, flush_tokens: int = 65_536,
        mode: str = "create",
    ):  # fmt: skip
        vocab_size = checked_int("vocab_size", vocab_size, 1, 2**31 - 1)
        self._flush_tokens = checked_int("flush_tokens", flush_tokens, 1, 2**31 - 1)
        if mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(_MODES)}; got {mode!r}")
        max_logprob_error = checked_positive("max_logprob_error", max_logprob_error)
        if not 1e-5 <= max_logprob_error <= 1:
            raise ValueError(f"max_logprob_error must be in [1e-5, 1] nats; got {max_logprob_error}")
        wanted = Manifest(
            checked_int("k", k, 1, vocab_size), vocab_size, checked_positive("temperature", temperature), max_logprob_error,
            _checked_name("teacher", teacher), _checked_name("tokenizer_hash", tokenizer_hash), _checked_metadata(metadata),
        )  # fmt: skip
        self.path = Path(path)
        self._open(wanted, mode)

    def _open(self, wanted: Manifest, mode: str) -> None:
        self._process = os.getpid()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            raise StoreError(f"the folder cannot be made: {reason.strerror}", self.path) from reason
        self._lock = WriterLock(self.path)
        try:
            self._claim(wanted, mode)
        except BaseException:
            self._lock.release()
            raise
        self._doc_ids: list[str | int] = []
        self._documents: list[tuple[int, int, int, int]] = []
        self._rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._token_ids: list[np.ndarray] = []
        self._buffered = 0

    def _claim(self, wanted: Manifest, mode: str) -> None:
        names = set(os.listdir(self.path)) - {LOCK_NAME, manifests.NAME + TEMPORARY}
        stored = sorted(name for name in names if name.startswith("shard-"))
        if manifests.NAME not in names and names:
            raise StoreError(f"the folder holds other files and no manifest of a store: {', '.join(sorted(names)[:3])}", self.path)
        if manifests.NAME in names and mode == "create":
            raise StoreError('there is a store already; mode="resume" continues it, mode="overwrite" deletes it', self.path)
        try:
            if mode == "overwrite":
                # the manifest last: until it is gone the folder is still a store that can be overwritten
                for name in (*reversed(stored), *(names & {manifests.NAME})):
                    (self.path / name).unlink()
            for name in stored:
                if name.endswith(TEMPORARY):
                    (self.path / name).unlink(missing_ok=True)
            self.manifest = wanted
            if mode == "resume" and manifests.NAME in names:
                self.manifest = Manifest.read(self.path)
                difference = self.manifest.difference(wanted)
                if difference:
                    raise ValueError(f"the store at {self.path} cannot be resumed with these properties: {difference} (there: as asked for)")
            else:
                wanted.write(self.path)
        except OSError as reason:
            raise StoreError(f"the folder cannot be prepared: {reason.strerror}", self.path) from reason
        self._written: set[str | int] = set()
        self._shards = self._tokens = 0
        for index in range(num_shards(self.path, self.manifest)):
            found = Shard(self.path, index, self.manifest)
            self._written.update(found.doc_ids)
            self._tokens += int(found.documents[:, shards.ROWS].sum())
            self._shards += 1

    @property
    def docs(self) -> frozenset[str | int]:
        """Ids of the documents that are flushed or waiting for it: what a resumed capture can skip."""
        return frozenset(self._written)

    def __contains__(self, doc_id: str | int) -> bool:
        return doc_id in self._written

    @property
    def tokens(self) -> int:
        """Rows flushed so far, by earlier writers too."""
        return self._tokens

    def append(self, teacher: TeacherTopK, doc_id: str | int, *, tokens: Tensor | Sequence[int] | None = None, first: int = 0) -> None:
        """Adds a document; flushes where `flush_tokens` rows are waiting.

        Slots are kept in descending order of log-prob, equal ones in the order given, empty slots last: a capture's order.

        Args:
            teacher: [T, K'] with K' ≤ k, on any device; T may be 0. Without a tail_logprob none comes back.
            doc_id: a str or int that the store does not hold yet.
            tokens: the document's L token ids in [0, 2^31), exact; a dataset can then be made of the store alone.
            first: the position in `tokens` of row 0; rows belong to positions first…first + T − 1 ≤ L − 1. A row predicts
                the token after its position.

        Raises:
            ValueError, TypeError: naming the argument and the token. StoreError: the flush failed; the document waits in
            memory with the others for the next :meth:`flush`.
        """
        self._check_open()
        doc_id = _checked_doc_id(doc_id)
        if doc_id in self._written:
            raise ValueError(f"doc_id must be new; the store already holds {doc_id!r}")
        rows = self._checked_rows(teacher)
        first = checked_int("first", first, 0, 2**31 - 1)
        token_ids = _checked_tokens(tokens, first, len(teacher))
        flags = shards.HAS_TAIL * (teacher.tail_logprob is not None) + shards.HAS_TOKENS * (token_ids is not None)
        self._documents.append((len(teacher), 0 if token_ids is None else len(token_ids), first, flags))
        self._doc_ids.append(doc_id)
        self._written.add(doc_id)
        self._rows.append(rows)
        if token_ids is not None:
            self._token_ids.append(token_ids)
        self._buffered += len(teacher)
        if self._buffered >= self._flush_tokens:
            self.flush()

    def flush(self) -> None:
        """Writes what waits as one file, durable and visible to readers on return.

        Raises StoreError where the file system refuses; the documents go on waiting, so that :meth:`flush` can be called
        again once there is room.
        """
        self._check_open()
        if not self._doc_ids:
            return
        ids, logprobs, tail = (np.concatenate(parts) for parts in zip(*self._rows))
        blocks = []
        for start in range(0, len(ids), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            scale = block_scale(logprobs[part], self.manifest.max_logprob_error)
            data = encode(ids[part], logprobs[part], tail[part], self.manifest.vocab_size, scale)
            blocks.append(Block(data.data, len(ids[part]), scale))
        tokens = np.concatenate([np.zeros(0, np.int64), *self._token_ids])
        self._publish(Content(self._doc_ids, np.array(self._documents, np.int64), blocks, token_blocks(tokens)))

    def append_content(self, content: Content) -> None:
        """Publishes documents that are encoded already, from a store of the same properties, as one file. See :func:`merge`."""
        self.flush()
        self._publish(content)

    def _publish(self, content: Content) -> None:
        path = self.path / shard_name(self._shards)
        try:
            write_shard(path, content, self.manifest.store, self._shards)
        except OSError as reason:
            message = f"cannot be written: {reason.strerror}; {len(content.doc_ids)} documents wait in memory, those flushed before are safe"
            raise StoreError(message, path, getattr(reason, "written", None)) from reason
        self._shards += 1
        self._written.update(content.doc_ids)
        self._tokens += int(content.documents[:, shards.ROWS].sum())
        self._doc_ids, self._documents, self._rows, self._token_ids, self._buffered = [], [], [], [], 0
        try:
            sync_folder(self.path)
        except OSError as reason:
            raise StoreError(f"is written, but may not outlive a power failure: {reason.strerror}", path) from reason

    def close(self, *, flush: bool = True) -> None:
        """Flushes, notes the totals in the manifest and releases the lock, the last even where the others fail.

        flush=False drops the documents that wait. A second call does nothing.
        """
        if self._lock is None:
            return
        self._check_open()
        try:
            if flush:
                self.flush()
            self.manifest = self.manifest.closed(self._shards, len(self._written) - len(self._doc_ids), self._tokens)
            try:
                self.manifest.write(self.path)
            except OSError as reason:
                raise StoreError(f"the totals cannot be written: {reason.strerror}", self.path / manifests.NAME) from reason
        finally:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> TopKWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        """Closes; after an exception, without the documents that wait: they may be half of what was meant."""
        self.close(flush=kind is None)

    def _check_open(self) -> None:
        if self._lock is None:
            raise ValueError("the writer is closed")
        if self._process != os.getpid():
            raise ValueError("the writer belongs to the process that opened it; this is a fork of it")

    def _checked_rows(self, teacher: TeacherTopK) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        k, vocab_size = self.manifest.k, self.manifest.vocab_size
        if not isinstance(teacher, TeacherTopK):
            raise TypeError(f"teacher must be a TeacherTopK; got {type(teacher).__name__}")
        if len(teacher.shape) != 1 or teacher.k > k:
            raise ValueError(f"teacher must be [T, K] with K at most {k}; got {tuple(teacher.ids.shape)}")
        if teacher.temperature != self.manifest.temperature:
            raise ValueError(f"teacher must have the store's temperature {self.manifest.temperature}; got {teacher.temperature}")
        teacher = teacher.to("cpu")
        n = len(teacher)
        given = teacher.ids.numpy()
        if given.size and (given.min() < -1 or given.max() >= vocab_size):
            teacher.validate(vocab_size)
        ids, logprobs = np.full((n, k), -1, np.int32), np.full((n, k), -np.inf, np.float32)
        ids[:, : teacher.k] = given
        logprobs[:, : teacher.k] = teacher.logprobs.detach().float().numpy()
        logprobs[ids < 0] = -np.inf
        tail = np.full(n, np.nan, np.float32) if teacher.tail_logprob is None else teacher.tail_logprob.detach().float().numpy().copy()
        if _suspicious(ids, logprobs, tail, teacher.tail_logprob is not None):
            teacher.validate(vocab_size)
        limit = largest_logprob(self.manifest.max_logprob_error)
        beyond = (logprobs < -limit) & (logprobs != -np.inf)
        if beyond.any():
            token = int(beyond.any(1).argmax())
            raise ValueError(
                f"teacher: a log-prob at token {token} is {logprobs[token][beyond[token]][0]}, beyond the {-limit:.0f} nats that float32 holds to "
                f"max_logprob_error={self.manifest.max_logprob_error}; masked ids have −inf"
            )
        order = None if _ordered(ids, logprobs) else np.lexsort((ids < 0, -logprobs), axis=1)
        if order is not None:
            ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
        return ids, logprobs, tail


def _suspicious(ids: np.ndarray, logprobs: np.ndarray, tail: np.ndarray, with_tail: bool) -> bool:
    """A quick look that misses nothing :meth:`TeacherTopK.validate` refuses (NaN, repeated ids, too much mass)."""
    ordered = np.sort(ids, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    mass = np.exp(logprobs).sum(1) + (np.exp(tail) if with_tail else np.float32(0))
    return bool(repeated.any()) or not (mass < 1.009).all()


def _ordered(ids: np.ndarray, logprobs: np.ndarray) -> bool:
    empty = ids < 0
    return not ((logprobs[:, :-1] < logprobs[:, 1:]) | (empty[:, :-1] & ~empty[:, 1:])).any()


def checked_int(name: str, value: int, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}]; got {value}")
    return int(value)


def _checked_name(name: str, value: str | None) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a str or None; got {type(value).__name__}")
    return value


def _checked_metadata(metadata: dict | None) -> dict:
    if metadata is not None and not isinstance(metadata, dict):
        raise TypeError(f"metadata must be a dict or None; got {type(metadata).__name__}")
    return json.loads(json.dumps(metadata or {}, allow_nan=False))


def _checked_doc_id(doc_id: str | int) -> str | int:
    if isinstance(doc_id, str):
        return doc_id
    if isinstance(doc_id, bool) or not isinstance(doc_id, numbers.Integral):
        raise TypeError(f"doc_id must be a str or int; got {type(doc_id).__name__}")
    return int(doc_id)


def _checked_tokens(tokens, first: int, rows: int) -> np.ndarray | None:
    if tokens is None:
        return None
    tokens = torch.as_tensor(tokens)
    if tokens.numel() == 0:
        tokens = tokens.long()
    if tokens.dim() != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens must be whole numbers [L]; got {tokens.dtype} {tuple(tokens.shape)}")
    if first + rows > len(tokens):
        raise ValueError(f"tokens must hold a token for each of the rows {first}…{first + rows - 1}; got {len(tokens)} tokens")
    tokens = tokens.cpu().long().numpy()
    if len(tokens) and not (0 <= tokens.min() and tokens.max() < 2**31):
        raise ValueError(f"tokens must be in [0, 2^31); got {tokens.min()}…{tokens.max()}")
    return tokens.copy()
