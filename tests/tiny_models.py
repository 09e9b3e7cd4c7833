"""Random causal LMs of a few thousand weights, sharp enough that their argmax is not a matter of rounding."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

V = 97  # a prime, so that no axis can stand for another
LLAMA = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
    max_position_embeddings=128, initializer_range=0.2,
)  # fmt: skip
GPT2 = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)


def tiny(name: str = "LlamaForCausalLM", seed: int = 0, **config):
    torch.manual_seed(seed)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**(GPT2 if name.startswith("GPT2") else LLAMA) | config)).eval()


def disturbed(model, scale: float, seed: int = 1):
    """A copy with some noise on its weights: it agrees with the original on some tokens and not on others."""
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * scale * p.std())
    return other


def prompts(lengths=(9, 6, 1, 4, 8), width: int = 9, seed: int = 0, vocab: int = V):
    """Left-padded ids and mask; the padding is a legal id, so that reading it would show."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids, mask


def rows_after(model, prompt, tokens):
    """The logits [len(tokens), V] that tokens were judged by, from one forward without a cache."""
    sequence = torch.cat([prompt, torch.as_tensor(tokens, dtype=torch.int64)])[None]
    with torch.no_grad():
        logits = model(input_ids=sequence, use_cache=False).logits[0]
    return logits[len(prompt) - 1 : len(sequence[0]) - 1]
