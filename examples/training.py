"""Small causal language models: building, training, capturing a teacher, evaluating on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import distilkernels as dk

from .progress import progress

Objective = Callable[[Tensor, Any], Tensor]
"""``objective(logits [B, T, V], targets) -> loss``; `targets` is what the batch has beside its inputs."""


class Size(NamedTuple):
    """Width and depth of a model; heads are 32 wide."""

    hidden: int
    layers: int


def causal_lm(size: Size, vocab_size: int, length: int, seed: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings, initialised from `seed`."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        intermediate_size=round(size.hidden * 8 / 3 / 32) * 32,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 32,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def parameters_in_millions(model: torch.nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def batches(num_windows: int, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of window numbers: one shuffled epoch after the other. A sampler for a DataLoader, too."""
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(num_windows, generator=generator)])
        yield queue[:batch_size]
        queue = queue[batch_size:]


def _learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over a twentieth of the steps, then half a cosine to a twentieth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    model: LlamaForCausalLM, data: Iterable[tuple[Tensor, Any]], objective: Objective, *, steps: int, peak_lr: float, stage: str,
    every: int = 0, on_step: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """AdamW on `objective` over `steps` batches of (input ids [B, T], targets); `on_step(step)` is called before the first step,
    every `every` steps and at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, steps))
    bar = progress(data, stage, steps)
    for step, (inputs, targets) in enumerate(bar):
        if on_step is not None and every and step % every == 0:
            on_step(step)
        model.train()
        loss = objective(model(input_ids=inputs).logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    if on_step is not None:
        on_step(steps)


@torch.no_grad()
def capture(teacher: LlamaForCausalLM, windows: Tensor, k: int, batch_size: int) -> dk.TeacherTopK:
    """The teacher's top-k at every position of every window, token shape [W, T]."""
    teacher.eval()
    parts = progress(windows.split(batch_size), "capture", math.ceil(len(windows) / batch_size))
    return dk.TeacherTopK.cat([dk.capture_topk(teacher(input_ids=part[:, :-1]).logits, k) for part in parts])


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, windows: Tensor, batch_size: int) -> Tensor:
    """Mean cross-entropy of each window in nats per token, [W]."""
    model.eval()
    rows = [-dk.token_logprobs(model(input_ids=part[:, :-1]).logits, part[:, 1:]).mean(-1) for part in windows.split(batch_size)]
    return torch.cat(rows)


class Comparison(NamedTuple):
    """A student against the teacher, one value per held-out window, over the full vocabulary."""

    loss: Tensor
    kl: Tensor
    agreement: Tensor


@torch.no_grad()
def compare(student: LlamaForCausalLM, teacher: LlamaForCausalLM, windows: Tensor, batch_size: int, stage: str) -> Comparison:
    """Loss, KL(teacher ‖ student) and top-1 agreement, in plain PyTorch from full rows of both."""
    student.eval()
    teacher.eval()
    rows = []
    for part in progress(windows.split(batch_size), stage, math.ceil(len(windows) / batch_size)):
        inputs, labels = part[:, :-1], part[:, 1:]
        log_q = student(input_ids=inputs).logits.log_softmax(-1)
        log_p = teacher(input_ids=inputs).logits.log_softmax(-1)
        loss = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        agreement = (log_q.argmax(-1) == log_p.argmax(-1)).float()
        rows.append(torch.stack([loss, kl, agreement]).mean(-1))
    return Comparison(*torch.cat(rows, -1))
