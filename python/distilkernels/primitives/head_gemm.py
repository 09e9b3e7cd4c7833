"""The three GEMMs of an lm_head, chunk by chunk: z = h Wᵀ + bias, dh = dz W, dW += dzᵀ h.

Bytes and FLOPs of a chunk of C tokens: 2·C·V·H FLOPs each; the logits scratch is C·V numbers, and dW (V·H numbers in
float32) is read and written once per chunk. So C must be large enough that 8·V·H bytes cost little beside 6·C·V·H FLOPs.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

# dW's traffic is 6.3/C of the GEMM time at 95 GFLOP/s and 20 GB/s, 250/C at 790 TFLOP/s and 4.3 TB/s
CHUNK = {"cpu": 256, "cuda": 4096}

# Columns of a float32 copy of 16-bit weights: 1,024 × H = 1,024 floats are 4 MB, a cache's share, and a GEMM of them is
# long beside its start
_TILE = 1024


def default_chunk_size(n: int, device: torch.device) -> int:
    return max(1, min(n, CHUNK.get(device.type, 256)))


_converts: dict[torch.dtype, bool] = {}


def converts_weight_tiles(dtype: torch.dtype) -> bool:
    """Whether GEMMs of this 16-bit dtype on this CPU lose to converting tiles to float32 first. Measured once, 50 ms.

    Without AMX or AVX-512 BF16 a 16-bit GEMM is several times slower than sgemm; with them, twice as fast.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if dtype not in _converts:
        _converts[dtype] = _gemm_seconds(dtype) > 1.2 * _gemm_seconds(torch.float32)
    return _converts[dtype]


# what torch.compiler.assume_constant_result sets; that decorator would import the compiler with this module
converts_weight_tiles._dynamo_marked_constant = True


def _gemm_seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(256, 1024).to(dtype), torch.ones(1024, 1024).to(dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b.t())
        times.append(time.perf_counter() - start)
    return min(times)


class HeadGemm:
    """GEMMs of hidden [N, H] with weight [V, H] in `dtype`; logits and their gradient lie in `scratch`.

    `dtype` is what the operands are rounded to (the autocast dtype, else their own). Products accumulate in float32
    (float64 for float64), dW over chunks too. Where the library can only give a 16-bit product of 16-bit operands (a CPU
    whose 16-bit GEMM is fast, CUDA builds without out_dtype) the scratch has that dtype by default: float32 would hold
    the same rounded logits. Asking for float32 on a CPU converts weight tiles instead and keeps every bit.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, scratch: torch.dtype | None = None):
        self.bias, self.dtype = bias, dtype
        self.sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        on_cpu, narrow = weight.device.type == "cpu", dtype in (torch.bfloat16, torch.float16)
        self.tiled = on_cpu and narrow and (scratch == torch.float32 or converts_weight_tiles(dtype))
        rounds = narrow and not self.tiled and (on_cpu or not _HAS_OUT_DTYPE)
        self.scratch = scratch or (dtype if rounds else self.sum_dtype)
        # the operands of every product: whole where they have the dtype already, tile by tile where they are converted
        self.operand = torch.float32 if self.tiled else dtype
        self.weight = weight if self.tiled else weight.to(dtype)

    def tokens(self, hidden: Tensor) -> Tensor:
        """A chunk of hidden states [C, H] as an operand."""
        return hidden.to(self.dtype).to(self.operand).contiguous()

    def _tiles(self):
        for start in range(0, self.weight.shape[0], _TILE):
            columns = slice(start, start + _TILE)
            yield columns, self.weight[columns].to(self.dtype).to(self.operand)

    def logits(self, h: Tensor, z: Tensor) -> None:
        """Writes h Wᵀ + bias into z [C, V]."""
        if self.tiled:
            for columns, tile in self._tiles():
                product(h, tile.t(), z[:, columns])
        else:
            product(h, self.weight.t(), z)
        if self.bias is not None:
            z.add_(self.bias.to(z.dtype))

    def hidden_grad(self, dz: Tensor, out: Tensor) -> None:
        """Writes dz W into out [C, H] of the sum dtype."""
        if self.tiled:
            out.zero_()
            for columns, tile in self._tiles():
                product(dz[:, columns].to(self.operand), tile, out, accumulate=True)
        else:
            product(dz.to(self.operand), self.weight, out)

    def add_weight_grad(self, dz: Tensor, h: Tensor, total: Tensor, first: bool) -> None:
        """total [V, H] (+)= dzᵀ h; `first` overwrites, so that fresh memory is not zeroed before."""
        if dz.dtype == self.operand:
            product(dz.t(), h, total, accumulate=not first)
            return
        for start in range(0, total.shape[0], _TILE):
            columns = slice(start, start + _TILE)
            product(dz[:, columns].to(self.operand).t(), h, total[columns], accumulate=not first)


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out (+)= a b. A 16-bit product with a float32 result keeps the accumulators on CUDA builds that can (torch ≥ 2.8).

    Elsewhere such a product is rounded to 16 bits first: 2⁻⁹ (bf16) or 2⁻¹² (fp16) of each entry.
    """
    if out.dtype == a.dtype:
        out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
    elif a.is_cuda and _HAS_OUT_DTYPE:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out) if accumulate else torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif accumulate:
        out.add_(torch.mm(a, b))
    else:
        out.copy_(torch.mm(a, b))


_HAS_OUT_DTYPE = "out_dtype" in str(torch._C._jit_get_schemas_for_operator("aten::addmm"))
