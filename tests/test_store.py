"""dk.store: the codec against its definition, then writer, reader, merge and info. Damage and processes: test_store_fuzz.py."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import distilkernels as dk
from distilkernels.store import codec
from distilkernels.store.layout import PAD, row_layout

INF = math.inf


def teacher_rows(n: int, k: int = 5, vocab: int = 97, seed: int = 0, spread: float = 3.0) -> dk.TeacherTopK:
    generator = torch.Generator().manual_seed(seed)
    return dk.capture_topk(torch.randn(n, vocab, generator=generator) * spread, k, backend="reference")


def assert_stored(got: dk.TeacherTopK, given: dk.TeacherTopK, error: float = 1e-3) -> None:
    """`given` is in capture order: ids and their order exact, log-probs within `error`, infinities and the tail exact."""
    k = given.k
    assert got.ids.dtype == torch.int32 and got.logprobs.dtype == torch.float32
    assert torch.equal(got.ids[:, :k].long(), given.ids.long()) and (got.ids[:, k:] == -1).all()
    filled = given.ids >= 0
    a, b = got.logprobs[:, :k][filled].double(), given.logprobs[filled].double()
    assert torch.equal(a == -INF, b == -INF)
    assert ((a - b).abs()[b != -INF] <= error).all()
    assert (got.logprobs[got.ids < 0] == -INF).all()
    assert (got.logprobs[:, 1:] <= got.logprobs[:, :-1]).all()
    assert (got.tail_logprob is None) == (given.tail_logprob is None)
    if given.tail_logprob is not None:
        assert torch.equal(got.tail_logprob, given.tail_logprob.float())
    assert got.temperature == given.temperature


@st.composite
def encoded_rows(draw):
    """Rows as the encoder takes them, of any K and V, with empty slots, −inf, ties and a wide or no range."""
    vocab = draw(st.sampled_from([1, 2, 3, 255, 256, 1000, 32_000, 50_257, 151_936, 2**18, 2**31 - 1]))
    k = draw(st.integers(1, min(vocab, 70)))
    n = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = np.stack([rng.choice(vocab, k, replace=False) if vocab < 2000 else np.sort(rng.integers(0, vocab, k)) for _ in range(n)]).astype(np.int32)
    logprobs = -np.sort(rng.exponential(draw(st.sampled_from([0.0, 1e-4, 1.0, 30.0, 300.0])), (n, k)), axis=1).astype(np.float32)
    logprobs = np.round(logprobs, draw(st.sampled_from([0, 1, 6])))
    for row in range(n):
        empty = rng.integers(0, k + 1) if draw(st.booleans()) else 0
        masked = rng.integers(0, k - empty + 1) if draw(st.booleans()) else 0
        logprobs[row, k - empty - masked :] = -np.inf
        ids[row, k - empty :] = -1
    tail = rng.choice(np.array([-np.inf, np.nan, -3.25, 0.0], np.float32), n)
    return vocab, ids, logprobs, tail, draw(st.sampled_from([1e-3, 1e-2, 1.0]))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(encoded_rows())
def test_codec_is_exact_and_the_same_in_numpy_and_cpp(case):
    vocab, ids, logprobs, tail, error = case
    scale = codec.block_scale(logprobs, error)
    reference = codec.encode(ids, logprobs, tail, vocab, scale, reference=True)
    assert np.array_equal(reference, codec.encode(ids, logprobs, tail, vocab, scale))
    n, k = ids.shape
    for start in {0, n // 2, n - 1}:
        results = []
        for in_numpy in (True, False):
            out = np.full((n - start, k), 7, np.int32), np.full((n - start, k), 7, np.float32), np.full(n - start, 7, np.float32)
            assert codec.decode(reference, start, scale, vocab, *out, reference=in_numpy) is None
            results.append(out)
        for a, b in zip(*results):
            assert a.tobytes() == b.tobytes()
        got_ids, got, got_tail = results[0]
        assert np.array_equal(got_ids, ids[start:]) and got_tail.tobytes() == tail[start:].tobytes()
        given_ = logprobs[start:].astype(np.float64)
        finite = np.isfinite(given_)
        assert np.array_equal(got[~finite], given_[~finite])
        assert (np.abs(got[finite] - given_[finite]) <= error).all()
        assert (got[:, 1:] <= got[:, :-1]).all()


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=PAD, max_size=400), st.integers(1, 9), st.sampled_from([5, 97, 151_936]), st.sampled_from([0, 50, 9000]))
def test_decoding_any_bytes_is_refused_or_gives_a_possible_row(data, k, vocab, max_code):
    """Bytes that no encoder wrote cannot read out of bounds or give an impossible row (checksums make this the second guard)."""
    layout = row_layout(min(k, vocab), vocab, max_code)
    n = (len(data) - PAD) // layout.row_bytes
    block = np.frombuffer(data, np.uint8).copy()
    for in_numpy in (True, False):
        ids, logprobs, tail = np.full((n, layout.k), -9, np.int32), np.full((n, layout.k), np.nan, np.float32), np.zeros(n, np.float32)
        bad = codec.decode(block, 0, codec.Scale(0.0, 0.002, max_code), vocab, ids, logprobs, tail, reference=in_numpy)
        if bad is None:
            assert ((ids >= -1) & (ids < vocab)).all() and not np.isnan(logprobs).any()
        else:
            assert 0 <= bad < n


def test_a_row_written_out_by_hand():
    """docs/store.md: K = 3, V = 6, error 0.25; two ids, one of them masked, and an empty slot."""
    ids, logprobs = np.array([[4, 2, -1]], np.int32), np.array([[-1.0, -INF, -INF]], np.float32)
    scale = codec.Scale(-1.0, 0.5, 0)
    got = codec.encode(ids, logprobs, np.array([-2.0], np.float32), 6, scale)
    number = 4 + 7 * 2 + 49 * 6  # base V + 1, the empty slot is digit V; 343 numbers take 9 bits
    high = 1 << 0 | 1 << 1 + 1 | 1 << 1 + 2  # codes 0, 1, 1
    assert got.tobytes() == struct.pack("<f", -2.0) + number.to_bytes(2, "little") + bytes([high]) + bytes(PAD)


def test_row_bytes_at_the_size_that_is_promised():
    """≤ 3.5 bytes an entry and 4 a token at K = 64, V = 151,936, for a range of up to 32 nats in a block of 256 rows."""
    step = 2 * 1e-3
    assert (row_layout(64, 151_936, int(32 / step)).block_bytes(256) + 20) / 256 <= 3.5 * 64 + 4


def test_documents_come_back(tmp_path):
    """Lengths 0, 1, a block's 256 and one more, several flushes; ids of both kinds; smaller K; without a tail; −inf."""
    masked = teacher_rows(3)
    masked = dk.TeacherTopK(masked.ids, masked.logprobs.index_fill(1, torch.tensor([4]), -INF), torch.full((3,), -INF))
    documents = {
        "a": teacher_rows(257), 7: teacher_rows(0), "7": teacher_rows(1, seed=1), -1: teacher_rows(256, seed=2), "small": teacher_rows(9, k=2),
        "no tail": dk.TeacherTopK(*list(teacher_rows(4, seed=3).tensors().values())[:2]), "masked": masked,
        "int64, float64": dk.capture_topk(torch.randn(6, 97, dtype=torch.float64), 5), "é\ud800\n": teacher_rows(2),
    }  # fmt: skip
    documents["int64, float64"] = dk.TeacherTopK(documents["int64, float64"].ids.long(), *list(documents["int64, float64"].tensors().values())[1:])
    with dk.store.TopKWriter(tmp_path / "s", 5, 97, flush_tokens=300) as writer:
        for doc_id, teacher in documents.items():
            writer.append(teacher, doc_id)
        assert writer.docs == documents.keys() and 7 in writer and 8 not in writer
    with dk.store.TopKReader(tmp_path / "s") as reader:
        assert reader.docs == list(documents) and len(reader) == len(documents) and reader.shards > 1
        assert reader.tokens == sum(map(len, documents.values())) and reader.lengths.tolist() == [len(t) for t in documents.values()]
        for doc_id, teacher in documents.items():
            assert_stored(reader[doc_id], teacher)
            assert reader.length(doc_id) == len(teacher)
        for start, stop in ((0, 0), (255, 257), (100, None), (-3, None), (5, 2), (300, 400), (0, 256), (256, 257)):
            part = reader.slice("a", start, stop)
            assert_stored(part, documents["a"][start:stop])
        reader.verify()
        for other in (pickle.loads(pickle.dumps(reader)), dk.store.TopKReader(tmp_path / "s")):
            assert other.docs == reader.docs and torch.equal(other["a"].logprobs, reader["a"].logprobs)
        with pytest.raises(KeyError, match="no document 'b'"):
            reader["b"]


def test_slots_are_put_in_the_teachers_order(tmp_path):
    """Given in any order: descending log-prob, ties as given, −inf after all finite ones, empty slots last."""
    ids = torch.tensor([[9, -1, 3, 1, 5, 2]])
    logprobs = torch.tensor([[-2.0, 0.5, -2.0, -INF, -1.0, -2.0004]])
    with dk.store.TopKWriter(tmp_path / "s", 6, 10) as writer:
        writer.append(dk.TeacherTopK(ids, logprobs), "a")
    got = dk.store.TopKReader(tmp_path / "s")["a"]
    # 3 and 2 differ by less than the error: their order is the teacher's, whatever they decode to
    assert got.ids.tolist() == [[5, 9, 3, 2, 1, -1]]
    assert got.logprobs[0, 4:].tolist() == [-INF, -INF] and (got.logprobs[0, :4] - torch.tensor([-1.0, -2.0, -2.0, -2.0004])).abs().max() <= 1e-3


@pytest.mark.parametrize("k, vocab", [(64, 151_936), (64, 999_983), (1, 1), (300, 300), (65, 2**31 - 1)])
def test_sizes(tmp_path, k, vocab):
    """The production size; a prime; one id; K = V; the largest vocabulary."""
    ids = torch.stack([torch.randperm(min(vocab, 10**6))[:k] for _ in range(30)])
    ids[:, 0] += vocab - 1 - ids.max() if vocab > 10**6 else 0
    logprobs = (torch.randn(30, k) * 4).log_softmax(-1).sort(-1, descending=True).values
    teacher = dk.TeacherTopK(ids, logprobs, torch.full((30,), -INF))
    with dk.store.TopKWriter(tmp_path / "s", k, vocab) as writer:
        writer.append(teacher, 0)
    assert_stored(dk.store.TopKReader(tmp_path / "s")[0], teacher)


@pytest.mark.parametrize("error", [1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_error_bound(tmp_path, error, dtype):
    logits = torch.randn(300, 97, dtype=torch.float64) * torch.linspace(0.01, 6, 300, dtype=torch.float64)[:, None]
    exact = dk.capture_topk(logits, 20)
    teacher = dk.TeacherTopK(exact.ids, exact.logprobs.to(dtype), exact.tail_logprob)
    with dk.store.TopKWriter(tmp_path / "s", 20, 97, max_logprob_error=error) as writer:
        writer.append(teacher, 0)
    got = dk.store.TopKReader(tmp_path / "s")[0]
    assert torch.equal(got.ids, teacher.ids)
    worst = (got.logprobs.double() - teacher.logprobs.double()).abs().max()
    assert 0.8 * error < worst <= error


def test_tokens_beside_rows(tmp_path):
    """Exact, of any width and number (several blocks), and rows that begin later."""
    long = torch.randint(0, 151_936, (20_000,))
    wide = torch.tensor([2**31 - 1, 0, 255, 256, 65_535, 65_536])
    with dk.store.TopKWriter(tmp_path / "s", 5, 97) as writer:
        writer.append(teacher_rows(10), "long", tokens=long, first=19_990)
        writer.append(teacher_rows(3), "wide", tokens=wide.tolist(), first=1)
        writer.append(teacher_rows(3), "none")
        writer.append(teacher_rows(0), "empty", tokens=[])
    reader = dk.store.TopKReader(tmp_path / "s")
    assert torch.equal(reader.token_ids("long"), long) and torch.equal(reader.token_ids("wide"), wide)
    assert torch.equal(reader.token_ids("long", 8000, 16_500), long[8000:16_500]) and reader.first("long") == 19_990
    assert reader.token_ids("none") is None and reader.num_tokens("none") is None
    assert reader.token_ids("empty").tolist() == [] and reader.num_tokens("empty") == 0
    assert reader.stored_tokens == 20_006


def test_more_shards_than_are_kept_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr("distilkernels.store.reader._MAPPED", 2)
    with dk.store.TopKWriter(tmp_path / "s", 5, 97, flush_tokens=1) as writer:
        for i in range(5):
            writer.append(teacher_rows(3, seed=i), i)
    reader = dk.store.TopKReader(tmp_path / "s")
    for i in (0, 4, 1, 1, 3, 0, 2):
        assert_stored(reader[i], teacher_rows(3, seed=i))
        assert len(reader._mapped) <= 2 < reader.shards


def test_the_container_is_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    with dk.store.TopKWriter(tmp_path / "s", 5, 97) as writer:
        writer.append(teacher_rows(300), "a", tokens=torch.arange(300))
        writer.flush()
        writer.append(teacher_rows(0), "b")
    for index, (blocks, ids) in enumerate(((2, b'["a"]'), (0, b'["b"]'))):
        with safetensors.safe_open(tmp_path / "s" / f"shard-{index:08d}.safetensors", "np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            assert file.metadata()["shard"] == str(index)
        assert tensors["block.rows"].tolist() == [256, 44][:blocks] and tensors["doc_ids"].tobytes() == ids


def test_modes(tmp_path):
    path = tmp_path / "s"
    with dk.store.TopKWriter(path, 5, 97, teacher="t", metadata={"a": (1, 2)}) as writer:
        writer.append(teacher_rows(3), "a")
    with pytest.raises(dk.store.StoreError, match="a store already"):
        dk.store.TopKWriter(path, 5, 97)
    with pytest.raises(ValueError, match="k is 5 here and 6 there"):
        dk.store.TopKWriter(path, 6, 97, teacher="t", mode="resume")
    reader = dk.store.TopKReader(path)
    with dk.store.TopKWriter(path, 5, 97, teacher="t", mode="resume") as writer:
        assert writer.docs == {"a"} and writer.tokens == 3
        with pytest.raises(ValueError, match="already holds 'a'"):
            writer.append(teacher_rows(3), "a")
        writer.append(teacher_rows(4), "b")
        assert reader.refresh() == 0
        writer.flush()
        assert reader.refresh() == 1 and reader.docs == ["a", "b"]
        assert_stored(reader["b"], teacher_rows(4))
    assert reader.manifest.metadata == {"a": [1, 2]} and reader.manifest.teacher == "t"
    with dk.store.TopKWriter(path, 2, 97, mode="overwrite") as writer:
        writer.append(teacher_rows(1, k=2), "c")
    assert dk.store.TopKReader(path).docs == ["c"]
    with pytest.raises(dk.store.StoreError, match="overwritten"):
        reader.refresh()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    for mode in ("create", "resume", "overwrite"):
        with pytest.raises(dk.store.StoreError, match="other files"):
            dk.store.TopKWriter(tmp_path / "other", 5, 97, mode=mode)
        assert (tmp_path / "other" / "thesis.tex").exists()
    with pytest.raises(dk.store.StoreError, match="no store"):
        dk.store.TopKReader(tmp_path / "other")
    with dk.store.TopKWriter(tmp_path / "new", 5, 97, mode="resume"):
        pass
    assert len(dk.store.TopKReader(tmp_path / "new")) == 0


def test_an_exception_leaves_what_was_flushed(tmp_path):
    with pytest.raises(ZeroDivisionError), dk.store.TopKWriter(tmp_path / "s", 5, 97) as writer:
        writer.append(teacher_rows(3), "a")
        writer.flush()
        writer.append(teacher_rows(3), "b")
        1 / 0  # noqa: B018
    assert dk.store.TopKReader(tmp_path / "s").docs == ["a"]
    with pytest.raises(ValueError, match="closed"):
        writer.flush()


def _changed(teacher: dk.TeacherTopK, field: str, index, value) -> dk.TeacherTopK:
    tensors = {name: t.clone() for name, t in teacher.tensors().items()}
    tensors[field][index] = value
    return dk.TeacherTopK(**tensors)


@pytest.mark.parametrize(
    "field, index, value, message",
    [
        ("ids", (2, 1), 97, "97"),
        ("ids", (2, 1), -2, "-2"),
        ("logprobs", (2, 1), math.nan, "NaN at token 2"),
        ("tail_logprob", 2, math.nan, "NaN at token 2"),
        ("logprobs", (2, 1), 0.5, "positive at token 2"),
        ("logprobs", (2, slice(None)), -0.5, "add up to more .* token 2"),
        ("tail_logprob", 2, -1e-5, "add up to more .* token 2"),
        ("logprobs", (2, 4), -1e4, "token 2 is -10000.*masked ids have −inf"),
    ],
)
def test_append_refuses_rows(tmp_path, field, index, value, message):
    with dk.store.TopKWriter(tmp_path / "s", 5, 97) as writer:
        with pytest.raises(ValueError, match=message):
            writer.append(_changed(teacher_rows(4), field, index, value), "a")
        repeated = teacher_rows(4)
        repeated.ids[2, 1] = repeated.ids[2, 0]
        with pytest.raises(ValueError, match="repeated at token 2"):
            writer.append(repeated, "a")
        assert not writer.docs


def test_arguments(tmp_path):
    open_ = lambda *args, **kwargs: dk.store.TopKWriter(tmp_path / "s", *args, **kwargs)
    for args, kwargs, error, message in (
        ((0, 97), {}, ValueError, "k must be"), ((98, 97), {}, ValueError, "k must be"), ((5.0, 97), {}, TypeError, "k must be"),
        ((5, 2**31), {}, ValueError, "vocab_size"), ((5, 97), {"temperature": 0}, ValueError, "temperature"),
        ((5, 97), {"max_logprob_error": 1e-6}, ValueError, "max_logprob_error"), ((5, 97), {"mode": "w"}, ValueError, "mode"),
        ((5, 97), {"teacher": 5}, TypeError, "teacher"), ((5, 97), {"metadata": []}, TypeError, "metadata"),
        ((5, 97), {"metadata": {"x": math.nan}}, ValueError, "JSON"), ((5, 97), {"flush_tokens": 0}, ValueError, "flush_tokens"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            open_(*args, **kwargs)
    assert not (tmp_path / "s").exists()
    rows = teacher_rows(3)
    with open_(5, 97) as writer:
        for args, kwargs, error, message in (
            ((rows.ids, "a"), {}, TypeError, "teacher must be a TeacherTopK"), ((rows[None], "a"), {}, ValueError, r"teacher must be \[T, K\]"),
            ((teacher_rows(3, k=6), "a"), {}, ValueError, "at most 5"), ((rows, 1.5), {}, TypeError, "doc_id"), ((rows, True), {}, TypeError, "doc_id"),
            ((dk.capture_topk(torch.randn(3, 97), 5, temperature=2.0), "a"), {}, ValueError, "temperature 1.0; got 2.0"),
            ((rows, "a"), {"tokens": [1, 2]}, ValueError, "tokens must hold"), ((rows, "a"), {"tokens": [1, 2, 3], "first": 1}, ValueError, "tokens must hold"),
            ((rows, "a"), {"tokens": [1, 2, -3]}, ValueError, r"2\^31"), ((rows, "a"), {"tokens": [1.0, 2.0, 3.0]}, ValueError, "whole numbers"),
            ((rows, "a"), {"first": -1}, ValueError, "first"),
        ):  # fmt: skip
            with pytest.raises(error, match=message):
                writer.append(*args, **kwargs)
        assert not writer.docs
    with pytest.raises(dk.store.StoreError) as caught:
        dk.store.TopKReader(tmp_path / "nothing")
    assert caught.value.file == str(tmp_path / "nothing" / "manifest.json") and not (tmp_path / "nothing").exists()


def test_merge_and_info(tmp_path):
    """Blocks are copied: the merged rows are the sources' bit for bit, and small shards are joined."""
    documents = {}
    for name in "xy":
        with dk.store.TopKWriter(tmp_path / name, 5, 97, flush_tokens=100, teacher="t") as writer:
            for i in range(7):
                documents[f"{name}{i}"] = teacher_rows(60 + i, seed=i)
                writer.append(documents[f"{name}{i}"], f"{name}{i}", tokens=torch.arange(70) + i)
    seen = []
    manifest = dk.store.merge([tmp_path / "x", tmp_path / "y"], tmp_path / "out", flush_tokens=250, progress=lambda *a: seen.append(a))
    reader, source = dk.store.TopKReader(tmp_path / "out"), dk.store.TopKReader(tmp_path / "y")
    assert seen[-1] == (14, 14) and manifest.documents == 14 and reader.docs == list(documents)
    assert reader.shards < dk.store.TopKReader(tmp_path / "x").shards + source.shards
    for doc_id, teacher in documents.items():
        assert_stored(reader[doc_id], teacher)
        assert torch.equal(reader.token_ids(doc_id), torch.arange(70) + int(doc_id[1]))
    assert torch.equal(reader["y3"].logprobs, source["y3"].logprobs)
    reader.verify()
    about = dk.store.info(tmp_path / "out")
    assert (about.documents, about.rows, about.tokens, about.shards) == (14, reader.tokens, 14 * 70, reader.shards)
    files = [tmp_path / "out" / name for name in os.listdir(tmp_path / "out") if name != "writer.lock"]
    assert about.row_bytes + about.token_bytes + about.table_bytes + about.manifest_bytes == sum(f.stat().st_size for f in files)
    with pytest.raises(ValueError, match="distinct documents; 'x0'"):
        dk.store.merge([tmp_path / "x", tmp_path / "out"], tmp_path / "again")
    with dk.store.TopKWriter(tmp_path / "z", 5, 97, teacher="u"):
        pass
    with pytest.raises(ValueError, match="teacher is 't' here and 'u' there"):
        dk.store.merge([tmp_path / "x", tmp_path / "z"], tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_bytes_per_token(tmp_path):
    """Everything in the folder, at the default flush size divided by eight, for rows like a language model's."""
    n, k, vocab = 8192, 64, 151_936
    logprobs = (-1.1 * torch.arange(1, k + 1).log() + 0.3 * torch.randn(n, k)) * torch.empty(n, 1).uniform_(0.5, 4)
    logprobs = (logprobs.log_softmax(-1) - 0.1).sort(-1, descending=True).values
    ids = torch.stack([torch.randperm(vocab)[:k] for _ in range(16)]).repeat(n // 16, 1)
    with dk.store.TopKWriter(tmp_path / "s", k, vocab) as writer:
        for i in range(8):
            writer.append(dk.TeacherTopK(ids, logprobs, torch.full((n,), -2.3))[i * 1024 : (i + 1) * 1024], i)
    total = sum(f.stat().st_size for f in (tmp_path / "s").iterdir())
    assert total / n <= 3.5 * k + 4


def test_codec_under_sanitizers(tmp_path):
    """Address and undefined-behaviour sanitizers on exact-size buffers, for layouts with one, two, three and seven ids a group."""
    compiler = shutil.which("c++") or shutil.which("g++")
    csrc = Path(__file__).parent.parent / "csrc" / "cpu"
    flags = ["-std=c++17", "-O1", "-g0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if compiler is None or subprocess.run([compiler, *flags, str(probe), "-o", str(tmp_path / "probe")], capture_output=True, check=False).returncode:
        pytest.skip("no compiler with the sanitizers")
    program = tmp_path / "store"
    subprocess.run([compiler, *flags, str(csrc / "store_codec.cpp"), str(csrc / "sanitize" / "store.cpp"), "-o", str(program)], check=True)
    groups = set()
    for k, vocab, max_code in ((64, 151_936, 9999), (1, 1, 0), (7, 130, 3), (50, 50_257, 50), (65, 2**31 - 1, 4_000_000), (64, 32_000, 9999)):
        layout = row_layout(k, vocab, max_code)
        groups.add(layout.group)
        done = subprocess.run([str(program), *map(str, codec._numbers(layout))], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (layout, done.stdout + done.stderr)
    assert len(groups) > 2
