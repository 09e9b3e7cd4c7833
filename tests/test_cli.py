"""``python -m distilkernels capture`` and ``store``: a tiny Llama over a few documents of every kind."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distilkernels as dk
from distilkernels.cli import main

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
safetensors_numpy = pytest.importorskip("safetensors.numpy")
pytest.importorskip("tqdm")

from distilkernels.cli.batches import Tokens, bucketed, padded  # noqa: E402
from distilkernels.cli.documents import Documents  # noqa: E402

# a prime, and more than the tokenizer's 256 bytes and one end
V, K, MAX_LENGTH = 263, 11, 48
TEXT = "def fits(self, row):\n    return é – self.rows[row] is not None and len(self) < 12\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model with its tokenizer in one folder, the model alone in another."""
    torch.manual_seed(0)
    pieces = ["<|end|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        max_position_embeddings=MAX_LENGTH,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    folder, bare = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("bare")
    for place in (folder, bare):
        model.save_pretrained(place)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return SimpleNamespace(folder=str(folder), bare=str(bare), model=model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def data(tiny, tmp_path_factory):
    """Documents of every kind under one folder, and the token ids that each should be captured with."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "deep").mkdir()
    (folder / "deep" / "a.txt").write_text(TEXT[:40], encoding="utf-8")
    (folder / "long.txt").write_text(TEXT * 2, encoding="utf-8")
    (folder / "unknown.md").write_text("skipped")
    lines = [{"text": TEXT[:n], "extra": n} for n in (3, 17, 0)] + [{"id": "named", "input_ids": [5, 262, 0]}]
    (folder / "b.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    rows = np.arange(14, dtype=np.uint16).reshape(2, 7)
    np.save(folder / "c.npy", rows)
    safetensors_numpy.save_file({"x": np.arange(9, dtype=np.int32), "y": rows.astype(np.int64)}, folder / "d.safetensors")
    ids = lambda text: tiny.tokenizer.encode(text).ids[:MAX_LENGTH]
    expected = {"deep/a.txt": ids(TEXT[:40]), "long.txt": ids(TEXT * 2), "b.jsonl:1": ids(TEXT[:3]), "b.jsonl:3": ids(TEXT[:17])}
    expected |= {"b.jsonl:5": [], "named": [5, 262, 0], "c.npy[0]": list(range(7)), "c.npy[1]": list(range(7, 14))}
    expected |= {"d.safetensors:x": list(range(9)), "d.safetensors:y[0]": list(range(7)), "d.safetensors:y[1]": list(range(7, 14))}
    return SimpleNamespace(folder=str(folder), expected=expected)


def capture(tiny, data, out, *more, model=None):
    return main(["capture", "--model", model or tiny.folder, "--data", data if isinstance(data, str) else data.folder, "--out", str(out), "--k", str(K), *more])


def check_rows(tiny, path, expected, temperature=1.0):
    """Every document holds the top-k of the model's own logits, to the store's precision and float32 rounding."""
    with dk.store.TopKReader(path) as reader:
        assert sorted(reader.docs) == sorted(expected)
        for name, tokens in expected.items():
            got = reader[name]
            assert reader.token_ids(name).tolist() == tokens and reader.first(name) == 0
            assert got.ids.shape == (len(tokens), K) and got.temperature == temperature
            if tokens:
                with torch.no_grad():
                    logits = tiny.model(input_ids=torch.tensor([tokens])).logits[0].double()
                want = dk.capture_topk(logits, K, temperature=temperature)
                exact = dk.score_topk(logits, got.ids, temperature=temperature)
                for mine, theirs in ((got.logprobs, want.logprobs), (got.logprobs, exact.logprobs)):
                    torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=1.1e-3)
                torch.testing.assert_close(got.tail_logprob.double(), want.tail_logprob, rtol=0, atol=1e-4)
                # a swap of two ids needs logits as close as rounding
                assert (got.ids == want.ids).float().mean() > 0.99


def test_capture_is_the_top_k_of_the_models_logits(tiny, data, tmp_path, capsys, monkeypatch):
    widths = []
    forward = transformers.LlamaForCausalLM.forward

    def noted(self, input_ids, **more):
        widths.append(input_ids.shape)
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", noted)
    assert capture(tiny, data, tmp_path / "store", "--temperature", "1.5") == 0
    # the LM's own logits were computed once, of a few tokens, to compare its head with ours
    assert len(widths) == 1 and widths[0][0] == 1 and widths[0][1] <= 8
    monkeypatch.undo()
    check_rows(tiny, tmp_path / "store", data.expected, 1.5)
    said = capsys.readouterr().err
    total = sum(map(len, data.expected.values()))
    cut = len(tiny.tokenizer.encode(TEXT * 2).ids) - MAX_LENGTH
    for words in (f"captured 11 documents, {total} tokens in", "tokens/s", f"{cut} tokens beyond 48 a document were left out", "bytes a token", "GB"):
        assert words in said
    with dk.store.TopKReader(tmp_path / "store") as reader:
        manifest = reader.manifest
        assert (manifest.k, manifest.vocab_size, manifest.teacher) == (K, V, tiny.folder)
        assert len(manifest.tokenizer_hash) == 64 and manifest.metadata["max_length"] == MAX_LENGTH


@pytest.mark.parametrize("more", [("--batch-tokens", "1"), ("--batch-tokens", "30", "--window", "4"), ("--max-length", "5", "--flush-tokens", "3")])
def test_batches_windows_and_flushes_do_not_change_rows(tiny, data, tmp_path, more):
    assert capture(tiny, data, tmp_path / "store", *more) == 0
    expected = {name: tokens[: 5 if "--max-length" in more else None] for name, tokens in data.expected.items()}
    check_rows(tiny, tmp_path / "store", expected)


def test_lines_of_text_and_a_model_without_tokenizer(tiny, tmp_path):
    (tmp_path / "lines.txt").write_bytes("one\r\n\n zwei é\nthree".encode())
    assert capture(tiny, str(tmp_path / "lines.txt"), tmp_path / "lines", "--per-line", model=tiny.bare) == 1
    assert capture(tiny, str(tmp_path / "lines.txt"), tmp_path / "store", "--per-line", "--tokenizer", tiny.folder, model=tiny.bare) == 0
    texts = {"lines.txt:1": "one", "lines.txt:3": " zwei é", "lines.txt:4": "three"}
    check_rows(tiny, tmp_path / "store", {name: tiny.tokenizer.encode(text).ids for name, text in texts.items()})
    np.save(tmp_path / "tokens.npy", np.array([3, 1, 2]))
    assert capture(tiny, str(tmp_path / "tokens.npy"), tmp_path / "tokens", model=tiny.bare) == 0
    check_rows(tiny, tmp_path / "tokens", {"tokens.npy": [3, 1, 2]})


def test_resume_after_an_interruption(tiny, data, tmp_path, capsys, monkeypatch):
    """Ctrl-C during a batch: the batch is finished and flushed; the next run takes the rest."""
    store, appended, handler = tmp_path / "store", [], signal.getsignal(signal.SIGINT)
    append = dk.store.TopKWriter.append

    def interrupting(self, teacher, doc_id, **more):
        append(self, teacher, doc_id, **more)
        appended.append(doc_id)
        if len(appended) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(dk.store.TopKWriter, "append", interrupting)
    assert capture(tiny, data, store, "--batch-tokens", "60") == 130
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is handler
    assert "interrupted: captured" in capsys.readouterr().err
    with dk.store.TopKReader(store) as reader:
        assert reader.docs == appended and 3 <= len(appended) < len(data.expected)
        reader.verify()
    assert capture(tiny, data, store) == 0
    assert f"{len(appended)} documents were in the store already" in capsys.readouterr().err
    check_rows(tiny, store, data.expected)
    assert capture(tiny, data, store) == 0
    assert "captured 0 documents, 0 tokens; 11 documents were in the store already" in capsys.readouterr().err
    assert capture(tiny, data, store, "--limit", "2", "--overwrite") == 0
    check_rows(tiny, store, {name: data.expected[name] for name in ("b.jsonl:1", "b.jsonl:3")})


def test_resume_after_kill(tiny, tmp_path):
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, V, (150, 9)))
    store = tmp_path / "store"
    arguments = ["capture", "--model", tiny.folder, "--data", str(tmp_path / "tokens.npy"), "--out", str(store), "--k", str(K)]
    command = [sys.executable, "-m", "distilkernels", *arguments, "--flush-tokens", "9", "--batch-tokens", "9"]
    child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(store.glob("shard-*.safetensors"))) < 5 and child.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.kill()
    assert child.wait() == -signal.SIGKILL, child.stderr.read().decode()[-2000:]
    child.stderr.close()
    with dk.store.TopKReader(store) as reader:
        before = reader.docs
    assert 5 <= len(before) < 150
    assert main(arguments) == 0
    check_rows(tiny, store, {f"tokens.npy[{i}]": row.tolist() for i, row in enumerate(np.load(tmp_path / "tokens.npy"))})
    with dk.store.TopKReader(store) as reader:
        assert reader.docs[: len(before)] == before


def test_resuming_with_other_arguments_is_refused(tiny, data, tmp_path, capsys):
    store = tmp_path / "store"
    assert capture(tiny, data, store, "--limit", "1") == 0
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer)
    other.add_tokens(["<|new|>"])
    other.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    changes = {
        ("--k", "5"): f"k is {K}",
        ("--temperature", "2"): "temperature is 1.0",
        ("--model", tiny.bare, "--tokenizer", tiny.folder): "teacher is",
        ("--tokenizer", str(tmp_path / "other")): "tokenizer_hash is",
        ("--dtype", "bfloat16"): "was captured with dtype float32, not bfloat16",
        ("--max-length", "9"): f"was captured with max_length {MAX_LENGTH}, not 9",
    }
    for more, message in changes.items():
        assert capture(tiny, data, store, *more) == 1, more
        assert message in capsys.readouterr().err
    with dk.store.TopKWriter(store, K, V, teacher=tiny.folder, tokenizer_hash=dk.store.TopKReader(store).manifest.tokenizer_hash, mode="resume"):
        assert capture(tiny, data, store) == 1
        assert "another writer" in capsys.readouterr().err


def test_an_error_keeps_what_was_captured_before_it(tiny, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"input_ids": [1, 2]}\n{"input_ids": [3]}\n{"input_ids": [999]}\n')
    assert capture(tiny, str(data), tmp_path / "store", "--window", "1") == 1
    assert "data.jsonl:3: token 0 is 999" in capsys.readouterr().err
    assert dk.store.TopKReader(tmp_path / "store").docs == ["data.jsonl:1", "data.jsonl:2"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffé".encode())
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "c"}\n'.encode())
    assert [(d.id, d.content) for d in Documents([tmp_path])] == [("a.txt", "é"), ("b.jsonl:1", "c")]


def test_errors_say_where(tiny, tmp_path, capsys):
    cases = {
        "missing.txt": (None, "there is no such file"),
        "table.csv": (b"1", "the type must be one of .txt, .jsonl, .npy, .safetensors"),
        "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "broken.jsonl:2: not JSON"),
        "list.jsonl": (b"[1]\n", "list.jsonl:1: an object is expected; got list"),
        "field.jsonl": (b'{"body": "a"}\n', "field.jsonl:1: a text in \"text\" or token ids in \"input_ids\" are expected; the line has ['body']"),
        "float.jsonl": (b'{"input_ids": [1.5]}\n', "float.jsonl:1: a list of token ids is expected; got float64"),
        "ragged.jsonl": (b'{"input_ids": [[1, 2], [3]]}\n', "ragged.jsonl:1: a list of token ids is expected"),
        "nested.jsonl": (b'{"text": ' + b"[" * 100_000, "nested.jsonl:1: not JSON"),
        "half.jsonl": (b'{"text": "\\ud800"}\n', "half.jsonl:1: not a text"),
        "empty.npy": (b"", "empty.npy: not an array of numbers"),
        "noise.npy": (b"noise", "noise.npy: not an array of numbers"),
        "noise.safetensors": (b"noise", "noise.safetensors: not a safetensors file"),
        "latin.txt": (b"caf\xe9", "latin.txt: not UTF-8"),
        "large.jsonl": (b'{"input_ids": [1, 263]}\n', f"large.jsonl:1: token 1 is 263; the model has ids below {V}"),
        "twice.jsonl": (b'{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}\n', "twice.jsonl:2: the data already has a document '1'"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert capture(tiny, str(tmp_path / name), tmp_path / "out") == 1, name
        assert message in capsys.readouterr().err
    np.save(tmp_path / "cube.npy", np.zeros((1, 2, 3), int))
    np.save(tmp_path / "one.npy", np.int64(3))
    safetensors_numpy.save_file({"x": np.array(3)}, tmp_path / "one.safetensors")
    np.save(tmp_path / "tokens.npy", np.arange(3))
    for argv, message in (
        (["--data", str(tmp_path / "one.npy")], "one.npy: token ids [T] or [documents, T] are expected; got shape ()"),
        (["--data", str(tmp_path / "one.safetensors")], "one.safetensors:x: token ids [T] or [documents, T] are expected; got shape ()"),
        (["--data", str(tmp_path / "tokens.npy"), "--device", "gpu"], "--device gpu: "),
        (["--data", str(tmp_path / "cube.npy")], "token ids [T] or [documents, T] are expected; got shape (1, 2, 3)"),
        (["--data", str(tmp_path / "latin.txt"), str(tmp_path / "latin.txt")], "have one name, 'latin.txt'"),
        (["--data", tiny.bare, "--k", "2000"], f"k must be in [1, {V}], the valid columns; got 2000"),
        (["--data", str(tmp_path / "twice.jsonl"), "--model", str(tmp_path / "nothing")], "nothing"),
    ):
        assert capture(tiny, str(tmp_path), tmp_path / "out", *argv) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert capture(tiny, str(tmp_path / "empty"), tmp_path / "out") == 1
    assert "no file of a known type" in capsys.readouterr().err
    for argv in (["capture"], ["capture", "--k", "0"], ["store"], ["nonsense"]):
        with pytest.raises(SystemExit) as left:
            main(argv)
        assert left.value.code == 2
    capsys.readouterr()


def test_a_model_that_gives_nan_is_named(tiny, tmp_path, capsys):
    broken = transformers.LlamaForCausalLM.from_pretrained(tiny.bare)
    torch.nn.init.constant_(broken.model.embed_tokens.weight[50], torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    np.save(tmp_path / "tokens.npy", np.array([[3, 1] * 6, [3, 1] * 5 + [50, 7]]))
    assert capture(tiny, str(tmp_path / "tokens.npy"), tmp_path / "out", model=str(tmp_path / "broken")) == 1
    # zero attention to a NaN is NaN, so earlier rows of that document have it too, and no other document's
    assert "document 'tokens.npy[1]': TeacherTopK: a log-prob is NaN at token" in capsys.readouterr().err


def test_a_missing_package_is_named(tiny, data, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "distilkernels.cli.capture", raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert capture(tiny, data, tmp_path / "out") == 1
    assert "this command needs tqdm: pip install 'distilkernels[capture]'" in capsys.readouterr().err


def test_documents_are_counted_as_they_are_read(data):
    documents = Documents([data.folder])
    names = [document.id for document in documents]
    assert len(documents) == len(names) == len(set(names)) and set(names) == set(data.expected)
    assert [d.id for d in Documents([data.folder], text_field="text", id_field="extra")][:4] == ["3", "17", "0", "b.jsonl:7"]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=30), budget=st.integers(1, 100))
def test_groups_keep_to_the_budget(lengths, budget):
    documents = [Tokens(str(i), np.full(n, i)) for i, n in enumerate(lengths)]
    groups = list(bucketed(documents, budget))
    assert sorted(d.id for g in groups for d in g) == sorted(d.id for d in documents)
    for group in groups:
        longest = max(len(d.tokens) for d in group)
        assert len(group) == 1 or len(group) * longest <= budget
    # no two neighbours would have fitted together
    for one, two in itertools.pairwise(groups):
        assert (len(one) + 1) * len(one[0].tokens) > budget and len(two[0].tokens) <= len(one[-1].tokens)
    for group in groups:
        ids, mask = padded(group)
        assert [row[kept].tolist() for row, kept in zip(ids, mask)] == [d.tokens.tolist() for d in group]
        assert (ids[~mask] == 0).all()


def test_store_commands(tiny, data, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert capture(tiny, data, first, "--limit", "4") == 0
    np.save(tmp_path / "tokens.npy", np.array([[3, 1], [2, 2]]))
    assert capture(tiny, str(tmp_path / "tokens.npy"), second) == 0
    capsys.readouterr()
    assert main(["store", "info", str(first), str(second)]) == 0
    said = capsys.readouterr().out
    for words in ("documents      4", "documents      2", f"4, top {K} of {V} at temperature 1", tiny.folder, "bytes, without token ids", "float32"):
        assert words in said
    with dk.store.TopKReader(first) as reader:
        rows = reader.tokens
    assert f"teacher rows   {rows}, top" in said and f"token ids      {rows}\n" in said
    files = sum(path.stat().st_size for path in first.iterdir() if path.name != "writer.lock")
    assert f"size           {files:,} bytes in 1 shards" in said
    assert main(["store", "verify", str(first), str(second)]) == 0
    assert f"{second}: sound, 2 documents, 4 rows" in capsys.readouterr().out

    merged = tmp_path / "merged"
    assert main(["store", "merge", str(first), str(second), "--out", str(merged)]) == 0
    assert "documents      6" in capsys.readouterr().out
    with dk.store.TopKReader(merged) as whole:
        for part in (first, second):
            with dk.store.TopKReader(part) as reader:
                for name in reader:
                    assert torch.equal(whole[name].logprobs, reader[name].logprobs) and torch.equal(whole[name].ids, reader[name].ids)
    assert main(["store", "merge", str(first), str(first), "--out", str(tmp_path / "twice")]) == 1
    assert "distinct documents" in capsys.readouterr().err

    (shard,) = second.glob("shard-*")
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    assert main(["store", "verify", str(first), str(second)]) == 1
    said = capsys.readouterr()
    assert f"damaged: {shard}, byte " in said.err and f"{first}: sound" in said.out
    assert main(["store", "info", str(tmp_path / "nowhere")]) == 1
    assert "there is no store here" in capsys.readouterr().err
