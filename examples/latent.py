"""A language model that thinks in latents: M of them, all updated at once, T times (PCCoT, arXiv 2506.18582).

A latent's input is the last hidden state of the token before it, from the previous update: Jacobi's iteration for what a
continuous chain of thought (CODI) computes one latent after the other. The answer is read off after the last update. The same
weights read the explicit chain of thought: that is the teacher.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import distilkernels as dk
from distilkernels.kv import Method

from .arithmetic import ANSWER, LINE, WORDS, Problems

KV = list[tuple[Tensor, Tensor]]
"""Keys and values [B, H, T, D] of each layer."""

# the attention function of transformers' registry that shows its queries
ATTENTION = "sdpa_with_queries"
_seen: list[Tensor] | None = None


def _attention(module, query: Tensor, *args, **options):
    if _seen is not None:
        _seen.append(query)
    return sdpa_attention_forward(module, query, *args, **options)


AttentionInterface.register(ATTENTION, _attention)
# without an entry of its own here it would get no mask
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextlib.contextmanager
def queries() -> Iterator[list[Tensor]]:
    """The queries [B, Hq, T, D] of each layer whose attention runs inside, in the order it runs."""
    global _seen
    _seen = found = []
    try:
        yield found
    finally:
        _seen = None


class Size(NamedTuple):
    """Width, depth, and heads of queries and of keys."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int


def causal_lm(size: Size, seed: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings over the words of :mod:`.arithmetic`, initialised from `seed`."""
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=size.hidden, intermediate_size=4 * size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, max_position_embeddings=256, tie_word_embeddings=True,
        initializer_range=0.08, bos_token_id=None, eos_token_id=None, pad_token_id=None, attn_implementation=ATTENTION,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


class Thought(NamedTuple):
    """What the student makes of a question: ``logits`` [B, V] of the answer, hidden states [B, 1, H] of each layer at "answer:",
    keys and values [B, Hkv, M, D] of its latents in each layer."""

    logits: Tensor
    hidden: list[Tensor]
    latents: KV


class LatentStudent(nn.Module):
    """`model` with `num_latents` latents, updated `num_updates` times (at 0 they are pause tokens)."""

    def __init__(self, model: LlamaForCausalLM, num_latents: int, num_updates: int):
        super().__init__()
        self.model, self.num_latents, self.num_updates = model, num_latents, num_updates
        width = model.config.hidden_size
        # latents enter at the scale of the embeddings
        scale = model.get_input_embeddings().weight.detach().square().mean().sqrt().item()
        self.start = nn.Parameter(torch.randn(num_latents, width) * scale)
        self.feedback = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width))
        nn.init.constant_(self.feedback[-1].weight, scale)

    def forward(self, question: Tensor) -> Thought:
        """question int64 [B, Q] -> the answer, num_updates + 1 passes later; differentiable through all of them."""
        batch, length = question.shape
        embed = self.model.get_input_embeddings()
        answer = embed(torch.full_like(question[:, :1], ANSWER))
        inputs, past = [embed(question), self.start.expand(batch, -1, -1)], []
        for update in range(self.num_updates + 1):
            cache = DynamicCache()
            for layer, pair in enumerate(past):
                cache.update(*pair, layer)
            last = update == self.num_updates
            out = self.model.model(
                inputs_embeds=torch.cat([*inputs, answer] if last else inputs, 1), past_key_values=cache, use_cache=True, output_hidden_states=last
            )
            if not past:
                # the token before the first latent is the question's last; later passes read the question from the cache
                asked = out.last_hidden_state[:, length - 1 : length]
                past = [(layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in cache.layers]
            if not last:
                thoughts = out.last_hidden_state[:, -self.num_latents : -1]
                inputs = [self.feedback(torch.cat([asked, thoughts], 1))]
        at = slice(length, length + self.num_latents)
        latents = [(layer.keys[:, :, at], layer.values[:, :, at]) for layer in cache.layers]
        # the first of the hidden states is the embedding
        return Thought(self.model.lm_head(out.last_hidden_state[:, -1]), [h[:, -1:] for h in out.hidden_states[1:]], latents)


class Trace(NamedTuple):
    """The teacher's pass over question, chain of thought and answer.

    ``logits`` [B, S, V] predict ``labels`` [B, S], all that follows the question; hidden states [B, 1, H] of each layer at "answer:"; the
    whole ``cache``; ``queries`` [B, Hq, 2, D] of each layer at "answer:" and at the answer; the ``span`` of the chain of thought in it.
    """

    logits: Tensor
    labels: Tensor
    hidden: list[Tensor]
    cache: KV
    queries: list[Tensor]
    span: tuple[int, int]


def read(model: LlamaForCausalLM, problems: Problems) -> Trace:
    """One pass over the explicit chain of thought, whose last line is dropped: it would hold the answer itself."""
    mark = torch.full_like(problems.question[:, :1], ANSWER)
    ids = torch.cat([problems.question, problems.thought[:, :-LINE], mark, problems.answer[:, None]], 1)
    start, stop = problems.question.shape[1], ids.shape[1] - 2
    with queries() as seen:
        out = model.model(input_ids=ids, use_cache=True, output_hidden_states=True)
    cache = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
    logits = model.lm_head(out.last_hidden_state[:, start - 1 : -1])
    return Trace(logits, ids[:, start:], [h[:, -2:-1] for h in out.hidden_states[1:]], cache, [q[:, :, -2:] for q in seen], (start, stop))


def targets(trace: Trace, method: Method, num_latents: int, inv_freq: Tensor) -> list[dk.kv.CompressedKV]:
    """The teacher's cache over the chain of thought, num_latents entries a head, its keys turned to the latents' positions; no gradient."""
    positions = trace.span[0] + torch.arange(num_latents, dtype=torch.int32).expand(len(trace.labels), -1)
    turned = dk.kv.Rope(inv_freq, target=positions)
    return [
        dk.kv.compress(q.detach(), keys.detach(), values.detach(), num_latents, method=method, span=trace.span, rotate=turned)
        for q, (keys, values) in zip(trace.queries, trace.cache)
    ]
