"""Text that every Python installation carries, its tokenizer, and fixed-length windows of tokens.

The text is the standard library's own modules: code and the English of its docstrings and comments.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from .progress import progress

END_OF_FILE = "<|endoftext|>"

# other people's packages; tests, which repeat the modules they test; tables of characters
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "__pycache__"}
# one long file must not be half of a split
MAX_FILE_CHARACTERS = 64 * 1024


class Document(NamedTuple):
    """One source file: its path inside the standard library, with forward slashes, and its text."""

    name: str
    text: str


class Corpus(NamedTuple):
    """Documents to train on and documents that no model and no tokenizer sees before the evaluation."""

    train: list[Document]
    heldout: list[Document]

    def describe(self) -> str:
        sizes = [sum(len(d.text) for d in split) / 1e6 for split in self]
        return f"{len(self.train)} files ({sizes[0]:.1f} M characters) to train on, {len(self.heldout)} files ({sizes[1]:.1f} M) held out"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_documents(folder: Path, max_characters: int) -> list[Document]:
    """Readable UTF-8 modules under `folder`, each content once, up to `max_characters` in all.

    The order is that of a hash of the path: the same on every machine, whatever order the file system lists, and any
    prefix of it is a sample of the whole library.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    names = [name for name in paths if not SKIPPED_FOLDERS.intersection(name.split("/"))]
    documents, seen, size = [], set(), 0
    for name in sorted(names, key=_digest):
        try:
            raw = paths[name].read_bytes()
            text = raw.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        text = text[:MAX_FILE_CHARACTERS].replace("\r\n", "\n")
        content = _digest(text)
        if not text.strip() or content in seen:
            continue
        seen.add(content)
        documents.append(Document(name, text))
        size += len(text)
        if size >= max_characters:
            break
    return documents


def standard_library(max_characters: int = 6_000_000, heldout_every: int = 12, folder: Path | None = None) -> Corpus:
    """The standard library split by file: one file in `heldout_every` is held out.

    Raises FileNotFoundError where the installation has no readable sources (a zipped standard library).
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    documents = read_documents(folder, max_characters)
    if len(documents) < 2 * heldout_every:
        raise FileNotFoundError(f"found {len(documents)} readable Python sources under {folder}; at least {2 * heldout_every} are needed")
    heldout = documents[::heldout_every]
    train = [d for i, d in enumerate(documents) if i % heldout_every]
    return Corpus(train, heldout)


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with exactly `vocab_size` entries; id 0 ends a file.

    Raises ValueError where the text is too small for that many merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = progress((d.text for d in documents), "tokenizer", len(documents), unit="file")
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the text gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}: use more text")
    return tokenizer


def token_windows(tokenizer: Tokenizer, documents: list[Document], length: int, limit: int | None = None) -> Tensor:
    """The documents as one stream cut into int64 windows [W, length + 1], at most `limit`; neighbours share one token.

    Inputs are ``windows[:, :-1]`` and labels ``windows[:, 1:]``: row i of the logits predicts label i, so nothing
    needs to be shifted or masked afterwards.
    """
    end = tokenizer.token_to_id(END_OF_FILE)
    stream: list[int] = []
    for document in documents:
        stream += [*tokenizer.encode(document.text).ids, end]
        if limit is not None and len(stream) > limit * length:
            stream = stream[: limit * length + 1]
            break
    count = (len(stream) - 1) // length
    if count < 1:
        raise ValueError(f"{len(stream)} tokens do not fill one window of {length + 1}")
    return torch.tensor(stream[: count * length + 1]).unfold(0, length + 1, length).contiguous()
