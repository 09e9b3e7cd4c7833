"""Vocabulary-parallel rows: each rank holds some columns of the lm_head, and all ranks see the whole row's statistics.

Forward, per call: one MAX all-reduce of the gathered logits [N, K], one all-gather of 9 + 2K numbers a row. Backward: none
for logits, since d logits of a rank's columns needs only the row's statistics; one all-reduce of d hidden behind the
lm_head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .boundary import without_duplicates
from .head import Head
from .statistics import VocabStats

# the vocabulary's size is not known to a rank
_ANY = 2**31 - 1
_PER_ROW = ("lse", "tail_lse", "expected_logit", "logit_sum", "finite_count", "lse_t1", "max", "argmax", "second")


@dataclass(frozen=True, eq=False)
class VocabShard:
    """This rank's columns [start, stop) of a vocabulary-parallel lm_head, and the process group that holds all of them.

    Logits are then [..., stop − start] and weight [stop − start, H], while ids, labels and `valid_vocab` count columns of
    the whole vocabulary. Every rank of `group` (None: the default group) makes the same call on the same rows, and gets
    the same loss. Shards may differ in size; each must have a column.
    """

    start: int
    stop: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self):
        if not 0 <= self.start < self.stop:
            raise ValueError(f"VocabShard needs 0 ≤ start < stop; got start={self.start}, stop={self.stop}")
        if not dist.is_initialized():
            raise ValueError("VocabShard needs torch.distributed.init_process_group() first")

    def check(self, columns: int) -> None:
        """ValueError unless the logits or the weight have this shard's columns."""
        if columns != self.stop - self.start:
            raise ValueError(f"shard holds {self.stop - self.start} columns, [{self.start}, {self.stop}); got {columns} in the logits or the weight")

    def head(self, head: Head) -> Head:
        """The head on this rank's columns; it may have none that are valid."""
        if head.valid_vocab is None:
            return head
        valid = min(max(head.valid_vocab - self.start, 0), self.stop - self.start)
        return head._replace(valid_vocab=None if valid == self.stop - self.start else valid)

    def local_ids(self, ids: Tensor | None) -> Tensor | None:
        """Ids of the whole vocabulary as ids of this rank's columns, −1 where another rank has them."""
        if ids is None:
            return None
        mine = (ids >= self.start) & (ids < self.stop)
        return torch.where(mine, ids - self.start, -1)

    def local_argmax(self, stats: dict[str, Tensor]) -> dict[str, Tensor]:
        """Statistics of whole rows with `argmax` as an id of this rank's columns, for the gradient of the maximum."""
        return stats | {"argmax": self.local_ids(stats["argmax"])} if "argmax" in stats else stats

    def reduce_max(self, t: Tensor) -> Tensor:
        dist.all_reduce(t, dist.ReduceOp.MAX, group=self.group)
        return t

    def reduce_sum(self, t: Tensor) -> Tensor:
        dist.all_reduce(t, group=self.group)
        return t

    def statistics(
        self, run: Callable[..., dict[str, Tensor]], logits: Tensor, ids: Tensor | None, names: tuple[str, ...], head: Head, backend: str | None
    ) -> dict[str, Tensor]:
        """The whole row's statistics from `run`, the statistics of this rank's columns. ids [N, K] count all columns."""
        head = self.head(head)
        local_ids = gathered = None
        # lse weighs the parts of the row and shows its NaNs, max tells whose argmax it is
        here = {"lse", *names} - {"rank", "mass_above"} | ({"max"} if "argmax" in names or "second" in names else set())
        here = tuple(name for name in VocabStats._fields if name in here)
        if ids is not None:
            local_ids = self.local_ids(without_duplicates(ids, _ANY))
            # rank compares with the kernel's own z: under a softcap its tanh may differ from PyTorch's in the last bit
            exact = head.softcap is not None and ("rank" in names or "mass_above" in names)
            first = ("lse", "gathered") if exact else ("gathered",)
            gathered = self.reduce_max(run(logits, local_ids, None, first, head, backend)["gathered"])
        if names == ("gathered",):
            return {"gathered": gathered}
        found = run(logits, local_ids, None, here, head, backend)
        if "rank" in names or "mass_above" in names:
            found |= self._above(run, logits, gathered, names, head, backend)
        merged = self._merge(found, ids)
        if gathered is not None:
            merged["gathered"] = torch.where(merged["lse"].isnan()[:, None] & (ids >= 0), math.nan, gathered)
        return {name: merged[name] for name in names}

    @staticmethod
    def _above(run, logits: Tensor, bars: Tensor, names: tuple[str, ...], head: Head, backend: str | None) -> dict[str, Tensor]:
        """rank and mass_above of thresholds that mostly belong to other ranks: any distinct ids make their slots count."""
        columns = logits.shape[2]
        wanted = tuple(name for name in names if name in ("rank", "mass_above", "lse"))
        parts = []
        for start in range(0, bars.shape[1], columns):
            some = bars[:, start : start + columns].contiguous()
            slots = torch.arange(some.shape[1], device=bars.device).expand(some.shape[0], -1).contiguous()
            parts.append(run(logits, slots, some, wanted, head, backend))
        return {name: torch.cat([part[name] for part in parts], 1) for name in wanted if name != "lse"}

    def _merge(self, found: dict[str, Tensor], ids: Tensor | None) -> dict[str, Tensor]:
        rows = [name for name in _PER_ROW if name in found]
        slots = [name for name in ("rank", "mass_above") if name in found]
        columns = [found[name].double() + (self.start if name == "argmax" else 0) for name in rows]
        packed = torch.cat([torch.stack(columns, 1), *(found[name].double() for name in slots)], 1)
        gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, packed, group=self.group)
        ranks = torch.stack(gathered)  # [R, N, 9 + 2K]
        part = {name: ranks[..., i] for i, name in enumerate(rows)}
        for i, name in enumerate(slots):
            part[name] = ranks[..., len(rows) + i * ids.shape[1] : len(rows) + (i + 1) * ids.shape[1]]

        merged = {name: part[name].logsumexp(0) for name in ("lse", "tail_lse", "lse_t1") if name in part}
        bad = merged["lse"].isnan()
        share = (part["lse"] - merged["lse"]).exp()
        if "expected_logit" in part:
            merged["expected_logit"] = torch.where(share == 0, 0.0, share * part["expected_logit"]).sum(0)
        for name in ("logit_sum", "finite_count"):
            if name in part:
                merged[name] = part[name].sum(0)
        if "finite_count" in part:
            merged["finite_count"] = merged["finite_count"].masked_fill(bad, -1)
        if "max" in part:
            merged["max"] = torch.where(bad, math.nan, part["max"].amax(0))
        if "argmax" in part:
            lowest = torch.where(part["max"] == merged["max"], part["argmax"], math.inf).amin(0)
            merged["argmax"] = torch.where(bad, -1.0, lowest)
        if "second" in part:
            merged["second"] = torch.where(bad, math.nan, torch.cat([part["max"], part["second"]]).topk(2, dim=0).values[1])
        if slots:
            unknown = (without_duplicates(ids, _ANY) < 0) | bad[:, None]
        if "rank" in part:
            merged["rank"] = part["rank"].sum(0).masked_fill(unknown, -1)
        if "mass_above" in part:
            mass = torch.where(share[..., None] == 0, 0.0, share[..., None] * part["mass_above"]).sum(0)
            merged["mass_above"] = mass.masked_fill(unknown, math.nan)
        return {name: t.to(found[name].dtype) for name, t in merged.items()}


def vocabulary(columns: int, shard: VocabShard | None) -> int:
    """How many columns ids may count: those of the tensor, or more than any where other ranks hold the rest."""
    if shard is None:
        return columns
    if not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a VocabShard; got {type(shard).__name__}")
    shard.check(columns)
    return _ANY


class CopiedToShards(torch.autograd.Function):
    """Identity on what every rank has; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, t, shard):
        ctx.shard = shard
        return t.view_as(t)

    @staticmethod
    def backward(ctx, grad):
        return ctx.shard.reduce_sum(grad.clone()), None


class SummedOverShards(torch.autograd.Function):
    """The sum of the ranks' parts; every rank goes on with it alike, so the gradient passes as it is."""

    @staticmethod
    def forward(ctx, t, shard):
        return shard.reduce_sum(t.clone())

    @staticmethod
    def backward(ctx, grad):
        return grad, None
