"""Kernels for distilling reasoning into small language models: top-k KL losses, teacher proposal and student
acceptance, compressed KV-cache alignment. The long axis is reduced in kernels, the short one is plain PyTorch."""

from . import backends, calibration, divergences, objectives, segments, signals
from .align import align_tokens
from .capture import capture_samples, capture_topk, linear_capture_samples, linear_capture_topk, linear_score_topk, score_topk
from .dense import distill_loss
from .errors import BackendError
from .linear import linear_row_loss, linear_token_logprobs, linear_topk_distill_loss, linear_vocab_stats
from .linear_dense import linear_distill_loss
from .losses import DistillStats, token_logprobs, topk_distill_loss
from .mixture import multi_teacher
from .primitives.shard import VocabShard
from .primitives.vocab_stats import VocabStats, vocab_stats
from .row_loss import row_loss
from .sampled import linear_sampled_distill_loss, sampled_distill_loss
from .samples import TeacherSamples
from .teacher import TeacherTopK
from .version import __version__

__all__ = [
    "BackendError",
    "DistillStats",
    "TeacherSamples",
    "TeacherTopK",
    "VocabShard",
    "VocabStats",
    "__version__",
    "align_tokens",
    "backends",
    "calibration",
    "capture_samples",
    "capture_topk",
    "distill_loss",
    "divergences",
    "linear_capture_samples",
    "linear_capture_topk",
    "linear_distill_loss",
    "linear_row_loss",
    "linear_sampled_distill_loss",
    "linear_score_topk",
    "linear_token_logprobs",
    "linear_topk_distill_loss",
    "linear_vocab_stats",
    "multi_teacher",
    "objectives",
    "row_loss",
    "sampled_distill_loss",
    "score_topk",
    "segments",
    "signals",
    "token_logprobs",
    "topk_distill_loss",
    "vocab_stats",
]


def __getattr__(name: str):
    """``dk.decoding``, ``dk.kv``, ``dk.nn``, ``dk.store`` and ``dk.integrations`` are imported when they are first named."""
    if name in ("decoding", "integrations", "kv", "nn", "store"):
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
