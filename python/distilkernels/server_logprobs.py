"""Log-probs as inference servers return them, as a :class:`TeacherTopK`."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .primitives.head import checked_positive
from .teacher import TeacherTopK
from .token_strings import TokenStrings

# servers write −9999 in JSON for −inf, and for "not among the most probable": neither is a log-prob to keep
ABSENT = -9999.0

# of an id that is listed, but that no slot may hold
_UNNAMED = -2


class ServerLogprobs:
    """Turns lists of a server's entries into rows, and counts the token strings that name no single id.

    Args: see :meth:`TeacherTopK.from_logprob_dicts`.
    """

    def __init__(
        self, k: int, *, tokenizer=None, token_form: str | None = None, temperature: float = 1.0, vocab_size: int | None = None
    ):  # fmt: skip
        for name, value in (("k", k), ("vocab_size", vocab_size)):
            if value is None and name == "vocab_size":
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise TypeError(f"{name} must be an int; got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.k = int(k)
        self.temperature = checked_positive("temperature", temperature)
        self.vocab_size = vocab_size
        self.entries = 0
        self.unnamed = 0
        self._strings = None if tokenizer is None else TokenStrings.of(tokenizer, token_form)
        self._example: str | None = None

    def rows(self, entries: Sequence[Any], strings_are_ids: bool | None = None) -> TeacherTopK:
        """One row per entry, [N, K]; a first entry that is None (or empty) is left out: nothing predicts the first token.

        strings_are_ids: whether a string key over a bare float is an id in decimal (JSON turns integer keys into strings)
        rather than a token; None: it is where there is no tokenizer.
        """
        if isinstance(entries, (str, bytes, Mapping)) or not isinstance(entries, Sequence):
            raise TypeError(f"a list with one entry per token is expected; got {type(entries).__name__}")
        first = 1 if len(entries) and (entries[0] is None or entries[0] == {}) else 0
        strings_are_ids = self._strings is None if strings_are_ids is None else strings_are_ids
        found = [self._row(entries[i], i, strings_are_ids) for i in range(first, len(entries))]
        width = max((len(row) for row in found), default=0)
        ids = torch.full((len(found), max(width, self.k)), -1, dtype=torch.int64)
        logprobs = torch.full(ids.shape, -math.inf, dtype=torch.float64)
        for i, row in enumerate(found):
            if row:
                ids[i, : len(row)] = torch.tensor([token for token, _ in row])
                logprobs[i, : len(row)] = torch.tensor([value for _, value in row], dtype=torch.float64)
        mass = logprobs.exp().sum(-1)
        if (mass > 1.01).any():
            row = int((mass > 1.01).nonzero()[0])
            raise ValueError(f"entry {row + first}: the probabilities add up to {mass[row]:.4g}: log-probs are expected, not logits")
        listed = TeacherTopK(ids.masked_fill(ids == _UNNAMED, 0), logprobs.float(), None, self.temperature)
        # by ascending id first, so that the stable sort breaks ties of the log-prob by it; what no slot may hold comes last
        ids, by_id = ids.sort(dim=-1)
        logprobs = logprobs.gather(-1, by_id)
        order = logprobs.masked_fill(ids < 0, -math.inf).sort(dim=-1, descending=True, stable=True).indices
        ids, logprobs = ids.gather(-1, order), logprobs.gather(-1, order)
        keep = (torch.arange(ids.shape[1]) < self.k) & (ids >= 0)
        dropped = logprobs.masked_fill(keep, -math.inf).logsumexp(-1)
        tail = torch.logaddexp(listed.log_tail(), dropped)
        kept = torch.where(keep, ids, -1)[:, : self.k]
        return TeacherTopK(
            kept.int(), logprobs[:, : self.k].masked_fill(kept < 0, -math.inf).float(), tail.float(), self.temperature
        )  # fmt: skip

    def warn(self, stacklevel: int) -> None:
        """One warning for all strings that named no single id."""
        if self.unnamed:
            warnings.warn(
                f"{self.unnamed} of {self.entries} entries have a token string that names no single id, such as {self._example!r}: their "
                'mass is in the tail. Ask the server for ids where it can (vLLM: "return_tokens_as_token_ids": true), or say '
                "what its strings are, token_form='text' or 'piece'",
                stacklevel=stacklevel,
            )

    def _row(self, entry: Any, i: int, strings_are_ids: bool) -> list[tuple[int, float]]:
        """Distinct (id, log-prob), first come first; strings without an id as _UNNAMED."""
        found: dict[Any, float] = {}
        for token, logprob in _entries(entry, i, strings_are_ids):
            if isinstance(logprob, bool) or not isinstance(logprob, numbers.Real):
                raise TypeError(f"entry {i}: the log-prob of {token!r} must be a number; got {type(logprob).__name__}")
            if math.isnan(logprob):
                raise ValueError(f"entry {i}: the log-prob of {token!r} is NaN")
            if logprob <= ABSENT:
                continue
            self.entries += 1
            name = self.token_id(*token, i) if isinstance(token, tuple) else int(token)
            if name is None:
                self.unnamed += 1
                self._example = self._example or token[0]
                # two tokens may share a string: both count, unless it is the sampled token listed a second time
                name = (token, float(logprob))
            elif name < 0 or (self.vocab_size is not None and name >= self.vocab_size):
                limit = "" if self.vocab_size is None else f" and below vocab_size = {self.vocab_size}"
                raise ValueError(f"entry {i}: ids must be at least 0{limit}; got {name}")
            found.setdefault(name, float(logprob))
        return [(_UNNAMED if isinstance(name, tuple) else name, value) for name, value in found.items()]

    def token_id(self, string: str, exact: bytes | None = None, i: int = 0) -> int | None:
        """The one id of a token string of entry `i`, or None; ValueError where that takes a tokenizer."""
        prefix, _, number = string.partition(":")
        if prefix == "token_id" and number.isascii() and number.isdecimal():
            return int(number)
        if self._strings is None:
            raise ValueError(f"entry {i}: the token {string!r} is a string: pass tokenizer= to find its id")
        return self._strings.id_of(string, exact)


def _entries(entry: Any, i: int, strings_are_ids: bool) -> Iterator[tuple[Any, Any]]:
    """(id, or (string, bytes)) and log-prob, of any of the shapes."""
    if entry is None:
        return
    listed = field(entry, "top_logprobs")
    if isinstance(entry, (list, tuple)) or isinstance(listed, (list, tuple)):
        # chat completions: the most probable tokens, and the sampled one, which need not be among them
        items = [*(entry if listed is None else listed), *([] if listed is None or field(entry, "logprob") is None else [entry])]
        for item in items:
            token, logprob = field(item, "token"), field(item, "logprob")
            if not isinstance(token, str) or logprob is None:
                raise ValueError(f"entry {i}: a token and its logprob are expected; got {item!r}")
            exact = field(item, "bytes")
            yield (token, None if exact is None else bytes(exact)), logprob
    elif isinstance(entry, Mapping):
        for key, value in entry.items():
            logprob = field(value, "logprob")
            if isinstance(key, str) and (logprob is not None or strings_are_ids) and key.isascii() and key.isdecimal():
                key = int(key)
            elif isinstance(key, str):
                key = (key, None)
            elif isinstance(key, bool) or not isinstance(key, numbers.Integral):
                raise TypeError(f"entry {i}: keys must be ids or token strings; got {type(key).__name__}")
            yield key, value if logprob is None else logprob
    else:
        raise TypeError(f"entry {i}: a dict of log-probs, a chat token with top_logprobs, or None is expected; got {type(entry).__name__}")


def field(item: Any, name: str) -> Any:
    """A field of a dict read from JSON, or of a client's object."""
    return item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)


def from_logprob_dicts(
    entries: Sequence[Any], k: int, *, tokenizer=None, token_form: str | None = None, temperature: float = 1.0, vocab_size: int | None = None
) -> TeacherTopK:
    """See :meth:`TeacherTopK.from_logprob_dicts`."""
    parser = ServerLogprobs(k, tokenizer=tokenizer, token_form=token_form, temperature=temperature, vocab_size=vocab_size)
    teacher = parser.rows(entries)
    parser.warn(stacklevel=4)
    return teacher
