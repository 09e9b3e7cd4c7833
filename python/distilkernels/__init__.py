"""Kernels for distilling reasoning into small language models: top-k KL losses, teacher proposal and student
acceptance, compressed KV-cache alignment. The long axis is reduced in kernels, the short one is plain PyTorch."""

from . import backends, divergences
from .errors import BackendError
from .losses import DistillStats, token_logprobs, topk_distill_loss
from .primitives.vocab_stats import VocabStats, vocab_stats
from .row_loss import row_loss
from .teacher import TeacherTopK, capture_topk
from .version import __version__

__all__ = [
    "BackendError",
    "DistillStats",
    "TeacherTopK",
    "VocabStats",
    "__version__",
    "backends",
    "capture_topk",
    "divergences",
    "row_loss",
    "token_logprobs",
    "topk_distill_loss",
    "vocab_stats",
]
