"""``TeacherTopK.from_logprob_dicts``: what vLLM and OpenAI-style servers return."""

from __future__ import annotations

import json
import math
import types
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distilkernels as dk

tokenizers = pytest.importorskip("tokenizers")

from distilkernels.token_strings import TokenStrings, byte_alphabet  # noqa: E402

V = 61


def logprob(value, rank=1, text="?"):
    """Like vLLM's Logprob."""
    return types.SimpleNamespace(logprob=value, rank=rank, decoded_token=text)


def served(rows: torch.Tensor, k: int, prompt: list[int]) -> list:
    """prompt_logprobs of log-softmax rows: the prompt's own token first, then the k most probable, ids as a dict's keys."""
    out: list = [None]
    for row, token in zip(rows, prompt):
        top = row.topk(k)
        listed = {token: row[token].item()} | dict(zip(top.indices.tolist(), top.values.tolist()))
        out.append({t: logprob(v, int((row > v).sum()) + 1) for t, v in listed.items()})
    return out


def as_json(entries):
    return json.loads(json.dumps([e and {t: vars(p) for t, p in e.items()} for e in entries]))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 5), k=st.integers(1, 9), returned=st.integers(1, 9), scale=st.sampled_from([0.3, 3.0, 12.0]), seed=st.integers(0, 999))
def test_prompt_logprobs_are_the_captured_rows(n, k, returned, scale, seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, V, generator=g, dtype=torch.float64) * scale
    log_p = logits.log_softmax(-1)
    prompt = torch.randint(V, (n,), generator=g).tolist()
    entries = served(log_p, returned, prompt)
    got = dk.TeacherTopK.from_logprob_dicts(entries, k, vocab_size=V)
    assert got.ids.shape == (n, k) and got.ids.dtype == torch.int32
    if n:
        got.validate(V)
    for i, token in enumerate(prompt):
        listed = sorted({token, *log_p[i].topk(returned).indices.tolist()}, key=lambda t: (-log_p[i, t], t))[:k]
        assert got.ids[i].tolist() == listed + [-1] * (k - len(listed))
        torch.testing.assert_close(got.logprobs[i, : len(listed)], log_p[i, listed].float())
        # what 1 − Σ loses in fp32: the floor of a derived tail
        exact = log_p[i].exp()
        rest = 1 - exact[listed].sum()
        assert abs(got.tail_logprob[i].double().exp() - rest) < 1e-6
    again = dk.TeacherTopK.from_logprob_dicts(as_json(entries), k)
    floats = dk.TeacherTopK.from_logprob_dicts([e and {t: p.logprob for t, p in e.items()} for e in entries], k)
    for other in (again, floats):
        for name, tensor in got.tensors().items():
            assert torch.equal(other.tensors()[name], tensor)


def test_the_tail_keeps_what_was_listed_but_not_kept():
    """Tails below the rounding of 1 − Σ: what the server listed beyond the k is known exactly."""
    values = [math.log(0.999999), -20.0, -21.0, -22.0]
    got = dk.TeacherTopK.from_logprob_dicts([dict(enumerate(values))], 2)
    everything = dk.TeacherTopK(torch.arange(4)[None], torch.tensor([values]))
    want = torch.logaddexp(everything.log_tail(), torch.tensor([[-21.0, -22.0]], dtype=torch.float64).logsumexp(-1))
    torch.testing.assert_close(got.tail_logprob.double(), want, rtol=1e-6, atol=0)
    nearly = dk.TeacherTopK.from_logprob_dicts([{3: 0.0, 5: -18.0}], 1)
    assert math.log(2**-23) - 1e-3 < nearly.tail_logprob.item() < -14 and nearly.ids.tolist() == [[3]]


def test_missing_rows_and_floors():
    got = dk.TeacherTopK.from_logprob_dicts([{}, None, {7: -0.9, 2: -0.9}, {4: -9999.0, 5: -1.0, 6: -math.inf}], 3)
    # an empty first entry is vLLM's flat form of None; None elsewhere is a row without slots
    assert got.ids.tolist() == [[-1, -1, -1], [2, 7, -1], [5, -1, -1]]
    assert got.logprobs[2].tolist() == [-1.0, -math.inf, -math.inf] and got.tail_logprob[0] == 0
    assert dk.TeacherTopK.from_logprob_dicts([], 3).ids.shape == (0, 3)
    assert dk.TeacherTopK.from_logprob_dicts([None], 3, temperature=0.5).temperature == 0.5


# the 256 bytes, then words; id 0 ends a text
WORDS = ["Ġthe", "the", "Ġ", "Ã©", "âĢ", "<|im_end|>", "12", "ĠĠ"]


@pytest.fixture(scope="module")
def byte_level():
    pieces = ["<|end|>", *sorted(byte_alphabet()), *WORDS]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece():
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁the", "the", "▁only", "▁", "é"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    d = tokenizers.decoders
    tokenizer.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    return tokenizer


def test_byte_alphabet_is_the_tokenizers():
    assert set(byte_alphabet()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    # the alphabet writes a text's bytes one for one
    text = "é – 漢\n"
    written = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]
    assert bytes(byte_alphabet()[c] for c in written) == text.encode()


def test_strings_of_a_byte_level_vocabulary(byte_level):
    strings = TokenStrings(byte_level)
    find = byte_level.token_to_id
    for name, piece in {" the": "Ġthe", "Ġthe": "Ġthe", "the": "the", "<|im_end|>": "<|im_end|>", "<|end|>": "<|end|>"}.items():
        assert strings.id_of(name) == find(piece)
    # é is a token's text, and the piece of the byte 0xE9: only who knows the server can say
    assert strings.id_of("é") is None
    text, piece = TokenStrings(byte_level, "text"), TokenStrings(byte_level, "piece")
    assert text.id_of("é") == find("Ã©") and piece.id_of("é") == find("é") != find("Ã©")
    assert text.id_of("Ġthe") is None and piece.id_of(" the") is None and text.id_of(" the") == piece.id_of("Ġthe") == find("Ġthe")
    for nothing in ("nowhere", "�", ""):
        assert strings.id_of(nothing) is None
    # half of a character: the string says nothing, its bytes say all; bytes that repeat the string add nothing
    assert strings.id_of("\\xe2\\x80", b"\xe2\x80") == find("âĢ")
    assert strings.id_of("�", "�".encode()) is None
    assert strings.id_of("\\xff\\xff", b"\xff\xff") is None


def test_strings_of_a_sentencepiece_vocabulary(sentencepiece):
    strings = TokenStrings(sentencepiece)
    find = sentencepiece.token_to_id
    assert strings.id_of("▁the") == strings.id_of(" the") == find("▁the")
    # "the" is a piece, and what "▁the" decodes to alone: which of them a server meant cannot be known
    assert strings.id_of("the") is None
    assert TokenStrings(sentencepiece, "piece").id_of("the") == find("the")
    assert strings.id_of("only") == strings.id_of(" only") == find("▁only")
    # tokens without an unknown token's id for strings that are none
    assert strings.id_of("missing") is None
    # é is one piece, and its bytes are no single other
    assert strings.id_of("é", "é".encode()) == find("é") and strings.id_of("\\xc3", b"\xc3") == find("<0xC3>")


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
def test_never_a_wrong_id(name, request):
    """Whatever a server calls a token, by text, by piece or by its bytes, the answer is that token or none."""
    tokenizer = request.getfixturevalue(name)
    strings, text, piece = (TokenStrings(tokenizer, form) for form in (None, "text", "piece"))
    found = {"text": 0, "piece": 0}
    for own, i in tokenizer.get_vocab().items():
        decoded = tokenizer.decode([i], skip_special_tokens=False)
        for answer in (strings.id_of(decoded), strings.id_of(own), text.id_of(decoded), text.id_of(decoded, decoded.encode())):
            assert answer in (i, None)
        assert piece.id_of(own) == i
        found["text"] += text.id_of(decoded) == i
        found["piece"] += strings.id_of(own) == i
    # most have a name: not all answers are None
    assert min(found.values()) > 90


def test_transformers_tokenizers_give_the_same(byte_level):
    transformers = pytest.importorskip("transformers")
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level)
    ours, theirs = TokenStrings(byte_level), TokenStrings.of(wrapped)
    assert ours._names == theirs._names and ours._bytes == theirs._bytes
    assert TokenStrings.of(wrapped) is theirs and TokenStrings.of(wrapped, "text") is not theirs


def chat(token, value, top, exact=None):
    item = {"token": token, "logprob": value, "bytes": exact}
    return item | {"top_logprobs": [{"token": t, "logprob": v, "bytes": list(t.encode())} for t, v in top]}


def test_chat_completions(byte_level):
    find = byte_level.token_to_id
    content = [
        chat(" the", -0.1, [(" the", -0.1), ("the", -2.5)]),
        # the sampled token is not among the most probable
        chat("12", -6.0, [("é", -0.2), (" the", -2.0)], [49, 50]),
        # listed twice, once as the sampled one
        chat("token_id:3", -0.3, [("token_id:3", -0.3), ("token_id:9", -1.5)]),
    ]
    got = dk.TeacherTopK.from_logprob_dicts(content, 3, tokenizer=byte_level, token_form="text")
    assert got.ids.tolist() == [[find("Ġthe"), find("the"), -1], [find("Ã©"), find("Ġthe"), find("12")], [3, 9, -1]]
    torch.testing.assert_close(got.mass()[1], torch.tensor([-0.2, -2.0, -6.0]).exp().sum().double())
    objects = [
        types.SimpleNamespace(token=c["token"], logprob=c["logprob"], bytes=c["bytes"], top_logprobs=[types.SimpleNamespace(**t) for t in c["top_logprobs"]])
        for c in content
    ]
    assert torch.equal(dk.TeacherTopK.from_logprob_dicts(objects, 3, tokenizer=byte_level, token_form="text").ids, got.ids)
    alone = dk.TeacherTopK.from_logprob_dicts([c["top_logprobs"] for c in content], 3, tokenizer=byte_level, token_form="text")
    assert alone.ids[1].tolist() == [find("Ã©"), find("Ġthe"), -1]
    # ids as strings need no tokenizer
    assert dk.TeacherTopK.from_logprob_dicts(content[2:], 1).ids.tolist() == [[3]]


def test_text_completions_and_strings_without_an_id(byte_level):
    find = byte_level.token_to_id
    # "12" over a float is a token here, and not the id 12; two names of one token count once
    entries = [None, {" the": -0.5, "Ġthe": -0.7, "12": -1.5}, {"�": -0.5, "the": -1.5, "nowhere": -3.0}]
    with pytest.warns(UserWarning, match=r"2 of 6 entries have a token string that names no single id, such as '�'"):
        got = dk.TeacherTopK.from_logprob_dicts(entries, 2, tokenizer=byte_level)
    assert got.ids.tolist() == [[find("Ġthe"), find("12")], [find("the"), -1]]
    # no id for them, but their mass is known to be elsewhere
    torch.testing.assert_close(got.mass() + got.tail_logprob.double().exp(), torch.ones(2, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dk.TeacherTopK.from_logprob_dicts([{"12": -0.5}], 1).ids.tolist() == [[12]]
        json_ids = [{"12": {"logprob": -0.5, "rank": 1, "decoded_token": "é"}}]
        assert dk.TeacherTopK.from_logprob_dicts(json_ids, 1, tokenizer=byte_level).ids.tolist() == [[12]]


def test_two_unknown_strings_count_twice(byte_level):
    """Distinct tokens may share the replacement character: neither may vanish from the returned mass."""
    top = [{"token": "�", "logprob": v, "bytes": None} for v in (-1.0, -1.2)] + [{"token": "12", "logprob": -1.3}]
    with pytest.warns(UserWarning, match="names no single id"):
        got = dk.TeacherTopK.from_logprob_dicts([{"token": "�", "logprob": -1.0, "bytes": None, "top_logprobs": top}], 1, tokenizer=byte_level)
    # the first of them is the sampled token, listed twice
    assert math.isclose(got.tail_logprob.exp().item(), 1 - math.exp(-1.3), rel_tol=1e-5)
    with pytest.raises(ValueError, match="add up to"):
        dk.TeacherTopK.from_logprob_dicts([[*top, {"token": "�", "logprob": -1.1}]], 1, tokenizer=byte_level)


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ("abc", TypeError, "a list with one entry per token is expected; got str"),
        ({"1": -0.5}, TypeError, "a list with one entry per token is expected; got dict"),
        ([None, 3], TypeError, "entry 1: a dict of log-probs"),
        ([{" the": -0.1}], ValueError, "entry 0: the token ' the' is a string: pass tokenizer="),
        ([{1: "x"}], TypeError, "entry 0: the log-prob of 1 must be a number; got str"),
        ([{1.5: -0.5}], TypeError, "entry 0: keys must be ids or token strings; got float"),
        ([{1: -0.5}, {2: math.nan}], ValueError, "entry 1: the log-prob of 2 is NaN"),
        ([{-3: -0.5}], ValueError, "entry 0: ids must be at least 0 and below vocab_size = 50; got -3"),
        ([{50: -0.5}], ValueError, "entry 0: ids must be at least 0 and below vocab_size = 50; got 50"),
        ([None, {1: 12.0, 2: 3.0}], ValueError, "entry 1: the probabilities add up to .*log-probs are expected, not logits"),
        ([[{"token": 5, "logprob": -0.1}]], ValueError, "entry 0: a token and its logprob are expected"),
    ],
)
def test_errors_name_the_entry(entries, error, message):
    with pytest.raises(error, match=message):
        dk.TeacherTopK.from_logprob_dicts(entries, 2, vocab_size=50)


def test_errors_name_the_argument():
    for k, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="k must be"):
            dk.TeacherTopK.from_logprob_dicts([], k)
    with pytest.raises(TypeError, match="tokenizer must be one of transformers or tokenizers; got str"):
        dk.TeacherTopK.from_logprob_dicts([], 1, tokenizer="gpt2")
    with pytest.raises(ValueError, match="vocab_size must be at least 1; got 0"):
        dk.TeacherTopK.from_logprob_dicts([], 1, vocab_size=0)
    with pytest.raises(ValueError, match='token_form must be "text", "piece" or None; got \'bytes\''):
        dk.TeacherTopK.from_logprob_dicts([], 1, tokenizer=tokenizers.Tokenizer(tokenizers.models.BPE()), token_form="bytes")
    with pytest.raises(ValueError, match="temperature must be"):
        dk.TeacherTopK.from_logprob_dicts([], 1, temperature=0)
