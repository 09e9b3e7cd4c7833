"""Training objectives on what a trainer has: log-probs, masks, advantages, rewards, group ids, hidden states. O(N) PyTorch.

Each docstring gives the equation, the paper, the shapes, and what is divided by what. Log-probs are natural logs; masks are
nonzero on tokens that count (other values than 0 and 1 weigh them), and what lies outside them may be NaN. Results are float32,
or float64 for float64 arguments.
"""

from .latent import info_nce, latent_kl, ranknet, span_weights
from .policy import aggregate, annealed, clipped_surrogate, distill_mask, gppo, group_advantages, kdrl, reverse_kl_estimate
from .preference import contrastive_token_weights, redi, token_dpo

__all__ = [
    "aggregate", "annealed", "clipped_surrogate", "contrastive_token_weights", "distill_mask", "gppo", "group_advantages", "info_nce",
    "kdrl", "latent_kl", "ranknet", "redi", "reverse_kl_estimate", "span_weights", "token_dpo",
]  # fmt: skip
