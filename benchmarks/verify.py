"""``decoding.verify``: a block of γ = 8 proposals for each of B requests, under every rule.

Peers, in one run. "PyTorch" is what one writes for the rule alone: softmax of every row (of both sides where the rule compares with
P), gather, the acceptance, multinomial on the row after the accepted tokens; greedy acceptance and SKD need no softmax of every row
and do none. "PyTorch + labels" returns also what ``verify`` always does: the judge's log-probability, rank and entropy at every
emitted token, and the proposer's log-probability where P is read. For B = 1 and speculative sampling also transformers' own.
``verify`` is given the proposer's logits where the rule compares with P, and the row γ where the rule has a bonus, as its peers are.

Bytes: every row of the judge, and of the proposer where it is given, read once; at the rate of a copy measured in the same run.

Before timing, in float64 from the same random words: how many proposals are accepted, the token that follows, and all labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.utils import _speculative_sampling

from distilkernels import decoding
from distilkernels.primitives.philox import Stream
from distilkernels.primitives.sample_rows import Noise, coin, uniforms_at

from .measure import Contender, copy_contender, median, race

GROUP = ("rule", "B", "gamma", "V", "dtype")

GAMMA = 8
VOCAB = 151_936
FILTERS = decoding.Sampling(temperature=0.7, top_k=50, top_p=0.95, min_p=0.02)
SEED, POSITION = 7, 100
# a decision nearer than this to going the other way is not compared
NEAR = 1e-3


@dataclass(frozen=True)
class Rows:
    """Logits of both sides, [B, γ + 1, V] and [B, γ, V], and proposals drawn from the latter under `sampling`."""

    judge: Tensor
    proposer: Tensor
    proposals: Tensor
    sampling: decoding.Sampling | None = None

    @property
    def uniforms(self) -> Tensor:
        b, g = self.proposals.shape
        at = torch.arange(g, device=self.proposals.device)
        return coin(torch.full((b, 1), SEED, device=at.device), torch.full((b, 1), POSITION, device=at.device), at, int(Stream.ACCEPTANCE))


def language_like(b: int, v: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Zipf's law over 64 columns that differ from row to row, 1% of the mass in the noise of the rest; the proposer is near the judge."""
    r = torch.Generator(device).manual_seed(0)
    judge = torch.randn(b, GAMMA + 1, v, generator=r, device=device)
    heads = min(64, v)
    columns = torch.randint(v, (b, GAMMA + 1, heads), generator=r, device=device)
    heights = math.log(v) + 3.6 - 1.2 * torch.arange(1, heads + 1, device=device).log()
    judge.scatter_(2, columns, heights.expand(columns.shape))
    proposer = torch.randn(b, GAMMA, v, generator=r, device=device).mul_(0.5).add_(judge[:, :GAMMA])
    return judge.to(dtype), proposer.to(dtype)


def rows_for(b: int, v: int, dtype: torch.dtype, device: str, sampling: decoding.Sampling | None = None, like: Rows | None = None) -> Rows:
    judge, proposer = language_like(b, v, dtype, device) if like is None else (like.judge, like.proposer)
    seeds = torch.arange(b * GAMMA, device=device)
    proposals, _ = decoding.sample(proposer.view(-1, v), seeds=seeds, positions=torch.zeros_like(seeds), sampling=sampling)
    return Rows(judge, proposer, proposals.view(b, GAMMA), sampling)


# ------------------------------------------------------------------------------------------- what one writes in PyTorch


def softmax(z: Tensor, sampling: decoding.Sampling | None, top_k: int | None = None) -> Tensor:
    """float32 probabilities of every column. With filters the frugal form: they are applied to the top k, so that nothing is sorted."""
    if sampling is None and top_k is None:
        return z.softmax(-1, dtype=torch.float32)
    sampling = sampling or decoding.Sampling()
    values, ids = z.topk(top_k or sampling.top_k, dim=-1)
    p = (values.float() / sampling.temperature).softmax(-1)
    if sampling.top_p is not None:
        p = torch.where(p.cumsum(-1) - p < sampling.top_p, p, 0.0)
    if sampling.min_p is not None:
        p = torch.where(p >= sampling.min_p * p[..., :1], p, 0.0)
    return torch.zeros(z.shape, device=z.device).scatter_(-1, ids, p / p.sum(-1, keepdim=True))


def at(t: Tensor, ids: Tensor) -> Tensor:
    return t[:, : ids.shape[1]].gather(2, ids[..., None])[..., 0]


def prefix(accepts: Tensor) -> Tensor:
    return accepts.long().cumprod(1).sum(1)


def row(t: Tensor, index: Tensor) -> Tensor:
    return t[torch.arange(t.shape[0], device=t.device), index]


def continued(accepted: Tensor, token: Tensor, bonus: bool) -> Tensor:
    """The next token, −1 where the rule gives none after the last proposal."""
    return token if bonus else token.masked_fill(accepted == GAMMA, -1)


def drawn_from(q: Tensor, accepted: Tensor, bonus: bool) -> Tensor:
    token = torch.multinomial(row(q, accepted.clamp(max=q.shape[1] - 1)), 1)[:, 0]
    return continued(accepted, token, bonus)


Answer = tuple[Tensor, Tensor]  # accepted [B], next token [B]


def torch_threshold(w: Rows, rule, u: Tensor) -> Answer:
    q = softmax(w.judge[:, :GAMMA], w.sampling)
    accepted = prefix(at(q, w.proposals) >= rule.min_prob)
    if isinstance(rule, decoding.ThresholdAcceptance):
        return accepted, continued(accepted, row(q, accepted.clamp(max=GAMMA - 1)).argmax(-1), False)
    return accepted, drawn_from(q, accepted, False)


def torch_retries(w: Rows, rule, u: Tensor) -> Answer:
    """T − 1 further draws from the pool, all at once; the first that passes wins."""
    q, p = softmax(w.judge[:, :GAMMA], None), softmax(w.proposer, None, rule.proposer_top_k)
    values, best = w.judge[:, :GAMMA].topk(rule.judge_top_k, dim=-1)
    inside = at(w.judge, w.proposals) >= values[..., -1]
    accepted = prefix((at(q, w.proposals) >= rule.min_prob) & inside)
    here = accepted.clamp(max=GAMMA - 1)
    more = torch.multinomial(row(p, here), rule.trials - 1, replacement=True)
    raw = row(w.judge, here).gather(1, more)
    passes = (row(q, here).gather(1, more) >= rule.min_prob) & (raw >= row(values, here)[:, -1:])
    retried = more.gather(1, passes.int().argmax(-1, keepdim=True))[:, 0]
    fallback = row(best, here).gather(1, torch.multinomial(row(values, here).float().softmax(-1), 1))[:, 0]
    return accepted, continued(accepted, torch.where(passes.any(-1), retried, fallback), False)


def torch_top_k(w: Rows, rule, u: Tensor) -> Answer:
    z = w.judge[:, :GAMMA]
    accepted = prefix((z > at(z, w.proposals)[..., None]).sum(-1) < rule.k)
    token = torch.multinomial(softmax(row(z, accepted.clamp(max=GAMMA - 1)), w.sampling), 1)[:, 0]
    return accepted, continued(accepted, token, False)


def torch_top_p(w: Rows, rule, u: Tensor) -> Answer:
    q = softmax(w.judge[:, :GAMMA], w.sampling)
    above = torch.where(q > at(q, w.proposals)[..., None], q, 0.0).sum(-1)
    accepted = prefix(above < rule.p)
    return accepted, drawn_from(q, accepted, False)


def residual(q: Tensor, p: Tensor, accepted: Tensor, scale: Tensor | float) -> Tensor:
    here = row(q, accepted)
    rest = (scale * here - row(p, accepted.clamp(max=GAMMA - 1))).clamp_(min=0)
    return torch.where((accepted < GAMMA)[:, None], rest, here)


def torch_speculative(w: Rows, rule, u: Tensor) -> Answer:
    q, p = softmax(w.judge, w.sampling), softmax(w.proposer, w.sampling)
    accepted = prefix(u < at(q, w.proposals) / at(p, w.proposals))
    return accepted, torch.multinomial(residual(q, p, accepted, 1.0), 1)[:, 0]


def torch_block(w: Rows, rule, u: Tensor) -> Answer:
    q, p = softmax(w.judge, w.sampling), softmax(w.proposer, w.sampling)
    ratio, kept = at(q, w.proposals) / at(p, w.proposals), [u.new_ones(len(u))]
    for i in range(GAMMA):
        kept.append((kept[-1] * ratio[:, i]).clamp(max=1))
    paid = torch.stack(kept, 1)
    z = (paid[:, 1:GAMMA, None].float() * q[:, 1:GAMMA] - p[:, 1:]).clamp_(min=0).sum(-1)
    h = torch.cat([z / (z + 1 - paid[:, 1:GAMMA]), paid[:, GAMMA:]], 1).nan_to_num(1.0)
    count = torch.arange(1, GAMMA + 1, device=u.device)
    accepted = torch.where(u <= h, count, 0).amax(1)
    return accepted, torch.multinomial(residual(q, p, accepted, paid.gather(1, accepted[:, None]).float()), 1)[:, 0]


def torch_typical(w: Rows, rule, u: Tensor) -> Answer:
    log_q = w.judge.log_softmax(-1, dtype=torch.float32)
    q = log_q.exp()
    entropy = -(q * log_q).sum(-1)[:, :GAMMA]
    accepted = prefix(at(q, w.proposals) > torch.minimum(torch.tensor(rule.epsilon, device=u.device), rule.delta * (-entropy).exp()))
    return accepted, drawn_from(q, accepted, True)


def torch_greedy(w: Rows, rule, u: Tensor) -> Answer:
    best = w.judge.argmax(-1)
    accepted = prefix(w.proposals == best[:, :GAMMA])
    return accepted, row(best, accepted)


def labelled(w: Rows, answer: Answer, reads_proposer: bool) -> tuple:
    """The same, and the labels of every emitted token."""
    accepted, token = answer
    place = torch.arange(GAMMA + 1, device=token.device)
    tokens = torch.nn.functional.pad(w.proposals, (0, 1)).scatter(1, accepted[:, None], token[:, None].clamp(min=0))
    emitted = (place < accepted[:, None]) | ((place == accepted[:, None]) & (token >= 0)[:, None])
    log_q = w.judge.log_softmax(-1, dtype=torch.float32)
    entropy = -(log_q.exp() * log_q).sum(-1)
    rank = (w.judge > at(w.judge, tokens)[..., None]).sum(-1)
    labels = [t.where(emitted, none) for t, none in ((at(log_q, tokens), math.nan), (rank, -1), (entropy, math.nan))]
    if reads_proposer:
        before = tokens[:, :GAMMA]
        labels.append((at(w.proposer, before).float() - w.proposer.float().logsumexp(-1)).where(emitted[:, :GAMMA], math.nan))
    return accepted, token, *labels


@dataclass(frozen=True)
class Work:
    name: str
    rule: decoding.Rule
    peer: Callable[[Rows, decoding.Rule, Tensor], Answer]
    sampling: decoding.Sampling | None = None


WORK = (
    Work("RSD", decoding.ReverseSpeculative(min_prob=0.01), torch_threshold),
    Work("RSD, 5 trials, top-20", decoding.ReverseSpeculative(min_prob=0.01, trials=5, proposer_top_k=20, judge_top_k=20), torch_retries),
    Work("SKD top-25", decoding.TopKAcceptance(k=25), torch_top_k),
    Work("top-p 0.9", decoding.TopPAcceptance(p=0.9), torch_top_p),
    Work("speculative sampling", decoding.SpeculativeSampling(), torch_speculative),
    Work("block verification", decoding.BlockVerification(), torch_block),
    Work("typical", decoding.TypicalAcceptance(), torch_typical),
    Work("threshold 0.1", decoding.ThresholdAcceptance(min_prob=0.1), torch_threshold),
    Work("greedy", decoding.GreedyAcceptance(), torch_greedy),
    Work("speculative sampling, filtered", decoding.SpeculativeSampling(), torch_speculative, FILTERS),
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the gate


def exact_law(z: Tensor, sampling: decoding.Sampling | None, top_k: int | None = None) -> Tensor:
    """Probabilities in float64, by a sort."""
    sampling = sampling or decoding.Sampling()
    x, order = (z.double() / sampling.temperature).sort(-1, descending=True)
    ties = lambda kept: kept | (x >= x.masked_fill(~kept, math.inf).amin(-1, keepdim=True))
    kept = torch.ones_like(x, dtype=torch.bool)
    top_k = top_k or sampling.top_k
    if top_k is not None:
        kept = ties(torch.arange(x.shape[-1], device=x.device).expand(x.shape) < top_k)
    p = x.masked_fill(~kept, -math.inf).softmax(-1)
    if sampling.top_p is not None:
        kept = ties(kept & (p.cumsum(-1) - p < sampling.top_p))
    if sampling.min_p is not None:
        kept = kept & (p >= sampling.min_p * p[..., :1])
    p = torch.where(kept, p, 0.0)
    return torch.zeros_like(p).scatter_(-1, order, p / p.sum(-1, keepdim=True))


def exact_margins(w: Rows, rule, q: Tensor, p: Tensor, u: Tensor) -> Tensor:
    """[B, γ] float64: > 0 where a proposal passes, its size how clearly."""
    x, z = w.proposals, w.judge.double()
    qx, px = at(q, x), at(p, x)
    if isinstance(rule, (decoding.ReverseSpeculative, decoding.ThresholdAcceptance)):
        margin = qx / rule.min_prob - 1
        narrow = getattr(rule, "judge_top_k", None)
        inside = torch.ones_like(x, dtype=torch.bool) if narrow is None else (z[:, :GAMMA] > at(z, x)[..., None]).sum(-1) < narrow
        return margin.where(inside, -1.0)
    if isinstance(rule, decoding.TopKAcceptance):
        return rule.k - 0.5 - (z[:, :GAMMA] > at(z, x)[..., None]).sum(-1)
    if isinstance(rule, decoding.TopPAcceptance):
        return rule.p - q[:, :GAMMA].where(q[:, :GAMMA] > qx[..., None], 0.0).sum(-1)
    if isinstance(rule, decoding.SpeculativeSampling):
        return qx / px / u - 1
    if isinstance(rule, decoding.TypicalAcceptance):
        entropy = -torch.special.xlogy(q, q).sum(-1)[:, :GAMMA]
        return qx / (rule.delta * (-entropy).exp()).clamp(max=rule.epsilon) - 1
    if isinstance(rule, decoding.GreedyAcceptance):
        return torch.where(x == w.judge[:, :GAMMA].float().argmax(-1), 1.0, -1.0)
    assert isinstance(rule, decoding.BlockVerification)
    paid, margins = torch.ones_like(u[:, 0]), []
    for i in range(GAMMA):
        paid = (paid * qx[:, i] / px[:, i]).clamp(max=1)
        z = (paid[:, None] * q[:, i + 1] - p[:, i + 1]).clamp(min=0).sum(-1) if i + 1 < GAMMA else None
        h = paid if z is None else torch.where((z == 0) & (paid == 1), 1.0, z / (z + 1 - paid))
        margins.append(h / u[:, i] - 1)
    # the longest prefix that passes wins: all before it may be counted as passing
    each = torch.stack(margins, 1)
    behind = each.flip(1).cummax(1).values.flip(1)
    return torch.where(each.abs() < NEAR, each, behind)


def exact_weights(w: Rows, rule, q: Tensor, p: Tensor, accepted: Tensor) -> Tensor:
    """What the next token is drawn by, [B, V] float64."""
    here, rows = row(q, accepted), row(p, accepted.clamp(max=GAMMA - 1))
    if isinstance(rule, (decoding.SpeculativeSampling, decoding.BlockVerification)):
        paid = torch.ones_like(here[:, 0])
        if isinstance(rule, decoding.BlockVerification):
            ratio = at(q, w.proposals) / at(p, w.proposals)
            for i in range(GAMMA):
                paid = torch.where(i < accepted, (paid * ratio[:, i]).clamp(max=1), paid)
        rest = (paid[:, None] * here - rows).clamp(min=0)
        return torch.where((accepted < GAMMA)[:, None] & (rest.sum(-1, keepdim=True) > 0), rest, here)
    return here


def check(work: Work, w: Rows, verdict: decoding.Verdict, peers: dict[str, tuple], rows: int = 2) -> None:
    """The gate, on the first requests; see the module's page."""
    rule, name = work.rule, work.name
    w = Rows(w.judge[:rows], w.proposer[:rows], w.proposals[:rows], w.sampling)
    b, u = len(w.proposals), w.uniforms
    q = exact_law(w.judge, w.sampling)
    p = exact_law(w.proposer, w.sampling, getattr(rule, "proposer_top_k", None))
    margins = exact_margins(w, rule, q, p, u)
    accepted = prefix(margins > 0)
    clear = (margins.abs() > NEAR).all(1)
    found = verdict.num_accepted[:b]
    assert torch.equal(found[clear], accepted[clear]), f"{name}: {found.tolist()} proposals are accepted, fp64 accepts {accepted.tolist()}"
    for peer, answer in peers.items():
        assert torch.equal(answer[0][:b][clear], accepted[clear]), f"{name}: {peer} accepts {answer[0][:b].tolist()}, fp64 {accepted.tolist()}"

    token, device = verdict.next_token[:b], w.judge.device
    assert verdict.valid.all() and torch.equal(token >= 0, (found < GAMMA) | (rule.bonus is not None)), f"{name}: a token is missing or too many"
    narrow = getattr(rule, "judge_top_k", None)
    if rule.at_rejection == "argmax":
        best = row(w.judge.float().argmax(-1), found)
        assert torch.equal(token, best.where(token >= 0, -1)), f"{name}: the next token is not the argmax"
    else:
        weights = exact_weights(w, rule, exact_law(w.judge, w.sampling, narrow), p, found)
        places = (torch.full((b,), SEED, device=device), torch.full((b,), POSITION, device=device), found)
        times = -torch.log1p(-uniforms_at(Noise(*places, int(Stream.FALLBACK)), weights.shape[1]).double()) / weights
        retried = verdict.next_source[:b] == decoding.Source.ACCEPTED
        best = times.amin(1)
        mine = times.gather(1, token.clamp(min=0)[:, None])[:, 0]
        wrong = (token >= 0) & ~retried & (mine > best * (1 + NEAR))
        assert not wrong.any(), f"{name}: the next token is not the race's"

    emitted = verdict.tokens(w.proposals) if b == len(verdict.valid) else decoding.Verdict(*(t[:b] for t in vars(verdict).values())).tokens(w.proposals)
    there, ids = emitted >= 0, emitted.clamp(min=0)
    log_q, wide = w.judge.double().log_softmax(-1), w.judge.double()
    exact = {
        "judge_logprobs": at(log_q, ids), "judge_entropy": -(log_q.exp() * log_q).sum(-1), "judge_rank": (wide > at(wide, ids)[..., None]).sum(-1),
    }  # fmt: skip
    if rule.needs_proposer:
        log_p = at(w.proposer.double().log_softmax(-1), ids[:, :GAMMA])
        exact["proposer_logprobs"] = torch.nn.functional.pad(log_p, (0, 1), value=math.nan)
    for label, want in exact.items():
        asked = there & ~want.isnan()
        error = (getattr(verdict, label)[:b].double() - want)[asked].abs().max().item() if asked.any() else 0.0
        assert error < 1e-4, f"{name}: {label} is {error:.1e} from fp64"


# -------------------------------------------------------------------------------------------------------- the contenders


def contenders(work: Work, w: Rows) -> list[Contender]:
    rule, b = work.rule, len(w.proposals)
    judge = w.judge if rule.bonus is not None else w.judge[:, :GAMMA]
    proposer = w.proposer if rule.needs_proposer else None
    positions, u = torch.full((b,), POSITION, device=judge.device), w.uniforms

    def ours() -> decoding.Verdict:
        return decoding.verify(
            rule, w.proposals, proposer_logits=proposer, judge_logits=judge, seeds=SEED, positions=positions, proposer=w.sampling, judge=w.sampling
        )

    def bare() -> Answer:
        return work.peer(w, rule, u)

    def with_labels() -> tuple:
        return labelled(w, bare(), rule.needs_proposer)

    peers = {"PyTorch": bare, "PyTorch + labels": with_labels}
    check(work, w, ours(), {name: run() for name, run in peers.items()})
    made = [Contender("ours", ours), *(Contender(name, run) for name, run in peers.items())]
    if isinstance(rule, decoding.SpeculativeSampling) and b == 1 and w.sampling is None:
        made.append(Contender("transformers", lambda: _speculative_sampling(w.proposals, w.proposer, GAMMA, w.judge)))
    return made


def bench(device: str, repeats: int, quick: bool, progress) -> Iterator[dict]:
    """One row of the table per contender."""
    for dtype in (torch.float32, torch.bfloat16):
        for b in (1,) if quick else (1, 16, 64):
            raw = rows_for(b, VOCAB, dtype, device)
            for work in WORK:
                w = raw if work.sampling is None else rows_for(b, VOCAB, dtype, device, work.sampling, like=raw)
                read = raw.judge if work.rule.bonus is not None else raw.judge[:, :GAMMA]
                nbytes = (read.numel() + (raw.proposer.numel() if work.rule.needs_proposer else 0)) * raw.judge.element_size()
                everyone = [*contenders(work, w), copy_contender(device, nbytes)]
                progress.reset(total=len(everyone) * (repeats + 2))
                progress.set_description(f"{work.name}, B = {b} {dtype}")
                times = race(everyone, device, repeats, progress=progress)
                floor, bare, full = (median(times[name]) for name in ("copy", "PyTorch", "PyTorch + labels"))
                for name, taken in times.items():
                    ms = median(taken)
                    yield {
                        "rule": work.name, "B": b, "gamma": GAMMA, "V": VOCAB, "dtype": str(dtype).removeprefix("torch."), "contender": name,
                        "ms": round(ms, 3), "best_ms": round(min(taken), 3), "x_torch": round(bare / ms, 2), "x_torch_labels": round(full / ms, 2),
                        "floor_ms": round(floor / 2, 3), "over_floor": None if name == "copy" else round(2 * ms / floor, 2),
                        "GB/s": round((2 if name == "copy" else 1) * nbytes / ms / 1e6, 1),
                    }  # fmt: skip
