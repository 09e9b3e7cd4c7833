"""``generate`` with :class:`CompressedCache` against the full cache: tokens a second, memory, and how much is changed by what is forgotten.

The model is a small random Llama whose attention is sharp. Bytes a step: the weights once, and the full cache's T·2·L·Hkv·D·4 of keys and
values, which transformers also copies for every token. A compressed cache holds at most budget + every entries a head.

Before timing: along one text the logits of each method equal those of a full cache whose evicted columns are masked. ``agreement`` is the
share of steps along one sampled text at which the most likely token is the full cache's; a random model has no reason to agree.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, StoppingCriteria
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distilkernels import kv

from .measure import Contender, median, peak_extra_bytes, race

PROMPT, NEW, BUDGET, EVERY = 64, 2048, 256, 64
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
METHODS = (kv.KaVa(), kv.RKV(), kv.SnapKV(), kv.LazyEviction(), kv.Crop())


def random_llama(device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=4096, max_position_embeddings=PROMPT + NEW)).eval()
    for name, weight in model.named_parameters():
        if "self_attn" in name:  # attention of a fresh model is flat and small: no entry would matter
            weight.data.mul_(5)
    return model.to(device)


def compressed(model: LlamaForCausalLM, method) -> kv.CompressedCache:
    return kv.CompressedCache(model.config, method=method, budget=BUDGET, every=EVERY)


def cache_bytes(cache: Cache) -> int:
    return sum(t.untyped_storage().nbytes() for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values))


class LargestCache(StoppingCriteria):
    """Stops nothing; looks at the cache after every token."""

    def __init__(self, cache: Cache):
        self.cache, self.nbytes = cache, 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        self.nbytes = max(self.nbytes, cache_bytes(self.cache))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def write(model: LlamaForCausalLM, prompt: Tensor, cache: Cache, new: int, **options) -> Tensor:
    return model.generate(prompt, past_key_values=cache, max_new_tokens=new, eos_token_id=None, pad_token_id=0, **{"do_sample": False} | options)


@torch.no_grad()
def logits_along(model: LlamaForCausalLM, text: Tensor, cache: Cache, before=lambda first, stop: None) -> Tensor:
    """Logits [T, V] of a text of one request that is read as ``generate`` would: the prompt, then token by token."""
    found = []
    for first, stop in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, text.shape[1]))]:
        before(first, stop)
        found.append(model(text[:, first:stop], past_key_values=cache).logits[0])
    return torch.cat(found)


def masked_logits(model: LlamaForCausalLM, text: Tensor, visible: list[list[Tensor]]) -> Tensor:
    """The same on a full cache: at each step, in each layer, only the `visible` columns (bool [Hkv, T]) are attended to."""
    step = -1

    def attention(module, query, key, value, mask, scaling, **_):
        groups = query.shape[1] // key.shape[1]
        seen = visible[step][module.layer_idx].repeat_interleave(groups, 0)[None, :, None]
        logits = (query @ key.repeat_interleave(groups, 1).mT) * scaling + mask
        p = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1)
        return (p @ value.repeat_interleave(groups, 1)).transpose(1, 2), None

    def advance(first: int, stop: int) -> None:
        nonlocal step
        step += 1

    name, own = "masked_columns", model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, eager_mask)
    model.config._attn_implementation = name
    try:
        return logits_along(model, text, DynamicCache(), advance)
    finally:
        model.config._attn_implementation = own


def check(model: LlamaForCausalLM, text: Tensor, method) -> float:
    """The gate: the largest difference of a logit, relative to the largest logit, from the full cache with masked columns."""
    visible: list[list[Tensor]] = []

    def note(first: int, stop: int) -> None:
        columns = []
        for layer in cache.layers:
            seen = torch.zeros(SIZES["num_key_value_heads"], stop + 1, dtype=torch.bool, device=text.device)
            if layer.positions is not None:
                seen.scatter_(1, layer.positions[0].long().masked_fill(layer.positions[0] < 0, stop), True)
            seen[:, first:stop] = True
            columns.append(seen[:, :stop])
        visible.append(columns)

    with compressed(model, method) as cache:
        mine = logits_along(model, text, cache, note)
    exact = masked_logits(model, text, visible)
    worst = ((mine - exact).abs().max() / exact.abs().max()).item()
    assert worst < 1e-4, f"{method}: logits are {worst:.1e} from those of a full cache with the evicted columns masked"
    return worst


def bench(device: str, repeats: int, quick: bool, progress) -> Iterator[dict]:
    model, new = random_llama(device), NEW // 4 if quick else NEW
    prompt = torch.randint(1, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    torch.manual_seed(0)
    text = write(model, prompt, DynamicCache(), new // 2, do_sample=True, top_k=0)
    likely = logits_along(model, text, DynamicCache()).argmax(-1)[PROMPT - 1 :]
    full = "full cache"
    makers = {full: DynamicCache} | {type(m).__name__: lambda m=m: compressed(model, m) for m in METHODS}
    differences = {type(m).__name__: check(model, text[:, : BUDGET + 3 * EVERY], m) for m in METHODS}
    contenders, held, peaks, agreement = [], {}, {}, {full: 1.0}
    for name, make in makers.items():

        def run(make=make, name=name, watch=False) -> None:
            cache = make()
            largest = LargestCache(cache)
            write(model, prompt, cache, new, stopping_criteria=[largest] if watch else None)
            if watch:
                held[name] = largest.nbytes
            if name != full:
                cache.release()

        if name != full:
            with make() as cache:
                same = logits_along(model, text, cache).argmax(-1)[PROMPT - 1 :] == likely
            agreement[name] = same.double().mean().item()
        peaks[name] = peak_extra_bytes(lambda run=run: run(watch=True), device)
        contenders.append(Contender(name, run))
    repeats = max(repeats // 4, 1)
    progress.reset(total=len(contenders) * (repeats + 1))
    progress.set_description(f"generate {new} tokens")
    times = race(contenders, device, repeats, warmup=1, progress=progress)
    heads, kv_heads, width = (SIZES[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    for name, taken in times.items():
        ms = median(taken)
        yield {
            "case": f"generate {new} tokens, budget {BUDGET}", "B": 1, "T": PROMPT + new, "Hq": heads, "Hkv": kv_heads, "D": width, "dtype": "float32",
            "contender": name, "ms": round(ms, 1), "best_ms": round(min(taken), 1), "x_peer": round(median(times[full]) / ms, 2),
            "tokens_per_s": round(new / ms * 1e3, 1), "peak_mb": None if peaks[name] is None else round(peaks[name] / 2**20, 1),
            "cache_mb": round(held[name] / 2**20, 2), "agreement": round(agreement[name], 3), "masked_difference": differences.get(name),
        }  # fmt: skip
