"""``decoding.generate``: tokens a second on a teacher and a student that were trained as the demo trains them.

Reverse speculative decoding (the teacher proposes, the student accepts) at γ = 8 against one token at a time: the loop that one writes
with transformers and PyTorch (two KV caches, softmax, multinomial, gather), and ``generate`` with blocks of 1. The student's reads of a
block are one forward instead of 8, the teacher's drafts are 8 forwards either way: with t and s the seconds of a forward of the two and
a the acceptance rate, a round costs 8·t + s for (1 − a⁸)/(1 − a) tokens against t + s for one, so that the gain is at most (t + s)/t,
and drafts that are thrown away count against it. Speculative decoding (the student proposes, the teacher accepts) against
``teacher.generate(assistant_model=student)``, which takes one prompt at a time, and each model alone.

Before timing: greedy text equals the teacher's own token for token, labels equal those of a forward over the whole text, and what RSD
accepted has at least the probability it asks for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from examples import demo, training
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from distilkernels import decoding

from .measure import Contender, median, race

GROUP = ("B", "prompt", "new")

PROMPT, NEW, GAMMA, MIN_PROB = 32, 64, 8, 0.01
# as a share of the demo's steps
TRAINING, QUICK_TRAINING = 0.4, 0.05
POOL = 20
# the published setting
RSD = decoding.ReverseSpeculative(min_prob=MIN_PROB, trials=5, proposer_top_k=POOL, judge_top_k=POOL)


@dataclass(frozen=True)
class Pair:
    teacher: LlamaForCausalLM
    student: LlamaForCausalLM
    prompts: Tensor


def trained(share: float, device: str) -> Pair:
    """The demo's teacher, its student on labels, and prompts from held-out files."""
    steps = demo.Steps.scaled(share)
    data = demo.prepare(steps)
    teacher = demo.train_teacher(data, steps.teacher, seed=0)
    targets = training.capture(teacher, data.transfer, demo.TOP_K, demo.EVAL_BATCH)
    student, _ = demo.train_student(demo.STUDENTS[0], demo.from_memory(data, targets, steps.student, 1), data, steps.student, 1)
    return Pair(teacher.to(device).eval(), student.to(device).eval(), data.heldout[:, :PROMPT].to(device))


@torch.no_grad()
def one_at_a_time(teacher: LlamaForCausalLM, student: LlamaForCausalLM, prompts: Tensor, new: int) -> tuple[Tensor, float]:
    """RSD as a loop: every step one token of each request, the first of the teacher's draws that passes, else the student's.

    Tokens [B, new] and the share that the teacher wrote. Without a wait for the device: all trials are drawn at once."""
    caches = DynamicCache(), DynamicCache()
    fed, written, kept = prompts, [], []
    for _ in range(new):
        z_p, z_q = (
            model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1] for model, cache in zip((teacher, student), caches)
        )
        pool, pool_ids = z_p.topk(POOL)
        own, own_ids = z_q.topk(POOL)
        tried = pool_ids.gather(1, torch.multinomial(pool.softmax(-1), RSD.trials, replacement=True))
        z = z_q.gather(1, tried)
        passes = (z_q.softmax(-1).gather(1, tried) >= MIN_PROB) & (z >= own[:, -1:])
        proposed = tried.gather(1, passes.int().argmax(1, keepdim=True))
        any_passes = passes.any(1, keepdim=True)
        fed = torch.where(any_passes, proposed, own_ids.gather(1, torch.multinomial(own.softmax(-1), 1)))
        written.append(fed)
        kept.append(any_passes)
    return torch.cat(written, 1), torch.cat(kept, 1).double().mean().item()


@dataclass
class Timed:
    """A contender and, of each run, the share of tokens that the proposer wrote."""

    name: str
    peer: str
    write: Callable[[int], tuple[Tensor, float | None]]
    accepted: list[float] = field(default_factory=list)
    runs: int = 0

    def run(self) -> None:
        # another seed each time: how much is accepted differs from text to text
        self.runs += 1
        _, rate = self.write(self.runs)
        if rate is not None:
            self.accepted.append(rate)


def ours(proposer, judge, prompts: Tensor, rule: decoding.Rule, gamma: int, seed: int, temperature: float = 1.0) -> decoding.Traces:
    sampling = decoding.Sampling(temperature=temperature)
    return decoding.generate(
        proposer, judge, prompts, None, rule=rule, block_size=gamma, max_new_tokens=NEW, seeds=seed * 1000 + torch.arange(len(prompts)),
        eos_token_id=None, proposer=sampling, judge=sampling,
    )  # fmt: skip


def _proposed(traces: decoding.Traces) -> float:
    return (traces.source == decoding.Source.ACCEPTED).double().mean().item()


def alone(model: LlamaForCausalLM, prompts: Tensor, seed: int = 0, **options) -> Tensor:
    """transformers' own ``generate``; an end of file does not end the text."""
    torch.manual_seed(seed)
    mask = torch.ones_like(prompts)
    written = model.generate(prompts, attention_mask=mask, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, **options)
    return written[:, prompts.shape[1] :]


def assisted(pair: Pair, prompts: Tensor, seed: int, **options) -> Tensor:
    """``teacher.generate(assistant_model=student)`` with as many drafts as ours: no early stop, no schedule."""
    config = pair.student.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule, config.assistant_confidence_threshold = GAMMA, "constant", 0.0
    return alone(pair.teacher, prompts, seed, assistant_model=pair.student, **options)


@torch.no_grad()
def check(pair: Pair, prompts: Tensor) -> None:
    """The gate; see the module's page."""
    greedy = alone(pair.teacher, prompts, do_sample=False).cpu()
    found = ours(pair.student, pair.teacher, prompts, decoding.GreedyAcceptance(), GAMMA, 0, temperature=0).tokens
    assert torch.equal(found, greedy), "greedy acceptance does not write the teacher's greedy text"
    if len(prompts) == 1:
        assert torch.equal(assisted(pair, prompts, 0, do_sample=False).cpu(), greedy), "assisted generation does not write the teacher's greedy text"
    for gamma in (1, GAMMA):
        traces = ours(pair.teacher, pair.student, prompts, RSD, gamma, 0)
        text = torch.cat([prompts, traces.tokens.to(prompts.device)], 1)
        rows = pair.student(input_ids=text[:, :-1]).logits[:, PROMPT - 1 :].log_softmax(-1)
        exact = rows.gather(-1, text[:, PROMPT:, None])[..., 0].double().cpu()
        error = (traces.judge_logprobs - exact).abs().max().item()
        assert error < 1e-3, f"RSD, γ = {gamma}: labels are {error:.1e} from a forward over the whole text"
        least = traces.judge_logprobs[traces.source == decoding.Source.ACCEPTED].exp().min().item()
        assert least >= MIN_PROB * (1 - 1e-5), f"RSD, γ = {gamma}: accepted a token of probability {least}"


def contenders(pair: Pair, prompts: Tensor) -> list[Timed]:
    """Everyone for this batch; `peer` is whom the speed-up is over."""
    loop = "RSD, PyTorch loop"

    def rsd(gamma: int, seed: int) -> tuple[Tensor, float]:
        traces = ours(pair.teacher, pair.student, prompts, RSD, gamma, seed)
        return traces.tokens, _proposed(traces)

    def looped(seed: int) -> tuple[Tensor, float]:
        torch.manual_seed(seed)
        return one_at_a_time(pair.teacher, pair.student, prompts, NEW)

    def speculative(rule: decoding.Rule, temperature: float, seed: int) -> tuple[Tensor, float]:
        traces = ours(pair.student, pair.teacher, prompts, rule, GAMMA, seed, temperature)
        return traces.tokens, _proposed(traces)

    teacher, cold = "teacher alone, transformers", "teacher alone, greedy, transformers"
    made = [
        Timed(loop, loop, looped),
        Timed("RSD, γ = 1", loop, functools.partial(rsd, 1)),
        Timed(f"RSD, γ = {GAMMA}", loop, functools.partial(rsd, GAMMA)),
        Timed(teacher, teacher, lambda seed: (alone(pair.teacher, prompts, seed, do_sample=True, top_k=0), None)),
        Timed("student alone, transformers", teacher, lambda seed: (alone(pair.student, prompts, seed, do_sample=True, top_k=0), None)),
        Timed("speculative sampling", teacher, functools.partial(speculative, decoding.SpeculativeSampling(), 1.0)),
        Timed(cold, cold, lambda seed: (alone(pair.teacher, prompts, do_sample=False), None)),
        Timed("greedy acceptance", cold, functools.partial(speculative, decoding.GreedyAcceptance(), 0.0)),
    ]
    if len(prompts) == 1:
        made.append(Timed("speculative sampling, transformers", teacher, lambda seed: (assisted(pair, prompts, seed, do_sample=True, top_k=0), None)))
        made.append(Timed("greedy acceptance, transformers", cold, lambda seed: (assisted(pair, prompts, seed, do_sample=False), None)))
    return made


def bench(device: str, repeats: int, quick: bool, progress) -> Iterator[dict]:
    """One row of the table per contender."""
    pair = trained(QUICK_TRAINING if quick else TRAINING, device)
    for batch in (1,) if quick else (1, 16, 64):
        prompts = pair.prompts[:batch]
        check(pair, prompts)
        everyone = contenders(pair, prompts)
        progress.reset(total=len(everyone) * (repeats + 2))
        progress.set_description(f"B = {batch}")
        times = race([Contender(t.name, t.run) for t in everyone], device, repeats, progress=progress)
        for one in everyone:
            ms = median(times[one.name])
            yield {
                "B": batch, "prompt": PROMPT, "new": NEW, "contender": one.name, "ms": round(ms, 1), "tokens_per_s": round(batch * NEW / ms * 1e3),
                "proposer's": round(sum(one.accepted) / len(one.accepted), 3) if one.accepted else None,
                "speed-up": round(median(times[one.peer]) / ms, 2), "over": one.peer,
            }  # fmt: skip
