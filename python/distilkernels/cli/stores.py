"""``python -m distilkernels store``: what stores hold, whether they are sound, and one store of several."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import StoreError
from ..store import TopKReader


def size_on_disk(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(entry.stat().st_size for entry in folder.iterdir() if entry.is_file())


def describe(reader: TopKReader) -> str:
    """Some lines for people to read."""
    manifest, size, tokens = reader.manifest, size_on_disk(reader.path), reader.tokens
    lines = {
        "documents": f"{len(reader):,}",
        "tokens": f"{tokens:,}" + (f" ({tokens / len(reader):,.0f} a document)" if len(reader) else ""),
        "size": f"{size:,} bytes" + (f", {size / tokens:.1f} a token" if tokens else ""),
        "rows": f"top {manifest.k} of {manifest.vocab_size:,} at temperature {manifest.temperature:g}, log-probs to {manifest.max_logprob_error:g} nats",
        "teacher": manifest.teacher,
        "tokenizer": manifest.tokenizer_hash and f"sha256 {manifest.tokenizer_hash}",
        **{name: str(value) for name, value in manifest.metadata.items()},
        "unfinished": ", ".join(reader.unfinished) and f"{', '.join(reader.unfinished)}: a writer is at work, or was interrupted",
    }
    width = max(map(len, lines))
    return "\n".join([str(reader.path), *(f"  {name:{width}}  {value}" for name, value in lines.items() if value)])


def info(paths: Sequence[str]) -> int:
    for path in paths:
        with TopKReader(path) as reader:
            print(describe(reader))
    return 0


def verify(paths: Sequence[str]) -> int:
    """1 where anything is damaged: every damaged block is a line on stderr, with its file and byte."""
    from tqdm import tqdm

    status = 0
    for path in paths:
        try:
            with TopKReader(path) as reader, tqdm(unit="shard", desc="verify", dynamic_ncols=True, leave=False) as bar:

                def move(done: int, total: int, bar=bar) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                damage = reader.damage(move)
        except StoreError as error:
            damage = [error]
        for error in damage:
            print(f"damaged: {error}", file=sys.stderr)
        if damage:
            status = 1
        else:
            print(f"{path}: sound, {len(reader):,} documents, {reader.tokens:,} tokens")
            if reader.unfinished:
                print(f"{path}: unfinished files of a writer that is at work or was interrupted: {', '.join(reader.unfinished)}")
    return status


def merge(paths: Sequence[str], out: str) -> int:
    from ..store import merge as merge_stores

    merge_stores(paths, out)
    return info([out])
