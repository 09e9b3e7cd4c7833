"""Compressed KV caches: score entries, select and gather them, align a student's with them."""

from .align import AppendedKV, alignment_loss, append_latents, diagonal_positions, hidden_alignment_loss
from .compress import RKV, AttentionOnly, Cached, CompressedKV, CosineOnly, Crop, KaVa, LazyEviction, Method, SnapKV, compress
from .lazy import RecurrenceTracker
from .scores import key_redundancy, window_importance
from .select import KVSelection, Rope, gather, select

__all__ = [
    "RKV",
    "AppendedKV",
    "AttentionOnly",
    "Cached",
    "CompressedCache",
    "CompressedKV",
    "CosineOnly",
    "Crop",
    "KVSelection",
    "KaVa",
    "LazyEviction",
    "Method",
    "RecurrenceTracker",
    "Rope",
    "SnapKV",
    "alignment_loss",
    "append_latents",
    "compress",
    "diagonal_positions",
    "gather",
    "hidden_alignment_loss",
    "key_redundancy",
    "select",
    "window_importance",
]


def __getattr__(name: str):
    """``CompressedCache`` needs transformers, which is imported when it is first named."""
    if name == "CompressedCache":
        from .cache import CompressedCache

        return CompressedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
