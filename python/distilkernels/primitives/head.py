"""From raw logits to the z whose softmax is the student: scale, softcap, valid columns, temperature."""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch


class Head(NamedTuple):
    """``z = softcap·tanh(logit_scale·x / softcap) / temperature`` on columns below `valid_vocab`, −inf from it on."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None

    @classmethod
    def checked(cls, vocab_size: int, temperature=1.0, logit_scale=1.0, softcap=None, valid_vocab=None) -> Head:
        """The head for rows of `vocab_size` columns; ValueError or TypeError names the argument that is wrong."""
        temperature = checked_positive("temperature", temperature)
        logit_scale = checked_number("logit_scale", logit_scale)
        if softcap is not None:
            softcap = checked_positive("softcap", softcap)
        if valid_vocab is not None:
            if isinstance(valid_vocab, bool) or not isinstance(valid_vocab, numbers.Integral):
                raise TypeError(f"valid_vocab must be an int; got {type(valid_vocab).__name__}")
            if not 0 < valid_vocab <= vocab_size:
                raise ValueError(f"valid_vocab must be in [1, {vocab_size}], the columns of the logits; got {valid_vocab}")
            valid_vocab = None if valid_vocab == vocab_size else int(valid_vocab)
        return cls(temperature, logit_scale, softcap, valid_vocab)

    def columns(self, vocab_size: int) -> int:
        """How many leading columns take part."""
        return vocab_size if self.valid_vocab is None else self.valid_vocab

    def apply(self, x: torch.Tensor, temperature: float | None = None) -> torch.Tensor:
        """z [..., V] from raw logits x [..., V]; `temperature` replaces the head's own."""
        z = x if self.logit_scale == 1.0 else x * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        if self.valid_vocab is not None:
            beyond = torch.arange(x.shape[-1], device=x.device) >= self.valid_vocab
            z = z.masked_fill(beyond, -math.inf)
        temperature = self.temperature if temperature is None else temperature
        return z if temperature == 1.0 else z / temperature

    def chain(self, z: torch.Tensor) -> torch.Tensor | float:
        """dz/dx at entries whose transformed value is `z`."""
        slope = self.logit_scale / self.temperature
        return slope if self.softcap is None else slope * (1 - (self.temperature * z / self.softcap) ** 2)


def checked_number(name: str, value) -> float:
    """A finite float, or an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite; got {value}")
    return float(value)


def checked_positive(name: str, value) -> float:
    """A finite float above 0, or an error that names the argument."""
    value = checked_number(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be positive; got {value}")
    return value
