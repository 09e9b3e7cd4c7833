"""The published scores and losses as their papers write them, in float64 with every [T, T] and [W, T]: what tests compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(queries: Tensor, keys: Tensor, seen: Tensor, scale: float | None = None) -> Tensor:
    """Softmax probabilities [B, Hq, W, T] over the keys `seen` (bool, broadcastable), with keys repeated for every query head."""
    groups = queries.shape[1] // keys.shape[1]
    logits = queries.double() @ keys.double().repeat_interleave(groups, 1).transpose(2, 3)
    logits = logits * (queries.shape[3] ** -0.5 if scale is None else scale)
    return logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0)


def importance(queries, keys, *, seen=None, query_mask=None, scale=None, group_reduce="max_logits", window_reduce="mean") -> Tensor:
    """Every option of the score one request, one KV head at a time; `seen` bool [B, W, T]."""
    b, hq, w, d = queries.shape
    hkv, t = keys.shape[1:3]
    g = hq // hkv
    rows = []
    for i in range(b if t else 0):
        for h in range(hkv):
            ok = torch.ones(w, t, dtype=torch.bool) if seen is None else seen[i]
            keep = torch.ones(w, dtype=torch.bool) if query_mask is None else query_mask[i]
            k = keys[i, h].double().masked_fill(~ok.any(0)[:, None], 0)
            q = queries[i, h * g : (h + 1) * g].double().masked_fill(~keep[:, None], 0)
            logits = (q @ k.T) * (d**-0.5 if scale is None else scale)
            soft = lambda x, ok=ok: x.masked_fill(~ok, -math.inf).softmax(-1).nan_to_num(0)
            if group_reduce == "max_logits":
                p = soft(logits.max(0).values)[None]
            elif group_reduce == "max_probs":
                p = soft(logits).max(0).values[None]
            elif group_reduce == "mean_probs":
                p = soft(logits).mean(0)[None]
            else:
                p = soft(logits)
            p = p[:, keep]
            if p.shape[1] == 0:
                rows.append(torch.zeros(p.shape[0], t, dtype=torch.float64))
            else:
                rows.append({"mean": p.mean(1), "sum": p.sum(1), "max": p.max(1).values}[window_reduce])
    heads = hq if group_reduce == "none" else hkv
    return torch.cat(rows).view(b, heads, t) if rows and t else torch.zeros(b, heads, t, dtype=torch.float64)


def kava_redundancy(keys: Tensor, mask: Tensor | None = None, pad_in_softmax: bool = False) -> Tensor:
    """KaVa's R: softmax of minus the mean cosine with the other valid keys; with padding as exp(0) in the published listing."""
    b, _, t, _ = keys.shape
    mask = torch.ones(b, t, dtype=torch.bool) if mask is None else mask
    k = keys.double().masked_fill(~mask[:, None, :, None], 0)
    k = k / (k.norm(dim=-1, keepdim=True) + 1e-8)
    cosine = k @ k.transpose(2, 3)
    cosine[:, :, range(t), range(t)] = 0
    r = -cosine.sum(2) / mask.sum(-1)[:, None, None].clamp(min=1)
    if not pad_in_softmax:
        r = r.masked_fill(~mask[:, None], -math.inf)
    return r.softmax(-1).nan_to_num(0) * mask[:, None]


def rkv_redundancy(keys: Tensor, mask: Tensor | None = None, threshold: float = 0.5) -> Tensor:
    """R-KV's ρ: in each row the last column above the threshold is zeroed (the first, where there is none), then column means."""
    b, h, t, _ = keys.shape
    out = torch.zeros(b, h, t, dtype=torch.float64)
    for i in range(b):
        real = torch.arange(t) if mask is None else mask[i].nonzero()[:, 0]
        n = len(real)
        for j in range(h):
            k = keys[i, j, real].double()
            k = k / (k.norm(dim=-1, keepdim=True) + 1e-8)
            cosine = k @ k.T
            cosine.fill_diagonal_(0)
            columns = (cosine > threshold) * torch.arange(n)
            cosine[range(n), columns.max(-1).values if n else []] = 0
            out[i, j, real] = cosine.mean(0).softmax(-1) if n else cosine.new_zeros(0)
    return out


def rkv(queries: Tensor, keys: Tensor, window: int = 8, lam: float = 0.1, pool: int = 7) -> Tensor:
    """R-KV's score of the keys before the window, [B, Hkv, T − W], no padding."""
    _, hkv, t, d = keys.shape
    q = queries[:, :, -window:].double().unflatten(1, (hkv, -1))
    logits = (q @ keys.double().unsqueeze(2).transpose(3, 4) / math.sqrt(d)).max(2).values
    a = logits[..., : t - window].softmax(-1).mean(2)
    a = torch.nn.functional.max_pool1d(a, pool, stride=1, padding=pool // 2)
    return lam * a - (1 - lam) * rkv_redundancy(keys)[..., : t - window]


def snapkv(queries: Tensor, keys: Tensor, window: int = 32, pool: int = 5) -> Tensor:
    """SnapKV's score per query head, [B, Hq, T − W]: causal inside the window, softmax over all keys, summed, average-pooled."""
    t = keys.shape[2]
    last = torch.arange(t - window, t)[:, None]
    p = attention(queries[:, :, -window:], keys, torch.arange(t) <= last)
    return torch.nn.functional.avg_pool1d(p[..., : t - window].sum(2), pool, stride=1, padding=pool // 2)


def kvpress_snapkv(queries: Tensor, keys: Tensor, window: int = 32, pool: int = 5) -> Tensor:
    """kvpress' SnapKV: means over the window and over the query heads of a KV head, [B, Hkv, T − W]."""
    return snapkv(queries, keys, window, pool).unflatten(1, (keys.shape[1], -1)).mean(2) / window


def kava(queries: Tensor, keys: Tensor, mask: Tensor | None = None, lam: float = 0.1, pad_in_softmax: bool = False) -> Tensor:
    """λ·I + (1 − λ)·R over the chain of thought, I the mean over the answer's queries of the group's largest probability."""
    seen = torch.ones(keys.shape[0], queries.shape[2], keys.shape[2], dtype=torch.bool)
    if mask is not None:
        seen = mask[:, None].expand_as(seen)
    return lam * importance(queries, keys, seen=seen, group_reduce="max_probs") + (1 - lam) * kava_redundancy(keys, mask, pad_in_softmax)


def distance(s: Tensor, t: Tensor, real: Tensor, loss: str, beta: float = 1.0, normalize: str | None = None) -> Tensor:
    """Mean distance of the real slots of one tensor pair [B, H, M, D], by torch's own losses; differentiable in s."""
    f = torch.nn.functional
    s, t = s[real], t[real].to(s.dtype)
    if s.numel() == 0:
        return s.sum() * 0
    if loss == "cosine":
        return (1 - f.cosine_similarity(s, t, dim=-1)).mean()
    if normalize == "inputs":
        s, t = s / s.std().clamp(min=1e-6), t / t.std().clamp(min=1e-6)
    found = {"mse": f.mse_loss, "l1": f.l1_loss, "smooth_l1": lambda a, b: f.smooth_l1_loss(a, b, beta=beta)}[loss](s, t)
    if normalize == "layer_std":
        std = t.std().clamp(min=1e-6)
        found = found / (std**2 if loss == "mse" else std)
    return found


def keys_of(kind: str, b: int, h: int, t: int, d: int, seed: int = 0) -> Tensor:
    """Random directions; clusters with neighbours above any threshold, as caches of real models have; exact duplicates."""
    g = torch.Generator().manual_seed(seed)
    k = torch.randn(b, h, t, d, generator=g)
    if kind != "random" and t:
        centre = torch.randint(0, max(t // 9, 1), (b, h, t), generator=g)[..., None].expand(b, h, t, d)
        noise = 0.3 if kind == "clustered" else 0.0
        k = k.gather(2, centre) + noise * torch.randn(b, h, t, d, generator=g)
    return k


def assert_kept(indices: Tensor, scores: Tensor, budget: int, tolerance: float) -> None:
    """`indices` [B, H, M] are the `budget` best of `scores` [B, H, T] (float64, −inf = not to be kept), but for ties within `tolerance`."""
    for kept, row in zip(indices.flatten(0, 1).tolist(), scores.flatten(0, 1)):
        kept = [i for i in kept if i >= 0]
        assert len(set(kept)) == len(kept) == min(budget, int((row > -math.inf).sum()))
        inside = torch.zeros(row.shape[0], dtype=torch.bool)
        inside[kept] = True
        if inside.any() and not inside.all():
            assert row[inside].min() >= row[~inside].max() - tolerance
