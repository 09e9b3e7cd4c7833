"""Plain PyTorch on any device: the definition that the kernels are held to, in whatever precision its input has."""

from __future__ import annotations

from ..primitives.draw_rows import reference as draw_rows
from ..primitives.filter_rows import reference as filter_rows
from ..primitives.gather_dot import reference as gather_dot
from ..primitives.gather_dot import reference_hidden_grad as gather_dot_hidden_grad
from ..primitives.gather_dot import reference_weight_grad as gather_dot_weight_grad
from ..primitives.key_redundancy import reference as key_redundancy
from ..primitives.kv_align import reference as kv_align
from ..primitives.kv_gather import reference as kv_gather
from ..primitives.pair_stats import reference as pair_stats
from ..primitives.pair_stats import reference_backward as pair_stats_backward
from ..primitives.recurrence_update import reference as recurrence_update
from ..primitives.sample_rows import reference as sample_rows
from ..primitives.sample_rows import reference_coin as coin
from ..primitives.sample_rows import reference_mass as weigh_rows
from ..primitives.topk_select import reference as topk_select
from ..primitives.vocab_stats import reference as vocab_stats
from ..primitives.vocab_stats import reference_backward as vocab_stats_backward
from ..primitives.window_importance import reference as window_importance

__all__ = [
    "coin",
    "draw_rows",
    "filter_rows",
    "gather_dot",
    "gather_dot_hidden_grad",
    "gather_dot_weight_grad",
    "key_redundancy",
    "kv_align",
    "kv_gather",
    "pair_stats",
    "pair_stats_backward",
    "recurrence_update",
    "sample_rows",
    "topk_select",
    "vocab_stats",
    "vocab_stats_backward",
    "weigh_rows",
    "why_not",
    "window_importance",
]


def why_not(primitive: str, *tensors) -> str | None:
    if primitive.startswith("linear_vocab_stats"):
        return "it would hold [tokens, vocab]: without a kernel for tiles, chunks serve this everywhere (path='chunked')"
    return None
