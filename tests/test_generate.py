"""``generate``: greedy decoding is the judge's own, laws hold at every block size, and no request sees the batch around it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_models import GPT2, LLAMA, V, disturbed, prompts, rows_after, tiny  # noqa: E402

from distilkernels.decoding import (  # noqa: E402
    BlockVerification,
    GreedyAcceptance,
    ReverseSpeculative,
    Sampling,
    Source,
    SpeculativeSampling,
    ThresholdAcceptance,
    TopKAcceptance,
    TopPAcceptance,
    TypicalAcceptance,
    caches,
    generate,
    session,
)
from distilkernels.decoding.pace import Pace  # noqa: E402

COLD = Sampling(temperature=0)
RULES = [
    ReverseSpeculative(min_prob=0.02),
    ReverseSpeculative(min_prob=0.02, trials=5, proposer_top_k=20, judge_top_k=20),
    TopKAcceptance(k=5),
    TopPAcceptance(0.8),
    SpeculativeSampling(),
    BlockVerification(),
    TypicalAcceptance(),
    ThresholdAcceptance(0.05),
    GreedyAcceptance(),
]
NAMES = [f"{type(rule).__name__}-{i}" for i, rule in enumerate(RULES)]


@pytest.fixture(scope="module")
def pair():
    judge = tiny(seed=3)
    return disturbed(judge, 0.1), judge


def written(model, ids, mask, limit, eos=None):
    """model.generate's new tokens, a list per request, up to and with the end of sequence."""
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=limit, eos_token_id=eos, pad_token_id=0)[:, ids.shape[1] :]
    ends = [] if eos is None else [eos] if isinstance(eos, int) else eos
    rows = []
    for row in out.tolist():
        first = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        rows.append(row[: first + 1])
    return rows


def tokens_of(traces):
    return [row[keep].tolist() for row, keep in zip(traces.tokens, traces.mask)]


# GPT-2 has learned positions, so that a position counted in slots would show; rotary ones see differences only
@pytest.mark.parametrize(
    ("name", "block_size"),
    [("LlamaForCausalLM", 1), ("LlamaForCausalLM", 8), ("Qwen2ForCausalLM", 3), ("GPT2LMHeadModel", 5), ("OPTForCausalLM", 8)],
)
def test_greedy_is_the_judges_own_decoding(name, block_size):
    sizes = dict(ffn_dim=64, word_embed_proj_dim=32, init_std=0.2) if name.startswith("OPT") else {}
    judge = tiny(name, **sizes)
    proposer = disturbed(judge, 0.1)
    ids, mask = prompts()
    for eos in (None, [3, 50, 61, 80]):
        expected = written(judge, ids, mask, 21, eos)
        together = generate(
            proposer, judge, ids, mask, rule=GreedyAcceptance(), block_size=block_size, max_new_tokens=21, seeds=0, eos_token_id=eos, proposer=COLD
        )
        assert tokens_of(together) == expected
        assert together.finished == tuple("eos" if eos and row[-1] in eos else "length" for row in expected)
        # some, not all: both ways of going on are taken
        assert 0.1 < together.acceptance_rate < 0.95
    for b in (1, 2):
        alone = generate(
            proposer, judge, ids[b : b + 1, mask[b].bool()], None, rule=GreedyAcceptance(), block_size=block_size, max_new_tokens=21, seeds=0,
            eos_token_id=eos, proposer=COLD,
        )  # fmt: skip
        assert tokens_of(alone) == [expected[b]]


def test_a_static_cache_gives_the_same(pair):
    proposer, judge = (disturbed(model, 0.0) for model in pair)
    ids, mask = prompts()
    expected = written(judge, ids, mask, 25)
    for model in (proposer, judge):
        model.generation_config.cache_implementation = "static"
    if int(transformers.__version__.split(".")[0]) < 5:
        with pytest.raises(ValueError, match="a StaticCache can be rolled back with full attention and transformers ≥ 5 only"):
            generate(proposer, judge, ids, mask, rule=GreedyAcceptance(), max_new_tokens=3, seeds=0, eos_token_id=None)
        return
    limits = [25, 3, 25, 10, 25]  # requests leave a static cache too
    traces = generate(proposer, judge, ids, mask, rule=GreedyAcceptance(), block_size=4, max_new_tokens=limits, seeds=0, eos_token_id=None, proposer=COLD)
    assert tokens_of(traces) == [row[:limit] for row, limit in zip(expected, limits)]


@pytest.mark.parametrize("rule", [SpeculativeSampling(), BlockVerification(), GreedyAcceptance()], ids=lambda rule: type(rule).__name__)
def test_a_judge_accepts_all_of_its_own_proposals(rule, pair):
    judge = pair[1]
    ids, mask = prompts()
    sampling = COLD if isinstance(rule, GreedyAcceptance) else Sampling(temperature=0.9, top_p=0.95)
    traces = generate(judge, judge, ids, mask, rule=rule, max_new_tokens=31, seeds=5, eos_token_id=None, proposer=sampling, judge=sampling)
    assert traces.acceptance_rate == 1
    # eight proposals and a bonus, over and over; the last block is cut
    assert (traces.source[:, 8::9] == Source.BONUS).all() and (traces.source == Source.BONUS).sum() == 5 * 3


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_request_alone_is_the_request_in_a_batch(rule, pair):
    ids, mask = prompts()
    b = len(ids)
    limits, seeds = [15, 11, 15, 5, 13], torch.arange(b) * 7 - 3
    temperature, top_k = torch.tensor([1.0, 0.7, 1.3, 0.0, 1.0]), torch.tensor([50, 9, 97, 5, 20])
    if hasattr(rule, "min_prob"):
        rule = dataclasses.replace(rule, min_prob=torch.tensor([0.01, 0.1, 0.02, 0.3, 0.001]))

    def run(rows, rule, cut):
        return generate(
            *pair, ids[rows, cut:], mask[rows, cut:], rule=rule, block_size=4, max_new_tokens=[limits[r] for r in rows], seeds=seeds[rows],
            eos_token_id=[5, 7], proposer=Sampling(temperature[rows]), judge=Sampling(temperature[rows], top_k[rows]),
        )  # fmt: skip

    def for_rows(rows):
        own = {f.name: getattr(rule, f.name)[rows] for f in dataclasses.fields(rule) if isinstance(getattr(rule, f.name), torch.Tensor)}
        return dataclasses.replace(rule, **own) if own else rule

    together = run(list(range(b)), rule, 0)
    for r in (1, 2, 3):  # with left padding in the batch
        alone = run([r], for_rows([r]), int((mask[r] == 0).sum()))
        n = int(together.lengths[r])
        assert tokens_of(alone)[0] == tokens_of(together)[r] and alone.finished[0] == together.finished[r]
        assert torch.equal(alone.source[0], together.source[r, :n])
        for name in ("judge_logprobs", "proposer_logprobs", "judge_entropy"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[r, :n], rtol=1e-4, atol=1e-4, equal_nan=True)
    swapped = run([4, 0], for_rows([4, 0]), 0)
    assert tokens_of(swapped) == [tokens_of(together)[r] for r in (4, 0)]


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_labels_are_both_models_own_words(rule, pair):
    proposer, judge = pair
    ids, mask = prompts()
    # the proposer reads another prompt, of another width, with other padding
    own_ids, own_mask = prompts((3, 7, 5, 2, 7), 7, seed=4)
    traces = generate(
        proposer, judge, ids, mask, rule=rule, block_size=5, max_new_tokens=14, seeds=torch.arange(5), eos_token_id=None,
        proposer_input_ids=own_ids, proposer_attention_mask=own_mask, proposer=Sampling(1.2), judge=Sampling(0.8, top_k=30),
    )  # fmt: skip
    for b, tokens in enumerate(tokens_of(traces)):
        row = torch.tensor(tokens)[:, None]
        z = rows_after(judge, ids[b, mask[b].bool()], tokens).double()
        logprobs, chosen = z.log_softmax(-1), z.gather(1, row)
        torch.testing.assert_close(traces.judge_logprobs[b], logprobs.gather(1, row)[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(traces.judge_entropy[b], -(logprobs.exp() * logprobs).sum(-1), rtol=1e-4, atol=1e-4)
        assert torch.equal(traces.judge_rank[b], (z > chosen).sum(1))
        proposed = rows_after(proposer, own_ids[b, own_mask[b].bool()], tokens).double().log_softmax(-1).gather(1, row)[:, 0]
        bonus = traces.source[b] == Source.BONUS
        assert torch.equal(traces.proposer_logprobs[b].isnan(), bonus)
        torch.testing.assert_close(traces.proposer_logprobs[b][~bonus], proposed[~bonus], rtol=1e-4, atol=1e-4)
    sources = set(traces.source.unique().tolist())
    # a proposer of another prompt hardly ever hits the judge's argmax
    assert len(sources) > 1 or isinstance(rule, GreedyAcceptance)


# ---- laws

TOY = dict(GPT2, vocab_size=7, n_embd=16, n_layer=1, n_head=2, initializer_range=0.6)


def one_position(rule, p, q):
    """The law of one token, float64 [..., V], of laws p and q at that position."""
    if not isinstance(rule, ReverseSpeculative):
        return q
    if rule.proposer_top_k is not None:
        p = torch.where(p >= p.topk(rule.proposer_top_k).values[..., -1:], p, 0.0)
        p = p / p.sum(-1, keepdim=True)
    passed = p * (q >= rule.min_prob)
    a = passed.sum(-1, keepdim=True)
    success = 1 - (1 - a) ** rule.trials
    return torch.where(a > 0, success * passed / a.clamp(min=1e-300), 0.0) + (1 - success) * q


def joint_law(rule, proposer, judge, prompt, length, temperature):
    """[V^length]: every continuation's probability, by enumeration."""
    vocab = judge.config.vocab_size
    paths, law = torch.zeros(1, 0, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    for _ in range(length):
        sequence = torch.cat([prompt.expand(len(paths), -1), paths], 1)
        with torch.no_grad():
            p, q = (model(sequence).logits[:, -1].double() for model in (proposer, judge))
        step = one_position(rule, p.softmax(-1), (q / temperature).softmax(-1))
        law = (law[:, None] * step).flatten()
        paths = torch.cat([paths.repeat_interleave(vocab, 0), torch.arange(vocab).repeat(len(paths))[:, None]], 1)
    return law


def chi_square_p(counts, law):
    """Cells of fewer than 5 expected are counted as one."""
    expected = law * counts.sum()
    small = expected < 5
    observed = torch.cat([counts[~small].double(), counts[small].sum()[None].double()])
    wanted = torch.cat([expected[~small], expected[small].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    return torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64), statistic / 2).item()


@pytest.mark.parametrize("block_size", [1, 8, "auto"])
@pytest.mark.parametrize(
    "rule", [SpeculativeSampling(), BlockVerification(), ReverseSpeculative(0.1), ReverseSpeculative(0.1, trials=4, proposer_top_k=4)],
    ids=["speculative", "block", "rsd", "rsd-trials"],
)  # fmt: skip
def test_the_law_does_not_depend_on_the_block_size(rule, block_size):
    judge, proposer = tiny("GPT2LMHeadModel", seed=1, **TOY), tiny("GPT2LMHeadModel", seed=2, **TOY)
    n, length, prompt = 5_000, 3, torch.tensor([[3, 1]])
    # fourteen tests at 1e-7 each: a false alarm in 700,000 runs of all of them
    law = joint_law(rule, proposer, judge, prompt, length, 1.3)
    traces = generate(
        proposer, judge, prompt.expand(n, -1), None, rule=rule, block_size=block_size, max_new_tokens=length, seeds=torch.arange(n) + 2**40,
        eos_token_id=None, judge=Sampling(1.3),
    )  # fmt: skip
    cells = (traces.tokens * 7 ** torch.arange(length - 1, -1, -1)).sum(1)
    counts = torch.bincount(cells, minlength=7**length)
    assert chi_square_p(counts, law) > 1e-7
    # and it can tell: RSD from the judge alone, the judge from the same at another temperature
    other = joint_law(SpeculativeSampling(), proposer, judge, prompt, length, 1.3 if isinstance(rule, ReverseSpeculative) else 1.0)
    assert chi_square_p(counts, other) < 1e-7


@pytest.mark.parametrize("rule", [SpeculativeSampling(), BlockVerification()], ids=["speculative", "block"])
def test_an_end_of_sequence_does_not_bend_the_law(rule):
    """A proposed end cuts the block short, so that a block's length depends on what was drawn in it."""
    judge, proposer = tiny("GPT2LMHeadModel", seed=1, **TOY), tiny("GPT2LMHeadModel", seed=2, **TOY)
    n, length, end, prompt = 5_000, 3, 4, torch.tensor([[3, 1]])
    digits = 7 ** torch.arange(length - 1, -1, -1)
    traces = generate(proposer, judge, prompt.expand(n, -1), None, rule=rule, max_new_tokens=length, seeds=torch.arange(n), eos_token_id=end)
    counts = torch.bincount((traces.tokens.masked_fill(~traces.mask, end) * digits).sum(1), minlength=7**length)
    paths = torch.cartesian_prod(*[torch.arange(7)] * length)
    ended = ((paths == end).cumsum(1) - (paths == end).long()).bool()  # behind an end: whatever is there counts as another
    law = torch.zeros(7**length, dtype=torch.float64)
    law.index_add_(0, (paths.masked_fill(ended, end) * digits).sum(1), joint_law(rule, proposer, judge, prompt, length, 1.0))
    assert 0.1 < traces.mask[:, 1:].float().mean() < 0.95
    assert chi_square_p(counts, law) > 1e-7


def test_seeds(pair):
    ids, mask = prompts((5,), 5)
    ids, mask = ids.expand(3, -1), mask.expand(3, -1)
    run = lambda seeds: tokens_of(generate(*pair, ids, mask, rule=ReverseSpeculative(), max_new_tokens=20, seeds=seeds, eos_token_id=None))
    same, different = run(9), run(torch.tensor([9, 10, 11]))
    assert same[0] == same[1] == same[2] == different[0]
    assert different[0] != different[1] != different[2]


# ---- vocabularies, ends, batches


def test_unequal_vocabularies():
    """The wider model's extra columns are real, and large: none is ever written, whoever is wider."""
    wide, narrow = tiny(seed=3, vocab_size=V + 11), tiny(seed=3)
    with torch.no_grad():
        for (name, target), source in zip(wide.named_parameters(), disturbed(narrow, 0.1).parameters()):
            target[: source.shape[0]] = source
            if name == "lm_head.weight":
                target[V:] = 3 * source[:11]
    ids, mask = prompts()
    expected = written(narrow, ids, mask, 20)
    traces = generate(wide, narrow, ids, mask, rule=GreedyAcceptance(), max_new_tokens=20, seeds=0, eos_token_id=None, proposer=COLD)
    assert tokens_of(traces) == expected and traces.acceptance_rate > 0.1
    for rule in RULES:
        for proposer, judge in ((wide, narrow), (narrow, wide)):
            traces = generate(proposer, judge, ids, mask, rule=rule, max_new_tokens=5, seeds=torch.arange(5), eos_token_id=None)
            assert traces.finished == ("length",) * 5 and 0 <= int(traces.tokens.min()) and int(traces.tokens.max()) < V


def test_valid_vocab_is_never_passed(pair):
    ids, mask = prompts()
    traces = generate(*pair, ids, mask, rule=SpeculativeSampling(), max_new_tokens=20, seeds=torch.arange(5), eos_token_id=None, valid_vocab=31)
    assert int(traces.tokens.max()) < 31


def test_padding_of_traces(pair):
    ids, mask = prompts()
    traces = generate(*pair, ids, mask, rule=ReverseSpeculative(), max_new_tokens=[3, 9, 1, 4, 7], seeds=1, eos_token_id=None, pad_token_id=96)
    assert traces.lengths.tolist() == [3, 9, 1, 4, 7] and traces.tokens.shape == (5, 9)
    assert (traces.tokens[~traces.mask] == 96).all() and (traces.source[~traces.mask] == Source.NONE).all()
    assert traces.judge_logprobs[~traces.mask].isnan().all() and (traces.judge_rank[~traces.mask] == -1).all()
    assert (traces.source[traces.mask] >= 0).all()


def test_finished_requests_leave_and_slots_are_regathered(pair, monkeypatch):
    proposer, judge = pair
    ids, mask = prompts()
    batches, gathered = [], []
    hook = judge.register_forward_pre_hook(lambda module, args, kwargs: batches.append(tuple(kwargs["attention_mask"].shape)), with_kwargs=True)

    def counted(cache, rows, index):
        gathered.append((len(rows), index.shape[1]))
        caches.regather(cache, rows, index)

    monkeypatch.setattr(session, "regather", counted)
    monkeypatch.setattr(session.Session, "slack", 2)
    limits = [40, 2, 40, 40, 40]
    kw = dict(rule=ReverseSpeculative(min_prob=0.02), block_size=4, seeds=torch.arange(5), eos_token_id=None)
    traces = generate(proposer, judge, ids, mask, max_new_tokens=limits, **kw)
    hook.remove()
    widths = [b for b, _ in batches]
    assert widths[0] == 5 and widths[-1] < 4 and widths == sorted(widths, reverse=True)
    # requests go at their own speed, and the axis stays within a quarter of what is used and a round
    assert max(slots for _, slots in batches) <= 1.25 * (9 + 40) + 2 + 6
    # for both models when a request leaves, and in between for waste alone
    assert any(before == after for (before, _), (after, _) in zip(gathered, gathered[2:]))
    alone = generate(proposer, judge, ids[3:4], mask[3:4], max_new_tokens=40, **(kw | dict(seeds=torch.tensor([3]))))
    assert tokens_of(alone)[0] == tokens_of(traces)[3]


def test_rejected_slots_are_dropped(pair):
    """Alone there is no waste at all: the cache ends where the sequence does."""
    seen = []
    hook = pair[1].register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    ids, _ = prompts((5,), 5)
    generate(*pair, ids, None, rule=ReverseSpeculative(min_prob=0.2), max_new_tokens=40, seeds=2, eos_token_id=None)
    hook.remove()
    assert all(mask.all() for mask in seen) and seen[-1].shape[1] <= 5 + 40


def test_blocks_that_pay():
    """``block_size="auto"`` takes the size that brings most tokens for its cost, by brute force over sequences of verdicts."""
    for ratio, bonus, accepted in ((0.3, False, 0.5), (0.3, False, 0.8), (0.3, False, 0.95), (5.0, True, 0.4), (5.0, True, 0.9), (0.1, False, 1.0)):
        block = Pace(ratio, bonus)
        block.kept, block.judged = accepted * 100, 100.0
        ends = [accepted**i * (1 - accepted) for i in range(Pace.most)]  # the first rejection is at i
        rate = {
            g: (sum((i + 1) * ends[i] for i in range(g)) + (g + bonus) * accepted**g) / (g + ratio) for g in range(1, Pace.most + 1)
        }  # fmt: skip
        assert rate[block.size()] == pytest.approx(max(rate.values()), rel=1e-12)
        # a second proposal pays where a > 1 / (1 + r)
        assert bonus or (block.size() > 1) == (accepted > 1 / (1 + ratio))
    seen = Pace(1.0, False)
    seen.saw(3, 8)
    seen.saw(8, 8)
    assert (seen.kept, seen.judged) == (7 + 11, 10 + 4 + 8)


def test_auto_blocks_follow_each_requests_own_acceptance(pair):
    """Long where all is kept, single where nothing is; a request alone is the request in the batch."""
    proposer, judge = pair
    ids, mask = prompts()
    seen = []
    hook = judge.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    # the first and the last request take everything, the others nothing
    rule = ReverseSpeculative(min_prob=torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))
    kw = dict(max_new_tokens=60, eos_token_id=None, block_size="auto")
    together = generate(proposer, judge, ids, mask, rule=rule, seeds=torch.arange(5), **kw)
    widths, seen[:] = list(seen), []
    for b in (0, 2):
        alone = generate(proposer, judge, ids[b : b + 1], mask[b : b + 1], rule=ReverseSpeculative(float(rule.min_prob[b])), seeds=b, **kw)
        assert tokens_of(alone)[0] == tokens_of(together)[b]
        lengths, seen[:] = list(seen[1:]), []  # without the prompt
        # a read takes the last token and all proposals but one; the last block is cut
        assert lengths[:-1] == sorted(lengths[:-1]) and max(lengths) > 4 if b == 0 else lengths[-40:] == [1] * 40
    hook.remove()
    assert max(widths[1:]) > 4 and widths[-1] == 1


def test_callback_and_progress(pair, capsys):
    ids, mask = prompts()
    seen = {b: ([], []) for b in range(5)}

    def callback(request, tokens, sources):
        assert len(tokens) == len(sources) > 0
        seen[request][0].extend(tokens)
        seen[request][1].extend(sources)

    traces = generate(
        *pair, ids, mask, rule=SpeculativeSampling(), max_new_tokens=[9, 20, 14, 3, 20], seeds=torch.arange(5), eos_token_id=[1, 2, 3, 4],
        callback=callback, progress=True,
    )  # fmt: skip
    assert [seen[b][0] for b in range(5)] == tokens_of(traces)
    assert [seen[b][1] for b in range(5)] == [row[keep].tolist() for row, keep in zip(traces.source, traces.mask)]
    bar = capsys.readouterr().err
    assert f"{int(traces.lengths.sum())}/66" in bar and "accepted=" in bar and "tok/s" in bar


def test_the_bar_is_closed_when_a_callback_raises(pair):
    from tqdm.auto import tqdm

    def callback(*_):
        raise KeyboardInterrupt

    ids, mask = prompts()
    before = set(tqdm._instances)
    # what was raised keeps generate's frame, and so its bar, alive
    with pytest.raises(KeyboardInterrupt) as raised:
        generate(*pair, ids, mask, rule=SpeculativeSampling(), max_new_tokens=4, seeds=0, eos_token_id=None, callback=callback, progress=True)
    assert raised.tb is not None and set(tqdm._instances) == before


def test_a_broken_request_stops_alone(pair):
    proposer, judge = disturbed(pair[0], 0.0), disturbed(pair[1], 0.0)
    with torch.no_grad():
        judge.get_input_embeddings().weight[11] = math.nan
    ids, mask = prompts()
    ids[ids == 11] = 12
    kw = dict(rule=ReverseSpeculative(), max_new_tokens=6, seeds=torch.arange(5), eos_token_id=None)
    healthy = generate(proposer, judge, ids, mask, **kw)
    ids[2, -1] = 11
    traces = generate(proposer, judge, ids, mask, **kw)
    assert traces.finished[2] == "invalid" and traces.lengths[2] == 0
    others = [0, 1, 3, 4]
    assert [tokens_of(traces)[b] for b in others] == [tokens_of(healthy)[b] for b in others]


def test_no_requests(pair):
    traces = generate(*pair, torch.zeros(0, 3, dtype=torch.int64), None, rule=ReverseSpeculative(), max_new_tokens=6, seeds=0, eos_token_id=1)
    assert traces.tokens.shape == (0, 0) and len(traces) == 0


# ---- models that cannot, arguments that are wrong


def test_a_window_that_is_never_reached_is_none():
    kw = dict(rule=GreedyAcceptance(), block_size=4, seeds=0, eos_token_id=None, proposer=COLD)
    ids, mask = prompts()
    judge = tiny("MistralForCausalLM", seed=3, sliding_window=40)
    traces = generate(disturbed(judge, 0.1), judge, ids, mask, max_new_tokens=25, **kw)
    assert tokens_of(traces) == written(judge, ids, mask, 25)
    with pytest.raises(ValueError, match=r"proposer_model|judge_model.*MistralForCausalLM attends through a window of 40 slots and this run may fill 41"):
        generate(judge, judge, ids, mask, max_new_tokens=26, **kw)


REFUSED = {
    "MambaForCausalLM": (dict(vocab_size=V, hidden_size=32, num_hidden_layers=1, state_size=4), "judge_model .* MambaForCausalLM keeps a recurrent state"),
    "Gemma2ForCausalLM": (dict(LLAMA, head_dim=8, sliding_window=8), "judge_model: Gemma2ForCausalLM attends through a window of 8 slots"),
    "BloomForCausalLM": (
        dict(vocab_size=V, hidden_size=32, n_layer=1, n_head=4), "judge_model must take position_ids in forward.*BloomForCausalLM does not",
    ),
    "T5ForConditionalGeneration": (
        dict(vocab_size=V, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2), "judge_model must be a decoder-only causal LM; got the encoder-decoder T5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_rolled_back_are_named(name, pair):
    config, message = REFUSED[name]
    cls = getattr(transformers, name)
    ids, mask = prompts()
    with pytest.raises(ValueError, match=message):
        generate(pair[0], cls(cls.config_class(**config)).eval(), ids, mask, rule=ReverseSpeculative(), max_new_tokens=9, seeds=0, eos_token_id=None)


def test_errors_name_the_argument(pair):
    ids, mask = prompts()
    good = dict(rule=ReverseSpeculative(), max_new_tokens=4, seeds=0, eos_token_id=None)

    def refused(kind, message, *args, **changed):
        with pytest.raises(kind, match=message):
            generate(*(args or (*pair, ids, mask)), **(good | changed))

    training = disturbed(pair[1], 0.0).train()
    refused(ValueError, r"judge_model must be in evaluation mode", pair[0], training, ids, mask)
    refused(ValueError, r"proposer_model must be in evaluation mode", training, pair[1], ids, mask)
    refused(TypeError, r"proposer_model must be a transformers causal LM; got int", 3, pair[1], ids, mask)
    refused(TypeError, r"input_ids must be an int32 or int64 tensor; got torch.float32", *pair, ids.float(), mask)
    refused(ValueError, r"input_ids must have shape \[B, T\], T ≥ 1; got \(9,\)", *pair, ids[0], mask[0])
    refused(ValueError, r"attention_mask must have the shape of input_ids, \(5, 9\); got \(5, 8\)", *pair, ids, mask[:, 1:])
    refused(ValueError, r"attention_mask must be left-padded.*row 1 is not", *pair, ids, mask.flip(1))
    refused(ValueError, r"proposer_input_ids must have shape \[5, T\].*got \(2, 9\)", proposer_input_ids=ids[:2])
    refused(ValueError, r"proposer_attention_mask needs proposer_input_ids", proposer_attention_mask=mask)
    refused(TypeError, r"rule must be one of distilkernels.decoding's rules.*got str", rule="rsd")
    refused(ValueError, r"rule must be given where no gate decides", rule=None)
    refused(ValueError, r'block_size must be an int of at least 1 or "auto"; got 0', block_size=0)
    refused(ValueError, r"max_new_tokens must be an int or have one entry a request, 5; got 2", max_new_tokens=[1, 2])
    refused(ValueError, r"max_new_tokens must be at least 1, ints; got 0", max_new_tokens=0)
    refused(ValueError, r"eos_token_id must be a token id, several, or None; got \[-1\]", eos_token_id=[-1])
    refused(ValueError, r"seeds must have the token shape \(5,\)", seeds=torch.arange(4))
    refused(ValueError, r"max_new_tokens must be at least 1, ints; got 3.5", max_new_tokens=3.5)
    refused(ValueError, r"eos_token_id must be a token id, several, or None; got 3.0", eos_token_id=3.0)
    refused(TypeError, r"gate must be a Gate or None; got int", gate=3)
    refused(ValueError, r"the prompts of judge_model must have ids in \[0, 97\), the rows of its embedding", *pair, torch.where(mask == 1, V, ids), mask)
    refused(ValueError, r"the prompts of proposer_model must have ids in \[0, 53\)", tiny(vocab_size=53), pair[1], ids, mask)
    refused(TypeError, r"proposer must be a Sampling; got float", proposer=0.5)
    quantized = disturbed(pair[1], 0.0)
    quantized.generation_config.cache_implementation = "quantized"
    refused(ValueError, r"cache_implementation must be None, 'dynamic' or 'static'.*'quantized'", pair[0], quantized, ids, mask)
