"""What a rule may know of a block of proposals: a few numbers per position, never a row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..primitives.filter_rows import Filtered, Filters, Plain, filtered
from ..primitives.philox import Stream
from ..primitives.sample_rows import Operand, coin, mass
from .sampling import Sampling, law_of


def among_all(index: Tensor, rows: int) -> Tensor:
    """Rows `index` [B] or [B, R′] of each request, which has `rows` of them, among those of all requests."""
    first = torch.arange(index.shape[0], device=index.device) * rows
    return index + (first if index.dim() == 1 else first[:, None])


@dataclass(frozen=True, eq=False)
class Side:
    """One model's rows [B, R, V] as kernels read them and how it samples from the first ``columns`` of them; ``logits`` [B, G]: its raw logits
    at the proposals; ``plain``: its laws where the raw statistics tell them. What has filters is read again, and only when it is asked for.
    """

    rows: Tensor
    logits: Tensor
    plain: Plain | None
    sampling: Sampling
    columns: int
    shape: tuple[int, int]
    backend: str | None = None

    @cached_property
    def law(self) -> Filtered:
        """Of every row, fields [B, R]."""
        if self.plain is not None:
            return self.plain
        return law_of(self.rows, self.columns, self.sampling, self.shape[0], self.backend).view(*self.shape)

    def law_at(self, row: Tensor) -> Filtered:
        """Of one row a request: `row` int64 [B] among all, fields [B]."""
        if self.plain is None and "law" not in vars(self):
            return law_of(self.rows, self.columns, self.sampling, self.shape[0], self.backend, row)
        return self.law.at(row)

    def operand(self, row: Tensor, none: Tensor, law: Filtered) -> Operand:
        """Rows among all, of any shape, but where `none`; their laws have the same shape."""
        return Operand(self.rows, row.masked_fill(none, -1).view(-1), law if row.dim() == 1 else law.view(-1))


@dataclass(frozen=True, eq=False)
class Block:
    """B requests of G proposals.

    ``ids`` int64 [B, G]; ``present`` bool [B, G]: before the request's length, and before its first proposal that no judge could accept
    (−1, or an id that one side lacks). ``rank`` int64 [B, G] in the judge's raw row; ``mass_above`` [B, G], of the judge's law, None where
    it has filters or the rule does not need it. ``judge``, ``proposer``: the two sides, the latter None where the rule does not need it;
    ``fallback``: the judge with the sampling that its own tokens are drawn with. ``columns``: ids that both sides have. ``seeds``, ``positions``
    int64 [B]: what the random numbers are a function of.

    Worked out when they are asked for: ``lengths`` int64 [B], how many proposals are present; ``logits`` [B, G]: the judge's raw logits at
    ids; ``log_q`` and ``log_p`` float64 [B, G] under both laws; ``uniforms`` float64 [B, G] for acceptance.
    """

    ids: Tensor
    present: Tensor
    rank: Tensor
    mass_above: Tensor | None
    judge: Side
    proposer: Side | None
    fallback: Side
    columns: int
    seeds: Tensor
    positions: Tensor
    backend: str | None = None

    @cached_property
    def lengths(self) -> Tensor:
        return self.present.sum(1)

    @property
    def logits(self) -> Tensor:
        return self.judge.logits

    @cached_property
    def log_q(self) -> Tensor:
        return self.judge_law.logprob(self.logits, self.ids)

    @cached_property
    def log_p(self) -> Tensor | None:
        return None if self.proposer is None else self.proposer.law.logprob(self.proposer.logits, self.ids)

    @cached_property
    def uniforms(self) -> Tensor:
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        return coin(self.seeds[:, None], self.positions[:, None], place, int(Stream.ACCEPTANCE), self.backend)

    @cached_property
    def prefix(self) -> Tensor:
        """p_0 = 1, p_i = min(p_{i−1}·Q(x_i)/P(x_i), 1) float64 [B, G + 1]; past the present proposals whatever.

        In logs p is a random walk that reflects at 0: s_i = L_i − max(0, max_{j ≤ i} L_j) with L the sums of log Q/P. A ratio of e^1000
        stands for the infinite one (P = 0 < Q), which leaves the difference that follows exact to 1e-13.
        """
        ratio = (self.log_q - self.log_p).masked_fill(self.log_q == -math.inf, -math.inf).clamp(max=1000)
        count = torch.arange(ratio.shape[1], device=ratio.device)
        later = count[:, None] < count
        sums = ratio[:, None, :].masked_fill(later, 0).sum(-1)
        if not ratio.shape[1]:
            return sums.new_ones(sums.shape[0], 1)
        highest = sums[:, None, :].masked_fill(later, -math.inf).amax(-1).clamp(min=0)
        return torch.nn.functional.pad((sums - highest).exp(), (1, 0), value=1.0)

    @cached_property
    def judge_law(self) -> Filtered:
        """The judge's laws at the proposals, fields [B, G]."""
        return self.judge.law.first(self.ids.shape[1])

    def per_request(self, value) -> Tensor:
        """A rule's parameter, a number or [B], as float64 [1, 1] or [B, 1]."""
        if not isinstance(value, Tensor):
            # written by a kernel: a copy from the host would wait for the device
            return torch.full((1, 1), value, dtype=torch.float64, device=self.ids.device)
        value = value.to(self.ids.device)
        if value.dim() == 0:
            return value.double().view(1, 1)
        if tuple(value.shape) != (self.ids.shape[0],):
            raise ValueError(f"a rule's parameter must be a number or have one entry a request, ({self.ids.shape[0]},); got {tuple(value.shape)}")
        return value.double()[:, None]

    def bar_of_mass(self, p: Tensor) -> Tensor:
        """The raw logits [B, G] from which less than `p` float64 [B, 1] of the judge's law lies above a token.

        The law's own filters keep an upper set of mass m of the softmax, so that mass above a kept token is 1/m of the softmax's.
        """
        law = self.judge.law
        top_p = (p * (law.lse - law.lse_all).exp()).reshape(-1)
        off = torch.zeros_like(top_p)
        filters = Filters(law.temperature.reshape(-1), off.long(), top_p, off)
        return filtered(self.judge.rows, self.columns, filters, self.backend).bar.view(law.bar.shape)[:, : self.ids.shape[1]]

    def residual_mass(self, scale: Tensor, rows: Tensor, none: Tensor) -> Tensor:
        """Σ_v max(c·Q_v − P_v, 0) at `rows` int64 [B, G], 0 where `none`, for c = `scale` float64 [B, G]."""
        places = [(side, among_all(rows, side.shape[1])) for side in (self.judge, self.proposer)]
        judge, proposer = (side.operand(row, none, side.law.at(row)) for side, row in places)
        return mass(judge, self.columns, second=proposer, scale=scale.reshape(-1), mode="residual", backend=self.backend).view(rows.shape)
