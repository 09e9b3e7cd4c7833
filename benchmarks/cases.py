"""One list of rows-of-logits cases: the contract test, opcheck, gradients and the benchmarks draw from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Case:
    """Logits [N, V] and ids [N, K] of a kind; `why` says what it would catch."""

    name: str
    n: int
    v: int
    k: int
    why: str = ""
    content: str = "normal"
    layout: str = "contiguous"
    ids: str = "top"
    ids_dtype: torch.dtype = torch.int64
    head: dict = field(default_factory=dict)

    def logits(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> torch.Tensor:
        """The case's logits, values exactly representable in `dtype`."""
        x = _content(self.content, self.n, self.v, torch.Generator().manual_seed(seed)).to(dtype).to(device)
        return _layout(self.layout, x)

    def make_ids(self, logits: torch.Tensor, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + 1)
        flat = logits.detach().reshape(-1, self.v)
        if self.ids == "top":
            # teacher-like: mostly where the student is large, some at random, in no order
            noisy = flat.cpu().float().nan_to_num(0, 1e4, -1e4) + torch.randn(flat.shape, generator=generator)
            ids = noisy.topk(self.k, dim=-1).indices
            ids = ids.gather(1, torch.rand(ids.shape, generator=generator).argsort(1))
        else:
            ids = torch.rand(flat.shape, generator=generator).argsort(1)[:, : self.k]
        if self.ids == "empty" and self.k:
            ids[:, :: 2 if self.k > 1 else 1] = -1
        if self.ids == "repeated" and self.k > 1:
            ids[:, -1] = ids[:, 0]
        return ids.to(self.ids_dtype).to(logits.device).view(*logits.shape[:-1], self.k)


def _content(kind: str, n: int, v: int, g: torch.Generator) -> torch.Tensor:
    x = torch.randn(n, v, generator=g) * 2.5
    if kind == "normal" and v > 64:
        # outliers: softmax over plain noise is flat, a language model's is not
        x[:, :: max(v // 16, 1)] += 6
    elif kind == "masked":
        x[torch.rand(n, v, generator=g) < 0.3] = -math.inf
        x[:, 0] = 1.0
    elif kind == "nan_row" and n > 1:
        x[n // 2, v // 2] = math.nan
    elif kind == "wide":
        x = x * 4000
    elif kind == "ascending":
        x = torch.linspace(-200, 200, v).expand(n, v).clone()
    elif kind == "equal":
        x = torch.full((n, v), 3.25)
    elif kind == "tiny_tail":
        x = x.clamp(-3, 3) - 24
    return x


def _layout(kind: str, x: torch.Tensor) -> torch.Tensor:
    n, v = x.shape
    if kind == "row_stride":
        wide = x.new_full((n, v + 5), math.nan)
        wide[:, :v] = x
        return wide[:, :v]
    if kind == "shifted":
        longer = x.new_full((2, n // 2 + 1, v), math.nan)
        longer[:, :-1] = x.view(2, n // 2, v)
        return longer[:, :-1]
    if kind == "transposed":
        return x.t().contiguous().t()
    if kind == "four_d":
        return x.view(1, 2, n // 2, v).transpose(1, 2)
    return x


CONTRACT = [
    Case("prime", 5, 1009, 7, "no block or vector divides 1009"),
    Case("one_row", 1, 333, 4, "no parallel split of rows"),
    Case("no_rows", 0, 64, 4, "an empty batch"),
    Case("one_column", 3, 1, 1, "the softmax is constant and the tail empty"),
    Case("short", 4, 13, 3, "shorter than a vector"),
    Case("k1", 4, 515, 1, "a label"),
    Case("k_is_v", 3, 37, 37, "no tail", ids="random"),
    Case("k_large", 2, 700, 300, "more slots than a block", ids="random"),
    Case("block", 3, 4096, 8, "a whole number of blocks"),
    Case("block_and_one", 3, 4097, 8, "one entry in the last block"),
    Case("random_ids", 4, 2053, 16, "ids with small probabilities", ids="random", ids_dtype=torch.int32),
    Case("empty_slots", 4, 515, 6, "ragged teachers", ids="empty", ids_dtype=torch.int32),
    Case("repeated_ids", 4, 515, 6, "the first counts", ids="repeated"),
    Case("masked", 4, 515, 6, "-inf logits are legal", content="masked", ids="random"),
    Case("nan_row", 5, 515, 6, "a NaN stays in its row", content="nan_row"),
    Case("wide", 4, 1009, 5, "spreads of 1e4: no overflow, no denormals", content="wide"),
    Case("ascending", 3, 6007, 5, "a running maximum that moves in every block", content="ascending"),
    Case("equal", 3, 515, 5, "ties: the lowest id", content="equal", ids="random"),
    Case("row_stride", 4, 259, 5, "a padded row", layout="row_stride"),
    Case("shifted", 6, 259, 5, "logits[:, :-1] is read in place", layout="shifted"),
    Case("transposed", 4, 131, 5, "a last stride that is not 1", layout="transposed"),
    Case("four_d", 6, 131, 5, "leading dimensions that two strides cannot describe", layout="four_d"),
    Case("temperature", 4, 515, 6, "T on value and gradient", head={"temperature": 2.0}),
    Case("cold", 4, 515, 6, "T = 0.1 spreads the logits by ten", head={"temperature": 0.1}),
    Case("softcap", 4, 515, 6, "Gemma's head", head={"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.5}),
    Case("valid_vocab", 4, 515, 6, "padded vocabularies", head={"valid_vocab": 400}, ids="random"),
    Case("valid_softcap", 4, 515, 6, "the cap comes before the mask", head={"valid_vocab": 509, "softcap": 3.0}),
]

# The shapes that performance.md and the issues name.
LOSSES = [
    Case("qwen", 256, 151_936, 64, "a micro-batch at Qwen's vocabulary"),
    Case("llama2", 1024, 32_000, 64, "a small vocabulary"),
    Case("label", 64, 151_936, 1, "one slot: the loss of a label"),
]
