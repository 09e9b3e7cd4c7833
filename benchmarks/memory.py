"""Peak memory of a linear-fused loss and of eager over the number of tokens: flat against linear.

Eager keeps logits, log-softmax and their gradient, 12·N·V bytes in float32; ours one chunk of logits, 4·C·V, beside what it
must return. ``python -m benchmarks.run memory`` also draws benchmarks/results/memory-DEVICE.png.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

import distilkernels as dk

from .losses import eager_loss
from .measure import peak_extra_bytes

GROUP = ("V", "H", "K")
TOKENS = (1024, 2048, 4096, 8192, 16_384, 32_768)


def bench(device: str, repeats: int, quick: bool, progress) -> Iterator[dict]:
    """Peak bytes above what was held before one forward + backward, d hidden and d weight included."""
    vocab, width, k = 40_000, 256, 32  # every buffer above 32 MB: smaller ones hide in memory the allocator kept
    weight = torch.randn(vocab, width, device=device).mul_(0.1).requires_grad_()
    rows = []
    progress.reset(total=2 * len(TOKENS))
    for n in TOKENS[:3] if quick else TOKENS:
        hidden = torch.randn(n, width, device=device).requires_grad_()
        ids = (torch.arange(k, device=device) * 1250 + torch.arange(n, device=device)[:, None] % 1250).contiguous()
        logprobs = torch.randn(n, k, device=device).log_softmax(-1) - 0.2
        tail = torch.log1p(-logprobs.exp().sum(-1))
        teacher = dk.TeacherTopK(ids, logprobs, tail)
        losses = {
            "ours": lambda h, teacher=teacher: dk.linear_topk_distill_loss(h, weight, teacher),
            "eager": lambda h, ids=ids, logprobs=logprobs, tail=tail: eager_loss(h @ weight.t(), ids, logprobs, tail),
        }
        values = {name: loss(hidden).item() for name, loss in losses.items()}
        assert abs(values["ours"] - values["eager"]) <= 1e-4 * abs(values["eager"]), values
        row = {"V": vocab, "H": width, "K": k, "N": n}
        for name, loss in losses.items():
            peak = peak_extra_bytes(lambda loss=loss, hidden=hidden: torch.autograd.grad(loss(hidden), (hidden, weight)), device)
            row[f"{name}_MB"] = None if peak is None else round(peak / 1e6, 1)
            progress.update()
        rows.append(row)
        yield row
    if rows[0]["ours_MB"] is not None:
        draw(rows, Path(__file__).parent / "results" / f"memory-{device}.png")


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    tokens = [row["N"] for row in rows]
    for name, colour in (("eager", "tab:gray"), ("ours", "tab:blue")):
        axes.plot(tokens, [row[f"{name}_MB"] for row in rows], "o-", color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="peak extra memory, MB", title=f"forward + backward, V = {rows[0]['V']:,}, fp32")
    axes.set_xticks(tokens, [f"{n // 1024}k" for n in tokens])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
