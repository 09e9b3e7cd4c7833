"""One flush of a store: an immutable safetensors file of rows, tokens and tables, with checksums over every byte of it.

The file is written by hand and not by the safetensors package, because a reader needs offsets to map it anyway; any
safetensors reader opens it. docs/store.md has the format byte by byte.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import StoreError
from .codec import Scale, decode
from .layout import row_layout
from .manifest import FORMAT, VERSION, Manifest, publish

BLOCK_ROWS = 256
BLOCK_TOKENS = 8192
# columns of `documents`
ROWS, TOKENS, FIRST, FLAGS = range(4)
HAS_TAIL, HAS_TOKENS = 1, 2

_NAME = re.compile(r"shard-(\d{8,})\.safetensors")
_CHECKSUM = "checksum"
_TABLES = {
    "documents": "I64", "block.step": "F64", "block.hi": "F32", "block.max_code": "U32", "block.rows": "U32", "block.crc32": "U32",
    "token_block.tokens": "U32", "token_block.width": "U32", "token_block.crc32": "U32", "doc_ids": "U8",
}  # fmt: skip
_DTYPES = {"I64": "<i8", "F64": "<f8", "F32": "<f4", "U32": "<u4", "U8": "u1"}


def shard_name(index: int) -> str:
    return f"shard-{index:08d}.safetensors"


def num_shards(folder: Path, manifest: Manifest) -> int:
    """Shards published. StoreError where one is missing that must be there: a later one is, or the manifest counts it."""
    found = {int(match[1]) for match in map(_NAME.fullmatch, os.listdir(folder)) if match}
    count = max([manifest.shards, *(number + 1 for number in found)])
    for index in range(count):
        # a listing made while a writer renames may lack a name that is there
        if index not in found and not (folder / shard_name(index)).is_file():
            raise StoreError(f"the shard is missing; there must be at least {count}", folder / shard_name(index))
    return count


@dataclass
class Block:
    """Encoded rows and their code's scale, or tokens of `width` bytes each (scale None)."""

    data: bytes | memoryview
    count: int
    scale: Scale | None = None
    width: int = 0
    crc32: int | None = None

    def __post_init__(self):
        if self.crc32 is None:
            self.crc32 = zlib.crc32(self.data)


@dataclass
class Content:
    """What a shard holds. documents: int64 [n, 4], columns ROWS, TOKENS, FIRST and FLAGS, one line per id in `doc_ids`."""

    doc_ids: list[str | int]
    documents: np.ndarray
    blocks: list[Block]
    token_blocks: list[Block]


def token_blocks(tokens: np.ndarray) -> list[Block]:
    """Token ids (int64, ≥ 0) as little-endian numbers of as few bytes as the largest of each block needs."""
    blocks = []
    for start in range(0, len(tokens), BLOCK_TOKENS):
        part = tokens[start : start + BLOCK_TOKENS]
        width = max(1, (int(part.max()).bit_length() + 7) // 8)
        data = np.ascontiguousarray(part.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width]).tobytes()
        blocks.append(Block(data, len(part), width=width))
    return blocks


def write_shard(path: Path, content: Content, store: str, index: int) -> None:
    """Raises OSError, leaving nothing behind."""
    scales = [b.scale for b in content.blocks]
    tables = {
        "documents": content.documents,
        "block.step": [s.step for s in scales],
        "block.hi": [s.hi for s in scales],
        "block.max_code": [s.max_code for s in scales],
        "block.rows": [b.count for b in content.blocks],
        "block.crc32": [b.crc32 for b in content.blocks],
        "token_block.tokens": [b.count for b in content.token_blocks],
        "token_block.width": [b.width for b in content.token_blocks],
        "token_block.crc32": [b.crc32 for b in content.token_blocks],
        "doc_ids": np.frombuffer(json.dumps(content.doc_ids, separators=(",", ":")).encode(), np.uint8),
    }
    arrays = {name: np.ascontiguousarray(value, _DTYPES[_TABLES[name]]) for name, value in tables.items()}
    layout = {_CHECKSUM: ("U32", [2], 8)}
    layout |= {name: (_TABLES[name], list(a.shape), a.nbytes) for name, a in arrays.items()}
    for name, blocks in (("tokens", content.token_blocks), ("rows", content.blocks)):
        size = sum(len(b.data) for b in blocks)
        layout[name] = ("U8", [size], size)
    header: dict = {"__metadata__": {"format": FORMAT, "version": str(VERSION), "store": store, "shard": str(index)}}
    end = 0
    for name, (dtype, shape, nbytes) in layout.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    table = b"".join(a.tobytes() for a in arrays.values())
    checksums = np.array([zlib.crc32(head), zlib.crc32(table)], "<u4").tobytes()
    publish(path, [head, checksums, table, *(b.data for b in content.token_blocks), *(b.data for b in content.blocks)])


class Shard:
    """A shard mapped into memory. Opening it verifies its head (header and tables); reading verifies each block once.

    Raises StoreError with the offset of whatever is damaged.
    """

    def __init__(self, folder: Path, index: int, manifest: Manifest):
        self.path = folder / shard_name(index)
        self._k, self._vocab_size = manifest.k, manifest.vocab_size
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise StoreError("the file ends within its header", self.path, size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as reason:
            raise StoreError(f"cannot be opened: {reason.strerror}", self.path) from reason
        self._bytes = np.frombuffer(self._map, np.uint8)
        tables = self._head(size, manifest.store, index)
        self.doc_ids: list[str | int] = json.loads(tables["doc_ids"].tobytes())
        self.documents = tables["documents"].copy()
        self._scales = list(map(Scale, *(tables[f"block.{name}"].tolist() for name in ("hi", "step", "max_code"))))
        self._rows = _Extents(
            "rows", tables["block.rows"], self._rows_start, tables["block.crc32"],
            [row_layout(self._k, self._vocab_size, s.max_code).block_bytes(n) for s, n in zip(self._scales, tables["block.rows"].tolist())],
        )  # fmt: skip
        counts, self._widths = tables["token_block.tokens"], tables["token_block.width"].tolist()
        self._tokens = _Extents("tokens", counts, self._tokens_start, tables["token_block.crc32"], [n * w for n, w in zip(counts.tolist(), self._widths)])

    def _head(self, size: int, store: str, index: int) -> dict[str, np.ndarray]:
        head = 8 + int.from_bytes(self._map[:8], "little")
        if head + 8 > size:
            raise StoreError("the header is damaged or the file is cut within it", self.path, 0)
        checksums = np.frombuffer(self._map, "<u4", 2, head).tolist()
        if zlib.crc32(self._bytes[:head]) != checksums[0]:
            raise StoreError("the header is damaged: its checksum does not match", self.path, 0)
        header = json.loads(self._map[8:head])
        about = header.pop("__metadata__")
        if about["version"] != str(VERSION):
            raise StoreError(f"the shard has format version {about['version']}; this release reads version {VERSION}", self.path, 0)
        if about["store"] != store or about["shard"] != str(index):
            raise StoreError(f"the file is shard {about['shard']} of store {about['store']}, not shard {index} of store {store}", self.path, 0)
        places = {name: (head + entry["data_offsets"][0], head + entry["data_offsets"][1]) for name, entry in header.items()}
        end = places["rows"][1]
        if end != size:
            raise StoreError(f"the file has {size} bytes; its header says {end}", self.path, min(size, end))
        self._tokens_start, self._rows_start = places["tokens"][0], places["rows"][0]
        if zlib.crc32(self._bytes[head + 8 : self._tokens_start]) != checksums[1]:
            raise StoreError("the tables are damaged: their checksum does not match", self.path, head + 8)
        self.part_bytes = {"tables": self._tokens_start, "tokens": self._rows_start - self._tokens_start, "rows": size - self._rows_start}
        tables = {}
        for name, dtype in _TABLES.items():
            shape = header[name]["shape"]
            tables[name] = np.frombuffer(self._map, _DTYPES[dtype], math.prod(shape), places[name][0]).reshape(shape)
        return tables

    @property
    def num_blocks(self) -> int:
        return len(self._rows.sizes) + len(self._tokens.sizes)

    def read_rows(self, start: int, stop: int, ids: np.ndarray, logprobs: np.ndarray, tail: np.ndarray) -> None:
        """Rows [start, stop) of the shard into int32 and float32 [n, K], [n, K] and [n]."""
        for block, first, last, out in self._rows.pieces(start, stop):
            data = self._checked(self._rows, block)
            bad = decode(data, first, self._scales[block], self._vocab_size, *(a[out : out + last - first] for a in (ids, logprobs, tail)))
            if bad is not None:
                raise StoreError(f"row {bad} of block {block} is none that a writer writes", self.path, self._rows.offsets[block])

    def read_tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the shard, int64."""
        tokens = np.empty(stop - start, np.int64)
        for block, first, last, out in self._tokens.pieces(start, stop):
            width = self._widths[block]
            padded = np.zeros((last - first, 4), np.uint8)
            padded[:, :width] = self._checked(self._tokens, block)[first * width : last * width].reshape(-1, width)
            tokens[out : out + last - first] = padded.view("<u4")[:, 0]
        return tokens

    def content(self) -> Content:
        """Everything, verified, as it would be written again; the blocks are views of the file."""
        blocks = [Block(self._checked(self._rows, i).data, n, self._scales[i], crc32=c) for i, (n, c) in enumerate(zip(self._rows.counts, self._rows.crc32))]
        tokens = [
            Block(self._checked(self._tokens, i).data, n, width=self._widths[i], crc32=c)
            for i, (n, c) in enumerate(zip(self._tokens.counts, self._tokens.crc32))
        ]
        return Content(self.doc_ids, self.documents, blocks, tokens)

    def damage(self) -> list[StoreError]:
        """Looks at every block, those verified before too: one error per damaged one."""
        found = []
        for extents in (self._rows, self._tokens):
            for block, n in enumerate(extents.counts):
                extents.verified[block] = 0
                start = extents.starts[block]
                try:
                    if extents is self._tokens:
                        self.read_tokens(start, start + n)
                    else:
                        self.read_rows(start, start + n, np.empty((n, self._k), np.int32), np.empty((n, self._k), np.float32), np.empty(n, np.float32))
                except StoreError as reason:
                    found.append(reason)
        return found

    def _checked(self, extents: _Extents, block: int) -> np.ndarray:
        start = extents.offsets[block]
        data = self._bytes[start : start + extents.sizes[block]]
        if not extents.verified[block]:
            if zlib.crc32(data) != extents.crc32[block]:
                raise StoreError(f"block {block} of the {extents.what} is damaged: its checksum does not match", self.path, start)
            extents.verified[block] = 1
        return data


class _Extents:
    """Where the blocks of one kind are: counts of rows or tokens, first ones, file offsets and sizes in bytes."""

    def __init__(self, what: str, counts: np.ndarray, start: int, crc32: np.ndarray, sizes: Sequence[int]):
        self.what = what
        self.counts = counts.tolist()
        self.starts = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
        self.offsets = [start, *(start + np.cumsum(sizes, dtype=np.int64)).tolist()]
        self.sizes = sizes
        self.crc32 = crc32.tolist()
        self.verified = bytearray(len(sizes))

    def pieces(self, start: int, stop: int):
        """(block, first and last + 1 within it, place in the output) for [start, stop)."""
        block = bisect_right(self.starts, start) - 1
        out = 0
        while start < stop:
            first = start - self.starts[block]
            last = min(stop - self.starts[block], self.counts[block])
            yield block, first, last, out
            out += last - first
            start += last - first
            block += 1
