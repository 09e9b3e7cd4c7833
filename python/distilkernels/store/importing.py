"""Responses of inference servers into a store, one at a time."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..server_logprobs import ServerLogprobs, field
from ..teacher import TeacherTopK
from .writer import TopKWriter


class Imported(NamedTuple):
    """What an import did: documents and rows written, documents that the store had already, and what was wrong with each bad
    line ("FILE:LINE: reason")."""

    documents: int
    rows: int
    skipped: int
    bad: list[str]


def import_logprobs(
    source: str | os.PathLike | Iterable[Any], out: TopKWriter | str | os.PathLike, k: int | None = None, *, vocab_size: int | None = None,
    tokenizer=None, token_form: str | None = None, temperature: float = 1.0, on_error: str = "raise", progress: bool = True, **options,
) -> Imported:  # fmt: skip
    """Writes what servers returned to a store: one response in memory at a time, so that files of any size go through.

    Each of these is a document (every choice of a response is one):
      - ``{"id", "prompt_logprobs" and/or "logprobs", "tokens"}``, the fields as in :meth:`TeacherTopK.from_logprob_dicts`;
        "logprobs" may also be the object of an OpenAI-style answer;
      - a response of a completions or chat completions endpoint, vLLM's ``prompt_logprobs``, ``prompt_token_ids`` and
        ``token_ids`` included; a line of a batch's output file (its ``custom_id`` names the document);
      - an object with these attributes, such as vLLM's ``RequestOutput``.
    Rows of the prompt come before those of the answer. The last row predicts the last token; tokens are stored beside the rows
    where all are known. An answer without its prompt's tokens gives rows without tokens: row j predicts token j of the
    answer, and :func:`distilkernels.align_tokens` puts it where it belongs.

    Args:
        source: a .jsonl file, a list of such files, or any iterable of documents.
        out: a writer, or the path of a store, which is made or continued: documents that it holds already are skipped.
        k, vocab_size, temperature, options: of the :class:`TopKWriter` for a path (`vocab_size` may come from the
            tokenizer); a writer brings its own.
        tokenizer, token_form: see :meth:`TeacherTopK.from_logprob_dicts`.
        on_error: "raise" stops at the first bad line or document; what was flushed stays. "skip" goes on, warns once and
            returns them all.
        progress: show a bar (needs tqdm).

    Raises:
        ValueError: a bad document, with its file and line (or number), and arguments. StoreError: from the writer.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error must be "raise" or "skip"; got {on_error!r}')
    items = _items(source)
    if isinstance(out, TopKWriter):
        given = [name for name, value in {"k": k, "vocab_size": vocab_size, **options}.items() if value is not None]
        if given or temperature not in (1.0, out.manifest.temperature):
            raise ValueError(f"{', '.join(given) or 'temperature'}: the writer has its own; leave it out")
        return _import(items, out, tokenizer, token_form, on_error, progress)
    if vocab_size is None and tokenizer is not None:
        vocab_size = max(tokenizer.get_vocab().values()) + 1
    if k is None or vocab_size is None:
        raise ValueError("k and vocab_size must be given for a path (vocab_size may come from the tokenizer)")
    with TopKWriter(out, k, vocab_size, temperature=temperature, mode="resume", **options) as writer:
        return _import(items, writer, tokenizer, token_form, on_error, progress)


class _Item(NamedTuple):
    """A response, or the bytes of a line of them; `place` and `name` are for messages and for documents without an id."""

    content: Any
    name: str
    place: str
    size: int


def _items(source) -> tuple[Iterator[_Item], int | None, str]:
    """The items, their total and its unit."""
    paths = [source] if isinstance(source, (str, os.PathLike)) else source
    if isinstance(paths, Sequence) and paths and all(isinstance(p, (str, os.PathLike)) for p in paths):
        paths = [Path(p) for p in paths]
        return _lines(paths), sum(path.stat().st_size for path in paths), "B"
    if not isinstance(paths, Iterable) or isinstance(paths, Mapping):
        raise TypeError(f"source must be a path, a list of paths or an iterable of responses; got {type(source).__name__}")
    numbered = (_Item(response, str(i), f"response {i}", 1) for i, response in enumerate(paths))
    return numbered, len(paths) if hasattr(paths, "__len__") else None, "response"


def _lines(paths: list[Path]) -> Iterator[_Item]:
    for path in paths:
        with path.open("rb") as file:
            for line, raw in enumerate(file, 1):
                yield _Item(raw, f"{path.name}:{line}", f"{path}:{line}", len(raw))


def _import(items: tuple, writer: TopKWriter, tokenizer, token_form: str | None, on_error: str, progress: bool) -> Imported:
    items, total, unit = items
    manifest = writer.manifest
    parser = ServerLogprobs(
        manifest.k, tokenizer=tokenizer, token_form=token_form, temperature=manifest.temperature, vocab_size=manifest.vocab_size
    )
    documents = rows = skipped = 0
    bad: list[str] = []
    with _bar(progress, total, unit) as update:
        for item in items:
            try:
                for document in _documents(item, parser):
                    if document.id in writer:
                        skipped += 1
                        continue
                    teacher, tokens, first = document.parsed(parser)
                    writer.append(teacher, document.id, tokens=tokens, first=first)
                    documents, rows = documents + 1, rows + len(teacher)
            except (ValueError, TypeError) as reason:
                if on_error == "raise":
                    raise ValueError(f"{item.place}: {reason}") from reason
                bad.append(f"{item.place}: {reason}")
            update(item.size)
    parser.warn(stacklevel=4)
    if bad:
        warnings.warn(f"{len(bad)} of the responses could not be read and were left out; the first: {bad[0]}", stacklevel=3)
    return Imported(documents, rows, skipped, bad)


class _bar:
    """A progress bar, or nothing; as a context it is the function that moves it on."""

    def __init__(self, shown: bool, total: int | None, unit: str):
        self._bar = None
        if shown:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=unit, unit_scale=unit == "B", desc="import", dynamic_ncols=True)

    def __enter__(self):
        return self._bar.update if self._bar is not None else lambda size: None

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()


class _Document(NamedTuple):
    """What a response says of one document; ids are None where it does not say them."""

    id: str | int
    prompt_logprobs: Sequence | None
    logprobs: Sequence | None
    strings_are_ids: bool | None
    tokens: Sequence[int] | None

    def parsed(self, parser: ServerLogprobs) -> tuple[TeacherTopK, list[int] | None, int]:
        """Rows, tokens and the position of row 0."""
        parts = []
        if self.prompt_logprobs is not None:
            parts.append(parser.rows(self.prompt_logprobs, strings_are_ids=True))
        if self.logprobs is not None:
            parts.append(parser.rows(self.logprobs, strings_are_ids=self.strings_are_ids))
        if not parts:
            raise ValueError("a response has no prompt_logprobs and no logprobs")
        teacher = TeacherTopK.cat(parts)
        if self.tokens is None:
            return teacher, None, 0
        first = len(self.tokens) - 1 - len(teacher)
        if first < 0:
            if not len(self.tokens) and not len(teacher):
                return teacher, [], 0
            raise ValueError(f"{len(teacher)} rows cannot predict the last of {len(self.tokens)} tokens: their number must be less")
        return teacher, list(self.tokens), first


def _documents(item: _Item, parser: ServerLogprobs) -> Iterator[_Document]:
    record = item.content
    if isinstance(record, bytes):
        if not record.strip():
            return
        try:
            record = json.loads(record)
        except (json.JSONDecodeError, UnicodeDecodeError) as reason:
            raise ValueError(f"not JSON: {reason}") from reason
        if not isinstance(record, dict):
            raise ValueError(f"an object is expected; got {type(record).__name__}")
    name = field(record, "custom_id")
    response = field(record, "response")
    if response is not None:
        # a line of a batch's output file
        if field(record, "error") is not None or field(response, "status_code") not in (None, 200):
            raise ValueError(f"the request failed: {field(record, 'error') or field(response, 'status_code')}")
        record = field(response, "body")
    name = next((n for n in (name, field(record, "id"), field(record, "request_id")) if n is not None), item.name)
    choices = field(record, "choices")
    choices = field(record, "outputs") if choices is None else choices
    if choices is None:
        logprobs, are_ids = _logprobs(field(record, "logprobs"))
        yield _Document(name, field(record, "prompt_logprobs"), logprobs, are_ids, field(record, "tokens"))
        return
    for i, choice in enumerate(choices):
        logprobs, are_ids = _logprobs(field(choice, "logprobs"))
        prompt, prompt_ids = (_first(field(source, key) for source in (choice, record)) for key in ("prompt_logprobs", "prompt_token_ids"))
        tokens: list[int | None] | None = None if prompt_ids is None else list(prompt_ids)
        if logprobs and logprobs[0] is None:
            # the prompt is echoed: the list has its tokens too
            tokens = [*_answer(choice, logprobs, parser)]
        elif logprobs is not None and tokens is not None:
            tokens += field(choice, "token_ids") or _answer(choice, logprobs, parser)
        if tokens is not None and None in tokens:
            tokens = None
        yield _Document(name if len(choices) == 1 else f"{name}/{i}", prompt, logprobs, are_ids, tokens)


def _first(values: Iterable) -> Any:
    return next((value for value in values if value is not None), None)


def _logprobs(found: Any) -> tuple[Sequence | None, bool | None]:
    """The list of entries, and whether their string keys are ids (None: where there is no tokenizer)."""
    for name in ("content", "top_logprobs"):
        listed = field(found, name)
        if listed is not None:
            return listed, False
    if found is None or isinstance(found, Sequence):
        return found, None
    raise ValueError('logprobs hold neither "content" nor "top_logprobs": ask the server for top_logprobs')


def _answer(choice: Any, logprobs: Sequence, parser: ServerLogprobs) -> Iterator[int | None]:
    """Ids of the tokens that an answer names by strings, None for those that are not known."""
    strings = field(field(choice, "logprobs"), "tokens")
    for i, entry in enumerate(logprobs):
        string = strings[i] if strings is not None else field(entry, "token")
        exact = field(entry, "bytes") if strings is None else None
        yield None if string is None else parser.token_id(string, None if exact is None else bytes(exact), i)
