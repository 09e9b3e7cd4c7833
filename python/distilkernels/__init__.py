"""Kernels for distilling reasoning into small language models."""

from .primitives.vocab_stats import VocabStats, vocab_stats
from .version import __version__
