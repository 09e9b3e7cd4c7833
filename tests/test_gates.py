"""Gates: who writes what, on scripted texts, and inside ``generate`` against a simulation without caches."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import V, disturbed, prompts, rows_after, tiny

from distilkernels.decoding import (
    DivergenceSwitch,
    ReflectionHandoff,
    ReverseSpeculative,
    Sampling,
    SentenceLead,
    Source,
    Turn,
    generate,
)

COLD = Sampling(temperature=0)


class Words:
    """One word a token; unknown words get new ids."""

    def __init__(self, words=()):
        self.words = list(words)

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)

    def encode(self, text, add_special_tokens):
        assert add_special_tokens is False
        parts = text.split(" ")
        return [self.id(f"{part} ") for part in parts]

    def id(self, word):
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)

    def ids(self, *words):
        return [self.id(word) for word in words]


def never(position):
    raise AssertionError("no coin is needed")


# ---- SentenceLead


def test_the_leader_starts_sentences():
    words = Words()
    a, dot, dots = words.ids("a ", "b. ", ".")
    flipped = []
    lead = SentenceLead(lead_tokens=3, probability=0.5, tokenizer=words).lead(lambda position: flipped.append(position) or [0.2, 0.5, 0.49][len(flipped) - 1])
    assert lead.next() == Turn("proposer", 3)
    # the leader is interrupted by the end of a block, and by a delimiter not at all
    assert lead.wrote([a, dot], [math.nan] * 2) == 2
    assert lead.next() == Turn("proposer", 1)
    assert lead.wrote([a], [math.nan]) == 1
    assert lead.next() == Turn("judge")
    assert lead.wrote([a, a], [math.nan] * 2) == 2
    assert lead.next() == Turn("judge")
    # what the follower wrote behind the delimiter is taken back
    assert lead.wrote([a, dots, a, dot], [math.nan] * 4) == 2
    # a coin of exactly the probability is a no
    assert lead.next() == Turn("judge")
    assert lead.wrote([dot, a], [math.nan] * 2) == 1
    assert lead.next() == Turn("proposer", 3)
    assert flipped == [0, 7, 8]


def test_delimiters_of_several_tokens_and_of_ids():
    words = Words()
    a, line, stop = words.ids("a", "\n", "<stop>")
    gate = SentenceLead(1, delimiters=("\n\n", stop), tokenizer=words, leader="judge", follower="rule")
    lead = gate.lead(lambda position: 0.0)
    assert lead.next() == Turn("judge", 1) and lead.wrote([line], [math.nan]) == 1
    # the first half of the delimiter was the leader's
    assert lead.next() == Turn("rule") and lead.wrote([line, a], [math.nan] * 2) == 1
    assert lead.next() == Turn("judge", 1) and lead.wrote([a], [math.nan]) == 1
    assert lead.next() == Turn("rule") and lead.wrote([line, a, line, a], [math.nan] * 4) == 4
    assert lead.next() == Turn("rule") and lead.wrote([a, stop, a], [math.nan] * 3) == 2
    assert lead.next() == Turn("judge", 1)
    # ids alone need no tokenizer
    assert SentenceLead(1, delimiters=(7,)).lead(lambda position: 0.9).next() == Turn("proposer", 1)


def test_a_bonus_behind_the_lead_is_taken_back():
    lead = SentenceLead(2, delimiters=[9], leader="rule").lead(lambda position: 0.0)
    assert lead.next() == Turn("rule", 2) and lead.wrote([1, 2, 3], [math.nan] * 3) == 2
    assert lead.next() == Turn("judge") and lead.wrote([4, 9, 5], [math.nan] * 3) == 2
    assert lead.next() == Turn("rule", 2)


def test_probability_zero_never_leads():
    lead = SentenceLead(2, probability=0, delimiters=(1,)).lead(lambda position: 2.0**-53)
    assert lead.next() == Turn("judge") and lead.wrote([1], [math.nan]) == 1 and lead.next() == Turn("judge")


# ---- ReflectionHandoff


def handoff(words, **options):
    return ReflectionHandoff(words, **(dict(draft_tokens=4, verify_tokens=6, threshold=2, threshold_growth=1, max_threshold=3) | options))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Wait, another idea", "negative"),
        ("so the sum is 4", None),
        ("Yes! the FINAL ANSWER", "positive"),
        ("hold on: yes", "negative"),  # one each
        ("yes, wait, yeah", "positive"),
        ("let me verify and check", "verifying"),
        ("check: confident", "negative"),  # shared, though neither is negative
        ("awaiting rechecks of the eyes", None),  # whole words
        ("think again, think again, wait", "verifying"),
    ],
)
def test_drafts_are_classed_by_their_words(text, kind):
    assert ReflectionHandoff(Words()).classify(text) == kind


def test_a_draft_with_a_word_is_replaced():
    words = Words()
    a, end, wait, check, yes = words.ids("a ", "\n\n", "wait ", "check ", "yes ")
    lead = handoff(words, threshold=99).lead(never)
    nan = [math.nan] * 8
    assert lead.next() == Turn("judge", None)
    assert lead.wrote([a, a, a], nan) == 3
    assert lead.next() == Turn("judge", None)
    assert lead.wrote([a, end, wait], nan) == 2
    # a draft without such words stays, up to the next paragraph, which is drafted anew
    assert lead.next() == Turn("judge", 4)
    assert lead.wrote([a, a, end, a], nan) == 3
    assert lead.next() == Turn("judge", 4)
    assert lead.wrote([a, wait, a, end], nan) == 0
    assert lead.next() == Turn("proposer", 4)
    assert lead.wrote([wait, end, a, end], nan) == 4  # the leader's paragraphs are its own; its last token starts one
    assert lead.next() == Turn("judge", 4)
    # a verifying word, whatever the class, is worth more tokens
    assert lead.wrote([wait, wait, check, a], nan) == 0
    assert lead.next() == Turn("proposer", 10)
    assert lead.wrote([a] * 7, [math.nan] * 7) == 7
    assert lead.next() == Turn("proposer", 3)
    assert lead.wrote([a] * 3, nan) == 3
    assert lead.next() == Turn("judge", None)
    assert lead.wrote([end], nan) == 1
    assert lead.next() == Turn("judge", 4) and lead.wrote([yes, yes, a, a], nan) == 0 and lead.next() == Turn("proposer", 4)


def test_too_many_doubts_bring_a_recap():
    words = Words()
    a, end, wait, yes = words.ids("a ", "\n\n", "wait ", "yes ")
    gate = handoff(words, recap="so far", recap_tokens=(5, 2, 8))
    recap = tuple(words.ids("so ", "far "))
    lead, nan, led = gate.lead(never), [math.nan] * 9, []
    for doubt in [True, True, False, True, True, True, True, True, True, True, True, True]:
        assert lead.next() == Turn("judge", None) and lead.wrote([end], nan) == 1
        assert lead.next() == Turn("judge", 4) and lead.wrote([wait if doubt else yes, a, a, a], nan) == 0
        turn = lead.next()
        if turn.writer == "text":
            assert turn.text == recap and lead.wrote(list(recap), nan) == 2
            turn = lead.next()
            led.append(turn.tokens)
        else:
            led.append(None)
            assert turn == Turn("proposer", 4)
        lead.wrote([a] * turn.tokens, nan)
    # the second doubt, the third after it (positive ones do not count), and from then on every third; 5, 7, then at most 8 tokens
    assert led == [None, 5, None, None, None, 7, None, None, 8, None, None, 8]


# ---- DivergenceSwitch


def test_the_switch_is_at_the_first_jump():
    lead = DivergenceSwitch(2.0).lead(never)
    assert lead.next() == Turn("judge")
    # the first has no mean to be held against; NaN is not counted; exactly twice the mean is no jump: means 3, 2, 2, 3
    assert lead.wrote([1, 2, 3, 4], [3.0, 1.0, math.nan, 4.0]) == 4
    assert lead.next() == Turn("judge")
    assert lead.wrote([1, 2, 3], [4.0, 6.1, 0.0]) == 1
    for _ in range(3):
        assert lead.next() == Turn("proposer")
        assert lead.wrote([1, 2], [99.0, 99.0]) == 2


def test_the_mean_is_over_a_window():
    lead = DivergenceSwitch(2.0, window=2).lead(never)
    assert lead.wrote([1, 2, 3], [9.0, 1.0, 1.0]) == 3
    assert lead.wrote([1, 2], [2.0, 3.1]) == 1  # means 1 and 1.5; with the first, 3 and more


def test_the_divergence_is_the_kl_of_the_leader():
    p, j = torch.randn(2, 3, 11, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    p[0, 0, 2] = -torch.inf
    log_p, log_j = p[..., :8].log_softmax(-1), j.log_softmax(-1)
    kl = lambda a, b: torch.nn.functional.kl_div(b, a, reduction="none", log_target=True).nan_to_num(0).sum(-1)
    torch.testing.assert_close(DivergenceSwitch(2.0).divergence(p, j), kl(log_p, log_j))
    torch.testing.assert_close(DivergenceSwitch(2.0, "judge", "proposer").divergence(p[1:], j[1:]), kl(log_j, log_p)[1:])
    measured = DivergenceSwitch(2.0, measure=lambda leader, follower: (leader.exp() - follower.exp()).abs().sum(-1) / 2).divergence(p, j)
    torch.testing.assert_close(measured, (log_p.exp() - log_j.exp()).abs().sum(-1) / 2)


# ---- inside generate


@pytest.fixture(scope="module")
def pair():
    judge = tiny(seed=3)
    return disturbed(judge, 0.2), judge


def vocabulary():
    """Ninety-seven words, of which many end sentences and paragraphs or are words of doubt."""
    words = [f"w{i} " for i in range(V)]
    words[0:20:2] = ["\n\n"] * 10
    words[1:40:3] = ["wait "] * 13
    words[60:64] = ["check "] * 4
    words[70:80] = ["x. "] * 10
    return Words(words)


GATES = {
    "sentences": SentenceLead(3, tokenizer=vocabulary()),
    "sentences-by-coin": SentenceLead(2, 0.5, tokenizer=vocabulary(), leader="judge", follower="proposer"),
    "reflection": ReflectionHandoff(vocabulary(), draft_tokens=5, verify_tokens=3, threshold=2, recap="w3 w5", recap_tokens=(4, 1, 6)),
    "reflection-judge": ReflectionHandoff(vocabulary(), draft_tokens=3, verify_tokens=3, threshold=2, recap="w3 w5", leader="judge", follower="proposer"),
    "switch": DivergenceSwitch(1.7),
    "switch-judge": DivergenceSwitch(1.5, "judge", "proposer"),
}


def simulated(gate, proposer, judge, prompt, limit, block_size, coin):
    """Greedy decoding under a gate, one whole forward a token: (tokens, sources)."""
    lead, tokens, sources = gate.lead(coin), [], []
    while len(tokens) < limit:
        turn = lead.next()
        if turn.writer == "text":
            block = list(turn.text)[: limit - len(tokens)]
        else:
            block, model = [], proposer if turn.writer == "proposer" else judge
            for _ in range(min(turn.tokens or block_size, limit - len(tokens))):
                block.append(int(rows_after(model, prompt, [*tokens, *block, 0])[-1].argmax()))
        divergence = [math.nan] * len(block)
        if gate.divergence is not None:
            rows = (rows_after(model, prompt, [*tokens, *block])[len(tokens) :] for model in (proposer, judge))
            divergence = gate.divergence(*rows).tolist()
        kept = lead.wrote(block, divergence)
        tokens += block[:kept]
        sources += [{"proposer": Source.ACCEPTED, "judge": Source.FALLBACK, "text": Source.NONE}[turn.writer]] * kept
    return tokens, [int(s) for s in sources]


@pytest.mark.parametrize("name", GATES)
def test_generate_under_a_gate(name, pair):
    from distilkernels.primitives.philox import Stream
    from distilkernels.primitives.sample_rows import coin

    gate, limit, block_size = GATES[name], 30, 6
    ids, mask = prompts()
    seeds = torch.arange(5) + 11
    kw = dict(rule=None, gate=gate, block_size=block_size, max_new_tokens=limit, eos_token_id=None, proposer=COLD, judge=COLD)
    traces = generate(*pair, ids, mask, seeds=seeds, **kw)
    for b in range(5):
        prompt = ids[b, mask[b].bool()]
        own = lambda position, b=b: coin(seeds[b : b + 1], torch.tensor([position]), torch.tensor([0]), int(Stream.GATE)).item()
        tokens, sources = simulated(gate, *pair, prompt, limit, block_size, own)
        assert traces.tokens[b].tolist() == tokens and traces.source[b].tolist() == sources
        # both models read along, whoever writes
        row = torch.tensor(tokens)[:, None]
        for model, label in zip(pair, (traces.proposer_logprobs, traces.judge_logprobs)):
            torch.testing.assert_close(label[b], rows_after(model, prompt, tokens).double().log_softmax(-1).gather(1, row)[:, 0], rtol=1e-4, atol=1e-4)
    assert {int(Source.ACCEPTED), int(Source.FALLBACK)} <= set(traces.source.unique().tolist())
    if isinstance(gate, ReflectionHandoff):
        assert (traces.source == Source.NONE).any()


def test_a_gate_with_a_rule_alone_and_in_a_batch(pair):
    """The follower is proposal and acceptance itself; drafts are drawn, not greedy."""
    ids, mask = prompts()
    gate = SentenceLead(3, 0.7, tokenizer=vocabulary(), leader="judge", follower="rule")
    kw = dict(rule=ReverseSpeculative(min_prob=0.05), gate=gate, block_size=4, eos_token_id=[90, 91, 92])
    together = generate(*pair, ids, mask, seeds=torch.arange(5), max_new_tokens=[18, 18, 5, 18, 18], **kw)
    for b, limit in ((1, 18), (2, 5), (3, 18)):
        alone = generate(*pair, ids[b : b + 1, mask[b].bool()], None, seeds=torch.tensor([b]), max_new_tokens=limit, **kw)
        assert alone.tokens[0].tolist() == together.tokens[b, together.mask[b]].tolist()
        assert torch.equal(alone.source[0], together.source[b, together.mask[b]])


class _Unlucky:
    """Takes some of the follower's tokens back; the leader then writes there."""

    divergence = None

    def __init__(self, refused):
        self.refused = refused

    def lead(self, coin):
        lead = _Unlucky(self.refused)
        lead.writer = "proposer"
        return lead

    def next(self):
        return Turn(self.writer, 1)

    def wrote(self, tokens, divergence):
        kept = self.writer == "judge" or tokens[0] not in self.refused
        self.writer = "proposer" if kept else "judge"
        return int(kept)


def test_a_token_taken_back_says_nothing_about_the_next():
    judge, proposer = (tiny("GPT2LMHeadModel", seed=seed, vocab_size=7, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3) for seed in (1, 2))
    n, refused, prompt = 5_000, [0, 2, 5], torch.tensor([3, 1])
    p, q = (rows_after(model, prompt, [0])[-1].double().softmax(-1) for model in (proposer, judge))
    kept = torch.ones(7, dtype=torch.float64).index_fill(0, torch.tensor(refused), 0.0)
    law = p * kept + (p * (1 - kept)).sum() * q
    traces = generate(
        proposer, judge, prompt.expand(n, -1), None, rule=None, gate=_Unlucky(refused), max_new_tokens=1, seeds=torch.arange(n), eos_token_id=None
    )
    counts = torch.bincount(traces.tokens[:, 0], minlength=7)
    # six degrees of freedom: a false alarm once in 10^7
    assert ((counts - n * law) ** 2 / (n * law)).sum() < 43.5


class _Refusing:
    divergence = None

    def lead(self, coin):
        return self

    def next(self):
        return Turn("judge", 2)

    def wrote(self, tokens, divergence):
        return 0


class _InTurns(_Refusing):
    """Refuses both models, one after the other."""

    def __init__(self):
        self.turns = 0

    def next(self):
        self.turns += 1
        return Turn(("judge", "proposer")[self.turns % 2], 2)


class _Silent(_Refusing):
    def next(self):
        return Turn(self.writer, self.tokens)


def test_errors(pair):
    ids, mask = prompts()

    def run(gate, **options):
        return generate(*pair, ids, mask, **(dict(rule=None, gate=gate, max_new_tokens=9, seeds=0, eos_token_id=None) | options))

    with pytest.raises(RuntimeError, match="kept nothing of what the proposer wrote at position 0 and asked it again"):
        run(_InTurns())
    with pytest.raises(RuntimeError, match="kept nothing of what the judge wrote at position 0 and asked it again"):
        run(_Refusing())
    for writer, tokens, message in (
        ("teacher", 2, "writer of a gate's turn must be one of proposer, judge, rule, text; got 'teacher'"),
        ("judge", 0, "tokens of a gate's turn must be at least 1; got 0"),
        ("text", None, r"text of a gate's turn must not be empty"),
        ("rule", None, "rule must be given for _Silent, which asks for it; got None"),
    ):
        gate = _Silent()
        gate.writer, gate.tokens = writer, tokens
        with pytest.raises(ValueError, match=message):
            run(gate)
    for make, message in (
        (lambda: SentenceLead(0, delimiters=(1,)), "lead_tokens of SentenceLead must be at least 1; got 0"),
        (lambda: SentenceLead(1, 1.5, delimiters=(1,)), r"probability of SentenceLead must be in \[0, 1\]; got 1.5"),
        (lambda: SentenceLead(1), "tokenizer of SentenceLead is needed for delimiters that are texts"),
        (lambda: SentenceLead(1, delimiters=()), "delimiters of SentenceLead must be a sequence of texts and token ids, not empty"),
        (lambda: SentenceLead(1, delimiters=".", tokenizer=Words()), "delimiters of SentenceLead must be a sequence"),
        (lambda: SentenceLead(1, delimiters=(1,), leader="judge"), "leader and follower of SentenceLead must differ; got 'judge' twice"),
        (lambda: ReflectionHandoff(Words(), leader="rule"), "leader of ReflectionHandoff must be one of proposer, judge; got 'rule'"),
        (lambda: ReflectionHandoff(None), "tokenizer of ReflectionHandoff is needed"),
        (lambda: ReflectionHandoff(Words(), threshold=0), "threshold of ReflectionHandoff must be at least 1; got 0"),
        (lambda: DivergenceSwitch(0), "factor of DivergenceSwitch must be above 0; got 0"),
        (lambda: DivergenceSwitch(2.0, window=0), "window of DivergenceSwitch must be a positive int or None; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
