"""``python -m distilkernels store``: what stores hold, whether they are sound, and one store of several."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from .. import store
from ..errors import StoreError


def describe(path: str) -> str:
    """Some lines for people to read."""
    found = store.info(path)
    manifest = found.manifest
    size = found.row_bytes + found.token_bytes + found.table_bytes + found.manifest_bytes
    parts = {"rows": found.row_bytes, "token ids": found.token_bytes, "tables": found.table_bytes, "manifest": found.manifest_bytes}
    lines = {
        "documents": f"{found.documents:,}",
        "teacher rows": f"{found.rows:,}, top {manifest.k} of {manifest.vocab_size:,} at temperature {manifest.temperature:g}",
        "log-probs": f"to {manifest.max_logprob_error:g} nats",
        "token ids": f"{found.tokens:,}" if found.tokens else "",
        "size": f"{size:,} bytes in {found.shards:,} shards ({', '.join(f'{name} {n:,}' for name, n in parts.items() if n)})",
        "a row": f"{found.bytes_per_row:.1f} bytes, without token ids" if found.rows else "",
        "teacher": manifest.teacher,
        "tokenizer": manifest.tokenizer_hash and f"sha256 {manifest.tokenizer_hash}",
        **{name: str(value) for name, value in manifest.metadata.items()},
        "unfinished": found.unfinished and f"{', '.join(found.unfinished)}: a writer is at work, or was interrupted",
    }
    width = max(map(len, lines))
    return "\n".join([path, *(f"  {name:{width}}  {value}" for name, value in lines.items() if value)])


def info(paths: Sequence[str]) -> int:
    for path in paths:
        print(describe(path))
    return 0


def verify(paths: Sequence[str]) -> int:
    """1 where anything is damaged: every damaged block is a line on stderr, with its file and byte."""
    status = 0
    for path in paths:
        try:
            with store.TopKReader(path) as reader, _bar("verify", "shard") as progress:
                damage = reader.damage(progress)
        except StoreError as error:
            damage = [error]
        for error in damage:
            print(f"damaged: {error}", file=sys.stderr)
        if damage:
            status = 1
            continue
        print(f"{path}: sound, {len(reader):,} documents, {reader.tokens:,} rows")
        if reader.unfinished:
            print(f"{path}: unfinished, by a writer that is at work or was interrupted: {', '.join(reader.unfinished)}")
    return status


def merge(paths: Sequence[str], out: str) -> int:
    with _bar("merge", "doc") as progress:
        store.merge(paths, out, progress=progress)
    return info([out])


@contextmanager
def _bar(stage: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar as the function progress(done, total)."""
    from tqdm import tqdm

    with tqdm(unit=unit, desc=stage, dynamic_ncols=True, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
