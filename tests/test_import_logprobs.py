"""``dk.store.import_logprobs``: responses of servers, line by line, into a store."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import distilkernels as dk

V, K = 61, 4


def rows(n: int, seed: int) -> torch.Tensor:
    return (torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3).log_softmax(-1)


def listed(row: torch.Tensor, token: int) -> dict[int, float]:
    """K most probable and the token itself, as vLLM lists them."""
    top = row.topk(K)
    return {token: row[token].item()} | dict(zip(top.indices.tolist(), top.values.tolist()))


def vllm_json(log_p: torch.Tensor, tokens: list[int]) -> list[dict]:
    return [{str(t): {"logprob": v, "rank": 1, "decoded_token": "?"} for t, v in listed(row, token).items()} for row, token in zip(log_p, tokens)]


def chat_content(log_p: torch.Tensor, tokens: list[int]) -> list[dict]:
    """vLLM's chat logprobs with return_tokens_as_token_ids."""
    content = []
    for row, token in zip(log_p, tokens):
        top = row.topk(K)
        pairs = zip(top.indices.tolist(), top.values.tolist())
        items = [{"token": f"token_id:{t}", "logprob": v, "bytes": list(f"token_id:{t}".encode())} for t, v in pairs]
        content.append({"token": f"token_id:{token}", "logprob": row[token].item(), "bytes": None, "top_logprobs": items})
    return content


PROMPT, ANSWER = [5, 1, 60, 7], [9, 9, 2]
P, A = rows(3, 1), rows(3, 2)
BOTH = torch.cat([P, A])


def completion(**choice):
    return {"id": "cmpl-1", "object": "text_completion", "choices": [{"index": 0, "text": "?", "logprobs": None, **choice}]}


def top_logprobs(log_p, tokens):
    return {"tokens": [f"token_id:{t}" for t in tokens], "token_logprobs": [], "text_offset": [],
            "top_logprobs": [{f"token_id:{t}": v for t, v in listed(row, token).items()} for row, token in zip(log_p, tokens)]}  # fmt: skip


def echoed(log_p, tokens):
    return {"tokens": [f"token_id:{t}" for t in tokens], "top_logprobs": [None, *top_logprobs(log_p, tokens[1:])["top_logprobs"]]}


# response, the rows it has, its tokens as far as they are known, the position of row 0
SHAPES = {
    "ids of a prompt": ({"id": "d", "prompt_logprobs": [None, *vllm_json(P, PROMPT[1:])], "tokens": PROMPT}, P, PROMPT, 0),
    "bare floats": ({"id": "d", "prompt_logprobs": [None, *(listed(r, t) for r, t in zip(P, PROMPT[1:]))], "tokens": PROMPT}, P, PROMPT, 0),
    "no tokens": ({"id": "d", "prompt_logprobs": [None, *vllm_json(P, PROMPT[1:])]}, P, None, 0),
    "an answer, all tokens": ({"id": "d", "logprobs": vllm_json(A, ANSWER), "tokens": PROMPT + ANSWER}, A, PROMPT + ANSWER, 3),
    "prompt and answer": (
        {"id": "d", "prompt_logprobs": [None, *vllm_json(P, PROMPT[1:])], "logprobs": {"content": chat_content(A, ANSWER)}, "tokens": PROMPT + ANSWER},
        BOTH, PROMPT + ANSWER, 0,
    ),
    "completions": (completion(logprobs=top_logprobs(A, ANSWER), prompt_token_ids=PROMPT, token_ids=ANSWER), A, PROMPT + ANSWER, 3),
    "completions, ids from strings": (completion(logprobs=top_logprobs(A, ANSWER), prompt_token_ids=PROMPT), A, PROMPT + ANSWER, 3),
    "completions, prompt alone": (completion(prompt_logprobs=[None, *vllm_json(P, PROMPT[1:])], prompt_token_ids=PROMPT), P, PROMPT, 0),
    "completions with echo": (
        completion(logprobs=echoed(BOTH, PROMPT + ANSWER), prompt_token_ids=PROMPT),
        BOTH, PROMPT + ANSWER, 0,
    ),
    "chat": (
        {"id": "chatcmpl", "prompt_token_ids": PROMPT, "prompt_logprobs": [None, *vllm_json(P, PROMPT[1:])],
         "choices": [{"index": 0, "message": {}, "logprobs": {"content": chat_content(A, ANSWER)}}]},
        BOTH, PROMPT + ANSWER, 0,
    ),
    "chat without the prompt's tokens": ({"id": "c", "choices": [{"logprobs": {"content": chat_content(A, ANSWER)}, "token_ids": ANSWER}]}, A, None, 0),
    "a batch's line": (
        {"id": "b", "custom_id": "named", "error": None,
         "response": {"status_code": 200, "body": completion(logprobs=top_logprobs(A, ANSWER), prompt_token_ids=PROMPT, token_ids=ANSWER)}},
        A, PROMPT + ANSWER, 3,
    ),
}  # fmt: skip


def check(reader, name, log_p, tokens, first):
    got, want = reader[name], dk.capture_topk(log_p, K)
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=0, atol=1.01e-3)
    torch.testing.assert_close(got.tail_logprob.double().exp(), want.tail_logprob.exp(), rtol=0, atol=1e-6)
    stored = reader.token_ids(name)
    assert (stored if stored is None else stored.tolist()) == tokens and reader.first(name) == first


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_response(tmp_path, shape):
    response, log_p, tokens, first = SHAPES[shape]
    name = response.get("custom_id", response["id"])
    (tmp_path / "r.jsonl").write_text(json.dumps(response) + "\n")
    done = dk.store.import_logprobs(tmp_path / "r.jsonl", tmp_path / "store", K, vocab_size=V, progress=False)
    assert done == (1, len(log_p), 0, [])
    with dk.store.TopKReader(tmp_path / "store") as reader:
        assert reader.docs == [name]
        check(reader, name, log_p, tokens, first)


def test_vllm_objects_and_several_answers(tmp_path):
    entry = lambda row, token: {t: SimpleNamespace(logprob=v, rank=1, decoded_token=None) for t, v in listed(row, token).items()}
    output = SimpleNamespace(
        request_id="7", prompt_token_ids=PROMPT, prompt_logprobs=[None, *(entry(r, t) for r, t in zip(P, PROMPT[1:]))],
        outputs=[SimpleNamespace(token_ids=[*ANSWER, 4][:n], logprobs=[entry(r, t) for r, t in zip(A, ANSWER[:n])]) for n in (3, 1)],
    )  # fmt: skip
    with dk.store.TopKWriter(tmp_path / "store", K, V) as writer:
        assert dk.store.import_logprobs(iter([output]), writer, progress=False) == (2, 10, 0, [])
    with dk.store.TopKReader(tmp_path / "store") as reader:
        check(reader, "7/0", BOTH, PROMPT + ANSWER, 0)
        check(reader, "7/1", BOTH[:4], PROMPT + ANSWER[:1], 0)


def lines(*responses) -> str:
    return "".join(json.dumps(r) + "\n" if not isinstance(r, str) else r for r in responses)


def test_bad_lines_are_named_and_the_rest_goes_on(tmp_path, capsys):
    good = lambda name, n=3: {"id": name, "logprobs": vllm_json(A[:n], ANSWER)}
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(lines(good("one"), "\n", '{"id": \n', good("two")))
    failed = {"custom_id": "x", "error": {"message": "too long"}, "response": {"status_code": 400, "body": {}}}
    large = {"id": "large", "logprobs": [{"61": {"logprob": -1.0}}]}
    few = {"id": "few", "logprobs": vllm_json(A, ANSWER), "tokens": ANSWER}
    without = {"id": "s", "logprobs": {"tokens": ["a"]}}
    second.write_text(lines("[3]\n", failed, {"id": "none"}, large, few, without, good("three", 2), {**good("4"), "id": None}))
    with pytest.raises(ValueError, match=r"a\.jsonl:3: not JSON"):
        dk.store.import_logprobs([first, second], tmp_path / "store", K, vocab_size=V, progress=False, flush_tokens=1)
    with dk.store.TopKReader(tmp_path / "store") as reader:
        assert reader.docs == ["one"]
    with pytest.warns(UserWarning, match=r"7 of the responses could not be read and were left out; the first: .*a\.jsonl:3"):
        done = dk.store.import_logprobs([first, second], tmp_path / "store", K, vocab_size=V, on_error="skip")
    assert "import" in capsys.readouterr().err
    assert (done.documents, done.rows, done.skipped) == (3, 8, 1)
    reasons = (
        "not JSON", "an object is expected; got list", "the request failed: {'message': 'too long'}", "no prompt_logprobs and no logprobs",
        "ids must be at least 0 and below vocab_size = 61; got 61", "3 rows cannot predict the last of 3 tokens",
        "ask the server for top_logprobs",
    )  # fmt: skip
    assert [line.partition(": ")[0].rpartition("/")[2] for line in done.bad] == ["a.jsonl:3", *(f"b.jsonl:{n}" for n in range(1, 7))]
    assert all(reason in line for line, reason in zip(done.bad, reasons))
    with dk.store.TopKReader(tmp_path / "store") as reader:
        # a document without an id is named after its line
        assert reader.docs == ["one", "two", "three", "b.jsonl:8"]


def test_token_strings_and_their_count(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "12": 2}, unk_token="a"))
    entries = [{"a": -0.5, "nowhere": -1.5}, {"12": -0.2}]
    with pytest.warns(UserWarning, match="1 of 6 entries have a token string that names no single id, such as 'nowhere'"):
        responses = [completion(logprobs={"top_logprobs": entries, "tokens": ["a", "12"]}, prompt_token_ids=[1]), {"id": "2", "logprobs": entries[1:] * 3}]
        dk.store.import_logprobs(responses, tmp_path / "store", 2, tokenizer=tokenizer, progress=False)
    with dk.store.TopKReader(tmp_path / "store") as reader:
        assert reader.manifest.vocab_size == 3
        assert reader["cmpl-1"].ids.tolist() == [[0, -1], [2, -1]] and reader.token_ids("cmpl-1").tolist() == [1, 0, 2]
        assert reader["2"].ids.tolist() == [[2, -1]] * 3


def test_an_unknown_token_of_the_answer_leaves_rows_without_tokens(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    response = completion(logprobs={"top_logprobs": [{"a": -0.5}], "tokens": ["?"]}, prompt_token_ids=[1])
    dk.store.import_logprobs([response], tmp_path / "store", 1, tokenizer=tokenizer, progress=False)
    with dk.store.TopKReader(tmp_path / "store") as reader:
        assert reader.token_ids("cmpl-1") is None and len(reader["cmpl-1"]) == 1


def test_rows_of_one_prompt_at_another_prompts_answer(tmp_path):
    """An answer captured under a privileged prompt; the student saw a shorter one. The positions before its tokens match."""
    response = {"id": "d", "prompt_logprobs": [None, *vllm_json(BOTH, PROMPT[1:] + ANSWER)], "tokens": PROMPT + ANSWER}
    dk.store.import_logprobs([response], tmp_path / "store", K, vocab_size=V, progress=False)
    student_tokens = [3, 8, *ANSWER]
    with dk.store.TopKReader(tmp_path / "store") as reader:
        captured = reader["d"]
    teacher_mask = torch.arange(len(captured)) >= len(PROMPT) - 1
    student_mask = (torch.arange(len(student_tokens)) >= 1) & (torch.arange(len(student_tokens)) < 4)
    aligned = dk.align_tokens(captured, student_mask, teacher_mask)
    for j in range(len(ANSWER)):
        assert torch.equal(aligned.ids[1 + j], dk.capture_topk(A[j], K).ids)
        assert student_tokens[1 + j + 1] == ANSWER[j]
    assert (aligned.ids[[0, 4]] == -1).all()


def test_arguments(tmp_path):
    call = dk.store.import_logprobs
    with pytest.raises(ValueError, match='on_error must be "raise" or "skip"'):
        call([], tmp_path / "s", 2, vocab_size=5, on_error="ignore")
    with pytest.raises(ValueError, match="k and vocab_size must be given for a path"):
        call([], tmp_path / "s", 2)
    with pytest.raises(TypeError, match="source must be a path, a list of paths or an iterable of responses; got dict"):
        call({"id": 1}, tmp_path / "s", 2, vocab_size=5)
    with dk.store.TopKWriter(tmp_path / "s", 2, 5, temperature=2.0) as writer:
        assert call([], writer, temperature=2.0, progress=False) == (0, 0, 0, [])
        for given in ({"k": 2}, {"vocab_size": 5}, {"temperature": 3.0}, {"flush_tokens": 5}):
            with pytest.raises(ValueError, match=f"{next(iter(given))}: the writer has its own"):
                call([], writer, **given)
