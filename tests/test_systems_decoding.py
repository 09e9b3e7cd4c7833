"""Recipes of docs/systems.md with two models: each against a simulation without caches, blocks or kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from recipes import Recipe, at, f64, same
from tiny_models import V, disturbed, prompts, rows_after, tiny

from distilkernels.decoding import Sampling, Source

COLD = Sampling(temperature=0)


@pytest.fixture
def recipe(request):
    return Recipe(request.node.originalname.removeprefix("test_"))


@pytest.fixture(scope="module")
def models():
    """(large, small): double models, so that a cache does not change an argmax; too small for a second thread to pay."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = tiny(seed=3).double()
    yield disturbed(small, 0.15), small
    torch.set_num_threads(threads)


def next_greedy(model, prompt, tokens):
    return int(rows_after(model, prompt, [*tokens, 0])[-1].argmax())


def written(traces):
    return [row[keep].tolist() for row, keep in zip(traces.tokens, traces.mask)]


def test_rsd(recipe, models):
    teacher, student = models
    ids, mask = prompts((7, 3), width=7)
    traces = recipe.rsd(teacher, student, ids, mask, torch.tensor([5, 6]), 24)
    sources = set()
    for b, tokens in enumerate(written(traces)):
        prompt = ids[b, mask[b].bool()]
        judged, proposed = (rows_after(model, prompt, tokens).log_softmax(-1) for model in (student, teacher))
        for i, token in enumerate(tokens):
            q, source = judged[i], int(traces.source[b, i])
            sources.add(source)
            assert traces.judge_logprobs[b, i].item() == pytest.approx(q[token].item(), abs=1e-9)
            # an accepted token is in both pools and likely enough, a fallback in the student's pool
            assert (q > q[token]).sum() < 20
            if source == Source.ACCEPTED:
                assert q[token].exp() >= 0.01 and (proposed[i] > proposed[i, token]).sum() < 20
    assert sources == {Source.ACCEPTED, Source.FALLBACK}


def test_foreal_decoding(recipe, models):
    leader, draft = models
    ids, mask = prompts((7, 3), width=7)
    delimiters = [*range(0, V, 6)]
    traces = recipe.foreal(leader, draft, ids, mask, delimiters, 3, 24, 0, sampling=COLD)
    for b, got in enumerate(written(traces)):
        prompt, tokens = ids[b, mask[b].bool()], []
        leading = 3
        while len(tokens) < 24:
            tokens.append(next_greedy(leader if leading else draft, prompt, tokens))
            if leading:
                leading -= 1
            elif tokens[-1] in delimiters:
                leading = 3
        assert got == tokens


class Letters:
    """Token i is a word; some are reflections, some end a paragraph."""

    def decode(self, ids):
        return "".join(" wait" if i % 7 == 0 else " check" if i % 11 == 0 else ".\n\n" if i % 5 == 0 else f" w{i}" for i in ids)

    def encode(self, text, add_special_tokens=False):
        return [1, 2, 3]


def test_speculative_thinking(recipe, models):
    large, small = models
    ids, mask = prompts((7, 3), width=7)
    limits = dict(draft_tokens=4, verify_tokens=5, threshold=2, threshold_growth=1, max_threshold=3, recap_tokens=(3, 1, 4))
    traces = recipe.speculative_thinking(large, small, ids, mask, Letters(), 60, 0, sampling=COLD, **limits)
    text, handed = Letters().decode, 0
    for b, got in enumerate(written(traces)):
        prompt, tokens = ids[b, mask[b].bool()], []
        negatives, threshold, recaps, paragraph = 0, 2, 0, False

        def write(model, count, prompt=prompt, tokens=tokens):
            for _ in range(count):
                tokens.append(next_greedy(model, prompt, tokens))

        while len(tokens) < 60:
            if not paragraph:
                write(small, 1)
                paragraph = tokens[-1] % 5 == 0 and tokens[-1] % 7 != 0 and tokens[-1] % 11 != 0
                continue
            draft = list(tokens)
            write(small, 4, tokens=draft)
            words = text(draft[len(tokens) :])
            waits, checks = words.count("wait"), words.count("check")
            if not waits and not checks:
                # the draft stays, up to where a paragraph ends in it
                paragraph = False
                for token in draft[len(tokens) :]:
                    tokens.append(token)
                    if text([token]).endswith("\n\n"):
                        paragraph = True
                        break
                continue
            handed += 1
            count = 4 + (5 if checks else 0)
            negatives += waits >= checks
            if negatives >= threshold:
                count = min(3 + recaps, 4)
                tokens += [1, 2, 3]
                negatives, recaps, threshold = 0, recaps + 1, min(threshold + 1, 3)
            write(large, count)
            paragraph = text(tokens[-1:]).endswith("\n\n")
        assert got == tokens[:60]
    assert handed > 3


def test_sirius(recipe, models):
    full, sparse = models
    ids, mask = prompts((7, 3), width=7)
    traces = recipe.sirius(sparse, full, ids, mask, 18, 0, threshold=0.1, proposer=COLD)
    kept = 0
    for b, got in enumerate(written(traces)):
        prompt, tokens = ids[b, mask[b].bool()], []
        while len(tokens) < 18:
            proposal = next_greedy(sparse, prompt, tokens)
            q = (rows_after(full, prompt, [*tokens, 0])[-1] / 0.6).softmax(-1)
            accepted = bool(q[proposal] >= 0.1)
            kept += accepted
            tokens.append(proposal if accepted else int(q.argmax()))
        assert got == tokens
    assert 0 < kept < 36


def test_adaswitch(recipe, models):
    teacher, student = models
    ids, mask = prompts((7, 3), width=7)
    traces = recipe.adaswitch(teacher, student, ids, mask, 2.0, 3, 14, 0, sampling=COLD)
    switched = 0
    for b, got in enumerate(written(traces)):
        prompt, tokens, seen, leading = ids[b, mask[b].bool()], [], [], False
        while len(tokens) < 14:
            p, q = (rows_after(model, prompt, [*tokens, 0])[-1].log_softmax(-1) for model in (teacher, student))
            d = (p.exp() * (p - q)).sum().item()
            leading = leading or (bool(seen) and d > 2.0 * sum(seen[-3:]) / len(seen[-3:]))
            seen.append(d)
            tokens.append(int((p if leading else q).argmax()))
        switched += leading
        assert got == tokens
    assert switched


def test_score(recipe, models):
    teacher, _ = models
    tokens, fork = torch.randint(0, V, (3, 8)), torch.tensor([8, 3, 5])
    traces = recipe.score(teacher, tokens, fork, 6, 0, sampling=COLD)
    for b, got in enumerate(written(traces)):
        new = []
        while len(new) < 6:
            new.append(next_greedy(teacher, tokens[b, : fork[b]], new))
        assert got == new


def test_calm(recipe, models):
    model, _ = models
    tokens, hint = torch.randint(0, V, (9,)), torch.tensor([11, 12])
    new = []
    while len(new) < 6:
        new.append(next_greedy(model, torch.cat([tokens[:4], hint]), new))
    assert written(recipe.calm(model, tokens, 4, hint, 6, 0, sampling=COLD)) == [new]


def test_unir(recipe):
    base, reasoner, tokens = f64(2, 5, 53).requires_grad_(), f64(2, 5, 53).requires_grad_(), torch.randint(0, 53, (2, 5))
    same(recipe.unir(base, reasoner, tokens, 0.7), at((base.detach() + 0.7 * reasoner).log_softmax(-1), tokens), (reasoner,))
    assert torch.autograd.grad(recipe.unir(base, reasoner, tokens).sum(), base, allow_unused=True) == (None,)


def test_dcd(recipe):
    expert, amateur = f64(3, 53, scale=2), f64(3, 53)
    p = expert.softmax(-1)
    want = torch.where(p >= 0.1 * p.amax(-1, keepdim=True), 1.5 * expert - 0.5 * amateur, -torch.inf)
    same(recipe.dcd(expert, amateur), want)
    assert (want == -torch.inf).any()


def test_growing_transformers(recipe):
    rows, tokens = [f64(4, 53).requires_grad_() for _ in range(3)], torch.randint(0, 53, (4,))
    same(recipe.growing_transformers(rows, tokens), torch.nn.functional.cross_entropy(sum(rows) / 3, tokens), rows)


def test_quiet_star(recipe):
    base, thought, w = f64(4, 53).requires_grad_(), f64(4, 53).requires_grad_(), torch.rand(4).double().requires_grad_()
    tokens = torch.randint(0, 53, (4,))
    mixed = (1 - w[:, None]) * base + w[:, None] * thought
    same(recipe.quiet_star(base, thought, w, tokens), torch.nn.functional.cross_entropy(mixed, tokens), (base, thought, w))
