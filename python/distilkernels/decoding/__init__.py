"""Proposal and acceptance: one model proposes tokens, another accepts a prefix of them by its own probabilities."""

from .rules import (
    BlockVerification,
    GreedyAcceptance,
    ReverseSpeculative,
    Rule,
    SpeculativeSampling,
    ThresholdAcceptance,
    TopKAcceptance,
    TopPAcceptance,
    TypicalAcceptance,
)
from .sampling import Sampling, combine, sample
from .verify import Source, Verdict, verify

__all__ = [
    "BlockVerification",
    "GreedyAcceptance",
    "ReverseSpeculative",
    "Rule",
    "Sampling",
    "Source",
    "SpeculativeSampling",
    "ThresholdAcceptance",
    "TopKAcceptance",
    "TopPAcceptance",
    "TypicalAcceptance",
    "Verdict",
    "combine",
    "sample",
    "verify",
]
