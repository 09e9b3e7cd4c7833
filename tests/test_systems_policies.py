"""Recipes of docs/systems.md for policy gradients, preferences and hidden states, each against a plain PyTorch form in fp64."""

from __future__ import annotations

import math

import kv_listings
import pytest
import torch
from recipes import Recipe, at, f64, masked_mean, ppo, ragged, same

V, H = 53, 16


@pytest.fixture
def recipe(request):
    return Recipe(request.node.originalname.removeprefix("test_"))


def policy(b=4, length=6):
    """(log-probs, old ones, reference's, rewards, group ids, mask); the old ones and the reference's are NaN outside the mask."""
    new, mask = (f64(b, length) - 3).requires_grad_(), ragged(b)
    rewards, groups = torch.tensor([1.0, 0.0, 0.3, 0.9]).double(), torch.tensor([0, 0, 5, 5])
    old, reference = ((x.masked_fill(mask == 0, math.nan)) for x in (new.detach() + f64(b, length, scale=0.4), f64(b, length) - 3))
    return new, old, reference, rewards, groups, mask


def clean(x):
    """0 for what a plain form would multiply by a gradient of 0."""
    return x.nan_to_num(0)


def advantages(rewards):
    pairs = rewards.view(2, 2)
    return ((pairs - pairs.mean(1, keepdim=True)) / (pairs.std(1, keepdim=True) + 1e-6)).flatten()


# ------------------------------------------------------------------------------------------------- policy gradients


def test_gppo(recipe):
    h, w, tokens = f64(4, 6, H).requires_grad_(), f64(V, H).requires_grad_(), torch.randint(0, V, (4, 6))
    new = at((h @ w.t()).log_softmax(-1), tokens)
    _, _, _, rewards, groups, mask = policy()
    old = new.detach() + f64(4, 6, scale=0.4)
    r, a = (new - old).exp(), advantages(rewards)[:, None]
    kept = r * (r.clamp(0.8, 1.28) / r).detach()
    same(recipe.gppo(h, w, tokens, old, rewards, groups, mask), -masked_mean(torch.minimum(r * a, kept * a), mask), (h, w))


def test_open_agentrl(recipe):
    new, old, _, rewards, groups, mask = policy()
    same(recipe.open_agentrl(new, old, rewards, groups, mask), -masked_mean(ppo(new, clean(old), advantages(rewards)[:, None], 0.2, 0.28), mask), (new,))


def test_prorl(recipe):
    new, old, reference, rewards, _, mask = policy()
    r = clean(reference) - new
    want = masked_mean(0.05 * (r.exp() - r - 1) - ppo(new, clean(old), rewards[:, None], 0.2, 0.4), mask)
    same(recipe.prorl(new, old, reference, rewards, mask, beta=0.05), want, (new,))


def test_guide_grpo(recipe):
    z, tokens, a = f64(2, 5, V).requires_grad_(), torch.randint(0, V, (2, 5)), f64(2)
    plain_mask, guided_mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]]).bool(), torch.tensor([[0, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0]]).bool()
    new = at(z.log_softmax(-1), tokens)
    guided = f64(2, 6) - 3
    terms = [ppo(new[b, i], guided[b, j], a[b]) for b in range(2) for i, j in zip(plain_mask[b].nonzero()[:, 0], guided_mask[b].nonzero()[:, 0])]
    guided = guided.masked_fill(~guided_mask, math.nan)
    same(recipe.guide_grpo(z, plain_mask, tokens, guided, guided_mask, a), -torch.stack(terms).mean(), (z,))


def log_ratios(new, old, mask):
    return torch.stack([(new[b] - old[b])[mask[b].bool()].sum() for b in range(len(new))])


def test_reg_grpo(recipe):
    new, old, _, rewards, groups, mask = policy()
    s = 0.1 * log_ratios(new, old, mask).view(2, 2)
    want = (advantages(rewards) - (s - s.mean(1, keepdim=True)).flatten()).square().mean()
    same(recipe.reg_grpo(new, old, rewards, groups, mask), want, (new,))


def test_pacs(recipe):
    new, _, reference, _, groups, mask = policy()
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0]).double()
    s = 0.5 * log_ratios(new, reference, mask)
    score = torch.stack([s[0] - s[1], s[1] - s[0], s[2] - s[3], s[3] - s[2]])
    want = -(rewards * score.sigmoid().log() + (1 - rewards) * (-score).sigmoid().log()).mean()
    same(recipe.pacs(new, reference, rewards, groups, mask, beta=0.5), want, (new,))


def test_trpa(recipe):
    new, old, _, rewards, _, mask = policy()
    s = 0.1 * log_ratios(new, old, mask)
    wins = [(0, 1), (0, 2), (0, 3), (3, 1), (3, 2), (2, 1)]
    want = -torch.stack([(s[i] - s[j]).sigmoid().log() for i, j in wins]).mean()
    same(recipe.trpa(new[None], old[None], rewards[None], mask[None]), want, (new,))


def test_pure(recipe):
    new, old, _, _, _, mask = policy()
    steps = torch.full((4, 6), math.inf).double()
    for b in range(4):
        last = int(mask[b].sum()) - 1
        steps[b, last], steps[b, last // 2] = f64(1).item(), f64(1).item()
    terms = [ppo(new[b, t], old[b, t], steps[b, t : int(mask[b].sum())].min()) for b in range(4) for t in range(int(mask[b].sum()))]
    same(recipe.pure(new, old, steps, mask), -torch.stack(terms).mean(), (new,))


# ----------------------------------------------------------------------------------------------- good and bad traces


def test_cdpo(recipe):
    sides, want = [], 0
    for sign in (1, -1):
        z = [f64(2, 5, V), f64(2, 5, V)]
        side = {"positive_logits": z[0], "negative_logits": z[1], "tokens": torch.randint(0, V, (2, 5)), "mask": ragged(2, 5),
                "logprobs": (f64(2, 5) - 3).requires_grad_(), "reference": f64(2, 5) - 3}  # fmt: skip
        s = at((2 * z[0].log_softmax(-1) - z[1].log_softmax(-1)).softmax(-1), side["tokens"])
        s = s if sign > 0 else 1 - s
        want = want + sign * 0.3 * (s * (side["logprobs"] - side["reference"]) * side["mask"]).sum(-1)
        sides.append(side)
    same(recipe.cdpo(*sides, beta=0.3), -want.sigmoid().log().mean(), [side["logprobs"] for side in sides])


def test_structured_agent_distillation(recipe):
    z, t, table = f64(2, 6, V).requires_grad_(), f64(2, 6, V), torch.tensor([0.5, 2.0])
    spans = torch.tensor([[0, 0, 1, 1, -1, -1], [0, 1, 0, 1, 1, -1]])
    ids = t.topk(10).indices
    inside = torch.zeros_like(t, dtype=torch.bool).scatter(-1, ids, True)
    p, q = t.log_softmax(-1), z.log_softmax(-1)
    each = (p.exp() * (p - q))[inside].view(2, 6, 10).sum(-1)
    tails = [x.masked_fill(inside, -math.inf).logsumexp(-1) for x in (p, q)]
    each = each + tails[0].exp() * (tails[0] - tails[1])
    reason, act = each[spans == 0], each[spans == 1]
    loss, report = recipe.structured_agent_distillation(z, t, spans, table, k=10)
    same(loss, (0.5 * reason.sum() + 2 * act.sum()) / (0.5 * len(reason) + 2 * len(act)), (z,))
    same(report, torch.stack([reason.mean(), act.mean()]).detach())


def test_redi(recipe):
    h, w, tokens, mask = f64(4, 6, H).requires_grad_(), f64(V, H).requires_grad_(), torch.randint(0, V, (4, 6)), ragged(4)
    nll = [-at((h @ w.t()).log_softmax(-1), tokens)[b][mask[b].bool()].mean() for b in range(4)]
    same(recipe.redi(h, w, tokens, mask, torch.tensor([1, 0, 0, 1])), (nll[0] + nll[3]) / 2 - 0.8 * (nll[1] + nll[2]) / 2, (h, w))


def test_qcrd(recipe):
    good, bad, quality = (f64(3, 6) - 2).requires_grad_(), (f64(3, 5) - 2).requires_grad_(), torch.tensor([1.0, 0.2, 0.7]).double()
    g, b = (torch.stack([x[i][m[i].bool()].mean() for i in range(3)]) for x, m in ((good, ragged()), (bad, ragged(3, 5))))
    want = -(quality * g).sum() / quality.sum() - 0.1 * (g - b).sigmoid().log().mean()
    same(recipe.qcrd(good, ragged(), bad, ragged(3, 5), quality), want, (good, bad))


def dpo(c, c_ref, r, r_ref, beta):
    return -(beta * ((c - c_ref).sum(-1) - (r - r_ref).sum(-1))).sigmoid().log().mean()


def test_bvpo(recipe):
    sides = [[(f64(3, n) - 2).requires_grad_() if i % 2 == 0 else f64(3, n) - 2 for i, n in enumerate((6, 6, 4, 4))] for _ in range(2)]
    same(recipe.bvpo(*sides, alpha=0.3), 0.3 * dpo(*sides[0], 0.1) + 0.7 * dpo(*sides[1], 0.1), [side[0] for side in sides])


def test_step_dpo(recipe):
    c, r = (f64(2, 6) - 2).requires_grad_(), (f64(2, 6) - 2).requires_grad_()
    c_ref, r_ref = f64(2, 6), f64(2, 6)
    want = dpo(c[:, 2:4], c_ref[:, 2:4], r[:, 2:5], r_ref[:, 2:5], 0.5)
    step = lambda stop: ((torch.arange(6) >= 2) & (torch.arange(6) < stop)).expand(2, 6)
    same(recipe.step_dpo(c, c_ref, r, r_ref, step(4), step(5)), want, (c, r))


def test_supercorrect(recipe):
    good, bad = f64(1, 7).requires_grad_(), f64(1, 6).requires_grad_()
    steps, own = torch.tensor([[0, 0, -1, 1, 1, 1, -1]]), torch.tensor([[-1, 0, 0, 0, 1, 1]])
    gaps = torch.stack([good[0, :2].sum() - bad[0, 1:4].sum(), good[0, 3:6].sum() - bad[0, 4:].sum()])
    same(recipe.supercorrect(good, steps, bad, own, 2), -(0.1 * gaps).sigmoid().log().mean(), (good, bad))


def test_aft(recipe):
    x, mask, good = (f64(4, 6) - 2).requires_grad_(), ragged(4), torch.tensor([True, False, True, False])
    s = torch.stack([x[b][mask[b].bool()].mean() for b in range(4)])
    want = torch.log(1 + sum((s[n].detach() - s[p]).exp() for p in (0, 2) for n in (1, 3)))
    same(recipe.aft(x, mask, good), want, (x,))
    assert torch.autograd.grad(recipe.aft(x, mask, good), x)[0][~good].eq(0).all()


# ------------------------------------------------------------------------------------------- caches and hidden states


def test_kava(recipe):
    teacher = [(f64(2, 2, 20, 8), f64(2, 2, 20, 8)) for _ in range(3)]
    student = [(f64(2, 2, 5, 8).requires_grad_(), f64(2, 2, 5, 8).requires_grad_()) for _ in range(3)]
    queries = [f64(2, 4, 3, 8) for _ in range(3)]
    start, stop = 4, 17
    losses = []
    for (sk, sv), (k, v), q in zip(student, teacher, queries):
        cot_k, cot_v = k[:, :, start:stop], v[:, :, start:stop]
        scores = kv_listings.kava(q, cot_k)
        kept = scores.topk(5, dim=-1).indices.sort(-1).values[..., None].expand(-1, -1, -1, 8)
        for ours, theirs in ((sk, cot_k), (sv, cot_v)):
            losses.append(torch.nn.functional.smooth_l1_loss(ours, theirs.gather(2, kept)))
    leaves = [t for pair in student for t in pair]
    same(recipe.kava(student, teacher, queries, (start, stop)), torch.stack(losses).mean(), leaves, rtol=1e-7)


def test_lazyeviction(recipe):
    steps = [torch.rand(1, 2, t + 1).pow(6) for t in range(12)]
    kept = recipe.lazy_eviction(steps, 7, 3, alpha=0.05)
    for head in range(2):
        last, gap = list(range(12)), [0] * 12
        for step, attention in enumerate(steps):
            for i in range(step + 1):
                if i < step and attention[0, head, i] > 0.05:
                    gap[i] = max(gap[i], step - last[i])
                    last[i] = step
        sigmoid = lambda x: 1 / (1 + math.exp(-x))
        score = [2 * sigmoid(-(11 - t) / m) + 2 * sigmoid(-(m - 1)) if m else float(t == 11) for t, m in zip(last, gap)]
        best = [*sorted(sorted(range(9), key=lambda i: (-score[i], i))[:4]), 9, 10, 11]
        assert kept.indices[0, head].tolist() == best


def test_cache_augmentation(recipe):
    k, v, q = f64(2, 2, 6, 8), f64(2, 2, 6, 8), f64(2, 2, 1, 8)
    lk, lv = f64(2, 2, 3, 8).requires_grad_(), f64(2, 2, 3, 8).requires_grad_()
    weights = (q @ torch.cat([k, lk], 2).mT / math.sqrt(8)).softmax(-1)
    same(recipe.cache_augmentation(q, k, v, lk, lv), weights @ torch.cat([v, lv], 2), (lk, lv))


def test_icot_kd(recipe):
    student, teacher = [f64(2, 5, 8).requires_grad_() for _ in range(4)], [f64(2, 12, 8) for _ in range(4)]
    position, start, stop = torch.tensor([4, 2]), torch.tensor([3, 5]), torch.tensor([10, 12])
    losses = []
    for layer in range(4):
        # 7 tokens of thought over 4 layers: the first, the last, and between them evenly, rounded down
        theirs = torch.stack([teacher[layer][b, int(start[b]) + 6 * layer // 3] for b in range(2)])
        ours = torch.stack([student[layer][b, position[b]] for b in range(2)])
        losses.append((ours / ours.std() - theirs / theirs.std()).square().mean())
    same(recipe.icot_kd(student, teacher, position, start, stop), torch.stack(losses).mean(), student)


def test_system_1_5(recipe):
    short, full = [f64(2, 6, 8).requires_grad_() for _ in range(3)], [f64(2, 6, 8) for _ in range(3)]
    positions = torch.tensor([[1, 3], [0, 5]])
    alive = torch.tensor([[[1, 1], [1, 1]], [[1, 0], [1, 1]], [[0, 0], [1, 0]]]).bool()
    losses = []
    for layer in range(3):
        pairs = [(layer, b, int(positions[b, p])) for b in range(2) for p in range(2) if alive[layer, b, p]]
        losses.append(torch.stack([(short[l][b, t] - full[l][b, t]).square().mean() for l, b, t in pairs]).mean())
    same(recipe.system_15(short, full, positions, alive), torch.stack(losses).mean(), short)


def nce(anchor, positive, negatives, temperature):
    cos = lambda x, y: (x * y).sum() / (x.norm() * y.norm()) / temperature
    scores = torch.stack([cos(anchor, positive), *(cos(anchor, n) for n in negatives)])
    return scores.logsumexp(0) - scores[0]


def test_lta_thinker(recipe):
    z, question, positive, negatives = f64(3, 8).requires_grad_(), f64(3, 8), f64(3, 8), f64(3, 2, 8)
    p = question.softmax(-1)
    semantic = (p * (p.log() - z.log_softmax(-1))).sum(-1).mean()
    contrast = torch.stack([nce(z[b], positive[b], negatives[b], 0.1) for b in range(3)]).mean()
    same(recipe.lta_thinker(z, question, positive, negatives), semantic + contrast, (z,))


def test_softcot(recipe):
    z = f64(2, 4, 8).requires_grad_()
    want = torch.stack([nce(z[b, i], z[b, i], [z[b, j] for j in range(4) if j != i], 0.1) for b in range(2) for i in range(4)]).mean()
    same(recipe.softcot(z), want, (z,))


def test_vidlankd(recipe):
    s, t = f64(4, 8).requires_grad_(), f64(4, 8)
    want = torch.stack([nce(s[i], t[i], [t[j] for j in range(4) if j != i], 0.07) for i in range(4)]).mean()
    same(recipe.vidlankd(s, t), want, (s,))


def test_cot_vectors(recipe):
    shift, plain, cot = [f64(8).requires_grad_() for _ in range(2)], [f64(2, 5, 8) for _ in range(2)], [f64(2, 9, 8) for _ in range(2)]
    a, b = torch.tensor([[2, 3], [3, 4]]), torch.tensor([[7, 8], [5, 6]])
    losses = [
        torch.stack([plain[l][i, a[i, p]] + shift[l] - cot[l][i, b[i, p]] for i in range(2) for p in range(2)]).square().mean() for l in range(2)
    ]
    same(recipe.cot_vectors(shift, plain, cot, a, b), torch.stack(losses).mean(), shift)


def test_carft(recipe):
    ma, ms = ragged(), ragged(3, 5)
    a, s = (f64(*m.shape, 8).masked_fill(m[..., None] == 0, math.nan).requires_grad_() for m in (ma, ms))
    x, y = (torch.stack([h[b][m[b].bool()].mean(0) for b in range(3)]) for h, m in ((a, ma), (s, ms)))
    both = [nce(p[i], q[i], [q[j] for j in range(3) if j != i], 0.1) for p, q in ((x, y), (y, x)) for i in range(3)]
    same(recipe.carft(a, ma, s, ms), torch.stack(both).mean(), (a, s))


def test_tpreasoner(recipe):
    student, teacher = [f64(2, 5, 8).requires_grad_() for _ in range(2)], [f64(2, 5, 8) for _ in range(4)]
    positions = torch.tensor([[1], [4]])
    cos = torch.nn.functional.cosine_similarity
    losses = [torch.stack([1 - cos(student[l][b, p], teacher[t][b, p], dim=0) for b, p in ((0, 1), (1, 4))]).mean() for l, t in ((0, 1), (1, 3))]
    same(recipe.tpreasoner(student, teacher, positions, [1, 3]), torch.stack(losses).mean(), student)


def test_latentseek(recipe):
    z, w = f64(4, H), f64(V, H)
    leaf = z.clone().requires_grad_()
    log_p = (leaf @ w.t()).log_softmax(-1)
    (g,) = torch.autograd.grad(0.7 * log_p.amax(-1).sum(), leaf)
    same(recipe.latentseek(z, w, 0.7, 0.3), z + 0.3 * g)
