"""Documents of text and token files, one at a time, under names that stay the same from run to run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Document(NamedTuple):
    """A document's name and either its text or its token ids; `place` says where it was read, for messages."""

    id: str
    content: str | np.ndarray
    place: str


class Format(NamedTuple):
    """How a file holds documents: their number, and an iterator over them for (file's name, path)."""

    count: Callable[[Path], int]
    read: Callable[[str, Path], Iterator[Document]]


class Documents:
    """The documents of files and folders.

    Names: a .txt file is one document under its file name (below the folder that was given, where one was); lines are
    FILE:LINE, counted from 1, or what `id_field` says; rows of an array are FILE[ROW], arrays of a .safetensors file FILE:KEY.

    Args:
        paths: files, or folders, whose files of known types are taken in the order of their names.
        per_line: every line of a .txt file is a document.
        text_field, id_field: of .jsonl lines; a line with "input_ids" is taken as tokens.

    Raises:
        FileNotFoundError, ValueError: a path that is not there, of no known type, or two files of one name.
    """

    def __init__(self, paths: Sequence[str | Path], *, per_line: bool = False, text_field: str = "text", id_field: str = "id"):
        self._text_field, self._id_field = text_field, id_field
        self._formats = {
            ".txt": Format(_lines, self._text_lines) if per_line else Format(lambda path: 1, self._text),
            ".jsonl": Format(_lines, self._jsonl),
            ".npy": Format(lambda path: _rows(np.load(path, mmap_mode="r")), self._npy),
            ".safetensors": Format(self._count_tensors, self._safetensors),
        }
        self._files: dict[str, Path] = {}
        for path in map(Path, paths):
            for name, file in self._expand(path):
                if name in self._files:
                    raise ValueError(f"{self._files[name]} and {file} have one name, {name!r}; give the folder that holds both")
                self._files[name] = file

    def _expand(self, path: Path) -> list[tuple[str, Path]]:
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if file.suffix in self._formats and file.is_file()]
            if not found:
                raise ValueError(f"{path}: no file of a known type ({', '.join(self._formats)}) in this folder")
            return [(file.relative_to(path).as_posix(), file) for file in found]
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file or folder")
        if path.suffix not in self._formats:
            raise ValueError(f"{path}: the type must be one of {', '.join(self._formats)}")
        return [(path.name, path)]

    def __len__(self) -> int:
        """How many there are; text files are read once to count their lines."""
        return sum(self._formats[path.suffix].count(path) for path in self._files.values())

    def __iter__(self) -> Iterator[Document]:
        for name, path in self._files.items():
            yield from self._formats[path.suffix].read(name, path)

    def _text(self, name: str, path: Path) -> Iterator[Document]:
        yield Document(name, _decoded(path.read_bytes(), str(path)), str(path))

    def _text_lines(self, name: str, path: Path) -> Iterator[Document]:
        for line, raw in _numbered(path):
            yield Document(f"{name}:{line}", _decoded(raw, f"{path}:{line}").rstrip("\r\n"), f"{path}:{line}")

    def _jsonl(self, name: str, path: Path) -> Iterator[Document]:
        for line, raw in _numbered(path):
            place = f"{path}:{line}"
            try:
                record = json.loads(_decoded(raw, place))
            except json.JSONDecodeError as reason:
                raise ValueError(f"{place}: not JSON: {reason}") from reason
            if not isinstance(record, dict):
                raise ValueError(f"{place}: an object is expected; got {type(record).__name__}")
            named = record.get(self._id_field)
            yield Document(f"{name}:{line}" if named is None else str(named), self._content(record, place), place)

    def _content(self, record: dict[str, Any], place: str) -> str | np.ndarray:
        if record.get("input_ids") is not None:
            return _tokens(np.array(record["input_ids"]), place)
        text = record.get(self._text_field)
        if not isinstance(text, str):
            raise ValueError(f'{place}: a text in "{self._text_field}" or token ids in "input_ids" are expected; the line has {sorted(record)}')
        return text

    def _npy(self, name: str, path: Path) -> Iterator[Document]:
        yield from _arrays(name, str(path), np.load(path, mmap_mode="r"))

    def _safetensors(self, name: str, path: Path) -> Iterator[Document]:
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            for key in sorted(file.keys()):
                yield from _arrays(f"{name}:{key}", f"{path}:{key}", file.get_tensor(key))

    def _count_tensors(self, path: Path) -> int:
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            shapes = [file.get_slice(key).get_shape() for key in file.keys()]
        return sum(1 if len(shape) == 1 else shape[0] for shape in shapes)


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            if raw.strip():
                yield line, raw


def _lines(path: Path) -> int:
    return sum(1 for _ in _numbered(path))


def _decoded(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise ValueError(f"{place}: not UTF-8: {reason}") from reason


def _rows(array: np.ndarray) -> int:
    return 1 if array.ndim == 1 else len(array)


def _arrays(name: str, place: str, array: np.ndarray) -> Iterator[Document]:
    if array.ndim == 1:
        yield Document(name, _tokens(array, place), place)
    elif array.ndim == 2:
        for i, row in enumerate(array):
            yield Document(f"{name}[{i}]", _tokens(row, f"{place}[{i}]"), f"{place}[{i}]")
    else:
        raise ValueError(f"{place}: token ids [T] or [documents, T] are expected; got shape {array.shape}")


def _tokens(array: np.ndarray, place: str) -> np.ndarray:
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{place}: a list of token ids is expected; got {array.dtype} of shape {array.shape}")
    # a copy: torch takes no view of a read-only map
    return np.array(array, dtype=np.int64)
