"""Plain PyTorch on any device: the definition that the kernels are held to, in whatever precision its input has."""

from __future__ import annotations

from ..primitives.draw_rows import reference as draw_rows
from ..primitives.gather_dot import reference as gather_dot
from ..primitives.gather_dot import reference_hidden_grad as gather_dot_hidden_grad
from ..primitives.gather_dot import reference_weight_grad as gather_dot_weight_grad
from ..primitives.pair_stats import reference as pair_stats
from ..primitives.pair_stats import reference_backward as pair_stats_backward
from ..primitives.topk_select import reference as topk_select
from ..primitives.vocab_stats import reference as vocab_stats
from ..primitives.vocab_stats import reference_backward as vocab_stats_backward

__all__ = [
    "draw_rows",
    "gather_dot",
    "gather_dot_hidden_grad",
    "gather_dot_weight_grad",
    "pair_stats",
    "pair_stats_backward",
    "topk_select",
    "vocab_stats",
    "vocab_stats_backward",
    "why_not",
]


def why_not(primitive: str, *tensors) -> str | None:
    if primitive.startswith("linear_vocab_stats"):
        return "it would hold [tokens, vocab]: without a kernel for tiles, chunks serve this everywhere (path='chunked')"
    return None
