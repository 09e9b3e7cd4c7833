"""A server as the proposer: a tiny model behind HTTP, and servers that fail in every way."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import V, disturbed, prompts, rows_after, tiny

from distilkernels.decoding import (
    BlockVerification,
    CompletionsProposer,
    DivergenceSwitch,
    GreedyAcceptance,
    RemoteError,
    RemoteProposer,
    ReverseSpeculative,
    Sampling,
    SentenceLead,
    Source,
    SpeculativeSampling,
    generate,
)

COLD = Sampling(temperature=0)


def word(i):
    return f"<{i}>"


class Words:
    def decode(self, ids):
        return "".join(word(i) for i in ids)

    def __len__(self):
        return V


class Server:
    """``/v1/completions`` of a model. `script`: what to answer first: a status, bytes, or a number of seconds to sleep."""

    def __init__(self, model, *, tokens="ids", eos=None, script=()):
        self.model, self.tokens, self.eos, self.script, self.asked, self.lock = model, tokens, eos, list(script), [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.asked.append((self.path, dict(self.headers), body))
                    act = outer.script.pop(0) if outer.script else None
                    answer = json.dumps(outer.complete(body)).encode() if act is None else act if isinstance(act, bytes) else b'{"error": "no"}'
                self.send_response(act if isinstance(act, int) else 200)
                if act == 429:
                    self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(answer) if act != b"cut" else 99))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda request, address: None  # clients that gave up
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def complete(self, body):
        torch.manual_seed(body["seed"])
        sequence, texts, logprobs, stopped = list(body["prompt"]), [], [], False
        for _ in range(body["max_tokens"]):
            z = rows_after(self.model, torch.tensor(sequence), [0])[-1].double()
            if body["temperature"] == 0:
                token = int(z.argmax())
            else:
                kept = z >= z.topk(body.get("top_k", V)).values[-1]
                token = int(torch.multinomial((z / body["temperature"]).masked_fill(~kept, -torch.inf).softmax(-1), 1))
            if token == self.eos:
                stopped = True
                break
            sequence.append(token)
            texts.append(f"token_id:{token}" if self.tokens == "ids" else word(token))
            logprobs.append(z.log_softmax(-1)[token].item())
        listed = {"tokens": texts, "token_logprobs": logprobs}
        return {"choices": [{"text": "", "logprobs": listed, "finish_reason": "stop" if stopped else "length"}]}

    def __enter__(self):
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture(scope="module")
def pair():
    judge = tiny(seed=3)
    return disturbed(judge, 0.1), judge


def proposer_for(server, **options):
    return CompletionsProposer(server.url, "tiny", **(dict(backoff=0.0, timeout=20.0) | options))


def test_a_server_proposes_what_the_model_would(pair):
    model, judge = pair
    ids, mask = prompts()
    kw = dict(rule=GreedyAcceptance(), block_size=3, max_new_tokens=10, seeds=0, eos_token_id=None, proposer=COLD)
    with Server(model) as server:
        remote = generate(proposer_for(server), judge, ids, mask, **kw)
    local = generate(model, judge, ids, mask, **kw)
    assert torch.equal(remote.tokens, local.tokens) and torch.equal(remote.source, local.source)
    accepted = local.source == Source.ACCEPTED
    assert 0.1 < accepted.double().mean() < 0.95
    torch.testing.assert_close(remote.proposer_logprobs[accepted], local.proposer_logprobs[accepted], rtol=1e-4, atol=1e-4)
    # a server says nothing of tokens that it did not write
    assert remote.proposer_logprobs[~accepted].isnan().all()
    torch.testing.assert_close(remote.judge_logprobs, local.judge_logprobs, rtol=1e-4, atol=1e-4)


def test_what_is_sent(pair):
    ids, mask = prompts()
    own_ids, own_mask = prompts((3, 7, 5, 2, 7), 7, seed=4)
    with Server(pair[0]) as server:
        proposer = proposer_for(server, api_key="secret")
        traces = generate(
            proposer, pair[1], ids, mask, rule=ReverseSpeculative(proposer_top_k=20), block_size=4, max_new_tokens=6, seeds=torch.arange(5),
            eos_token_id=None, proposer=Sampling(torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9]), top_p=0.9), proposer_input_ids=own_ids,
            proposer_attention_mask=own_mask,
        )  # fmt: skip
        asked = list(server.asked)
    first = sorted((body for _, _, body in asked[:5]), key=lambda body: body["temperature"])
    assert [body["prompt"] for body in first] == [row[keep.bool()].tolist() for row, keep in zip(own_ids, own_mask)]
    assert [body["temperature"] for body in first] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    for path, headers, body in asked:
        assert path == "/v1/completions" and headers["Authorization"] == "Bearer secret" and headers["Content-Type"] == "application/json"
        assert body["model"] == "tiny" and body["top_k"] == 20 and body["top_p"] == 0.9 and body["logprobs"] == 1 and body["max_tokens"] <= 4
        assert "min_p" not in body and body["return_tokens_as_token_ids"] is True and 0 <= body["seed"] < 2**31
    # every block of every request has its own seed, and its prompt goes on with what was written
    assert len({body["seed"] for _, _, body in asked}) == len(asked)
    for _, _, body in asked[5:]:
        b = min(range(5), key=lambda b: abs(body["temperature"] - (0.5 + b / 10)))
        prompt = own_ids[b, own_mask[b].bool()].tolist()
        written = body["prompt"][len(prompt) :]
        assert body["prompt"][: len(prompt)] == prompt and written and written == traces.tokens[b, : len(written)].tolist()


def test_alone_as_in_a_batch(pair):
    ids, mask = prompts()
    kw = dict(rule=ReverseSpeculative(), block_size=3, max_new_tokens=7, eos_token_id=[4, 5])
    with Server(pair[0]) as server:
        together = generate(proposer_for(server), pair[1], ids, mask, seeds=torch.arange(5), **kw)
        alone = generate(proposer_for(server), pair[1], ids[1:2, 3:], None, seeds=torch.tensor([1]), **kw)
    assert alone.tokens[0].tolist() == together.tokens[1, together.mask[1]].tolist()


def test_texts_through_a_tokenizer(pair):
    ids, _ = prompts((4,), 4)
    with Server(pair[0], tokens="texts") as server:
        proposer = proposer_for(server, tokenizer=Words(), extra={})
        tokens, logprobs = proposer.propose([ids[0].tolist()], [5], sampling=[COLD], seeds=[1])
        assert "return_tokens_as_token_ids" not in server.asked[0][2]
        with pytest.raises(RemoteError, match=r"answers with token texts such as '<\d+>': give CompletionsProposer the tokenizer"):
            proposer_for(server).propose([[1]], [1], sampling=[COLD], seeds=[1])
        ambiguous = Words()
        ambiguous.decode = lambda ids: "<same>"
        with pytest.raises(RemoteError, match=r"which stands for no token"):
            proposer_for(server, tokenizer=ambiguous).propose([[1]], [1], sampling=[COLD], seeds=[1])
        server.script = [json.dumps({"choices": [{"logprobs": {"tokens": ["<same>"], "token_logprobs": [-1.0]}}]}).encode()]
        with pytest.raises(RemoteError, match=r"'<same>', which stands for several tokens"):
            proposer_for(server, tokenizer=ambiguous).propose([[1]], [1], sampling=[COLD], seeds=[1])
    row = torch.tensor(tokens[0])[:, None]
    z = rows_after(pair[0], ids[0], tokens[0]).double()
    assert z.argmax(-1).tolist() == tokens[0]
    torch.testing.assert_close(torch.tensor(logprobs[0], dtype=torch.float64), z.log_softmax(-1).gather(1, row)[:, 0], rtol=1e-4, atol=1e-4)


def test_a_server_that_stops(pair):
    """Its end of sequence is not in its answer: named, it is a proposal; unnamed, an empty answer lets the judge write."""
    judge = pair[1]
    ids, _ = prompts((6,), 6)
    free = generate(judge, judge, ids, None, rule=GreedyAcceptance(bonus=None), max_new_tokens=12, seeds=0, eos_token_id=None, proposer=COLD).tokens[0].tolist()
    eos = next(token for i, token in enumerate(free) if i >= 3 and token not in free[:i])
    expected = free[: free.index(eos) + 1]
    for named, last in ((eos, Source.ACCEPTED), (None, Source.FALLBACK)):
        with Server(judge, eos=eos) as server:
            traces = generate(
                proposer_for(server, eos_token_id=named), judge, ids, None, rule=GreedyAcceptance(bonus=None), block_size=5, max_new_tokens=12, seeds=0,
                eos_token_id=eos, proposer=COLD,
            )  # fmt: skip
        assert traces.tokens[0].tolist() == expected and traces.finished == ("eos",) and traces.source[0, -1] == last
        # nobody said how likely the end was
        assert traces.proposer_logprobs[0].isnan().tolist() == [False] * (len(expected) - 1) + [True]


def test_retries(pair):
    asked = lambda proposer: proposer.propose([[1, 2]], [3], sampling=[COLD], seeds=[1])
    with Server(pair[0]) as server:
        expected = asked(proposer_for(server))
        for script in ([429], [500, 503], [b"cut"], [429, 502, b"cut", 500]):
            server.script, server.asked = list(script), []
            assert asked(proposer_for(server)) == expected and len(server.asked) == len(script) + 1
        server.script, server.asked = [503] * 9, []
        with pytest.raises(RemoteError, match=r"http://127.0.0.1:\d+/v1/completions failed 3 times, the last time with status 503: .*no"):
            asked(proposer_for(server, retries=2))
        assert len(server.asked) == 3
        # what the caller did wrong is not tried again
        server.script, server.asked = [404], []
        with pytest.raises(RemoteError, match=r"answered status 404: .*no"):
            asked(proposer_for(server))
        assert len(server.asked) == 1
        url = server.url
    with pytest.raises(RemoteError, match=r"failed 2 times, the last time with .*refused"):
        asked(CompletionsProposer(url, "tiny", retries=1, backoff=0.0))


def test_a_timeout(pair):
    with Server(pair[0]) as server, server.lock, pytest.raises(RemoteError, match=r"failed 2 times, the last time with timed out"):
        proposer_for(server, timeout=0.2, retries=1).propose([[1]], [1], sampling=[COLD], seeds=[1])


def test_waits_double_up_to_a_bound(pair, monkeypatch):
    waits = []
    monkeypatch.setattr("distilkernels.decoding.remote.time.sleep", waits.append)
    with Server(pair[0], script=[500] * 6) as server:
        proposer_for(server, backoff=0.5, max_backoff=3.0, retries=6).propose([[1]], [1], sampling=[COLD], seeds=[1])
    assert waits == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>", "answered something that is not JSON"),
        (b'{"choices": []}', r"must answer choices\[0\].logprobs with tokens and token_logprobs; got \{'choices': \[\]\}"),
        (b'{"choices": [{"text": "a", "logprobs": null}]}', r"must answer choices\[0\].logprobs"),
        (b'{"choices": [{"logprobs": {"tokens": ["token_id:3"], "token_logprobs": []}}]}', "one log-probability a token; got 0 for 1 tokens"),
        (b'{"choices": [{"logprobs": {"tokens": ["token_id:3"], "token_logprobs": ["low"]}}]}', r"must answer choices\[0\].logprobs"),
        (b'{"choices": [{"token_ids": [null], "logprobs": {"tokens": ["a"], "token_logprobs": [-1]}}]}', r"must answer choices\[0\].logprobs"),
        (b'{"choices": [{"logprobs": {"tokens": ["token_id:99999999999999999999"], "token_logprobs": [-1]}}]}', r"must answer token ids in \[0, 2³¹\)"),
        (b'{"choices": [{"token_ids": [-1], "logprobs": {"tokens": ["a"], "token_logprobs": [-1]}}]}', r"must answer token ids in"),
        (b'{"choices": [{"logprobs": {"tokens": [3], "token_logprobs": [-1]}}]}', "answers with token texts such as '3': give CompletionsProposer"),
    ],
)
def test_answers_that_are_none(answer, message, pair):
    with Server(pair[0], script=[answer]) as server, pytest.raises(RemoteError, match=message):
        proposer_for(server).propose([[1]], [1], sampling=[COLD], seeds=[1])


def test_token_ids_and_unknown_logprobs(pair):
    answer = {"choices": [{"token_ids": [3, 4, 5], "logprobs": {"tokens": ["a", "b", "c"], "token_logprobs": [None, -1.0, -2.0]}}]}
    with Server(pair[0], script=[json.dumps(answer).encode()]) as server:
        tokens, logprobs = proposer_for(server).propose([[1]], [2], sampling=[COLD], seeds=[1])
    # no more than was asked for
    assert tokens == [[3, 4]] and math.isnan(logprobs[0][0]) and logprobs[0][1] == -1.0


class Scripted:
    """A proposer of one's own needs `propose` and nothing else."""

    def __init__(self, *blocks):
        self.blocks = list(blocks)

    def propose(self, prompts, counts, *, sampling, seeds):
        tokens = self.blocks.pop(0)
        return [list(tokens) for _ in prompts], [[-0.5] * len(tokens) for _ in prompts]


def test_a_proposer_of_ones_own(pair):
    assert isinstance(Scripted(), RemoteProposer)
    ids, mask = prompts()
    rule = ReverseSpeculative(min_prob=0.0)
    # nothing, an id that the judge lacks, and then what it takes
    proposer = Scripted([], [1, V + 5, 2], [7, 8])
    traces = generate(proposer, pair[1], ids, mask, rule=rule, block_size=3, max_new_tokens=5, seeds=1, eos_token_id=None)
    assert traces.source.tolist() == [[1, 0, 1, 0, 0]] * 5
    assert traces.tokens[:, [1, 3, 4]].tolist() == [[1, 7, 8]] * 5
    assert (traces.proposer_logprobs[:, [1, 3, 4]] == -0.5).all() and traces.proposer_logprobs[:, [0, 2]].isnan().all()
    with pytest.raises(RemoteError, match="propose must return at most 3 tokens and a log-probability for each; got 4 and 4"):
        generate(Scripted([1, 2, 3, 4]), pair[1], ids, mask, rule=rule, block_size=3, max_new_tokens=5, seeds=1, eos_token_id=None)

    class Short(Scripted):
        def propose(self, prompts, counts, *, sampling, seeds):
            return [[1]], [[-0.5]]

    with pytest.raises(RemoteError, match="a list of tokens and one of log-probabilities a request, 5; got 1 and 1"):
        generate(Short(), pair[1], ids, mask, rule=rule, max_new_tokens=5, seeds=1, eos_token_id=None)
    gated = generate(
        Scripted([1, 2], [3]), pair[1], ids[:1], mask[:1], rule=None, gate=SentenceLead(2, delimiters=range(V)), max_new_tokens=4, seeds=1,
        block_size=5, eos_token_id=None,
    )  # fmt: skip
    assert gated.source.tolist() == [[0, 0, 1, 0]] and gated.tokens[0, [0, 1, 3]].tolist() == [1, 2, 3]


def test_rules_that_need_the_proposers_law_are_refused(pair):
    ids, mask = prompts()
    kw = dict(max_new_tokens=4, seeds=0, eos_token_id=None)
    for rule, message in (
        (SpeculativeSampling(), "SpeculativeSampling compares with the proposer's whole law, of which a server sends only the tokens drawn"),
        (BlockVerification(), "BlockVerification compares"),
        (ReverseSpeculative(trials=5), "ReverseSpeculative with trials=5 compares"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(Scripted(), pair[1], ids, mask, rule=rule, **kw)
    with pytest.raises(ValueError, match="DivergenceSwitch compares the models' rows, which a server does not send"):
        generate(Scripted(), pair[1], ids, mask, rule=None, gate=DivergenceSwitch(2.0), **kw)
    with pytest.raises(ValueError, match='block_size must be an int where the proposer is a server, whose cost is not known; got "auto"'):
        generate(Scripted(), pair[1], ids, mask, rule=ReverseSpeculative(), block_size="auto", **kw)
    for options, message in ((dict(url="ftp://x"), "url must start with http"), (dict(retries=-1), "retries must be at least 0; got -1")):
        with pytest.raises(ValueError, match=message):
            CompletionsProposer(**(dict(url="http://x", model="m") | options))
