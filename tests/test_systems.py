"""Recipes of docs/systems.md for losses, signals and rewards, each against a plain PyTorch form in fp64."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from recipes import PAGE, Recipe, at, certainty, entropy, f64, masked_mean, ppo, ragged, recipes, same, slug

import distilkernels as dk

V, H = 53, 16


@pytest.fixture
def recipe(request):
    return Recipe(request.node.originalname.removeprefix("test_"))


def test_every_row_of_the_tables_has_a_recipe_and_a_test():
    found = recipes()
    rows = re.findall(r"^\| \[(.*?)\]\(#(.*?)\) \|", PAGE.read_text(), flags=re.M)
    assert len(rows) == len(found) > 60
    assert {slug(name) for name, _ in rows} == set(found)
    for name, anchor in rows:
        assert anchor == re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-"), name
    tested = set()
    for file in Path(__file__).parent.glob("test_systems*.py"):
        tested |= set(re.findall(r"^def test_(\w+)\(recipe", file.read_text(), flags=re.M))
    assert tested == set(found)
    for name, source in found.items():
        for function in source.split("\n\n\n"):
            assert 0 < sum(bool(line.strip()) for line in function.splitlines()) <= 15, name


def kl(log_p, log_q):
    return torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def buckets(log_p, log_q, ids):
    """(log p, log q) on K + 1 buckets from full distributions."""
    inside = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, ids, True)
    tails = (x.masked_fill(inside, -math.inf).logsumexp(-1, keepdim=True) for x in (log_p, log_q))
    heads = (x.gather(-1, ids) for x in (log_p, log_q))
    return [torch.cat(pair, -1) for pair in zip(heads, tails)]


# ------------------------------------------------------------------------------------- losses of a teacher's rows


def test_first(recipe):
    z, t = f64(2, 3, V).requires_grad_(), f64(2, 3, V, scale=3)
    top = t.softmax(-1).topk(5)
    p = (top.values / 0.4).softmax(-1)
    want = (p * (p.log() - z.log_softmax(-1).gather(-1, top.indices))).sum(-1).mean()
    same(recipe.first(z, t, 0.4), want, (z,))

    # c by hand: ten equal bins, the paper's two grids
    t, labels = f64(400, V, scale=2), torch.randint(0, V, (400,))
    top = t.softmax(-1).topk(5)
    labels[:250] = top.indices[:250, 0]

    def error(c):
        confidence = (top.values / c).softmax(-1)[:, 0]
        total = 0
        for low in range(10):
            inside = (confidence > low / 10) & (confidence <= (low + 1) / 10)
            total += abs((top.indices[:, 0] == labels)[inside].double().sum() - confidence[inside].sum())
        return float(total) / 400

    coarse = min((round(0.1 * i, 6) for i in range(1, 11)), key=error)
    fine = [round(max(0, coarse - 0.1) + 0.02 * i, 6) for i in range(1, 11)]
    best = min([coarse, *(c for c in fine if c <= 1)], key=error)
    c = recipe.first_c(t, labels)
    assert 0.02 < c < 1 and abs(error(c) - error(best)) < 1e-12


def test_kdrl(recipe):
    h, w, tokens, mask = f64(4, 6, H).requires_grad_(), f64(V, H).requires_grad_(), torch.randint(0, V, (4, 6)), ragged(4)
    logprobs = at((h @ w.t()).log_softmax(-1), tokens)
    old, teacher = logprobs.detach() + f64(4, 6, scale=0.3), f64(4, 6) - 4
    rewards, groups = torch.tensor([1.0, 0.0, 1.0, 0.0]).double(), torch.tensor([0, 0, 1, 1])
    a = torch.tensor([1.0, -1.0, 1.0, -1.0]).double() * 0.5 / (math.sqrt(0.5) + 1e-6)
    terms = -ppo(logprobs, old, a[:, None]) + 4e-3 * (1 - rewards[:, None]) * (teacher - logprobs).square() / 2
    same(recipe.kdrl(h, w, tokens, old, teacher, rewards, groups, mask, 20), masked_mean(terms, mask), (h, w))

    z, t = f64(2, 6, V).requires_grad_(), f64(2, 6, V)
    log_p, log_q = buckets(t.log_softmax(-1), z.log_softmax(-1), z.detach().topk(20).indices)
    same(recipe.kdrl_topk(z, t, mask[:2]), masked_mean(kl(log_q, log_p), mask[:2]), (z,))


def test_vold(recipe):
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]).bool()
    teacher_mask = torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]]).bool()
    new = (f64(2, 6) - 3).requires_grad_()
    old, a, teacher = new.detach() + f64(2, 6, scale=0.3), f64(2), f64(2, 8) - 3
    terms = []
    for b in range(2):
        for i, j in zip(mask[b].nonzero()[:, 0], teacher_mask[b].nonzero()[:, 0]):
            terms.append(-ppo(new[b, i], old[b, i], a[b]) + 0.1 * (teacher[b, j] - new[b, i]).square() / 2)
    same(recipe.vold(new, old, a, mask, teacher, teacher_mask, 0.1), torch.stack(terms).mean(), (new,))


def test_ssb(recipe, tmp_path):
    rows, z = torch.randn(9, V) * 2, f64(7, V).requires_grad_()
    with dk.store.TopKWriter(tmp_path / "rows", 8, V, teacher="random", tokenizer_hash="none") as writer:
        writer.append(dk.capture_topk(rows, 8), "problem-1", tokens=range(9))
    teacher_mask, student_mask = torch.arange(9) >= 5, (torch.arange(7) >= 2) & (torch.arange(7) < 6)
    ids = rows[5:].topk(8).indices
    log_p, log_q = buckets(rows[5:].double().log_softmax(-1), z[2:6].log_softmax(-1), ids)
    got, want = recipe.ssb(z, student_mask, tmp_path / "rows", "problem-1", teacher_mask), kl(log_p, log_q).mean()
    # the store keeps log-probs to 1e-3 nats
    (dgot,), (dwant,) = torch.autograd.grad(got, z), torch.autograd.grad(want, z)
    assert abs(got - want) < 2e-3 and (dgot - dwant).norm() < 2e-3 * dwant.norm()


def test_mentor_kd(recipe):
    z, t, labels = f64(2, 5, V).requires_grad_(), f64(2, 5, V, scale=2), torch.randint(0, V, (2, 5))
    labels[0, 0] = -100
    log_p, log_q = buckets((t / 2).log_softmax(-1), (z / 2).log_softmax(-1), t.topk(20).indices)
    ce = torch.nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten())
    same(recipe.mentor_kd(z, t, labels, k=20), 0.7 * ce + 0.3 * 4 * kl(log_p, log_q).mean(), (z,))


def test_dear(recipe):
    z, t, relevant = f64(2, 4, V).requires_grad_(), f64(2, 4, V, scale=2), torch.rand(2, 4) < 0.5
    log_q, pair = z.log_softmax(-1), torch.tensor([7, 9])
    ce = -torch.where(relevant, log_q[..., 7], log_q[..., 9]).mean()
    s, r = z[..., 7] - z[..., 9], t[..., 7] - t[..., 9]
    pairs = [torch.nn.functional.softplus(s[b, j] - s[b, i]) for b in range(2) for i in range(4) for j in range(4) if r[b, i] > r[b, j]]
    want = ce + torch.stack(pairs).mean() + 4 * kl((t[..., pair] / 2).log_softmax(-1), (z[..., pair] / 2).log_softmax(-1)).mean()
    same(recipe.dear(z, t, relevant, 7, 9), want, (z,))


def test_temperature_sweeps(recipe):
    z, t = f64(3, V), f64(3, V, scale=2)
    z[0] = t[0]
    for (loss, agreement, mass), heat in zip(recipe.temperature_sweep(z, t, (0.7, 3.0), k=10), (0.7, 3.0)):
        p, q = (t / heat).log_softmax(-1), (z / heat).log_softmax(-1)
        ids = t.topk(10).indices
        same(loss, heat**2 * kl(*buckets(p, q, ids)).mean())
        assert agreement == (z.argmax(-1) == t.argmax(-1)).float().mean() > 0
        same(mass, p.gather(-1, ids).exp().sum(-1).mean())


def test_m1(recipe):
    z, t, mask = f64(3, 6, V).requires_grad_(), f64(3, 6, V), ragged()
    log_p, log_q = buckets(t.log_softmax(-1), z.log_softmax(-1), z.detach().topk(12).indices)
    same(recipe.m1(z, t, mask, k=12), masked_mean(kl(log_q, log_p), mask), (z,))


def test_pinto(recipe):
    z, options, labels = f64(4, V).requires_grad_(), torch.tensor([3, 8, 20]), torch.tensor([8, 3, 20, 20])
    p = torch.full((4, 3), 0.1 / 3).double() + 0.9 * (options == labels[:, None])
    want = (p * (p.log() - z.log_softmax(-1)[:, options])).sum(-1).mean()
    same(recipe.pinto(z, options, labels, epsilon=0.1).double(), want, rtol=1e-6)


def test_tinyllm(recipe):
    z, ts, labels = f64(3, V).requires_grad_(), [f64(3, V), f64(3, V, scale=3)], torch.tensor([1, 5, 9])
    want = -at(z.log_softmax(-1), labels).mean()
    for w, t in zip((0.2, 0.9), ts):
        want = want + w * 4 * kl(*buckets((t / 2).log_softmax(-1), (z / 2).log_softmax(-1), t.topk(11).indices)).mean()
    same(recipe.tinyllm(z, ts, (0.2, 0.9), labels, k=11), want, (z,))


# -------------------------------------------------------------------------------------------------------- signals


def test_80_20(recipe):
    z, tokens, mask, a = f64(3, 6, V, scale=3).requires_grad_(), torch.randint(0, V, (3, 6)), ragged(), f64(3)
    new = at(z.log_softmax(-1), tokens)
    old = new.detach() + f64(3, 6, scale=0.3)
    n, broken = int(mask.sum()), old.masked_fill(mask == 0, math.nan)
    threshold = entropy(z)[mask.bool()].sort(descending=True).values[math.ceil(0.2 * n) - 1]
    kept = (entropy(z) >= threshold) & mask.bool()
    assert kept.sum() == math.ceil(0.2 * n)
    same(recipe.forking(z, tokens, broken, a, mask), -(ppo(new, old, a[:, None]) * kept).sum() / n, (z,))


def test_ares(recipe):
    z, tokens, mask = f64(3, 6, V, scale=4).requires_grad_(), torch.randint(0, V, (3, 6)), ragged()
    reference = at(f64(3, 6, V).log_softmax(-1), tokens).masked_fill(mask == 0, math.nan)
    new, h, total, low = at(z.log_softmax(-1), tokens), entropy(z).detach(), 0, 0
    for b in range(3):
        length = int(mask[b].sum())
        for t in range(length):
            high = h[b, t : min(t + 3, length)].mean() > 1.5
            low += not high
            r = reference[b, t] - new[b, t]
            total = total + (0.001 if high else 0.01) * (r.exp() - r - 1)
    assert 0 < low < mask.sum()
    same(recipe.ares(z, tokens, reference, mask, window=3, threshold=1.5), total / mask.sum(), (z,))


def test_light_if(recipe):
    h, w, tokens, mask = f64(3, 6, H).requires_grad_(), f64(V, H).requires_grad_(), torch.randint(0, V, (3, 6)), ragged()
    z = h @ w.t()
    ent = entropy(z)
    weight = ent.detach() / masked_mean(ent.detach(), mask)
    same(recipe.light_if(h, w, tokens, mask), masked_mean(-weight * at(z.log_softmax(-1), tokens) - 0.01 * ent, mask), (h, w))


def test_self_certainty(recipe):
    z, mask, answers = f64(5, 6, V, scale=3), ragged(5), torch.tensor([4, 2, 4, 2, 2])
    means = torch.stack([certainty(z[s])[mask[s].bool()].mean() for s in range(5)])
    got, winner = recipe.self_certainty(z, mask, answers, power=1.2)
    same(got, means)
    points = {4: 0.0, 2: 0.0}
    for place, s in enumerate(means.argsort(descending=True).tolist()):
        points[int(answers[s])] += (5 - place) ** 1.2
    assert winner == max(points, key=points.get)


def test_nothinking(recipe):
    z, mask, answers = f64(5, 6, V, scale=3), ragged(5), torch.tensor([0, 1, 2, 1, 0])
    order = torch.stack([certainty(z[s])[mask[s].bool()].mean() for s in range(5)]).argsort(descending=True).tolist()
    points = [sum(5 - order.index(s) for s in range(5) if answers[s] == a) for a in range(3)]
    ties = [a for a in range(3) if points[a] == max(points)]
    assert recipe.nothinking(z, mask, answers) in ties


def test_rpc(recipe):
    z, tokens, mask, answers = f64(5, 6, V), torch.randint(0, V, (5, 6)), ragged(5), torch.tensor([3, 3, 1, 1, 0])
    mask[:] = mask[0]
    p = torch.stack([at(z.log_softmax(-1), tokens)[s].sum().exp() for s in range(5)])
    kept = p >= p.mean()
    assert 0 < kept.sum() < 5
    vote = recipe.rpc(z, tokens, mask, answers)
    for s in range(5):
        assert vote.votes[s].item() == pytest.approx((p * kept)[answers == answers[s]].sum().item() / p[kept].sum().item() * kept[s].item(), rel=1e-9)
    assert vote.answer == answers[vote.votes.argmax()]


def test_crew(recipe):
    h, w, tokens, mask = f64(3, 6, H), f64(V, H), torch.randint(0, V, (3, 6)), ragged()
    top = (h @ w.t()).softmax(-1).amax(-1)
    same(recipe.crew(h, w, tokens, mask), torch.stack([top[b][mask[b].bool()].mean() for b in range(3)]))


def test_laser(recipe):
    h, w, mask, verified = f64(3, 6, H).requires_grad_(), f64(V, H).requires_grad_(), ragged(), torch.tensor([1.0, 0.0, 1.0]).double()
    rows = [(h[b, int(mask[b].sum()) - 1] @ w.t()).log_softmax(-1)[11] for b in range(3)]
    want = 0.2 * (torch.stack(rows) + 9)
    reward, loss = recipe.laser(h, w, 11, mask, verified, scale=0.2, constant=-9.0)
    same(reward, want)
    same(loss, (want - verified).square().mean(), (h, w))


def test_acereason_1_1(recipe):
    z, mask, heats = f64(3, 6, V, scale=6), ragged(), (0.3, 0.6, 0.9, 1.2)
    means = torch.stack([masked_mean(entropy(z / t), mask) for t in heats])
    best, got = recipe.acereason(z, mask, heats, target=float(means[2]) + 0.01)
    same(got, means)
    assert best == 0.9


def test_confucius3_math(recipe):
    z, mask = f64(3, 6, V).requires_grad_(), ragged()
    same(recipe.confucius3(z, mask), 0.01 * (masked_mean(entropy(z), mask) - 0.2) ** 2, (z,))


def test_internal_consistency(recipe):
    states, w, options = f64(6, 4, H), f64(V, H), torch.tensor([5, 17, 40])
    choice = (states @ w.t())[..., options].argmax(-1)
    last, agreement = recipe.internal_consistency(states, w, options)
    assert torch.equal(last, choice[-1])
    want = [sum((choice[l, b] == choice[5, b]).item() for l in range(5)) / 5 for b in range(4)]
    assert agreement.tolist() == pytest.approx(want) and sum(want) > 0


# --------------------------------------------------------------------------------------------- student's rewards


def test_rlt(recipe):
    solution, think = f64(3, 6) - 2, ragged()
    s, t = f64(3, 6) - 2, f64(3, 6) - 2
    want = []
    for b in range(3):
        n, m = int(ragged()[b].sum()), int(think[b].sum())
        x, gap = solution[b, :n], (t - s)[b, :m]
        want.append(x.mean() + 0.01 * x.min() - 0.1 * (gap.mean() + 0.01 * gap.max()))
    same(recipe.rlt(solution, ragged(), s, t, think), torch.stack(want))


def test_listener_grpo(recipe):
    h, w, options, correct = f64(4, H), f64(V, H), torch.tensor([30, 31, 33]), torch.tensor([0, 2, 1, 1])
    p = (h @ w.t())[:, options].softmax(-1)
    same(recipe.listener(h, w, options, correct), torch.stack([p[b, correct[b]] for b in range(4)]))


def test_expo(recipe):
    sides = [(f64(3, 6, V), ragged(), torch.randint(0, V, (3, 6))) for _ in range(2)]
    means = [torch.stack([at(z.log_softmax(-1), ids)[b][m[b].bool()].mean() for b in range(3)]) for z, m, ids in sides]
    same(recipe.expo(*sides[0], *sides[1]), means[0] - means[1])


def test_soft_score_discriminators(recipe):
    h, w = f64(2, 3, H), f64(V, H)
    z = h @ w.t()
    same(recipe.soft_score(h, w, 4, 50), 1 / (1 + (z[..., 50] - z[..., 4]).exp()))


def test_ampo(recipe):
    z, tokens, answer = f64(4, 6, V), torch.randint(0, V, (4, 6)), ragged(4)
    p = [at(z.softmax(-1), tokens)[m][answer[m].bool()] for m in range(4)]
    order = sorted(range(4), key=lambda m: -(p[m].prod() ** (1 / len(p[m]))).item())
    assert recipe.ampo(z, tokens, answer, torch.ones(4).bool()).tolist() == order[:1]
    assert recipe.ampo(z, tokens, answer, torch.arange(4) != order[0], k=2).tolist() == order[1:3]


def test_persyn(recipe):
    z, tokens, mask, quality = f64(4, 6, V), torch.randint(0, V, (4, 6)), ragged(4), torch.tensor([0.1, 0.12, 0.11, 0.115]).double()
    p = [at(z.log_softmax(-1), tokens)[m][mask[m].bool()].mean().exp().item() for m in range(4)]
    for lam in (0.0, 0.5, 1.0):
        assert recipe.persyn(z, tokens, mask, quality, lam) == max(range(4), key=lambda m: (1 - lam) * quality[m].item() + lam * p[m])
