"""From a store into training: windows, alignment, padding, packing, and data loaders that fork and spawn."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

import distilkernels as dk
from distilkernels.store import TopKCollator, TopKDataset, TopKReader, TopKWriter

K, VOCAB = 4, 53
LENGTHS = {"a": 11, "b": 1, "nothing": 0, 3: 7, "later": 9}
FIRST = {"later": 4}


def token_ids(doc_id) -> torch.Tensor:
    return torch.arange(LENGTHS[doc_id]) * 3 % VOCAB + len(str(doc_id))


def rows(doc_id) -> dk.TeacherTopK:
    generator = torch.Generator().manual_seed(LENGTHS[doc_id])
    n = LENGTHS[doc_id] - FIRST.get(doc_id, 0)
    return dk.capture_topk(torch.randn(n, VOCAB, generator=generator), K, backend="reference")


def write(path, with_tokens=True):
    with TopKWriter(path, K, VOCAB) as writer:
        for doc_id in LENGTHS:
            writer.append(rows(doc_id), doc_id, tokens=token_ids(doc_id) if with_tokens else None, first=FIRST.get(doc_id, 0))
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "s")


def check_items(items, length) -> None:
    """Put together again, items are the documents; every position has its own token, teacher row and next token."""
    together: dict = {}
    for item in items:
        n = len(item["input_ids"])
        assert 0 < n <= (length or 99) and len(item["teacher"]) == len(item["labels"]) == n
        assert item["start"] == len(together.setdefault(item["doc_id"], []))
        together[item["doc_id"]] += list(zip(item["input_ids"].tolist(), item["labels"].tolist(), item["teacher"].ids, item["teacher"].logprobs))
    assert list(together) == [doc_id for doc_id, n in LENGTHS.items() if n]
    for doc_id, positions in together.items():
        tokens, teacher, first = token_ids(doc_id).tolist(), rows(doc_id), FIRST.get(doc_id, 0)
        assert [p[0] for p in positions] == tokens
        assert [p[1] for p in positions] == [*tokens[1:], -100]
        for t, (_, _, ids, logprobs) in enumerate(positions):
            if t < first:
                assert (ids == -1).all() and (logprobs == -torch.inf).all()
            else:
                assert torch.equal(ids, teacher.ids[t - first]) and (logprobs - teacher.logprobs[t - first]).abs().max() <= 1e-3


@pytest.mark.parametrize("length", [None, 1, 3, 4, 11, 100])
@pytest.mark.parametrize("beside", [True, False])
def test_items(tmp_path, length, beside):
    """Lengths that cut documents with and without a remainder, within and at the first stored row; tokens from either side."""
    tokens = None if beside else {doc_id: token_ids(doc_id) for doc_id in LENGTHS}
    dataset = TopKDataset(TopKReader(write(tmp_path / "s", beside)), tokens=tokens, length=length)
    check_items([dataset[i] for i in range(len(dataset))], length)
    assert torch.equal(dataset[-1]["input_ids"], dataset[len(dataset) - 1]["input_ids"])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_padding(path):
    dataset = TopKDataset(path)
    batch = TopKCollator(pad_token_id=52)([dataset[i] for i in range(3)])
    assert batch["input_ids"].shape == (3, 11) and batch["teacher"].shape == (3, 11)
    for r, doc_id in enumerate(("a", "b", 3)):
        n = LENGTHS[doc_id]
        assert batch["input_ids"][r].tolist() == token_ids(doc_id).tolist() + [52] * (11 - n)
        assert batch["attention_mask"][r].tolist() == [1] * n + [0] * (11 - n)
        assert batch["position_ids"][r, :n].tolist() == list(range(n)) and (batch["labels"][r, n - 1 :] == -100).all()
        assert torch.equal(batch["teacher"].ids[r, :n], rows(doc_id).ids) and (batch["teacher"].ids[r, n:] == -1).all()
    assert TopKCollator(0, max_length=16)([dataset[0]])["teacher"].shape == (1, 16)
    with pytest.raises(ValueError, match="max_length=10 positions; got 11"):
        TopKCollator(0, max_length=10)([dataset[0]])


@pytest.mark.parametrize("max_length, layout", [(12, [["a", "b"], [3], ["later"]]), (17, [["a", "b"], [3, "later"]]), (None, [["a", "b", 3, "later"]])])
def test_packing(path, max_length, layout):
    dataset = TopKDataset(path)
    batch = TopKCollator(0, packing=True, max_length=max_length)([dataset[i] for i in range(4)])
    width = max_length or sum(LENGTHS.values())
    assert batch["input_ids"].shape == (len(layout), width) == batch["teacher"].shape
    for r, docs in enumerate(layout):
        start = 0
        for number, doc_id in enumerate(docs):
            place = slice(start, start + LENGTHS[doc_id])
            first = FIRST.get(doc_id, 0)
            assert torch.equal(batch["input_ids"][r, place], token_ids(doc_id))
            assert batch["labels"][r, place].tolist() == [*token_ids(doc_id)[1:].tolist(), -100]
            assert batch["position_ids"][r, place].tolist() == list(range(LENGTHS[doc_id]))
            assert (batch["sequence_ids"][r, place] == number).all()
            assert torch.equal(batch["teacher"].ids[r, place][first:], rows(doc_id).ids)
            start += LENGTHS[doc_id]
        assert (batch["sequence_ids"][r, start:] == -1).all() and batch["attention_mask"][r].sum() == start


def test_padding_and_packing_do_not_change_the_loss(path):
    """The sum over tokens of a top-k loss with cross-entropy: padded, packed and document by document."""
    dataset = TopKDataset(path)
    items = [dataset[i] for i in range(len(dataset))]
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))  # a bigram student

    def loss(input_ids, labels, teacher) -> float:
        return dk.topk_distill_loss(table[input_ids], teacher, labels=labels, ce_weight=0.5, reduction="sum").item()

    wanted = sum(loss(item["input_ids"], item["labels"], item["teacher"]) for item in items)
    for collate in (TopKCollator(0), TopKCollator(0, packing=True, max_length=20), TopKCollator(0, packing=True)):
        batch = collate(items)
        assert loss(batch["input_ids"], batch["labels"], batch["teacher"]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(path, context, monkeypatch):
    """Two workers after OpenMP ran in this process; the batches are those of no workers, and the teacher gets pinned."""
    torch.randn(512, 512) @ torch.randn(512, 512)
    dataset = TopKDataset(path, length=5)
    options = dict(batch_size=2, collate_fn=TopKCollator(0))
    wanted = list(DataLoader(dataset, **options))
    loader = DataLoader(dataset, num_workers=2, multiprocessing_context=context, prefetch_factor=2, timeout=60, **options)
    got = list(loader)
    assert len(got) == len(wanted) > 2
    for a, b in zip(got, wanted):
        assert a.keys() == b.keys()
        for name in a.keys() - {"teacher"}:
            assert torch.equal(a[name], b[name])
        for x, y in zip(a["teacher"].tensors().values(), b["teacher"].tensors().values(), strict=True):
            assert torch.equal(x, y)


def test_pinning_reaches_the_teacher(path, monkeypatch):
    """What a pin_memory=True loader calls on a batch; the tensors' own pinning needs a GPU and is noted instead."""
    from torch.utils.data._utils.pin_memory import pin_memory

    dataset = TopKDataset(path)
    batch = TopKCollator(0)([dataset[0], dataset[1]])
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self.data_ptr()) or self)
    out = pin_memory(batch)
    assert isinstance(out["teacher"], dk.TeacherTopK)
    assert {t.data_ptr() for t in out["teacher"].tensors().values()} | {out["input_ids"].data_ptr()} <= set(pinned)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches(path):
    for batch in DataLoader(TopKDataset(path), batch_size=2, collate_fn=TopKCollator(0), pin_memory=True):
        assert batch["teacher"].ids.is_pinned() and batch["teacher"].logprobs.is_pinned() and batch["labels"].is_pinned()


def test_an_error_in_a_worker_keeps_its_name(path):
    file = path / "shard-00000000.safetensors"
    data = bytearray(file.read_bytes())
    data[-20] ^= 4
    file.write_bytes(data)
    with pytest.raises(dk.store.StoreError, match="block 0 of the rows is damaged"):
        list(DataLoader(TopKDataset(path), batch_size=2, num_workers=1, collate_fn=TopKCollator(0), timeout=60))


def test_what_a_dataset_refuses(tmp_path):
    path = write(tmp_path / "s", with_tokens=False)
    with pytest.raises(ValueError, match=r"tokens must be given.*'a'"):
        TopKDataset(path)
    tokens = {doc_id: token_ids(doc_id) for doc_id in LENGTHS}
    with pytest.raises(ValueError, match=r"at least 9 of document 'later'.*got 8"):
        TopKDataset(path, tokens=tokens | {"later": token_ids("later")[:8]})
    with pytest.raises(ValueError, match="length must be"):
        TopKDataset(path, tokens=tokens, length=0)
    with pytest.raises(KeyError, match="'z'"):
        TopKDataset(path, tokens=tokens | {"z": []}, doc_ids=["z"])
    assert [TopKDataset(path, tokens=tokens, doc_ids=[3, "a"])[i]["doc_id"] for i in range(2)] == [3, "a"]
