"""``decoding.generate``: tokens a second on a teacher and a student that were trained as the demo trains them.

Reverse speculative decoding in its published setting (the teacher proposes, the student accepts what it gives 1 %, 5 trials, pools of 20)
at γ = 1, γ = 8 and ``block_size="auto"``, against one token at a time: the loop that one writes with transformers and PyTorch (two KV
caches, topk, softmax, multinomial, gather), over the same batch and over one prompt after the other. Speculative decoding (the student
proposes, the teacher accepts) against ``teacher.generate(assistant_model=student)``, which takes one prompt at a time, and each model alone.

The floor is forwards: t and s are the seconds of one-token forwards of teacher and student, timed in the same run, and a is how likely the
first proposal of a position is kept, from both models' rows over what the loop wrote. One token at a time costs t + s. A block of γ costs
γ·t + s for (1 − a^γ)/(1 − a) tokens, if a read of γ tokens costs no more than one of a single token. "at most" is the gain of a block by
these forwards alone. It is never more than (t + s)/t, and less than 1 where a < t/(t + s): the teacher's forwards are most of the cost, every
token that is kept needs one, and those that are thrown away come on top. So no block is twice as fast as the loop over the same batch
while t > s; "auto" finds the block that loses least.

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

PROMPT, NEW, QUICK_NEW, GAMMA = 32, 64, 24, 8
# as a share of the demo's steps
TRAINING, QUICK_TRAINING = 0.4, 0.05
MIN_PROB, POOL = 0.01, 20
TEACHERS, STUDENTS = "forwards of the teacher only", "forwards of the student only"
# one prompt after the other takes time in proportion: a few stand for all
ONE_BY_ONE = 4
# the published setting
RSD = decoding.ReverseSpeculative(min_prob=MIN_PROB, trials=5, proposer_top_k=POOL, judge_top_k=POOL)


@dataclass(frozen=True)
class Pair:
    teacher: LlamaForCausalLM
    student: LlamaForCausalLM
    prompts: Tensor
    new: int


def trained(share: float, new: int, device: str) -> Pair:
    """The demo's teacher, its student on labels, and prompts from held-out files."""
    steps = demo.Steps.scaled(share)
    data = demo.prepare(steps)
    teacher = demo.train_teacher(data, steps.teacher, seed=0)
    targets = training.capture(teacher, data.transfer, demo.TOP_K, demo.EVAL_BATCH)
    student, _ = demo.train_student(demo.STUDENTS[0], demo.from_memory(data, targets, steps.student, 1), data, steps.student, 1)
    return Pair(teacher.to(device).eval(), student.to(device).eval(), data.heldout[:, :PROMPT].to(device), new)


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


@torch.no_grad()
def first_kept(pair: Pair, text: Tensor) -> float:
    """a, the mean probability that the first proposal is kept, at the new tokens of `text` [B, PROMPT + new]: the mass of the teacher's pool
    on what passes at the student."""
    p, q = (model(input_ids=text[:, :-1]).logits[:, PROMPT - 1 :] for model in (pair.teacher, pair.student))
    pool, ids = p.topk(POOL)
    passes = (q.softmax(-1).gather(-1, ids) >= MIN_PROB) & (q.gather(-1, ids) >= q.topk(POOL).values[..., -1:])
    return (pool.softmax(-1) * passes).sum(-1).mean().item()


@torch.no_grad()
def forwards(model: LlamaForCausalLM, prompts: Tensor, new: int) -> None:
    """What the model costs any writer: the prompt and `new` − 1 tokens, one by one."""
    cache, fed = DynamicCache(), prompts
    for _ in range(new):
        model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        fed = prompts[:, :1]


def at_most(t: float, s: float, a: float, gamma: int) -> float:
    """The gain over one token at a time of blocks of `gamma`, by forwards alone."""
    return (t + s) * sum(a**i for i in range(gamma)) / (gamma * t + s)


@dataclass
class Timed:
    """A contender: `write(seed)` gives the share of tokens that the proposer wrote, None without one. `peer` is whom its speed-up is over,
    `prompts` how many it continues (None: the batch), `gamma` the block of one that judges the teacher."""

    name: str
    peer: str
    write: Callable[[int], float | None]
    prompts: int | None = None
    gamma: int | str | None = None
    shares: list[float] = field(default_factory=list)
    runs: int = 0

    def run(self) -> None:
        # another seed each time: how much is accepted differs from text to text
        self.runs += 1
        share = self.write(self.runs)
        if share is not None:
            self.shares.append(share)


def ours(
    proposer: LlamaForCausalLM, judge: LlamaForCausalLM, prompts: Tensor, new: int, rule: decoding.Rule, block: int | str, seed: int,
    temperature: float = 1.0,
) -> decoding.Traces:  # fmt: skip
    sampling = decoding.Sampling(temperature=temperature)
    return decoding.generate(
        proposer, judge, prompts, None, rule=rule, block_size=block, max_new_tokens=new, seeds=seed * 1000 + torch.arange(len(prompts)),
        eos_token_id=None, proposer=sampling, judge=sampling,
    )  # fmt: skip


def alone(model: LlamaForCausalLM, prompts: Tensor, new: int, seed: int = 0, **options) -> Tensor:
    """transformers' own ``generate``; an end of file does not end the text."""
    torch.manual_seed(seed)
    mask = torch.ones_like(prompts)
    written = model.generate(prompts, attention_mask=mask, max_new_tokens=new, eos_token_id=None, pad_token_id=0, use_cache=True, **options)
    return written[:, prompts.shape[1] :]


def assisted(pair: Pair, prompts: Tensor, seed: int, **options) -> Tensor:
    """``teacher.generate(assistant_model=student)`` with as many drafts as ours: no early stop, no schedule."""
    config = pair.student.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule, config.assistant_confidence_threshold = GAMMA, "constant", 0.0
    return alone(pair.teacher, prompts, pair.new, seed, assistant_model=pair.student, **options)


@torch.no_grad()
def check(pair: Pair, prompts: Tensor) -> None:
    """The gate; see the module's page."""
    greedy = alone(pair.teacher, prompts, pair.new, do_sample=False).cpu()
    for block in (GAMMA, "auto"):
        found = ours(pair.student, pair.teacher, prompts, pair.new, decoding.GreedyAcceptance(), block, 0, temperature=0).tokens
        assert torch.equal(found, greedy), f"greedy acceptance does not write the teacher's greedy text, block_size {block}"
    if len(prompts) == 1:
        assert torch.equal(assisted(pair, prompts, 0, do_sample=False).cpu(), greedy), "assisted generation does not write the teacher's greedy text"
    for block in (1, GAMMA, "auto"):
        traces = ours(pair.teacher, pair.student, prompts, pair.new, RSD, block, 0)
        text = torch.cat([prompts, traces.tokens.to(prompts.device)], 1)
        rows = pair.student(input_ids=text[:, :-1]).logits[:, PROMPT - 1 :].log_softmax(-1)
        exact = rows.gather(-1, text[:, PROMPT:, None])[..., 0].double().cpu()
        error = (traces.judge_logprobs - exact).abs().max().item()
        assert error < 1e-3, f"RSD, block_size {block}: labels are {error:.1e} from a forward over the whole text"
        least = traces.judge_logprobs[traces.source == decoding.Source.ACCEPTED].exp().min().item()
        assert least >= MIN_PROB * (1 - 1e-4), f"RSD, block_size {block}: accepted a token of probability {least}"


def contenders(pair: Pair, prompts: Tensor) -> list[Timed]:
    """Everyone for this batch."""
    loop = "RSD, PyTorch loop"

    def share(traces: decoding.Traces) -> float:
        return (traces.source == decoding.Source.ACCEPTED).double().mean().item()

    def rsd(block: int | str, seed: int) -> float:
        return share(ours(pair.teacher, pair.student, prompts, pair.new, RSD, block, seed))

    def looped(batches: tuple[Tensor, ...], seed: int) -> float:
        torch.manual_seed(seed)
        return sum(one_at_a_time(pair.teacher, pair.student, batch, pair.new)[1] for batch in batches) / len(batches)

    def speculative(rule: decoding.Rule, block: int | str, temperature: float, seed: int) -> float:
        return share(ours(pair.student, pair.teacher, prompts, pair.new, rule, block, seed, temperature))

    def theirs(model: LlamaForCausalLM, sampled: bool, seed: int) -> None:
        alone(model, prompts, pair.new, seed, **(dict(do_sample=True, top_k=0) if sampled else dict(do_sample=False)))

    def helped(sampled: bool, seed: int) -> None:
        assisted(pair, prompts, seed, **(dict(do_sample=True, top_k=0) if sampled else dict(do_sample=False)))

    teacher, cold = "teacher alone, transformers", "teacher alone, greedy, transformers"
    made = [
        Timed(TEACHERS, loop, lambda seed: forwards(pair.teacher, prompts, pair.new)),
        Timed(STUDENTS, loop, lambda seed: forwards(pair.student, prompts, pair.new)),
        Timed(loop, loop, functools.partial(looped, (prompts,)), gamma=1),
        *(Timed(f"RSD, γ = {block}", loop, functools.partial(rsd, block), gamma=block) for block in (1, GAMMA, "auto")),
        Timed(teacher, teacher, functools.partial(theirs, pair.teacher, True)),
        Timed("student alone, transformers", teacher, functools.partial(theirs, pair.student, True)),
        *(
            Timed(f"speculative sampling, γ = {block}", teacher, functools.partial(speculative, decoding.SpeculativeSampling(), block, 1.0))
            for block in (GAMMA, "auto")
        ),
        Timed(cold, cold, functools.partial(theirs, pair.teacher, False)),
        Timed(f"greedy acceptance, γ = {GAMMA}", cold, functools.partial(speculative, decoding.GreedyAcceptance(), GAMMA, 0.0)),
    ]
    if len(prompts) == 1:
        made.append(Timed("speculative sampling, transformers", teacher, functools.partial(helped, True)))
        made.append(Timed("greedy acceptance, transformers", cold, functools.partial(helped, False)))
    else:
        few = prompts[:ONE_BY_ONE]
        made.append(Timed("RSD, PyTorch loop, prompt by prompt", loop, functools.partial(looped, few.split(1)), prompts=len(few)))
    return made


def bench(device: str, repeats: int, quick: bool, progress) -> Iterator[dict]:
    """One row of the table per contender."""
    pair = trained(QUICK_TRAINING, QUICK_NEW, device) if quick else trained(TRAINING, NEW, device)
    # a CPU of few cores is busy with 16 requests already
    for batch in (1,) if quick else (1, 16) if device == "cpu" else (1, 16, 64):
        prompts = pair.prompts[:batch]
        check(pair, prompts)
        text, _ = one_at_a_time(pair.teacher, pair.student, prompts, pair.new)
        a = first_kept(pair, torch.cat([prompts, text], 1))
        everyone = contenders(pair, prompts)
        progress.reset(total=len(everyone) * (repeats + 2))
        progress.set_description(f"B = {batch}")
        times = race([Contender(one.name, one.run) for one in everyone], device, repeats, progress=progress)
        ms = {name: median(found) for name, found in times.items()}
        rate = {one.name: (one.prompts or batch) * pair.new / ms[one.name] * 1e3 for one in everyone}
        gains = {gamma: at_most(ms[TEACHERS], ms[STUDENTS], a, gamma) for gamma in range(1, 17)}
        gains["auto"] = max(gains.values())
        for one in everyone:
            yield {
                "B": batch, "prompt": PROMPT, "new": pair.new, "contender": one.name, "ms": round(ms[one.name], 1),
                "tokens_per_s": round(rate[one.name]), "proposer's": round(sum(one.shares) / len(one.shares), 3) if one.shares else None,
                "a": round(a, 3) if one.gamma else None, "speed-up": round(rate[one.name] / rate[one.peer], 2),
                "at most": round(gains[one.gamma], 2) if one.gamma else None, "over": one.peer,
            }  # fmt: skip
