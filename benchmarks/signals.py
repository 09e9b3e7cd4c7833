"""Token signals: entropy, log-prob, self-certainty, margin, confidence and rank of every row.

From logits. Bytes: the row is read once, N·V·itemsize. FLOPs: an exponential and about 20 more an entry. The floor is those
bytes at the rate of a copy measured in the same run; "lse alone" is what one statistic costs. From hidden states. FLOPs: one
product, 2·N·V·H; the floor is that product alone. With a gradient (entropy, log-prob and self-certainty summed): the row is
read again and d logits written, 3·N·V·itemsize. At several temperatures: still one read of memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import distilkernels as dk
from distilkernels import backends, signals
from distilkernels.primitives.head_gemm import HeadGemm, default_chunk_size

from .cases import Case
from .losses import isas
from .measure import Contender, copy_contender, median, race

GROUP = ("case", "N", "V", "H", "dtype")

CPU = (Case("qwen", 256, 151_936, 1, "a micro-batch at Qwen's vocabulary"), Case("llama2", 1024, 32_000, 1, "a small vocabulary"))
GPU = (Case("step", 8192, 151_936, 1, "a trainer's micro-batch"),)
HIDDEN = {"cpu": (256, 151_936, 1024), "cuda": (8192, 151_936, 4096)}
TEMPERATURES = (0.6, 0.8, 1.0, 1.2)
NAMES = ("logprob", "entropy", "margin", "self_certainty")


def eager_signals(z: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """What a trainer writes: a float32 log-softmax, and each signal from it."""
    log_p = z.float().log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    top = p.topk(2).values
    self_certainty = -log_p.mean(-1) - torch.log(torch.tensor(float(z.shape[-1])))
    return log_p.gather(-1, ids[:, None])[:, 0], entropy, top[:, 0] - top[:, 1], self_certainty


def ours(z: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    found = signals.from_logits(z, ids)
    return tuple(getattr(found, name) for name in NAMES)


def trained(of: Callable, z: Tensor, ids: Tensor) -> Callable[[], Tensor]:
    """d logits of the three that methods train through."""
    leaf = z.detach().clone().requires_grad_()

    def run():
        logprob, entropy, _, certainty = of(leaf, ids)
        return torch.autograd.grad((logprob + entropy + certainty).sum(), leaf)[0]

    return run


def check(name: str, got: tuple[Tensor, ...], z: Tensor, ids: Tensor, tolerance: float) -> None:
    """The gate, on the first rows against fp64."""
    rows = min(4, z.shape[0])
    exact = z[:rows].double().log_softmax(-1)
    top = exact.exp().topk(2).values
    spread = torch.log(torch.tensor(float(z.shape[-1]), dtype=torch.float64))
    want = (exact.gather(-1, ids[:rows, None])[:, 0], -(exact.exp() * exact).sum(-1), top[:, 0] - top[:, 1], -exact.mean(-1) - spread)
    for label, a, b in zip(NAMES, got, want):
        error = (a[:rows].double() - b).abs().max().item()
        assert error < tolerance, f"{name}: {label} is {error:.2e} from fp64"


def from_logits(z: Tensor, ids: Tensor, device: str, with_compile: bool) -> list[Contender]:
    made = []
    for isa in isas(device):
        mark = "" if isa is None else f" {isa}"

        def on(call: Callable[[], object], isa=isa) -> Callable[[], object]:
            def run():
                if isa is not None:
                    backends.module("cpp").set_isa(isa)
                return call()

            return run

        check(f"ours{mark}", on(lambda: ours(z, ids))(), z, ids, 1e-5)
        made += [Contender(f"ours{mark}", on(lambda: ours(z, ids))), Contender(f"lse alone{mark}", on(lambda: dk.vocab_stats(z)))]
        if isa == isas(device)[0]:
            at = signals.from_logits(z[:4], ids[:4], temperatures=TEMPERATURES)
            for i, t in enumerate(TEMPERATURES):
                check("several temperatures", tuple(getattr(at, name)[..., i] for name in NAMES), z[:4].double() / t, ids, 1e-4)
            many = on(lambda: signals.from_logits(z, ids, temperatures=TEMPERATURES))
            each = on(lambda: [signals.from_logits(z, ids, temperature=t) for t in TEMPERATURES])
            made += [Contender(f"ours, {len(TEMPERATURES)} temperatures", many), Contender(f"ours, {len(TEMPERATURES)} calls", each)]
            made.append(Contender("ours with gradient", on(trained(ours, z, ids))))
    check("eager", eager_signals(z, ids), z, ids, 2e-4)
    made += [Contender("eager", lambda: eager_signals(z, ids)), Contender("eager with gradient", trained(eager_signals, z, ids))]
    if with_compile:
        compiled = torch.compile(eager_signals, dynamic=False)
        check("torch.compile", compiled(z, ids), z, ids, 1e-3)  # sums of 151,936 float32 numbers in a row
        made.append(Contender("torch.compile", lambda: compiled(z, ids)))
    return made


def from_hidden(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Contender]:
    n, v, h = shape
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=g).to(dtype).to(device)
    weight = torch.randn(v, h, generator=g).mul_(0.1).to(dtype).to(device)
    ids = torch.randint(0, v, (n,), generator=g).to(device)
    chunk = default_chunk_size(n, hidden.device)
    gemm = HeadGemm(weight, None, dtype)
    scratch = torch.empty(chunk, v, dtype=gemm.scratch, device=device)

    def product() -> None:
        for part in hidden.split(chunk):
            gemm.logits(gemm.tokens(part), scratch[: part.shape[0]])

    found = signals.from_hidden(hidden, weight, ids)
    exact = hidden[:4].double() @ weight.double().t()
    tolerance = 1e-3 if dtype == torch.float32 else 0.3
    check("from hidden", tuple(getattr(found, name) for name in NAMES), exact, ids, tolerance)
    compiled = torch.compile(lambda h, w: eager_signals(h @ w.t(), ids), dynamic=False)
    check("torch.compile from hidden", compiled(hidden, weight), exact, ids, tolerance)
    return [
        Contender("ours", lambda: signals.from_hidden(hidden, weight, ids)),
        Contender("logits, then eager", lambda: eager_signals(hidden @ weight.t(), ids)),
        Contender("torch.compile", lambda: compiled(hidden, weight)),
        Contender("its GEMM alone", product),
    ]


def bench(device: str, repeats: int, quick: bool, progress) -> Iterator[dict]:
    """One row of the table per contender."""
    cases = GPU if device == "cuda" else CPU
    for case in cases[:1] if quick else cases:
        for dtype in (torch.float32, torch.bfloat16):
            z = case.logits(dtype, device)
            ids = case.make_ids(z)[:, 0]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = from_logits(z, ids, device, with_compile=not quick)
            nbytes = z.numel() * z.element_size()
            times = _race([*made, copy_contender(device, nbytes)], device, repeats, progress, f"{case.name} {dtype}")
            floor = median(times["copy"]) / 2
            for name, taken in times.items():
                peer = median(times["eager with gradient" if "gradient" in name else "eager"])
                reads = 3 if "gradient" in name else 2 if name == "copy" else 1
                alone = times.get(name.replace("ours", "lse alone"))
                yield _line(case.name, case.n, case.v, None, dtype, name, taken, peer, reads * floor) | {
                    "over_lse": None if alone is None or not name.startswith("ours") else round(median(taken) / median(alone), 2),
                    "GB/s": round(reads * nbytes / median(taken) / 1e6, 1),
                }
            del z, made
    if quick:
        return
    n, v, h = HIDDEN[device]
    for dtype in (torch.float32, torch.bfloat16):
        times = _race(from_hidden((n, v, h), dtype, device), device, max(repeats // 2, 3), progress, f"hidden {dtype}")
        for name, taken in times.items():
            yield _line("hidden", n, v, h, dtype, name, taken, median(times["logits, then eager"]), median(times["its GEMM alone"])) | {
                "GFLOP/s": round(2 * n * v * h / median(taken) / 1e6, 1)
            }


def _race(made: list[Contender], device: str, repeats: int, progress, label: str) -> dict[str, list[float]]:
    progress.reset(total=len(made) * (repeats + 2))
    progress.set_description(label)
    return race(made, device, repeats, progress=progress)


def _line(case: str, n: int, v: int, h: int | None, dtype: torch.dtype, name: str, taken: list[float], eager: float, floor: float) -> dict:
    ms = median(taken)
    return {
        "case": case, "N": n, "V": v, "H": h or 0, "dtype": str(dtype).removeprefix("torch."), "contender": name, "ms": round(ms, 3),
        "best_ms": round(min(taken), 3), "x_eager": round(eager / ms, 2), "floor_ms": round(floor, 2), "over_floor": round(ms / floor, 2),
    }  # fmt: skip
