"""Chains of modular arithmetic with their working: a question, its chain of thought line by line, its answer.

A question is a value and `steps` operations on it, each "+b" or "*b" modulo 7, applied from the left. The chain of thought has
one line an operation, "3 *4 = 5". Additions and multiplications do not commute with each other, so the answer is no sum over the
operations: whoever answers without working has to compose them all in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MODULUS = 7
# a value is its own id; then the operations; "+0", "*0" and "*1" would be steps for nothing, or forget what came before
WORDS = [*map(str, range(MODULUS)), *(f"+{b}" for b in range(1, MODULUS)), *(f"*{b}" for b in range(2, MODULUS)), "=", "think:", "answer:"]
EQUALS, THINK, ANSWER = range(len(WORDS) - 3, len(WORDS))
LINE = 4


@dataclass(frozen=True)
class Problems:
    """N problems of one length, int64: ``question`` [N, steps + 2] up to "think:", ``thought`` [N, LINE · steps], ``answer`` [N]."""

    question: Tensor
    thought: Tensor
    answer: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Problems:
        return Problems(self.question[rows], self.thought[rows], self.answer[rows])

    def __len__(self) -> int:
        return len(self.answer)

    def text(self, row: int) -> str:
        ids = [*self.question[row].tolist(), *self.thought[row].tolist(), ANSWER, int(self.answer[row])]
        return " ".join(WORDS[i] for i in ids)


def problems(count: int, steps: int, seed: int) -> Problems:
    """`count` different problems of `steps` operations in random order, fewer where draws repeat."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(MODULUS, (count, 1), generator=generator)
    operations = torch.randint(MODULUS, EQUALS, (count, steps), generator=generator)
    asked = torch.cat([first, operations], 1).unique(dim=0)
    asked = asked[torch.randperm(len(asked), generator=generator)]
    value, lines = asked[:, 0], []
    for operation in asked[:, 1:].unbind(1):
        addend, factor = operation - MODULUS + 1, operation - 2 * MODULUS + 3
        result = torch.where(addend < MODULUS, value + addend, value * factor) % MODULUS
        lines.append(torch.stack([value, operation, torch.full_like(value, EQUALS), result], 1))
        value = result
    question = torch.cat([asked, torch.full_like(asked[:, :1], THINK)], 1)
    return Problems(question, torch.cat(lines, 1), value)
