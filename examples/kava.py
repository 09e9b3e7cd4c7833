"""KaVa end to end on a CPU: latents learn from a compressed cache (arXiv 2510.02312): ``python -m examples.kava``.

A small Llama first learns to solve chains of modular arithmetic with an explicit chain of thought. From that one start, and on the same
batches, each variant trains for the same number of steps: the chain of thought again, answers without one, and latents in its
place. The latents' objective has the same weights as teacher and as student:

    CE(answer | latents, question) + CE(thought, answer | question) + a1 · CODI + a2 · KV

CODI aligns the hidden states at the token before the answer, KV the latents' keys and values with those that a method keeps of
the teacher's chain of thought. Both stop at the teacher. The table is what the run gives.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import distilkernels as dk
from distilkernels.kv import Method

from . import arithmetic, latent, training
from .progress import progress

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZE = latent.Size(hidden=64, layers=2, heads=4, kv_heads=2)
OPERATIONS = 3
LATENTS = 6
UPDATES = 3
BATCH = 64
START_STEPS = 300
STEPS = 1000
START_LR = 2e-3
LR = 2e-3
# published for models of a billion parameters: 10 and 1
CODI_WEIGHT = 1.0
KV_WEIGHT = 20.0
PROBLEMS = 20_000
HELDOUT = 1024


class Variant(NamedTuple):
    """A row of the table: how the model answers, "thought", "direct" or "latent", and what the latents' keys and values are aligned with."""

    name: str
    mode: str
    method: Method | None = None


START = Variant("common start: explicit CoT", "thought")
EXPLICIT, DIRECT = Variant("explicit CoT", "thought"), Variant("no CoT", "direct")
CODI, KAVA = Variant("latent, no KV loss (CODI)", "latent"), Variant("KaVa", "latent", dk.kv.KaVa(lam=0.1))
VARIANTS = (
    EXPLICIT,
    DIRECT,
    CODI,
    KAVA,
    Variant("  λ = 0, cosine only", "latent", dk.kv.CosineOnly()),
    Variant("  λ = 1, attention only", "latent", dk.kv.AttentionOnly()),
    Variant("  crop", "latent", dk.kv.Crop()),
)


class Data(NamedTuple):
    """Problems to train on, and others to test on: no question is in both."""

    train: arithmetic.Problems
    heldout: arithmetic.Problems


def prepare(operations: int, seed: int, heldout: int = HELDOUT) -> Data:
    every = arithmetic.problems(PROBLEMS, operations, seed)
    return Data(every[heldout:], every[:heldout])


def answer_logits(model: transformers.LlamaForCausalLM, question: Tensor) -> Tensor:
    """Of the answer [B, V], without a chain of thought."""
    mark = torch.full_like(question[:, :1], arithmetic.ANSWER)
    return model(input_ids=torch.cat([question, mark], 1), logits_to_keep=1).logits[:, -1]


class Losses(NamedTuple):
    """The parts of a latent student's objective."""

    student: Tensor
    teacher: Tensor
    hidden: Tensor
    kv: Tensor | None

    def total(self, codi_weight: float = CODI_WEIGHT, kv_weight: float = KV_WEIGHT) -> Tensor:
        total = self.student + self.teacher + codi_weight * self.hidden
        return total if self.kv is None else total + kv_weight * self.kv


def thought_loss(trace: latent.Trace) -> Tensor:
    return F.cross_entropy(trace.logits.flatten(0, 1), trace.labels.flatten())


def latent_losses(student: latent.LatentStudent, batch: arithmetic.Problems, method: Method | None) -> Losses:
    """One pass of the teacher, num_updates + 1 of the student; without a method there is no KV loss."""
    trace, thought = latent.read(student.model, batch), student(batch.question)
    # both hold the hidden state at "answer:" alone
    here = torch.zeros(len(batch), dtype=torch.int64)
    hidden = dk.kv.hidden_alignment_loss(thought.hidden, trace.hidden, positions=here)
    kv = None
    if method is not None:
        kept = latent.targets(trace, method, student.num_latents, student.model.model.rotary_emb.inv_freq)
        kv = dk.kv.alignment_loss(thought.latents, kept, normalize="layer_std")
    return Losses(F.cross_entropy(thought.logits, batch.answer), thought_loss(trace), hidden, kv)


def objective(variant: Variant, module: nn.Module) -> Callable[[arithmetic.Problems], Tensor]:
    if variant.mode == "thought":
        return lambda batch: thought_loss(latent.read(module, batch))
    if variant.mode == "direct":
        return lambda batch: F.cross_entropy(answer_logits(module, batch.question), batch.answer)
    return lambda batch: latent_losses(module, batch, variant.method).total()


def learning_rate(step: int, steps: int) -> float:
    """Of the peak: linear warm-up over a twentieth of the steps, the peak up to three quarters, then linearly to a twentieth."""
    return min(1, 20 * (step + 1) / steps, max(0.05, 4 * (1 - step / steps)))


def train(
    variant: Variant, module: nn.Module, data: Data, *, steps: int, lr: float, seed: int, stage: str, every: int = 0,
    on_step: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """AdamW; `on_step(step)` is called every `every` steps and at the end."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    loss_of = objective(variant, module)
    bar = progress(training.batches(len(data.train), BATCH, steps, seed), stage, steps)
    for step, rows in enumerate(bar):
        if on_step is not None and every and step % every == 0:
            on_step(step)
        loss = loss_of(data.train[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    if on_step is not None:
        on_step(steps)


@contextlib.contextmanager
def counted_passes(model: transformers.LlamaForCausalLM) -> Iterator[list[None]]:
    """One entry a forward pass of the model's layers inside."""
    passes: list[None] = []
    hook = model.model.register_forward_hook(lambda *_: passes.append(None))
    try:
        yield passes
    finally:
        hook.remove()


class Found(NamedTuple):
    """Share of held-out answers that are right, and forward passes a question (all are answered in one batch)."""

    accuracy: float
    passes: int


@torch.no_grad()
def evaluate(variant: Variant, module: nn.Module, problems: arithmetic.Problems) -> Found:
    """The most probable answer; the explicit chain of thought is the model's own, written greedily."""
    model = module.model if variant.mode == "latent" else module
    with counted_passes(model) as passes:
        if variant.mode == "latent":
            answer = module(problems.question).logits.argmax(-1)
        elif variant.mode == "direct":
            answer = answer_logits(model, problems.question).argmax(-1)
        else:
            length = problems.thought.shape[1] - arithmetic.LINE + 2
            ones = torch.ones_like(problems.question)
            answer = model.generate(problems.question, attention_mask=ones, max_new_tokens=length, do_sample=False, pad_token_id=0)[:, -1]
    return Found((answer == problems.answer).double().mean().item(), len(passes))


class Result(NamedTuple):
    """Of one variant: accuracy of each seed, forward passes, and (step, accuracy) of the first seed while it trained."""

    variant: Variant
    accuracy: list[float]
    passes: int
    curve: list[tuple[int, float]]


def run(
    variants: Sequence[Variant], *, steps: int, start_steps: int, seeds: Sequence[int], latents: int = LATENTS, heldout: int = HELDOUT
) -> list[Result]:
    """Every variant from the start of its seed, on the batches of its seed; the start's own result comes first."""
    results = {variant: Result(variant, [], 0, []) for variant in (START, *variants)}
    for seed in seeds:
        data = prepare(OPERATIONS, seed, heldout)
        if seed == seeds[0]:
            print(f"{len(data.train):,} questions to train on, {len(data.heldout):,} held out: {data.train.text(0)}", flush=True)
        start = latent.causal_lm(SIZE, seed)
        train(EXPLICIT, start, data, steps=start_steps, lr=START_LR, seed=seed, stage="common start")
        found = evaluate(START, start, data.heldout)
        results[START] = Result(START, [*results[START].accuracy, found.accuracy], found.passes, [])
        for variant in variants:
            torch.manual_seed(seed + 1)
            module = copy.deepcopy(start)
            if variant.mode == "latent":
                module = latent.LatentStudent(module, latents, UPDATES)
            curve: list[tuple[int, float]] = []
            log = lambda step: curve.append((step, evaluate(variant, module, data.heldout[:256]).accuracy))  # noqa: B023
            train(variant, module, data, steps=steps, lr=LR, seed=seed + 1, stage=variant.name.strip(), every=math.ceil(steps / 10), on_step=log)
            found = evaluate(variant, module, data.heldout)
            old = results[variant]
            results[variant] = Result(variant, [*old.accuracy, found.accuracy], found.passes, old.curve or curve)
    return list(results.values())


def summary(result: Result) -> str:
    """Mean accuracy; with several seeds, the lowest and the highest as well."""
    mean = statistics.fmean(result.accuracy)
    return f"{mean:.1%}" if len(result.accuracy) == 1 else f"{mean:.1%} ({min(result.accuracy):.1%} … {max(result.accuracy):.1%})"


def table(results: list[Result]) -> str:
    lines = [("variant", "accuracy", "forward passes"), *((r.variant.name, summary(r), str(r.passes)) for r in results)]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    rows = ["  ".join([name.ljust(widths[0]), accuracy.rjust(widths[1]), passes.rjust(widths[2])]) for name, accuracy, passes in lines]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])


def save(results: list[Result], seeds: Sequence[int], folder: Path) -> None:
    """kava.csv, one row a variant and seed, and kava.png: accuracy while training, and against forward passes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "kava.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", "accuracy", "forward_passes"])
        writer.writerows((r.variant.name.strip(), seed, accuracy, r.passes) for r in results for seed, accuracy in zip(seeds, r.accuracy))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    for i, result in enumerate(results):
        name, colour = result.variant.name.strip(), f"C{i}"
        if result.curve:
            left.plot(*zip(*result.curve), color=colour, marker="o", markersize=3, label=name)
        right.scatter([result.passes] * len(result.accuracy), result.accuracy, color=colour, s=40, label=name)
    for axes in (left, right):
        axes.axhline(1 / arithmetic.MODULUS, color="black", linestyle="--", linewidth=1)
        axes.set(ylim=(0, 1.03), ylabel="held-out accuracy")
    left.set(xlabel="step after the common start", title="While training")
    right.set(xlabel="forward passes a question", xlim=(0, None), title="Accuracy and its price (dashed: guessing)")
    left.legend(frameon=False, fontsize=8)
    figure.savefig(folder / "kava.png", dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(prog="python -m examples.kava", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="of each variant, after the common start")
    parser.add_argument("--seed", type=int, default=0, help="of problems, weights and batches")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with so many seeds, from --seed on")
    parser.add_argument("--latents", type=int, default=LATENTS, help="entries of the teacher's cache that are kept, and latents of the student")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the steps: shows that it runs, and no more")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for kava.csv and kava.png")
    options = parser.parse_args(argv)
    for name in ("steps", "seeds", "latents"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be positive; got {getattr(options, name)}")
    transformers.logging.set_verbosity_error()
    scale = 0.05 if options.quick else 1
    steps, start_steps = (max(2, round(n * scale)) for n in (options.steps, START_STEPS))
    seeds = list(range(options.seed, options.seed + options.seeds))
    began = time.perf_counter(), time.process_time()
    results = run(VARIANTS, steps=steps, start_steps=start_steps, seeds=seeds, latents=options.latents, heldout=HELDOUT)
    save(results, seeds, options.out)
    print(f"\n{table(results)}")
    print(
        f"{OPERATIONS} operations modulo {arithmetic.MODULUS} (guessing: {1 / arithmetic.MODULUS:.1%}); {options.latents} latents, {UPDATES} updates, "
        f"{start_steps} steps of explicit CoT for all, then {steps} of each;\nthe chain of thought has {arithmetic.LINE * (OPERATIONS - 1)} tokens "
        f"without its last line. {time.perf_counter() - began[0]:.0f} s of wall clock, {time.process_time() - began[1]:.0f} s of CPU."
    )
    print(f"wrote {options.out / 'kava.csv'} and {options.out / 'kava.png'}")
    return results


if __name__ == "__main__":
    main()
