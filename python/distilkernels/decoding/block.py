"""What a rule may know of a block of proposals: a few numbers per position, never a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..primitives.filter_rows import Filtered, Filters, filtered
from ..primitives.sample_rows import Operand, mass


class Side(NamedTuple):
    """One model's rows [B, R, V] as kernels read them, and their laws, fields [B, R]."""

    rows: Tensor
    law: Filtered

    def operand(self, index: Tensor, law: Filtered | None = None) -> Operand:
        """Rows at `index` [B] or [B, R′], −1 for none, with their own laws or others of the same shape."""
        b, r = self.law.lse.shape
        flat = torch.arange(b, device=index.device).view(-1, *(1,) * (index.dim() - 1)) * r + index
        if law is None:
            law = self.law.view(-1).at(flat.clamp(min=0))
        return Operand(self.rows, torch.where(index < 0, -1, flat).reshape(-1), Filtered(*(t.reshape(-1) for t in law)))


@dataclass(frozen=True, eq=False)
class Block:
    """B requests of G proposals.

    ``ids`` int64 [B, G]; ``present`` bool [B, G]: before the request's length, and before its first proposal that no judge could accept
    (−1, or an id that one side lacks); ``lengths`` int64 [B], how many are present. ``logits`` [B, G]: the judge's raw logits at ids,
    ``rank`` int64 [B, G] in the judge's raw row, ``log_q`` and ``log_p`` float64 [B, G] under both laws (log_p None without a proposer's
    logits), ``uniforms`` float64 [B, G] for acceptance. ``judge``, ``proposer``: the two sides, ``fallback``: the laws [B, R] that the
    judge's own tokens are drawn from. ``columns``: ids that both sides have.
    """

    ids: Tensor
    present: Tensor
    lengths: Tensor
    logits: Tensor
    rank: Tensor
    log_q: Tensor
    log_p: Tensor | None
    uniforms: Tensor
    judge: Side
    proposer: Side | None
    fallback: Filtered
    columns: int
    backend: str | None = None

    @property
    def judge_law(self) -> Filtered:
        """The judge's laws at the proposals, fields [B, G]."""
        return self.judge.law.at((slice(None), slice(0, self.ids.shape[1])))

    def per_request(self, value) -> Tensor:
        """A rule's parameter, a number or [B], as float64 [B, 1]."""
        if not isinstance(value, Tensor):
            # written by a kernel: a copy from the host would wait for the device
            return torch.full((self.ids.shape[0], 1), value, dtype=torch.float64, device=self.ids.device)
        value = value.to(self.ids.device)
        if value.dim() == 0:
            value = value.expand(self.ids.shape[0])
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

    def residual_mass(self, scale: Tensor, rows: Tensor) -> Tensor:
        """Σ_v max(c·Q_v − P_v, 0) at `rows` int64 [B, G] (−1: 0) for c = `scale` float64 [B, G]."""
        judge, proposer = self.judge.operand(rows), self.proposer.operand(rows)
        return mass(judge, self.columns, second=proposer, scale=scale.reshape(-1), mode="residual", backend=self.backend).view(rows.shape)
