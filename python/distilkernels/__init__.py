"""Kernels for distilling reasoning into small language models: top-k KL losses, teacher proposal and student
acceptance, compressed KV-cache alignment. The long axis is reduced in kernels, the short one is plain PyTorch."""

from . import backends, divergences
from .errors import BackendError
from .linear import linear_row_loss, linear_token_logprobs, linear_topk_distill_loss, linear_vocab_stats
from .losses import DistillStats, token_logprobs, topk_distill_loss
from .primitives.shard import VocabShard
from .primitives.vocab_stats import VocabStats, vocab_stats
from .row_loss import row_loss
from .teacher import TeacherTopK, capture_topk
from .version import __version__

__all__ = [
    "BackendError",
    "DistillStats",
    "TeacherTopK",
    "VocabShard",
    "VocabStats",
    "__version__",
    "backends",
    "capture_topk",
    "divergences",
    "linear_row_loss",
    "linear_token_logprobs",
    "linear_topk_distill_loss",
    "linear_vocab_stats",
    "row_loss",
    "token_logprobs",
    "topk_distill_loss",
    "vocab_stats",
]


def __getattr__(name: str):
    """``dk.nn`` and ``dk.integrations`` are imported when they are first named."""
    if name in ("integrations", "nn"):
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
