"""Compressed KV caches: importance, redundancy, gather and alignment against the published code in plain PyTorch, time and memory.

Importance, a KV head with G query heads and W queries. FLOPs: 2·G·W·T·D, once on a CPU (the probabilities of one head are kept) and
twice on a GPU; bytes: T·D·itemsize as often. The floor on a CPU is that product alone, in one GEMM.
Redundancy "kava". Bytes: T·D·itemsize twice; the floor is those at the rate of a copy. "rkv" adds pairs: T²·D FLOPs at most.
Gather. Bytes: M·(D + Dv)·itemsize read and written: a copy of so many.
Alignment, forward + backward. Bytes: student and teacher read, gradient written; the floor is those at the rate of a copy.
Compress: score by a method, select a quarter, gather. Bytes: keys once for each pass of its scores, and those of the gather.
``generate``: see :mod:`.kv_generate`.

Checked against fp64 forms up to T = 4,096, against the float32 listing beyond: a [T, T] in fp64 is 2 GiB a head there. For the same
reason the listings run on one head at T = 16,384 (their peak is then below 6 GiB).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tests import kv_listings as listing
from torch import Tensor

from distilkernels import backends, kv

from . import kv_generate
from .losses import isas
from .measure import Contender, copy_contender, median, peak_extra_bytes, race

GROUP = ("case", "B", "T", "Hq", "Hkv", "D", "dtype")
LENGTHS = (1024, 4096, 16_384)
WINDOW, LAYERS, LATENTS = 32, 32, 24


@dataclass(frozen=True)
class Case:
    """`ours`, on every instruction set, and published `peers`, all held to `exact`; the first peer is what ratios are to."""

    name: str
    shape: tuple[int, int, int, int, int]  # B, T, Hq, Hkv, D
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    exact: Callable[[], object]
    tolerance: float
    nbytes: float  # moved at the least
    floor: Callable[[], object] | None = None  # another than a copy of so many bytes


# --------------------------------------------------------------------------------------------- the published forms


def repeated_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """As model code has it: keys repeated for every query head, softmax, the group's largest probability, the mean over queries."""
    groups = queries.shape[1] // keys.shape[1]
    p = (queries @ keys.repeat_interleave(groups, 1).mT * queries.shape[3] ** -0.5).float().softmax(-1)
    return p.unflatten(1, (keys.shape[1], groups)).amax(2).mean(2)


def grouped_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """The same without repeating keys."""
    b, _, width, d = queries.shape
    logits = queries.reshape(b, keys.shape[1], -1, d) @ keys.mT * d**-0.5
    return logits.unflatten(2, (-1, width)).float().softmax(-1).amax(2).mean(2)


def cosines(keys: Tensor) -> Tensor:
    unit = keys.float() / (keys.float().norm(dim=-1, keepdim=True) + 1e-8)
    similarity = unit @ unit.mT
    similarity.diagonal(dim1=-2, dim2=-1).zero_()
    return similarity


def kava_listing(keys: Tensor) -> Tensor:
    return (-cosines(keys).mean(2)).softmax(-1)


def rkv_listing(keys: Tensor) -> Tensor:
    """The last column above the threshold is the largest of a [T, T] of indices."""
    similarity = cosines(keys)
    columns = torch.where(similarity > 0.5, torch.arange(keys.shape[2], device=keys.device), 0)
    similarity.scatter_(-1, columns.amax(-1, keepdim=True), 0.0)
    return similarity.mean(2).softmax(-1)


def composed_kava(queries: Tensor, keys: Tensor) -> Tensor:
    return 0.1 * grouped_attention(queries, keys) + 0.9 * kava_listing(keys)


def composed_rkv(queries: Tensor, keys: Tensor) -> Tensor:
    """The last 8 queries on what came before them, the group's largest logit, max-pooled."""
    q, t, d = queries[:, :, -8:], keys.shape[2] - 8, keys.shape[3]
    logits = (q.reshape(q.shape[0], keys.shape[1], -1, d) @ keys[:, :, :t].mT * d**-0.5).unflatten(2, (-1, 8)).float().amax(2)
    return 0.1 * F.max_pool1d(logits.softmax(-1).mean(2), 7, stride=1, padding=3) - 0.9 * rkv_listing(keys)[..., :t]


def gathered(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    place = indices.long()[..., None]
    return keys.gather(2, place.expand(*indices.shape, keys.shape[3])), values.gather(2, place.expand(*indices.shape, values.shape[3]))


def selected(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    """One index_select a head."""
    heads = [(b, h) for b in range(keys.shape[0]) for h in range(keys.shape[1])]
    return tuple(torch.stack([t[b, h].index_select(0, indices[b, h]) for b, h in heads]).view(*indices.shape, -1) for t in (keys, values))


def layer_loop(student: list[tuple[Tensor, Tensor]], teacher: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    pairs = zip(student, teacher)
    loss = sum(0.5 * (F.smooth_l1_loss(sk, tk) + F.smooth_l1_loss(sv, tv)) for (sk, sv), (tk, tv) in pairs) / len(student)
    return torch.autograd.grad(loss, [t for pair in student for t in pair])


# --------------------------------------------------------------------------------------------- cases


def importance(b: int, t: int, dtype: torch.dtype, device: str) -> Case:
    heads, kv_heads, d = 32, 8, 128
    keys = listing.keys_of("clustered", b, kv_heads, t, d).to(device, dtype)
    queries = torch.randn(b, heads, WINDOW, d, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    flat = queries.reshape(b, kv_heads, -1, d)
    out = torch.empty(b, kv_heads, flat.shape[2], t, dtype=dtype, device=device)
    return Case(
        "importance", (b, t, heads, kv_heads, d),
        lambda: kv.window_importance(queries, keys, group_reduce="max_probs"),
        {"grouped softmax(QKᵀ)": lambda: grouped_attention(queries, keys), "repeat_kv softmax(QKᵀ)": lambda: repeated_attention(queries, keys)},
        lambda: listing.importance(queries.cpu(), keys.cpu(), group_reduce="max_probs"), 1e-5,
        keys.numel() * keys.element_size() * (1 if device == "cpu" else 2),
        (lambda: torch.matmul(flat, keys.mT, out=out)) if device == "cpu" else None,
    )  # fmt: skip


def redundancy(mode: str, kind: str, b: int, t: int, dtype: torch.dtype, device: str) -> Case:
    heads, d = 8 if t <= 4096 else 1, 128  # a [T, T] of indices is 2 GiB a head beyond
    keys = listing.keys_of(kind, b, heads, t, d).to(device, dtype)
    published = kava_listing if mode == "kava" else rkv_listing
    in_double = listing.kava_redundancy if mode == "kava" else listing.rkv_redundancy
    exact = (lambda: in_double(keys.cpu())) if t <= 4096 else (lambda: published(keys))
    name = mode if mode == "kava" else f"{mode}, {kind} keys"
    return Case(
        name, (b, t, 0, heads, d), lambda: kv.key_redundancy(keys, mode=mode), {"[T, T] listing": lambda: published(keys)}, exact, 1e-5,
        2 * keys.numel() * keys.element_size(),
    )  # fmt: skip


def gather(b: int, t: int, dtype: torch.dtype, device: str) -> Case:
    heads, d, g = 8, 128, torch.Generator().manual_seed(0)
    keys, values = (torch.randn(b, heads, t, d, generator=g).to(device, dtype) for _ in range(2))
    chosen = kv.select(torch.rand(b, heads, t, generator=g).to(device), t // 4)
    return Case(
        "gather a quarter", (b, t, 0, heads, d), lambda: kv.gather(keys, values, chosen),
        {"torch.gather": lambda: gathered(keys, values, chosen.indices), "index_select a head": lambda: selected(keys, values, chosen.indices)},
        lambda: gathered(keys, values, chosen.indices), 0.0, 4 * chosen.indices.numel() * d * keys.element_size(),
    )  # fmt: skip


def compression(method: kv.RKV | kv.KaVa, b: int, t: int, dtype: torch.dtype, device: str) -> Case:
    heads, kv_heads, d = 32, 8, 128
    keys = listing.keys_of("clustered", b, kv_heads, t, d).to(device, dtype)
    g = torch.Generator().manual_seed(1)
    queries, values = (torch.randn(*shape, d, generator=g).to(device, dtype) for shape in ((b, heads, WINDOW), keys.shape[:3]))
    published, in_double = (composed_kava, listing.kava) if isinstance(method, kv.KaVa) else (composed_rkv, listing.rkv)

    def composed() -> Tensor:
        scores = published(queries, keys)
        gathered(keys, values, scores.topk(t // 4 - method.protected, -1).indices.sort(-1).values)
        return scores

    scored = t - method.protected
    return Case(
        f"compress, {type(method).__name__}", (b, t, heads, kv_heads, d),
        lambda: kv.compress(queries, keys, values, t // 4, method=method).scores[..., :scored], {"listings + topk + gather": composed},
        lambda: in_double(queries.cpu(), keys.cpu()), 1e-5, (2 + 4 / 4) * keys.numel() * keys.element_size(),
    )  # fmt: skip


def alignment(b: int, dtype: torch.dtype, device: str) -> Case:
    heads, d, g = 8, 128, torch.Generator().manual_seed(0)
    make = lambda: torch.randn(b, heads, LATENTS, d, generator=g).to(device, dtype)
    student, teacher = ([(make(), make()) for _ in range(LAYERS)] for _ in range(2))
    leaves = [tuple(t.requires_grad_() for t in pair) for pair in student]
    flat = [t for pair in leaves for t in pair]
    in_double = [tuple(t.detach().double().requires_grad_() for t in pair) for pair in student]
    return Case(
        f"alignment, {LAYERS} layers", (b, LATENTS, 0, heads, d),
        lambda: torch.autograd.grad(kv.alignment_loss(leaves, teacher), flat), {"a loss a layer": lambda: layer_loop(leaves, teacher)},
        lambda: layer_loop(in_double, [tuple(t.double() for t in pair) for pair in teacher]), 1e-5 if dtype == torch.float32 else 0.01,
        6 * LAYERS * student[0][0].numel() * student[0][0].element_size(),
    )  # fmt: skip


def cases(device: str, quick: bool) -> Iterator[tuple[torch.dtype, Case]]:
    batch = 1 if device == "cpu" else 8
    for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
        for t in LENGTHS[1:2] if quick else LENGTHS:
            yield dtype, importance(batch, t, dtype, device)
            for mode, kind in (("kava", "clustered"), ("rkv", "clustered"), ("rkv", "random")):
                yield dtype, redundancy(mode, kind, 1 if t > 4096 else batch, t, dtype, device)
            yield dtype, gather(batch, t, dtype, device)
            if t == LENGTHS[1]:
                yield dtype, compression(kv.KaVa(), batch, t, dtype, device)
                yield dtype, compression(kv.RKV(), batch, t, dtype, device)
        yield dtype, alignment(8, dtype, device)


# --------------------------------------------------------------------------------------------- check, race, report


def check(name: str, got: object, exact: object, tolerance: float) -> None:
    """The gate: relative to the largest of each row."""
    for mine, theirs in zip(*((x,) if isinstance(x, Tensor) else x for x in (got, exact))):
        theirs = theirs.to(mine.device).double()
        worst = ((mine.double() - theirs).abs() / theirs.abs().amax(-1, keepdim=True).clamp(min=1e-30)).max().item()
        assert worst <= tolerance, f"{name} is {worst:.1e} from the exact result"


def on_isa(isa: str | None, run: Callable[[], object]) -> Callable[[], object]:
    def call():
        if isa is not None:
            backends.module("cpp").set_isa(isa)
        return run()

    return call


def bench(device: str, repeats: int, quick: bool, progress) -> Iterator[dict]:
    """One row of the table per contender."""
    for dtype, case in cases(device, quick):
        exact = case.exact()
        made = [Contender("ours" if isa is None else f"ours {isa}", on_isa(isa, case.ours)) for isa in isas(device)]
        for contender in made:
            check(f"{case.name}: {contender.name}", contender.run(), exact, case.tolerance)
        for name, run in case.peers.items():
            check(f"{case.name}: {name}", run(), exact, 1e-3 if dtype == torch.float32 else 0.1)
            made.append(Contender(name, run))
        del exact
        peaks = {c.name: peak_extra_bytes(c.run, device) for c in made}
        floor = Contender("its GEMM alone", case.floor) if case.floor else copy_contender(device, max(int(case.nbytes) // 2, 4))
        everyone = [*made, floor]
        progress.reset(total=len(everyone) * (repeats + 2))
        progress.set_description(f"{case.name} T={case.shape[1]} {dtype}")
        times = race(everyone, device, repeats, progress=progress)
        peer, least = median(times[next(iter(case.peers))]), median(times[floor.name])
        for name, taken in times.items():
            ms = median(taken)
            yield dict(zip(GROUP, case_columns(case, dtype))) | {
                "contender": name, "ms": round(ms, 3), "best_ms": round(min(taken), 3), "x_peer": round(peer / ms, 2),
                "over_floor": round(ms / least, 2), "peak_mb": None if peaks.get(name) is None else round(peaks[name] / 2**20, 1),
            }  # fmt: skip
    best = isas(device)[0]
    if best is not None:
        backends.module("cpp").set_isa(best)
    yield from kv_generate.bench(device, repeats, quick, progress)


def case_columns(case: Case, dtype: torch.dtype) -> tuple:
    return case.name, *case.shape, str(dtype).removeprefix("torch.")
