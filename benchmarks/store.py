"""The store against raw arrays and zstd: bytes per token, then write, sequential and random-read rates.

Rows are ``capture_topk`` of long-tailed logits: a Zipf prior with noise, rows from nearly certain to nearly flat. Every
contender gives a float32 TeacherTopK of a document's slice from a warm page cache; before the timing its ids are compared
with what was captured, and its worst log-prob error is reported. The store compares a checksum per block, raw has none; the
store validates what it writes and waits for the disk (fsync), its peers do neither. MB/s are of decoded output, 8·K + 4
bytes a row.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

import distilkernels as dk
from distilkernels.store import TopKReader, TopKWriter

from .measure import Contender, copy_contender, median, race

GROUP = ("V", "K", "tokens", "work")
VOCAB, K, DOCUMENT, DISTINCT = 151_936, 64, 512, 1024


def captured(rows: int, progress) -> dk.TeacherTopK:
    """`rows` teacher rows like a language model's: 1,024 distinct ones over and over, no row twice in a block."""
    generator = torch.Generator().manual_seed(0)
    prior = -1.1 * torch.arange(1, VOCAB + 1).log()[torch.randperm(VOCAB, generator=generator)]
    noise = torch.randn(3 * VOCAB, generator=generator)
    parts = []
    for _ in range(0, DISTINCT, 64):
        starts = torch.randint(2 * VOCAB, (64,), generator=generator).tolist()
        logits = torch.stack([prior + 2 * noise[s : s + VOCAB] for s in starts])
        logits *= torch.empty(64, 1).uniform_(0.8, 2.5, generator=generator)
        certain = torch.randint(VOCAB, (64, 1), generator=generator)
        logits.scatter_add_(1, certain, torch.empty(64, 1).exponential_(0.3, generator=generator))
        parts.append(dk.capture_topk(logits, K))
        progress.update()
    return dk.TeacherTopK.cat(parts)[torch.cat([torch.randperm(DISTINCT, generator=generator) for _ in range(0, rows, DISTINCT)])]


class Ours:
    """dk.store at its defaults."""

    name = "dk.store"

    def write(self, folder: Path, documents: list[dk.TeacherTopK]) -> None:
        with TopKWriter(folder, K, VOCAB) as writer:
            for i, document in enumerate(documents):
                writer.append(document, i)

    def opened(self, folder: Path) -> Callable[[int, int, int], dk.TeacherTopK]:
        return TopKReader(folder).slice


class Raw:
    """int32 ids, float16 log-probs and tail, a file and np.memmap each: 6·K + 2 bytes a row, no checksums, float16's errors."""

    name = "np.memmap int32 + fp16"

    def columns(self, documents: list[dk.TeacherTopK]) -> list[np.ndarray]:
        dtypes = {"ids": np.int32, "logprobs": np.float16, "tail_logprob": np.float16}
        return [torch.cat([getattr(d, field) for d in documents]).numpy().astype(dtype) for field, dtype in dtypes.items()]

    def write(self, folder: Path, documents: list[dk.TeacherTopK]) -> None:
        folder.mkdir()
        for i, column in enumerate(self.columns(documents)):
            column.tofile(folder / str(i))

    def opened(self, folder: Path) -> Callable[[int, int, int], dk.TeacherTopK]:
        shapes = ((np.int32, (-1, K)), (np.float16, (-1, K)), (np.float16, (-1,)))
        columns = [np.memmap(folder / str(i), dtype, "r").reshape(shape) for i, (dtype, shape) in enumerate(shapes)]
        return lambda doc, start, stop: teacher([c[doc * DOCUMENT + start : doc * DOCUMENT + stop] for c in columns])


class Zstd(Raw):
    """The same columns in blocks of 256 rows, each a zstd frame of level 3 with zstd's checksum."""

    name = "zstd(int32 + fp16)"
    block = 256

    def write(self, folder: Path, documents: list[dk.TeacherTopK]) -> None:
        import zstandard

        folder.mkdir()
        columns = self.columns(documents)
        compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
        offsets = [0]
        with open(folder / "rows", "wb") as file:
            for start in range(0, len(columns[0]), self.block):
                file.write(compressor.compress(b"".join(c[start : start + self.block].tobytes() for c in columns)))
                offsets.append(file.tell())
        (folder / "offsets.json").write_text(json.dumps(offsets))

    def opened(self, folder: Path) -> Callable[[int, int, int], dk.TeacherTopK]:
        import zstandard

        data, offsets = np.memmap(folder / "rows", np.uint8, "r"), json.loads((folder / "offsets.json").read_text())
        decompressor = zstandard.ZstdDecompressor()

        def block(index: int, rows: slice) -> list[np.ndarray]:
            frame = decompressor.decompress(data[offsets[index] : offsets[index + 1]].data)
            n = len(frame) // (6 * K + 2)
            ids = np.frombuffer(frame, np.int32, n * K).reshape(n, K)
            logprobs = np.frombuffer(frame, np.float16, n * K, 4 * n * K).reshape(n, K)
            return [ids[rows], logprobs[rows], np.frombuffer(frame, np.float16, n, 6 * n * K)[rows]]

        def read(doc: int, start: int, stop: int) -> dk.TeacherTopK:
            at, end, parts = doc * DOCUMENT + start, doc * DOCUMENT + stop, []
            while at < end:
                first = at % self.block
                last = min(self.block, first + end - at)
                parts.append(block(at // self.block, slice(first, last)))
                at += last - first
            return teacher(parts[0] if len(parts) == 1 else [np.concatenate(columns) for columns in zip(*parts)])

        return read


def teacher(columns: list[np.ndarray]) -> dk.TeacherTopK:
    ids, logprobs, tail = columns
    return dk.TeacherTopK(*map(torch.from_numpy, (np.array(ids), logprobs.astype(np.float32), tail.astype(np.float32))))


def bench(device: str, repeats: int, quick: bool, progress) -> Iterator[dict]:
    """All on one core, whatever the threads: the store's codec and the peers are serial."""
    n = 4096 if quick else 32_768
    progress.reset(total=DISTINCT // 64)
    rows = captured(n, progress)
    documents = [rows[i : i + DOCUMENT] for i in range(0, n, DOCUMENT)]
    if importlib.util.find_spec("zstandard") is None:
        print("zstandard is not installed (the bench extra has it): its rows are left out")
        kinds = [Ours(), Raw()]
    else:
        kinds = [Ours(), Raw(), Zstd()]
    shape = {"V": VOCAB, "K": K, "tokens": n}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        readers = {}
        for kind in kinds:
            kind.write(root / kind.name, documents)
            readers[kind.name] = kind.opened(root / kind.name)
            size = sum(f.stat().st_size for f in (root / kind.name).iterdir())
            worst = 0.0
            for i, document in enumerate(documents):
                got = readers[kind.name](i, 0, DOCUMENT)
                assert torch.equal(got.ids, document.ids), f"{kind.name} changed ids"
                worst = max(worst, (got.logprobs - document.logprobs).abs().max().item())
            yield shape | {"work": "size", "contender": kind.name, "B_per_token": round(size / n, 2), "worst_error": f"{worst:.1e}"}
        about = dk.store.info(root / Ours.name)
        for part in ("row", "table", "manifest"):
            yield shape | {"work": "size", "contender": f"dk.store: {part}s", "B_per_token": round(getattr(about, f"{part}_bytes") / n, 3)}

        rng = np.random.default_rng(0)
        works = {"read in order": [(i, 0, DOCUMENT) for i in range(len(documents))]}
        for length, count in ((128, 256), (1, 2000)):
            docs, starts = rng.integers(0, len(documents), count), rng.integers(0, DOCUMENT - length, count)
            works[f"read {length} at random"] = [(int(d), int(s), int(s) + length) for d, s in zip(docs, starts)]

        def written(kind) -> Contender:
            folder = root / f"again {kind.name}"
            return Contender(kind.name, lambda: kind.write(folder, documents), lambda: shutil.rmtree(folder, ignore_errors=True))

        def reads(read, places) -> Callable[[], None]:
            def run() -> None:
                for place in places:
                    read(*place)

            return run

        jobs = {"write": (n, [written(kind) for kind in kinds])}
        for work, places in works.items():
            jobs[work] = sum(stop - start for _, start, stop in places), [Contender(k.name, reads(readers[k.name], places)) for k in kinds]
        decoded = 8 * K + 4
        progress.reset(total=(repeats + 2) * len(jobs) * (len(kinds) + 1))
        for work, (count, contenders) in jobs.items():
            times = race([*contenders, copy_contender("cpu", count * decoded // 4 * 4)], "cpu", repeats, progress=progress)
            for contender, found in times.items():
                ms = median(found)
                yield shape | {
                    "work": work, "contender": contender, "ms": round(ms, 3), "ns_per_row": round(ms / count * 1e6),
                    "rows_per_s": round(count / ms * 1e3), "MB_per_s": round(count * decoded / ms / 1e3),
                }  # fmt: skip
