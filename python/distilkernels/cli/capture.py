"""``python -m distilkernels capture``: a causal LM over documents, its top-k into a store."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import transformers
from tqdm import tqdm

from .. import __version__
from ..capture import linear_capture_topk
from ..integrations.transformers import check, hidden_and_head
from ..primitives.topk_select import checked_k
from ..store import TopKWriter
from ..teacher import TeacherTopK
from .batches import Tokens, bucketed, encoded, padded, windows
from .documents import Document, Documents


class Teacher(NamedTuple):
    """A model and how texts become its tokens; `tokenizer` is None where there is none, for token files."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase | None
    max_length: int | None

    @property
    def vocab_size(self) -> int:
        """Rows of the lm_head, which may be more than the tokenizer's entries."""
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def num_inputs(self) -> int:
        """Ids that the model takes."""
        return self.model.get_input_embeddings().weight.shape[0]

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        if self.tokenizer is None:
            raise ValueError("the data holds texts, and the model comes without a tokenizer: name one with --tokenizer")
        return self.tokenizer(texts, verbose=False)["input_ids"]


def capture(options: SimpleNamespace) -> int:
    """Runs the command; see its help for the options. Returns the exit status, 130 after an interruption."""
    documents = Documents(options.data, per_line=options.per_line, text_field=options.text_field, id_field=options.id_field)
    teacher = load(options)
    checked_k(options.k, teacher.vocab_size)
    flush = {} if options.flush_tokens is None else {"flush_tokens": options.flush_tokens}
    metadata = {
        "dtype": str(teacher.model.dtype).removeprefix("torch."),
        "max_length": teacher.max_length,
        "captured_with": f"distilkernels {__version__}, transformers {transformers.__version__}",
    }
    with interruptible() as interrupted, TopKWriter(
        options.out, options.k, teacher.vocab_size, temperature=options.temperature, teacher=str(Path(options.model)),
        tokenizer_hash=tokenizer_hash(teacher.tokenizer), metadata=metadata, mode="overwrite" if options.overwrite else "resume", **flush,
    ) as writer:  # fmt: skip
        for name in ("dtype", "max_length"):
            if writer.manifest.metadata.get(name) != metadata[name]:
                raise ValueError(f"the store at {options.out} was captured with {name} {writer.manifest.metadata.get(name)}, not {metadata[name]}")
        run = Run(teacher, writer, options)
        run(documents, interrupted)
    print(("interrupted: " if interrupted() else "") + run.summary(), file=sys.stderr)
    return 130 if interrupted() else 0


def load(options: SimpleNamespace) -> Teacher:
    """Raises OSError or ValueError where transformers finds no such model."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval().to(device)
    name = options.tokenizer or options.model
    with_tokenizer = options.tokenizer is not None or not Path(name).is_dir() or any(Path(name).glob("*token*"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(name) if with_tokenizer else None
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Teacher(model, tokenizer, min(filter(None, (options.max_length, limit)), default=None))


def tokenizer_hash(tokenizer: transformers.PreTrainedTokenizerBase | None) -> str | None:
    """SHA-256 of the vocabulary and, where the tokenizer is a fast one, of its whole pipeline."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGINT has come; a second one raises KeyboardInterrupt."""
    seen: list[int] = []

    def note(number, frame):
        seen.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


class Run:
    """Captures what the store does not hold yet, window by window, until the end or an interruption."""

    def __init__(self, teacher: Teacher, writer: TopKWriter, options: SimpleNamespace):
        self.teacher, self.writer, self.options = teacher, writer, options
        self.documents = self.skipped = self.tokens = self.cut = 0
        self.seconds = 0.0
        self._seen: set[str] = set()
        self._checked = False

    def __call__(self, documents: Documents, interrupted: Callable[[], bool]) -> None:
        interval = 0.2 if sys.stderr.isatty() else 20.0
        total = min(len(documents), self.options.limit or sys.maxsize)
        started, weighed = time.perf_counter(), -math.inf
        with tqdm(total=total, unit="doc", desc="capture", dynamic_ncols=True, mininterval=interval) as bar:
            for window in windows(islice(documents, self.options.limit), self.options.window):
                missing = self._missing(window)
                bar.update(len(window) - len(missing))
                for group in bucketed(self._encoded(missing), self.options.batch_tokens):
                    if interrupted():
                        return
                    self._capture(group)
                    bar.update(len(group))
                    self.seconds = time.perf_counter() - started
                    if self.seconds - weighed > 2:
                        weighed, gigabytes = self.seconds, size_on_disk(self.writer.path) / 1e9
                    bar.set_postfix_str(f"{self.tokens / self.seconds:,.0f} tokens/s, {gigabytes:.3f} GB", refresh=False)

    def _missing(self, window: list[Document]) -> list[Document]:
        missing = []
        for document in window:
            if document.id in self._seen:
                raise ValueError(f"{document.place}: the data already has a document {document.id!r}; names must be unique")
            self._seen.add(document.id)
            if document.id not in self.writer:
                missing.append(document)
        self.skipped += len(window) - len(missing)
        return missing

    def _encoded(self, documents: list[Document]) -> list[Tokens]:
        limit = self.teacher.max_length
        found = encoded(documents, self.teacher.tokenize, self.teacher.num_inputs)
        self.cut += sum(max(0, len(d.tokens) - limit) for d in found) if limit else 0
        return [Tokens(d.id, d.tokens[:limit]) for d in found]

    @torch.no_grad()
    def _capture(self, group: list[Tokens]) -> None:
        """Padding is on the right, where a causal model's other positions do not see it, so that no attention mask is needed."""
        ids, mask = padded(group)
        model, k = self.teacher.model, self.options.k
        if mask.any():
            ids, mask = ids.to(model.device), mask.to(model.device)
            if not self._checked:
                check(model, input_ids=ids[:1, :8], use_cache=False)
                self._checked = True
            head = hidden_and_head(model, input_ids=ids, use_cache=False)
            rows = linear_capture_topk(head.hidden[mask], head.weight, k, temperature=self.options.temperature, **head.head_kwargs()).to("cpu")
        else:
            rows = TeacherTopK(torch.zeros(0, k, dtype=torch.int32), torch.zeros(0, k), torch.zeros(0), self.options.temperature)
        start = 0
        for document in group:
            stop = start + len(document.tokens)
            try:
                self.writer.append(rows[start:stop], document.id, tokens=torch.from_numpy(document.tokens))
            except ValueError as reason:
                raise ValueError(f"document {document.id!r}: {reason}") from reason
            start = stop
        self.documents += len(group)
        self.tokens += start

    def summary(self) -> str:
        parts = [f"captured {self.documents:,} documents, {self.tokens:,} tokens"]
        if self.seconds:
            parts[0] += f" in {self.seconds:,.1f} s ({self.tokens / self.seconds:,.0f} tokens/s)"
        if self.skipped:
            parts.append(f"{self.skipped:,} documents were in the store already")
        if self.cut:
            parts.append(f"{self.cut:,} tokens beyond {self.teacher.max_length:,} a document were left out")
        size, tokens = size_on_disk(self.writer.path), self.writer.tokens
        each = f", {size / tokens:.1f} bytes a token" if tokens else ""
        return "; ".join(parts) + f"\n{self.writer.path} holds {len(self.writer.docs):,} documents, {tokens:,} tokens, {size / 1e9:.3f} GB{each}"


def size_on_disk(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(entry.stat().st_size for entry in folder.iterdir() if entry.is_file())
