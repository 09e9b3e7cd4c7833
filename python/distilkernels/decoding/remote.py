"""A server as the proposer: completions with log-probabilities over HTTP, judged by a local model."""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..primitives.philox import philox
from .gates import Gate
from .rules import Rule
from .sampling import Sampling
from .session import Draft, Draw


class RemoteError(RuntimeError):
    """A server that refused, failed for good, or answered something that is no completion with log-probabilities."""


@runtime_checkable
class RemoteProposer(Protocol):
    """A proposer that shows its tokens and their log-probabilities, not its logits."""

    def propose(
        self, prompts: Sequence[Sequence[int]], counts: Sequence[int], *, sampling: Sequence[Sampling], seeds: Sequence[int]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """At most `counts[b]` tokens after `prompts[b]`, drawn with `sampling[b]` (numbers, no tensors) and the 31-bit `seeds[b]`.

        Returns (tokens, their natural log-probabilities), a list per request. NaN stands for a log-probability that is not known. An
        empty list is a request for which there is nothing to propose: the judge then writes one token itself.
        """


class CompletionsProposer:
    """An OpenAI-style ``/completions`` endpoint that takes prompts of token ids (vLLM, SGLang, llama.cpp's server and others).

    Args:
        url: up to and without ``/completions``, such as ``http://localhost:8000/v1``.
        model: the name the server knows the model by.
        tokenizer: needed where the server answers with token texts rather than ids: anything with ``decode(ids)`` and ``len``.
        eos_token_id: what a completion ended with that stops early without naming its last token.
        api_key: sent as a bearer token.
        timeout: seconds for one answer. retries: how often a request is sent again after 429, 5xx, a broken connection or a timeout.
        backoff: seconds before the first retry, doubled every time, at most `max_backoff`; a ``Retry-After`` header counts within that.
        concurrency: requests in flight.
        extra: more fields of the request body. The default asks vLLM for token ids; servers that reject fields they do not know need {}.

    Log-probabilities are taken as the server computes them; for the labels of traces it should report the raw ones (temperature 1).
    """

    def __init__(
        self, url: str, model: str, *, tokenizer: Any = None, eos_token_id: int | None = None, api_key: str | None = None, timeout: float = 60.0,
        retries: int = 4, backoff: float = 0.5, max_backoff: float = 8.0, concurrency: int = 16, extra: dict[str, Any] | None = None,
    ):  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https://; got {url!r}")
        for name, value, least in (("retries", retries, 0), ("concurrency", concurrency, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        self.url, self.model, self.tokenizer, self.eos_token_id = url.rstrip("/") + "/completions", model, tokenizer, eos_token_id
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self.timeout, self.retries, self.backoff, self.max_backoff, self.concurrency = timeout, retries, backoff, max_backoff, concurrency
        self.extra = {"return_tokens_as_token_ids": True} if extra is None else dict(extra)
        self._ids_of_text: dict[str, int | None] | None = None

    def propose(
        self, prompts: Sequence[Sequence[int]], counts: Sequence[int], *, sampling: Sequence[Sampling], seeds: Sequence[int]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """See :class:`RemoteProposer`. Raises RemoteError."""
        with ThreadPoolExecutor(max(1, min(self.concurrency, len(prompts)))) as pool:
            answers = list(pool.map(self._one, prompts, counts, sampling, seeds))
        return [tokens for tokens, _ in answers], [logprobs for _, logprobs in answers]

    def _one(self, prompt: Sequence[int], count: int, sampling: Sampling, seed: int) -> tuple[list[int], list[float]]:
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": count, "temperature": sampling.temperature, "logprobs": 1, "seed": seed}
        body |= {name: value for name in ("top_k", "top_p", "min_p") if (value := getattr(sampling, name)) is not None}
        return self._parsed(self._sent(body | self.extra), count)

    def _sent(self, body: dict[str, Any]) -> Any:
        for attempt in range(self.retries + 1):
            wait, request = self.backoff * 2**attempt, urllib.request.Request(self.url, json.dumps(body).encode(), self.headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}: {error.read()[:300].decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    raise RemoteError(f"{self.url} answered {reason}") from error
                asked = error.headers.get("Retry-After", "")
                wait = max(wait, float(asked)) if asked.isdigit() else wait
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            except ValueError as error:
                raise RemoteError(f"{self.url} answered something that is not JSON: {error}") from error
            if attempt < self.retries:
                time.sleep(min(wait, self.max_backoff))
        raise RemoteError(f"{self.url} failed {self.retries + 1} times, the last time with {reason}")

    def _parsed(self, answer: Any, count: int) -> tuple[list[int], list[float]]:
        try:
            choice = answer["choices"][0]
            listed = choice["logprobs"]
            logprobs = [math.nan if value is None else float(value) for value in listed["token_logprobs"]]
            texts, ids = [str(text) for text in listed["tokens"]], choice.get("token_ids")
            ids = None if ids is None else [int(i) for i in ids]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RemoteError(f"{self.url} must answer choices[0].logprobs with tokens and token_logprobs; got {str(answer)[:300]}") from error
        tokens = [self._id(text) for text in texts] if ids is None else ids
        if not all(0 <= token < 2**31 for token in tokens):
            raise RemoteError(f"{self.url} must answer token ids in [0, 2³¹); got {str(tokens)[:300]}")
        if len(tokens) != len(logprobs):
            raise RemoteError(f"{self.url} must answer one log-probability a token; got {len(logprobs)} for {len(tokens)} tokens")
        tokens, logprobs = tokens[:count], logprobs[:count]
        ended = choice.get("finish_reason") == "stop" and self.eos_token_id is not None
        if ended and len(tokens) < count and tokens[-1:] != [self.eos_token_id]:
            tokens, logprobs = [*tokens, self.eos_token_id], [*logprobs, math.nan]
        return tokens, logprobs

    def _id(self, text: str) -> int:
        prefix, _, number = text.partition(":")
        if prefix == "token_id" and number.isdigit():
            return int(number)
        if self.tokenizer is None:
            raise RemoteError(f"{self.url} answers with token texts such as {text!r}: give CompletionsProposer the tokenizer")
        if self._ids_of_text is None:
            found: dict[str, int | None] = {}
            for i in range(len(self.tokenizer)):
                word = self.tokenizer.decode([i])
                found[word] = None if word in found else i
            self._ids_of_text = found
        token = self._ids_of_text.get(text)
        if token is None:
            raise RemoteError(f"{self.url} answered the text {text!r}, which stands for {'several tokens' if text in self._ids_of_text else 'no token'}")
        return token


class RemoteSession:
    """A RemoteProposer in the place of a :class:`~.session.Session`: it keeps each request's tokens instead of a cache."""

    columns: int | None = None

    def __init__(self, proposer: RemoteProposer, input_ids: Tensor, attention_mask: Tensor):
        self.proposer = proposer
        self.sequences = [row[keep].tolist() for row, keep in zip(input_ids.cpu(), attention_mask.cpu().bool())]

    @staticmethod
    def checked(rule: Rule | None, gate: Gate | None) -> None:
        """ValueError for a rule or a gate that looks at what a server does not send."""
        if rule is not None and rule.needs_proposer:
            trials = f" with trials={rule.trials}" if hasattr(rule, "trials") else ""
            raise ValueError(
                f"{type(rule).__name__}{trials} compares with the proposer's whole law, of which a server sends only the tokens drawn: "
                "proposer_model must be a local model, or the rule one that reads the judge alone"
            )
        if gate is not None and gate.divergence is not None:
            raise ValueError(f"{type(gate).__name__} compares the models' rows, which a server does not send: proposer_model must be a local model")

    def draft(self, members: list[bool], counts: list[int], draw: Draw) -> Draft:
        rows = [b for b, member in enumerate(members) if member]
        width = max(counts[b] for b in rows)
        # a server's generator starts anew with every request: each block needs its own seed
        seeds = (philox(draw.seeds, (0, draw.positions, 0, draw.stream))[0] & 0x7FFFFFFF).tolist()
        texts, logprobs = self.proposer.propose(
            [self.sequences[b] for b in rows], [counts[b] for b in rows], sampling=[_numbers(draw.sampling, b) for b in rows],
            seeds=[seeds[b] for b in rows],
        )  # fmt: skip
        if not len(texts) == len(logprobs) == len(rows):
            raise RemoteError(f"propose must return a list of tokens and one of log-probabilities a request, {len(rows)}; got {len(texts)} and {len(logprobs)}")
        tokens = torch.full((len(members), width), -1)
        values = torch.full((len(members), width), math.nan, dtype=torch.float64)
        for b, found, value in zip(rows, texts, logprobs):
            if len(found) != len(value) or len(found) > counts[b]:
                raise RemoteError(f"propose must return at most {counts[b]} tokens and a log-probability for each; got {len(found)} and {len(value)}")
            tokens[b, : len(found)] = torch.tensor(found, dtype=torch.int64)
            values[b, : len(value)] = torch.tensor(value, dtype=torch.float64)
        return Draft(tokens, None, values)

    def score(self, members: list[bool], counts: list[int], tokens: Tensor, extra: bool) -> None:
        """A server is not asked for tokens that it did not write."""

    def commit(self, emitted: list[list[int]]) -> None:
        for sequence, tokens in zip(self.sequences, emitted):
            sequence.extend(tokens)

    def select(self, rows: list[int]) -> None:
        self.sequences = [self.sequences[b] for b in rows]


def _numbers(sampling: Sampling, b: int) -> Sampling:
    values = (getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p"))
    return Sampling(*(value[b].item() if isinstance(value, Tensor) else value for value in values))
