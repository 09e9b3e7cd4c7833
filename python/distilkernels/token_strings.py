"""Ids of the token strings that servers return, wherever a string names exactly one."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

REPLACEMENT = "�"


class TokenStrings:
    """The strings of a vocabulary, each with the one id it names.

    A server names a token by its text (" the", and "the" where it decodes the id of "▁the" alone) or by its piece in the
    vocabulary ("Ġthe", "▁the"). A string that several ids share names none: a wrong id is worse than mass in the tail. Nor do
    strings with U+FFFD, which stand for bytes that are no UTF-8.

    Args:
        tokenizer: of transformers, or a ``tokenizers.Tokenizer``.
        form: "text" or "piece", what the server writes; None where that is not known: then a string counts if it
            names the same id either way (in byte-level vocabularies "é" does not: it is the piece of the byte 0xE9).
    """

    def __init__(self, tokenizer, form: str | None = None):
        if form not in (None, "text", "piece"):
            raise ValueError(f'token_form must be "text", "piece" or None; got {form!r}')
        vocab = tokenizer.get_vocab()
        pieces = sorted(vocab, key=vocab.__getitem__)
        single = [[vocab[piece]] for piece in pieces]
        decode = getattr(tokenizer, "decode_batch", None) or functools.partial(tokenizer.batch_decode, clean_up_tokenization_spaces=False)
        decoded = decode(single, skip_special_tokens=False)
        self._names: dict[str, int | None] = {}
        self._bytes: dict[bytes, int | None] = {}
        for piece, text, exact in zip(pieces, decoded, _piece_bytes(pieces, decoded)):
            names = set() if form == "text" else {piece}
            if form != "piece":
                names.add(text)
            if exact is not None:
                _add(self._bytes, exact, vocab[piece])
                if form != "piece":
                    names.add(exact.decode("utf-8", errors="replace"))
            for name in names:
                if name and REPLACEMENT not in name:
                    _add(self._names, name, vocab[piece])

    @classmethod
    def of(cls, tokenizer, form: str | None = None) -> TokenStrings:
        """Built once per tokenizer and size of its vocabulary (reading 150,000 entries takes about a second)."""
        if not callable(getattr(tokenizer, "get_vocab", None)):
            raise TypeError(f"tokenizer must be one of transformers or tokenizers; got {type(tokenizer).__name__}")
        return _built(tokenizer, form, len(tokenizer.get_vocab()))

    def id_of(self, token: str, exact: Iterable[int] | None = None) -> int | None:
        """The id of `token`, or None where it is not exactly one. `exact`: the token's bytes, where the server knows them.

        Bytes that only repeat the string say nothing more: some servers encode the decoded text again.
        """
        if exact is not None:
            exact = bytes(exact)
            if exact != token.encode("utf-8", errors="replace"):
                return self._bytes.get(exact)
        return self._names.get(token)


@functools.lru_cache(maxsize=2)
def _built(tokenizer, form: str | None, size: int) -> TokenStrings:
    return TokenStrings(tokenizer, form)


def _add(names: dict, name, token: int) -> None:
    """None marks a name that several ids share."""
    if names.setdefault(name, token) != token:
        names[name] = None


def _piece_bytes(pieces: Sequence[str], decoded: Sequence[str]) -> list[bytes | None]:
    """The bytes that each piece stands for, None where the vocabulary does not say."""
    known = set(pieces)
    if {"<0x00>", "<0xFF>"} <= known:
        bytes_of_piece = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}
        return [bytes_of_piece.get(piece) or piece.replace("▁", " ").encode("utf-8", errors="replace") for piece in pieces]
    alphabet = byte_alphabet()
    if known.issuperset(alphabet):
        return [
            bytes(alphabet[c] for c in piece) if all(c in alphabet for c in piece) else piece.encode("utf-8", errors="replace")
            for piece in pieces
        ]
    return [None if REPLACEMENT in text else text.encode("utf-8", errors="replace") for text in decoded]


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte: itself where it prints, else one from U+0100 on, in order."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printed]
    return {chr(b): b for b in printed} | {chr(0x100 + i): b for i, b in enumerate(others)}
