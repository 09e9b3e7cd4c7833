"""``block_size="auto"``: how many proposals pay for themselves, from what the judge kept of a request's own."""

from __future__ import annotations

from torch import nn


def cost_ratio(proposer: nn.Module, judge: nn.Module) -> float:
    """r by the sizes of the models: the judge reads a block in about one forward, and a forward costs what its weights do."""
    drafts, reads = (sum(p.numel() for p in model.parameters()) for model in (proposer, judge))
    return reads / drafts


class Pace:
    """One request's block size.

    With a the share of proposals that are kept and r the cost of the judge's read over that of one draft, a block of γ costs γ + r drafts
    and brings (1 − a^γ)/(1 − a) tokens, and a^γ more under a rule with a bonus. The size is the γ that brings most for its cost. Under a
    rule without bonus a second proposal pays where a > 1/(1 + r), so that a costly proposer that is often refused writes one by one.

    A request's own past is all it depends on: with a clock, or with the batch's acceptance, the text would differ from run to run.
    """

    most = 16
    # what is believed of a before the first block, as so many proposals: a lucky start must not make one request hold up its batch
    believed, weight = 0.7, 10

    def __init__(self, ratio: float, bonus: bool):
        self.ratio, self.bonus = ratio, bonus
        self.kept, self.judged = self.believed * self.weight, float(self.weight)

    def size(self) -> int:
        a = self.kept / self.judged
        # tokens of blocks of 1, 2, …: a block's proposal i counts if all before it were kept, and so does a bonus
        tokens, worth = 0.0, []
        for g in range(1, self.most + 1):
            tokens += a ** (g - 1)
            worth.append((tokens + self.bonus * a**g) / (g + self.ratio))
        return worth.index(max(worth)) + 1

    def saw(self, kept: int, proposed: int) -> None:
        """A block of `proposed`, of which the first `kept` stayed: those behind the first rejection say nothing."""
        self.kept += kept
        self.judged += min(kept + 1, proposed)
