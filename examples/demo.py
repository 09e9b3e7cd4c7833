"""Distil small language models on the Python standard library's sources: ``python -m examples.demo``.

A tokenizer and a teacher are trained on text that every Python installation carries. The teacher's top-k is captured
once, over a transfer set that is a part of the teacher's own text. Three students of one size then see the same batches
in the same order from the same initial weights, and differ in their loss alone: labels, forward KL, reverse KL. A fourth
repeats forward KL with rows read from a store on disk: the offline path, which is how a large teacher is used. Then the
labels-only student goes on, on text that models wrote: the teacher, RSD and the student itself (:mod:`.traces`). Last, and apart
from these, a small model learns to think in latents (:mod:`.kava`).

Both distilled students minimise ``D(p ‖ q) + CE_WEIGHT · cross-entropy`` with ``tail="bucket"``, so the mass that the
teacher has outside its K tokens counts too. Reverse KL is the other end of the family (mode-seeking, what on-policy
distillation uses); without the tail bucket it would have no proper minimum.
"""

from __future__ import annotations

import os

# before torch: its profiler announces every start and stop
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import argparse
import functools
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

import distilkernels as dk

from . import arithmetic, corpus, kava, measure, report, traces, training

VOCAB_SIZE = 8192
LENGTH = 128
BATCH = 4
EVAL_BATCH = 8
TEACHER = training.Size(hidden=192, layers=4)
STUDENT = training.Size(hidden=96, layers=2)
TEACHER_STEPS = 700
STUDENT_STEPS = 480
TEACHER_LR = 3e-3
STUDENT_LR = 4e-3
# the students' transfer set, in windows; the teacher has TEACHER_STEPS · BATCH of them
TRANSFER_WINDOWS = 640
HELDOUT_WINDOWS = 160
TRACE_PROMPTS = 96
TRACE_STEPS = 48
# one for every token of the chain of thought without its last line: nothing is dropped, and learnt in few steps
LATENTS = arithmetic.LINE * (kava.OPERATIONS - 1)
LATENT_STEPS = 400
LATENT_VARIANTS = (kava.DIRECT, kava.KAVA)
TOP_K = 32
CE_WEIGHT = 0.5


class Student(NamedTuple):
    """A way to train the student: its name in the table, its loss, and the eager PyTorch form of that loss."""

    name: str
    loss: Callable[..., Tensor]
    eager: Callable[..., Tensor]


def labels_only(logits: Tensor, teacher: dk.TeacherTopK, labels: Tensor, inplace: bool = False) -> Tensor:
    return -dk.token_logprobs(logits, labels, inplace_backward=inplace).mean()


def distilled(logits: Tensor, teacher: dk.TeacherTopK, labels: Tensor, inplace: bool = False, *, divergence: str) -> Tensor:
    return dk.topk_distill_loss(
        logits, teacher, divergence=divergence, tail="bucket", labels=labels, ce_weight=CE_WEIGHT, inplace_backward=inplace
    )


def _distilled_student(name: str, divergence: str) -> Student:
    return Student(
        name,
        functools.partial(distilled, divergence=divergence),
        functools.partial(measure.eager_topk_distill_loss, divergence=divergence, ce_weight=CE_WEIGHT),
    )


STUDENTS = (
    Student("labels only", labels_only, lambda logits, teacher, labels: measure.eager_cross_entropy(logits, labels)),
    _distilled_student("forward KL", "forward_kl"),
    _distilled_student("reverse KL", "reverse_kl"),
)
ONLINE = STUDENTS[1]
OFFLINE = ONLINE._replace(name="forward KL, stored")


class Data(NamedTuple):
    """Windows of tokens [W, LENGTH + 1]: the teacher's, the students' (the first of the teacher's), the held-out files'; and the
    first tokens [W, PROMPT] of other windows of the held-out files."""

    teacher: Tensor
    transfer: Tensor
    heldout: Tensor
    prompts: Tensor


class Steps(NamedTuple):
    """How much of everything a run does."""

    teacher: int
    student: int
    transfer_windows: int
    heldout_windows: int
    trace_prompts: int
    trace: int
    latent: int

    @classmethod
    def scaled(cls, scale: float) -> Steps:
        full = cls(TEACHER_STEPS, STUDENT_STEPS, TRANSFER_WINDOWS, HELDOUT_WINDOWS, TRACE_PROMPTS, TRACE_STEPS, LATENT_STEPS)
        least = cls(8, 8, 2 * BATCH, 2 * EVAL_BATCH, 4, 4, 4)
        return cls(*(max(low, round(n * scale)) for n, low in zip(full, least)))


def prepare(steps: Steps) -> Data:
    """Corpus, tokenizer and windows."""
    library = corpus.standard_library()
    print(f"Python {platform.python_version()} standard library: {library.describe()}")
    tokenizer = corpus.train_tokenizer(library.train, VOCAB_SIZE)
    needed = max(steps.teacher * BATCH, steps.transfer_windows)
    train = corpus.token_windows(tokenizer, library.train, LENGTH, limit=needed)
    heldout = corpus.token_windows(tokenizer, library.heldout, LENGTH)
    # evenly over all held-out files
    picked = torch.linspace(0, len(heldout) - 1, min(steps.heldout_windows, len(heldout) // 2)).long()
    others = heldout[torch.isin(torch.arange(len(heldout)), picked, invert=True)]
    prompts = others[torch.linspace(0, len(others) - 1, min(steps.trace_prompts, len(others))).long(), : traces.PROMPT]
    print(
        f"vocabulary {VOCAB_SIZE:,}; tokens: {len(train) * LENGTH:,} for the teacher, "
        f"{steps.transfer_windows * LENGTH:,} of them for the students, {len(picked) * LENGTH:,} held out"
    )
    return Data(train, train[: steps.transfer_windows], heldout[picked], prompts)


def train_teacher(data: Data, steps: int, seed: int) -> transformers.LlamaForCausalLM:
    model = training.causal_lm(TEACHER, VOCAB_SIZE, LENGTH, seed)

    def objective(logits: Tensor, labels: Tensor) -> Tensor:
        return -dk.token_logprobs(logits, labels, inplace_backward=True).mean()

    windows = (data.teacher[rows] for rows in training.batches(len(data.teacher), BATCH, steps, seed))
    training.train(model, ((w[:, :-1], w[:, 1:]) for w in windows), objective, steps=steps, peak_lr=TEACHER_LR, stage="teacher")
    return model


Batches = Iterator[tuple[Tensor, tuple[dk.TeacherTopK, Tensor]]]
"""Input ids [B, T], and the teacher's rows and the labels at the same positions."""


def from_memory(data: Data, teacher: dk.TeacherTopK, steps: int, seed: int) -> Batches:
    for rows in training.batches(len(data.transfer), BATCH, steps, seed):
        yield data.transfer[rows, :-1], (teacher[rows], data.transfer[rows, 1:])


def from_store(path: Path, steps: int, seed: int) -> Batches:
    """The same batches from the store alone: its documents are the windows, with their tokens."""
    dataset = dk.store.TopKDataset(path)
    order = [rows.tolist() for rows in training.batches(len(dataset), BATCH, steps, seed)]
    for batch in DataLoader(dataset, batch_sampler=order, collate_fn=dk.store.TopKCollator(pad_token_id=0)):
        # the last token of a window is a label only
        yield batch["input_ids"][:, :-1], (batch["teacher"][:, :-1], batch["labels"][:, :-1])


def write_store(path: Path, windows: Tensor, teacher: dk.TeacherTopK) -> dk.store.StoreInfo:
    """One document a window: its tokens [LENGTH + 1] and the rows that predict all but the first."""
    with dk.store.TopKWriter(path, TOP_K, VOCAB_SIZE, teacher="the demo's", mode="overwrite") as writer:
        for i in range(len(windows)):
            writer.append(teacher[i], i, tokens=windows[i])
    return dk.store.info(path)


def train_student(student: Student, batches: Batches, data: Data, steps: int, seed: int):
    """The trained model and its curve of (step, held-out loss); `seed` gives the initial weights."""
    model = training.causal_lm(STUDENT, VOCAB_SIZE, LENGTH, seed)
    curve: list[tuple[int, float]] = []

    def objective(logits: Tensor, targets: tuple[dk.TeacherTopK, Tensor]) -> Tensor:
        return student.loss(logits, *targets, inplace=True)

    def on_step(step: int) -> None:
        curve.append((step, training.heldout_loss(model, data.heldout, EVAL_BATCH).mean().item()))

    training.train(
        model, batches, objective, steps=steps, peak_lr=STUDENT_LR, stage=f"student: {student.name}", every=math.ceil(steps / 8), on_step=on_step
    )
    return model, curve


def costs(student: Student, model: transformers.LlamaForCausalLM, data: Data, teacher: dk.TeacherTopK) -> measure.LossCosts:
    """The loss against its eager form on real logits of the trained student."""
    rows = torch.arange(EVAL_BATCH)
    with torch.no_grad():
        logits = model(input_ids=data.transfer[rows, :-1]).logits
    batch = {"teacher": teacher[rows], "labels": data.transfer[rows, 1:]}
    ours, inplace = (functools.partial(student.loss, **batch, inplace=flag) for flag in (False, True))
    return measure.loss_costs(ours, inplace, functools.partial(student.eager, **batch), logits)


def result_row(name: str, model: transformers.LlamaForCausalLM, found: training.Comparison) -> dict[str, object]:
    loss = found.loss.mean()
    return {
        "model": name,
        "params_m": training.parameters_in_millions(model),
        "loss": loss.item(),
        "perplexity": loss.exp().item(),
        "kl": found.kl.mean().item(),
        "agreement": found.agreement.mean().item(),
    }


def gain_columns(baseline: Tensor, loss: Tensor) -> dict[str, float]:
    """Mean of (baseline − loss) over held-out windows and its standard error, windows paired."""
    gain = baseline - loss
    return {"gain": gain.mean().item(), "gain_se": (gain.std() / len(gain) ** 0.5).item()}


def cost_columns(found: measure.LossCosts) -> dict[str, float]:
    return {
        "ours_ms": found.ours.ms,
        "eager_ms": found.eager.ms,
        "speedup": found.eager.ms / found.ours.ms,
        "ours_mib": found.ours.extra_mib,
        "inplace_mib": found.ours_inplace_mib,
        "eager_mib": found.eager.extra_mib,
    }


def train_on_traces(
    data: Data, teacher: transformers.LlamaForCausalLM, student: transformers.LlamaForCausalLM, baseline: Tensor, steps: int, seed: int
) -> tuple[list[dict[str, object]], dict[str, Tensor]]:
    """A row for each kind of traces, for `student` trained on them, and the surprisal of every token; `baseline` is its loss before."""
    rows, surprisal = [], {}
    for kind in traces.KINDS:
        written = traces.write(kind, teacher, student, data.prompts, LENGTH + 1 - traces.PROMPT, seed)
        model = traces.train_on(kind, written, student, steps, seed + 2)
        found = training.compare(model, teacher, data.heldout, EVAL_BATCH, "evaluation")
        rows.append(result_row(f"+ {kind.name} traces", model, found) | gain_columns(baseline, found.loss) | written.columns())
        surprisal[kind.name] = written.surprisal.flatten()
    return rows, surprisal


def serving_backend() -> str:
    """The backend that takes the loss's rows on this machine: the one asked for, else the first that can."""
    able = {s.backend for s in dk.backends.support(["cpu"]) if s.primitive == "vocab_stats" and s.dtype == "float32" and s.refusal is None}
    return os.environ.get("DISTILKERNELS_BACKEND") or next(name for name in dk.backends.ORDER if name in able)


class Clock:
    """Wall and CPU seconds of each stage."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, float, float]] = []
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stage(self, name: str) -> None:
        """Ends a stage: everything since the last call."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.stages.append((name, wall - self._wall, cpu - self._cpu))
        self._wall, self._cpu = wall, cpu

    def summary(self) -> str:
        total = [sum(stage[i] for stage in self.stages) for i in (1, 2)]
        parts = ", ".join(f"{name} {wall:.0f} ({cpu:.0f})" for name, wall, cpu in self.stages)
        return f"seconds of wall clock (of CPU): {parts}; in all {total[0]:.0f} ({total[1]:.0f})"


def run(steps: Steps, folder: Path, seed: int = 0) -> list[dict[str, object]]:
    """The whole demo; returns one row per model, the teacher's first."""
    clock = Clock()
    data = prepare(steps)
    clock.stage("corpus and tokenizer")
    teacher = train_teacher(data, steps.teacher, seed)
    clock.stage("teacher")
    targets = training.capture(teacher, data.transfer, TOP_K, EVAL_BATCH)
    print(f"captured the top {TOP_K} of {VOCAB_SIZE:,} at {targets.shape.numel():,} tokens: mean teacher mass {targets.mass().mean():.3f}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "teacher-store"
    stored = write_store(path, data.transfer, targets)
    raw = sum(t.nbytes for t in targets.tensors().values()) / targets.shape.numel()
    print(f"stored in {path}: {stored.bytes_per_row:.1f} bytes a token, {raw:.0f} in memory")
    clock.stage("capture")

    rows, curves, errors, losses, models = [], {}, [], {}, {}
    for student in (*STUDENTS, OFFLINE):
        batches = from_store(path, steps.student, seed + 1) if student is OFFLINE else from_memory(data, targets, steps.student, seed + 1)
        model, curves[student.name] = train_student(student, batches, data, steps.student, seed + 1)
        found = training.compare(model, teacher, data.heldout, EVAL_BATCH, "evaluation")
        if not losses:
            rows.append(result_row("teacher", teacher, training.compare(teacher, teacher, data.heldout, EVAL_BATCH, "evaluation")))
        losses[student.name] = found.loss
        row = result_row(student.name, model, found)
        if student is not STUDENTS[0]:
            row |= gain_columns(losses[STUDENTS[0].name], found.loss)
        if student is not OFFLINE:
            cost = costs(student, model, data, targets)
            errors.append((cost.value_error, cost.grad_error))
            row |= cost_columns(cost)
        rows.append(row)
        models[student.name] = model
        clock.stage(student.name)

    baseline = STUDENTS[0].name
    trace_rows, surprisal = train_on_traces(data, teacher, models[baseline], losses[baseline], steps.trace, seed)
    rows += trace_rows
    clock.stage("traces")

    latents = kava.run(LATENT_VARIANTS, steps=steps.latent, start_steps=steps.latent, seeds=[seed], latents=LATENTS)
    kava.save(latents, [seed], folder)
    latent_rows = [{"model": r.variant.name, "accuracy": r.accuracy[0], "passes": r.passes} for r in latents]
    clock.stage("latents")

    report.save([*rows, *latent_rows], curves, surprisal, rows[0]["loss"], folder)
    print(f"\n{report.table(rows, report.QUALITY)}")
    print(
        "Nats per token on the held-out files; KL(teacher || student) over the full vocabulary; agreement of the most probable token;\n"
        "gain: labels-only loss minus this loss, with its standard error over held-out windows (evaluation only: one training seed)."
    )
    difference = losses[OFFLINE.name] - losses[ONLINE.name]
    print(
        f"From the store, {stored.bytes_per_row:.1f} bytes a token with log-probs to {stored.manifest.max_logprob_error:g} nats, the held-out loss "
        f"is {difference.mean():+.4f} from online\n(largest difference of a window {difference.abs().max():.4f}): same weights, same batches, same order."
    )
    print(f"\n{report.table(trace_rows, report.TRACES)}")
    print(
        f"{len(data.prompts)} prompts of {traces.PROMPT} tokens from the held-out files (other windows than those of the evaluation), continued by\n"
        f"who is named; RSD: the teacher proposes, the student accepts what it gives {traces.MIN_PROB:.0%}, {traces.TRIALS} trials. "
        f"Surprisal: mean nats a token\nunder the labels-only student; below {traces.MIN_PROB:.0%}: the share of tokens that it gives less; "
        f"proposer's: the share that the proposer wrote.\nHeld-out loss and gain: that student after {steps.trace} more steps on those traces. "
        "RSD's text is more probable than the files are, so a student\nof it grows too sure of itself for them: RSD is for reasoning, where "
        "traces are kept by their answers (decoding.rsd_filter)."
    )
    print(f"\n{kava.table(latents)}")
    print(
        f"Modular arithmetic in {LATENTS} latents instead of a chain of thought: {steps.latent} steps each after a common start of as many. Accuracy on\n"
        f"{kava.HELDOUT} held-out questions; nothing is dropped here: `python -m examples.kava` trains longer, with fewer latents and KaVa's ablations."
    )
    print(f"\n{report.table(rows[1 : 1 + len(STUDENTS)], report.COST)}")
    print(
        f"Forward + backward of the loss alone on {EVAL_BATCH * LENGTH:,} rows of {VOCAB_SIZE:,} float32 logits "
        f"({EVAL_BATCH * LENGTH * VOCAB_SIZE * 4 / 2**20:.0f} MiB): medians of {measure.REPEATS} alternating runs, and\n"
        "the peak of allocated memory beyond those logits (torch.profiler), with the gradient unless it is written in place.\n"
        f"Before timing: values agree with PyTorch's to {max(v for v, _ in errors):.0e}, gradients to {max(g for _, g in errors):.0e}."
    )
    print(clock.summary())
    print(f"wrote {folder / 'results.csv'}, {folder / 'results.png'} and {folder / 'kava.png'}")
    return [*rows, *latent_rows]


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--steps-scale", type=float, default=1.0, help="factor on steps and tokens (0.05 for a quick look)")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for results.csv and results.png")
    parser.add_argument("--seed", type=int, default=0, help="initial weights and order of the batches, to see the spread between runs")
    options = parser.parse_args(argv)
    if not options.steps_scale > 0:
        parser.error(f"--steps-scale must be positive; got {options.steps_scale}")
    transformers.logging.set_verbosity_error()
    print(f"distilkernels {dk.__version__} ({serving_backend()} backend), torch {torch.__version__}, {torch.get_num_threads()} threads")
    return run(Steps.scaled(options.steps_scale), options.out, options.seed)


if __name__ == "__main__":
    main()
