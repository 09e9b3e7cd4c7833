"""Proposal and acceptance: one model proposes tokens, another accepts a prefix of them by its own probabilities."""

from .gates import DivergenceSwitch, Gate, Lead, ReflectionHandoff, SentenceLead, Turn
from .generate import generate
from .remote import CompletionsProposer, RemoteError, RemoteProposer
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
from .traces import Traces, TraceStatistics, rsd_filter
from .verify import Source, Verdict, verify

__all__ = [
    "BlockVerification",
    "CompletionsProposer",
    "DivergenceSwitch",
    "Gate",
    "GreedyAcceptance",
    "Lead",
    "ReflectionHandoff",
    "RemoteError",
    "RemoteProposer",
    "ReverseSpeculative",
    "Rule",
    "Sampling",
    "SentenceLead",
    "Source",
    "SpeculativeSampling",
    "ThresholdAcceptance",
    "TopKAcceptance",
    "TopPAcceptance",
    "TraceStatistics",
    "Traces",
    "Turn",
    "TypicalAcceptance",
    "Verdict",
    "combine",
    "generate",
    "rsd_filter",
    "sample",
    "verify",
]
