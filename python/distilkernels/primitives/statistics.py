"""The names and shapes of what is known of a row: :class:`VocabStats`, and which statistics need which."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor


class VocabStats(NamedTuple):
    """Statistics of rows of transformed logits z; a field that was not asked for is None. Natural logs throughout.

    ========================== ==================================================================================
    ``lse`` [...]              log Σ exp z_v
    ``gathered`` [..., K]      z at the ids; −inf for an empty slot, a repeated id or a masked column
    ``tail_lse`` [...]         log Σ over v ∉ S of exp z_v, summed directly; −inf where S covers every valid column
    ``expected_logit`` [...]   μ = Σ q_v z_v (0·−inf = 0); the entropy is lse − μ
    ``logit_sum`` [...]        Σ z_v over finite entries; their number is ``finite_count`` [...] int64
    ``lse_t1`` [...]           the log-sum-exp at temperature 1, log Σ exp(T·z_v), whatever the temperature T of z
    ``max``, ``argmax`` [...]  the largest z and its lowest id (int64); where equal, the gradient of ``max`` is that id's
    ``second`` [...]           the second largest z: the largest without the entry at argmax; not differentiable
    ``rank`` [..., K]          #{v : z_v > z at the id} (int64), −1 for an empty slot; not differentiable
    ``mass_above`` [..., K]    Σ q_v over those v, NaN for an empty slot; not differentiable
    ========================== ==================================================================================

    A row with a NaN has NaN statistics, and −1 for argmax, rank and finite_count. +inf is no logit: what a row with one
    gives depends on the backend. Under a softcap a −inf logit becomes −softcap, as in the models that have one: mask
    columns by `valid_vocab`.
    """

    lse: Tensor | None = None
    gathered: Tensor | None = None
    tail_lse: Tensor | None = None
    expected_logit: Tensor | None = None
    logit_sum: Tensor | None = None
    finite_count: Tensor | None = None
    lse_t1: Tensor | None = None
    max: Tensor | None = None
    argmax: Tensor | None = None
    second: Tensor | None = None
    rank: Tensor | None = None
    mass_above: Tensor | None = None

    @property
    def entropy(self) -> Tensor:
        """H(q) = lse − μ in nats."""
        if self.lse is None or self.expected_logit is None:
            raise ValueError('entropy needs want=("lse", "expected_logit")')
        return self.lse - self.expected_logit

    @property
    def logprobs(self) -> Tensor:
        """log q at the ids, [..., K]."""
        if self.lse is None or self.gathered is None:
            raise ValueError('logprobs needs want=("lse", "gathered")')
        return self.gathered - self.lse.unsqueeze(-1)


WANTS = tuple(name for name in VocabStats._fields if name != "finite_count")
DEFAULT_WANT = ("lse", "gathered")
_NEEDS_IDS = ("gathered", "tail_lse", "rank", "mass_above")
PER_SLOT = ("gathered", "rank", "mass_above")
INTEGER = ("finite_count", "argmax", "rank")
DIFFERENTIABLE = ("lse", "gathered", "tail_lse", "expected_logit", "logit_sum", "lse_t1", "max")


def checked_want(want: Iterable[str], has_ids: bool) -> tuple[str, ...]:
    """The requested names in canonical order; ValueError for an unknown one or one that lacks its ids."""
    want = (want,) if isinstance(want, str) else tuple(want)
    if want == DEFAULT_WANT and not has_ids:
        want = ("lse",)
    unknown = [name for name in want if name not in WANTS]
    if unknown:
        raise ValueError(f"want has unknown statistics {unknown}; known: {', '.join(WANTS)}")
    missing = [name for name in want if name in _NEEDS_IDS and not has_ids]
    if missing:
        raise ValueError(f"want={missing} needs ids; got ids=None")
    return tuple(name for name in WANTS if name in want)


def computed(want: tuple[str, ...], has_ids: bool) -> tuple[str, ...]:
    """What the kernel computes for `want`: also what the backward of it will need."""
    names = set(want)
    if names & {"tail_lse", "expected_logit", "mass_above"}:
        names.add("lse")
    if has_ids and names & set(DIFFERENTIABLE):
        names.add("gathered")
    if "logit_sum" in names:
        names.add("finite_count")
    if "max" in names:
        names.add("argmax")
    return tuple(name for name in VocabStats._fields if name in names)
