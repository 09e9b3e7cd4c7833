"""Damage, crashes, full disks and many processes: never a wrong row, never a hang, always a StoreError with file and offset.

Processes are spawned with time limits; what they run stands at module level so that they can import it.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_store import assert_stored, teacher_rows

import distilkernels as dk
from distilkernels.store import StoreError, TopKReader, TopKWriter
from distilkernels.store import manifest as manifests

K, VOCAB = 5, 97
LIMIT = 60  # seconds until a process counts as hung


def small_store(path: Path) -> dict:
    """Two shards: rows of two blocks, tokens, an empty document, ids of both kinds."""
    documents = {"a": teacher_rows(258), 7: teacher_rows(0), "b": teacher_rows(3, seed=1)}
    with TopKWriter(path, K, VOCAB, teacher="t", metadata={"note": "é"}) as writer:
        writer.append(documents["a"], "a", tokens=list(range(258)))
        writer.append(documents[7], 7)
        writer.flush()
        writer.append(documents["b"], "b")
    return documents


def read_everything(path: Path) -> dict:
    """What a user can see of a store, verified, to be compared with what was written."""
    with TopKReader(path) as reader:
        reader.verify()
        return {doc_id: (reader[doc_id], reader.token_ids(doc_id)) for doc_id in reader.docs} | {"": reader.manifest}


def assert_same(seen: dict, truth: dict) -> None:
    assert list(seen) == list(truth) and seen[""] == truth[""]
    for doc_id in seen.keys() - {""}:
        for got, wanted in zip(seen[doc_id][0].tensors().values(), truth[doc_id][0].tensors().values(), strict=True):
            assert torch.equal(got, wanted)
        assert (seen[doc_id][1] is None) == (truth[doc_id][1] is None)
        assert seen[doc_id][1] is None or torch.equal(seen[doc_id][1], truth[doc_id][1])


def assert_sound_or_named(path: Path, truth: dict, damaged: Path, offset_near: int | None = None) -> bool:
    """True if the damage was named; otherwise everything must read as written."""
    try:
        seen = read_everything(path)
    except StoreError as error:
        assert error.file == str(damaged) and error.offset is not None, error
        assert 0 <= error.offset <= max(damaged.stat().st_size, 1 if offset_near is None else offset_near)
        return True
    assert_same(seen, truth)
    return False


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "s"
    small_store(path)
    return path, read_everything(path)


def content_files(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.name != "writer.lock")


def test_truncation_at_every_byte(store):
    path, truth = store
    for file in content_files(path):
        data = file.read_bytes()
        for size in reversed(range(len(data))):
            os.truncate(file, size)
            named = assert_sound_or_named(path, truth, file, len(data))
            assert named or (file.name == manifests.NAME and size == len(data) - 1), f"{file.name} cut to {size} bytes"
        file.write_bytes(data)
    assert_same(read_everything(path), truth)


def test_bit_flips(store):
    """Bits all over the manifest and the heads of the shards, and random ones elsewhere; in single flips and in bursts."""
    path, truth = store
    rng = random.Random(0)
    harmless = total = 0
    for file in content_files(path):
        data = file.read_bytes()
        flips = [[bit] for bit in range(0, 8 * min(len(data), 1300), 13)] + [[rng.randrange(8 * len(data))] for _ in range(150)]
        flips += [[rng.randrange(8 * len(data)) for _ in range(rng.randrange(2, 30))] for _ in range(50)]
        for bits in flips:
            changed = bytearray(data)
            for bit in bits:
                changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            total += 1
            harmless += not assert_sound_or_named(path, truth, file)
        file.write_bytes(data)
    # white space between the tokens of the manifest's JSON: the content is the same
    assert total > 2000 and harmless < 0.01 * total


def test_damage_is_named_by_block(store):
    """The intact blocks and documents stay readable, the damaged ones are listed."""
    path, truth = store
    file = path / "shard-00000000.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1  # padding of the second block of rows
    file.write_bytes(data)
    with TopKReader(path) as reader:
        assert torch.equal(reader.slice("a", 0, 256).ids, truth["a"][0].ids[:256])
        with pytest.raises(StoreError, match="block 1 of the rows is damaged") as caught:
            reader.slice("a", 255, 257)
        assert caught.value.file == str(file) and 0 < len(data) - caught.value.offset < 200
        assert torch.equal(reader["b"].ids, truth["b"][0].ids)
        seen = []
        (only,) = reader.damage(lambda *at: seen.append(at))
        assert only.offset == caught.value.offset and seen == [(1, 2), (2, 2)]
        with pytest.raises(StoreError, match="block 1 of the rows"):
            reader.verify()


def test_missing_and_foreign_files(store, tmp_path):
    path, truth = store
    second = path / "shard-00000001.safetensors"
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(StoreError, match="shard is missing") as caught:
        TopKReader(path)
    assert caught.value.file == str(second)
    small_store(tmp_path / "other")
    shutil.copy(tmp_path / "other" / second.name, second)
    with pytest.raises(StoreError, match="not shard 1 of store"):
        TopKReader(path)
    shutil.copy(path / "shard-00000000.safetensors", second)
    with pytest.raises(StoreError, match="is shard 0 of"):
        TopKReader(path)
    second.write_bytes(kept)
    (path / "shard-00000003.safetensors").write_bytes(kept)
    with pytest.raises(StoreError, match="missing") as caught:
        TopKReader(path)
    assert caught.value.file == str(path / "shard-00000002.safetensors")
    (path / "shard-00000003.safetensors").unlink()
    (path / "shard-00000002.safetensors.tmp").write_bytes(kept[:50])
    assert TopKReader(path).unfinished == ["shard-00000002.safetensors.tmp"]
    with TopKWriter(path, K, VOCAB, teacher="t", mode="resume"):
        assert TopKReader(path).unfinished == []
    assert_same({**read_everything(path), "": truth[""]}, truth)


def test_a_disk_that_fills(tmp_path, monkeypatch):
    """ENOSPC at every write of a flush, at fsync and at rename: named, earlier documents intact, the writer can go on."""
    path = tmp_path / "s"
    given = {i: teacher_rows(40, seed=i) for i in range(3)}
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_):
        raise full

    writer = TopKWriter(path, K, VOCAB)
    writer.append(given[0], 0)
    writer.flush()
    writer.append(given[1], 1)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(manifests.os, name, refuse)
            with pytest.raises(StoreError, match=r"No space left.*1 documents wait") as caught:
                writer.flush()
        assert caught.value.file == str(path / "shard-00000001.safetensors") and caught.value.offset > 0
        assert TopKReader(path).docs == [0] and TopKReader(path).unfinished == []
    writer.append(given[2], 2)
    writer.flush()
    with monkeypatch.context() as patch:
        patch.setattr(manifests.os, "replace", refuse)
        with pytest.raises(StoreError, match="totals"):
            writer.close()
    for doc_id in given:
        assert_stored(TopKReader(path)[doc_id], given[doc_id])
    with TopKWriter(path, K, VOCAB, mode="resume") as again:
        assert again.docs == set(given)


def test_a_disk_that_fills_for_real(tmp_path):
    """The kernel refuses bytes beyond a limit on the file's size, at each of several lengths, in the middle of a write."""
    path = tmp_path / "s"
    writer = TopKWriter(path, K, VOCAB)
    writer.append(teacher_rows(20), "first")
    writer.flush()
    writer.append(teacher_rows(3000), "second")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (0, 1, 1000, 20_000, 50_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(StoreError, match="File too large") as caught:
                writer.flush()
            assert caught.value.file == str(path / "shard-00000001.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert TopKReader(path).docs == ["first"]
    writer.close()
    assert_stored(TopKReader(path)["second"], teacher_rows(3000))


WRITE_FOREVER = """
    import sys, torch
    sys.path.insert(0, {tests!r})
    from test_store import teacher_rows
    from distilkernels.store import TopKWriter
    torch.set_num_threads(1)
    with TopKWriter({path!r}, 5, 97, flush_tokens=400, mode="resume") as writer:
        print("open", flush=True)
        start = len(writer.docs)
        for i in range(start, start + 100_000):
            writer.append(teacher_rows(i % 150, seed=i), i, tokens=range(i % 150))
            print(i, flush=True)
"""


def start_writer(path: Path) -> subprocess.Popen:
    code = textwrap.dedent(WRITE_FOREVER).format(tests=str(Path(__file__).parent), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout.readline() == "open\n"
    return process


def assert_prefix(reader: TopKReader, start: int = 0) -> None:
    """Documents 0, 1, 2, … without a gap, each as written."""
    assert reader.docs == list(range(len(reader)))
    for i in range(start, len(reader)):
        assert_stored(reader[i], teacher_rows(i % 150, seed=i))
        assert reader.token_ids(i).tolist() == list(range(i % 150))


def test_reading_while_another_process_writes_and_is_killed(tmp_path):
    """A reader sees a growing prefix; a second writer is told who holds the store; kill −9 at any moment loses no flushed
    document, leaves no lock, and the next writer goes on from there."""
    path = tmp_path / "s"
    rng = random.Random(0)
    checked = 0
    for round_ in range(3):
        process = start_writer(path)
        try:
            reader = TopKReader(path)
            if round_ == 0:
                with pytest.raises(StoreError, match=f"process {process.pid} on") as caught:
                    TopKWriter(path, K, VOCAB, mode="resume")
                assert caught.value.file == str(path / "writer.lock")
                deadline = time.monotonic() + LIMIT
                while len(reader) < 60 and time.monotonic() < deadline:
                    if reader.refresh():
                        assert_prefix(reader, checked)
                        checked = len(reader)
                assert len(reader) >= 60
            time.sleep(rng.uniform(0, 0.25))
        finally:
            process.kill()
            process.communicate(timeout=LIMIT)
        reader = TopKReader(path)
        assert len(reader) >= checked
        assert_prefix(reader, checked)
        checked = len(reader)
        reader.verify()
    with TopKWriter(path, K, VOCAB, mode="resume") as writer:
        assert len(writer.docs) == checked and reader.unfinished == []


class Crash(BaseException):
    """Stands for the death of the process: nothing catches it."""


class FatalSteps:
    """Counts writes, fsyncs and renames of the store's files; the fatal one does not happen, a fatal write does by half."""

    def __init__(self, monkeypatch, fatal: int):
        self.fatal, self.taken = fatal, 0
        for name in ("fsync", "replace"):
            monkeypatch.setattr(manifests.os, name, self.counted(getattr(os, name)))
        monkeypatch.setattr(manifests, "open", lambda *args: TornFile(open(*args), self), raising=False)

    def counted(self, action):
        def step(*args):
            self.taken += 1
            if self.taken == self.fatal:
                raise Crash
            return action(*args)

        return step


class TornFile:
    def __init__(self, file, steps: FatalSteps):
        self._file, self._steps = file, steps

    def write(self, data):
        if self._steps.taken + 1 == self._steps.fatal:
            self._file.write(bytes(data)[: len(data) // 2])
            self._file.flush()
        return self._steps.counted(self._file.write)(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def test_a_crash_at_any_step_of_a_flush(tmp_path, monkeypatch):
    """The process dies at every write, fsync and rename, and half-way through a write: earlier documents stay, the new one is
    there or not, and the next writer goes on."""
    fatal, crashed = 0, True
    while crashed:
        fatal, crashed = fatal + 1, False
        path = tmp_path / str(fatal)
        with TopKWriter(path, K, VOCAB) as writer:
            writer.append(teacher_rows(30), "kept")
        writer = TopKWriter(path, K, VOCAB, mode="resume")
        with monkeypatch.context() as patch:
            FatalSteps(patch, fatal)
            try:
                writer.append(teacher_rows(600, seed=1), "new", tokens=range(600))
                writer.close()
            except Crash:
                crashed = True
                if writer._lock is not None:
                    writer._lock.release()  # as the kernel would
        reader = TopKReader(path)
        reader.verify()
        assert reader.docs in (["kept"], ["kept", "new"])
        assert_stored(reader["kept"], teacher_rows(30))
        if "new" in reader:
            assert_stored(reader["new"], teacher_rows(600, seed=1))
        with TopKWriter(path, K, VOCAB, mode="resume") as writer:
            if "new" not in writer:
                writer.append(teacher_rows(600, seed=1), "new")
        assert len(TopKReader(path)) == 2 and TopKReader(path).unfinished == []
    # head, checksums, table, three blocks of rows, one of tokens, fsync, rename, fsync of the folder; then the manifest
    assert fatal > 12


def _write_some(path, seed, queue) -> None:
    """Tries to append until it has stored ten documents of its own, whoever else is at it."""
    torch.set_num_threads(1)
    stored = refused = 0
    deadline = time.monotonic() + LIMIT
    while stored < 10 and time.monotonic() < deadline:
        try:
            with TopKWriter(path, K, VOCAB, mode="resume") as writer:
                writer.append(teacher_rows(20, seed=stored), f"{seed}-{stored}")
            stored += 1
        except StoreError as error:
            assert "another writer" in str(error) and os.path.basename(error.file) == "writer.lock", error
            refused += 1
    queue.put((seed, stored, refused))


def test_two_writers(tmp_path):
    """Processes that fight for one store: each is refused or has it alone; every document of both is there in the end."""
    path = tmp_path / "s"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_write_some, args=(path, seed, queue)) for seed in range(2)]
    for p in processes:
        p.start()
    results = [queue.get(timeout=LIMIT) for _ in processes]
    for p in processes:
        p.join(LIMIT)
        assert p.exitcode == 0
    assert [stored for _, stored, _ in results] == [10, 10]
    reader = TopKReader(path)
    assert sorted(reader.docs) == sorted(f"{seed}-{i}" for seed in range(2) for i in range(10))
    for doc_id in reader.docs:
        assert_stored(reader[doc_id], teacher_rows(20, seed=int(doc_id.split("-")[1])))


def _child_of_a_writer(writer, reader, queue) -> None:
    try:
        writer.flush()
    except ValueError as error:
        queue.put(str(error))
    queue.put(reader["a"].ids.sum().item())
    time.sleep(LIMIT)


def test_forks_of_a_writer_and_a_reader(tmp_path):
    """After the parent has used OpenMP; the child may read, may not write, and does not keep the lock."""
    path = tmp_path / "s"
    torch.randn(512, 512) @ torch.randn(512, 512)
    dk.topk_distill_loss(torch.randn(64, VOCAB), teacher_rows(64))
    writer = TopKWriter(path, K, VOCAB)
    writer.append(teacher_rows(300), "a")
    writer.flush()
    reader = TopKReader(path)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child_of_a_writer, args=(writer, reader, queue), daemon=True)
    child.start()
    assert "fork" in queue.get(timeout=LIMIT) and queue.get(timeout=LIMIT) == reader["a"].ids.sum().item()
    writer.close()
    TopKWriter(path, K, VOCAB, mode="resume").close()
    child.kill()
    child.join(LIMIT)


def test_threads_share_a_reader(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    small_store(tmp_path / "s")
    reader = TopKReader(tmp_path / "s")
    wanted = reader["a"]

    def read(i: int) -> bool:
        part = reader.slice("a", i, i + 9)
        return torch.equal(part.ids, wanted.ids[i : i + 9]) and torch.equal(part.logprobs, wanted.logprobs[i : i + 9])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, np.random.default_rng(0).integers(0, 249, 500).tolist()))
