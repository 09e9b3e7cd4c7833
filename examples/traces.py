"""The demo's step "RSD traces": what a student would be trained on if a model wrote its text.

Three kinds of traces continue the same prompts: the teacher's, reverse speculative decoding's (RSD: the teacher proposes, the student
accepts what it might have said itself), and the student's own. All come from ``dk.decoding.generate``, which labels every token with
the student's probability: a rule that accepts everything leaves the proposer's own text.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import distilkernels as dk
from distilkernels import decoding

from . import training
from .progress import progress

PROMPT = 32
GENERATE_BATCH = 32
BATCH = 4
PEAK_LR = 5e-4
MIN_PROB = 0.01
TRIALS = 5
# the published trials and bar without its pools: from 20 tokens everybody's text is sharper still than the files are
RSD = decoding.ReverseSpeculative(min_prob=MIN_PROB, trials=TRIALS)
EVERYTHING = decoding.ReverseSpeculative(min_prob=0.0)


class Kind(NamedTuple):
    """Who writes, and what the student must find likely enough."""

    name: str
    by_teacher: bool
    rule: decoding.Rule


KINDS = (
    Kind("teacher", True, EVERYTHING),
    Kind("RSD", True, RSD),
    Kind("student", False, EVERYTHING),
)


class Written(NamedTuple):
    """Prompts and their continuations, int64 [W, T + 1], and what the student thinks of the continuations."""

    windows: Tensor
    surprisal: Tensor
    acceptance: float

    def columns(self) -> dict[str, float]:
        """Numbers of the traces' table."""
        return {
            "tokens": self.surprisal.numel(),
            "surprisal": self.surprisal.mean().item(),
            "unlikely": (self.surprisal > -math.log(MIN_PROB)).double().mean().item(),
            "acceptance": self.acceptance,
        }


def write(kind: Kind, teacher: LlamaForCausalLM, student: LlamaForCausalLM, prompts: Tensor, tokens: int, seed: int) -> Written:
    """`tokens` more for each of `prompts` [W, PROMPT]; text goes on after an end of file, as it does in the training windows."""
    proposer = (teacher if kind.by_teacher else student).eval()
    parts = []
    with progress(None, f"traces: {kind.name}", len(prompts) * tokens, unit="tok") as bar:
        for first in range(0, len(prompts), GENERATE_BATCH):
            part = prompts[first : first + GENERATE_BATCH]
            traces = decoding.generate(
                proposer, student.eval(), part, None, rule=kind.rule, block_size="auto", max_new_tokens=tokens, eos_token_id=None,
                seeds=seed + torch.arange(first, first + len(part)),
                callback=lambda request, new, sources: bar.update(len(new)),
            )  # fmt: skip
            parts.append((torch.cat([part, traces.tokens], 1), -traces.judge_logprobs, traces.source))
    windows, surprisal, source = (torch.cat(p) for p in zip(*parts))
    return Written(windows, surprisal, (source == decoding.Source.ACCEPTED).double().mean().item())


def train_on(kind: Kind, written: Written, student: LlamaForCausalLM, steps: int, seed: int) -> LlamaForCausalLM:
    """A copy of `student` after `steps` more on what was written; the prompts are read and not learnt."""
    model = copy.deepcopy(student)
    learnt = slice(PROMPT - 1, None)

    def objective(logits: Tensor, labels: Tensor) -> Tensor:
        return -dk.token_logprobs(logits[:, learnt], labels[:, learnt]).mean()

    windows = (written.windows[rows] for rows in training.batches(len(written.windows), BATCH, steps, seed))
    training.train(model, ((w[:, :-1], w[:, 1:]) for w in windows), objective, steps=steps, peak_lr=PEAK_LR, stage=f"on {kind.name} traces")
    return model
