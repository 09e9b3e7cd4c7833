"""What a store says of itself: ``manifest.json``, replaced as a whole and atomically."""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ..errors import StoreError

NAME = "manifest.json"
FORMAT = "distilkernels-topk-store"
VERSION = 1
TEMPORARY = ".tmp"


@dataclass(frozen=True)
class Manifest:
    """What holds for every row of a store.

    Attributes:
        k, vocab_size: slots per row; ids are below vocab_size.
        temperature: of the teacher's softmax. max_logprob_error: nats.
        teacher, tokenizer_hash: names given by whoever captured, or None. metadata: any JSON object.
        store: a random name that every shard repeats, so that a shard of another store is noticed.
        shards, documents, tokens: totals when a writer was last closed; a store may hold more (a later writer crashed),
            never less. tokens counts teacher rows.
        version: of the format.
    """

    k: int
    vocab_size: int
    temperature: float = 1.0
    max_logprob_error: float = 1e-3
    teacher: str | None = None
    tokenizer_hash: str | None = None
    metadata: dict = field(default_factory=dict)
    store: str = field(default_factory=lambda: uuid.uuid4().hex)
    shards: int = 0
    documents: int = 0
    tokens: int = 0
    version: int = VERSION

    def closed(self, shards: int, documents: int, tokens: int) -> Manifest:
        return replace(self, shards=shards, documents=documents, tokens=tokens)

    def write(self, folder: Path) -> None:
        """Replaces the manifest; raises OSError and leaves the old one where that fails."""
        body = {"format": FORMAT, **asdict(self)}
        text = json.dumps(body | {"crc32": _crc32(body)}, indent=1) + "\n"
        publish(folder / NAME, [text.encode()])
        sync_folder(folder)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises StoreError where there is none, or it is damaged or of a newer format."""
        path = folder / NAME
        try:
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as reason:
            raise StoreError("there is no store here: the manifest is missing", path) from reason
        except OSError as reason:
            raise StoreError(f"the manifest cannot be read: {reason.strerror}", path) from reason
        try:
            body = json.loads(text.decode())
        except (UnicodeDecodeError, json.JSONDecodeError) as reason:
            offset = reason.start if isinstance(reason, UnicodeDecodeError) else reason.pos
            raise StoreError(f"the manifest is damaged: {reason}", path, offset) from reason
        if not isinstance(body, dict) or body.pop("crc32", None) != _crc32(body):
            raise StoreError("the manifest is damaged: its checksum does not match", path, 0)
        if body.pop("format") != FORMAT or body["version"] != VERSION:
            raise StoreError(f"the store has format version {body.get('version')}; this release reads version {VERSION}", path, 0)
        return cls(**body)

    def difference(self, other: Manifest) -> str | None:
        """The first property in which rows of the two stores differ, as a sentence's end, or None."""
        for name in ("k", "vocab_size", "temperature", "max_logprob_error", "teacher", "tokenizer_hash"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} is {mine!r} here and {theirs!r} there"
        return None


def _crc32(body: dict) -> int:
    """Of the content, not of the text: a change of the text that parses to the same content is harmless."""
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def publish(path: Path, parts: Iterable) -> None:
    """Writes the byte strings `parts` to a temporary name, makes them durable and renames: `path` is whole or not there.

    :func:`sync_folder` then makes the name durable too. Raises OSError with nothing left behind; its `written` is the number
    of bytes the file system had taken.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    written = 0
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
                written += len(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as reason:
        temporary.unlink(missing_ok=True)
        reason.written = written
        raise


def sync_folder(folder: Path) -> None:
    """Makes renames and new names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
