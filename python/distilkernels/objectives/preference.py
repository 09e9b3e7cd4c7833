"""Objectives on good and bad traces: REDI, DPO by tokens, and the contrastive weights of cDPO."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import token_logprobs
from ..primitives.head import checked_number
from ..primitives.vocab_stats import checked_logits
from .shapes import checked_floats, checked_mask, over


def redi(
    logprobs: Tensor, positive: Tensor, mask: Tensor | None = None, *, alpha: float = 0.8, sequence_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Reinforcement distillation (REDI, arXiv 2505.24850): likelihood up on correct traces, down by α on incorrect ones, no reference.

        loss = mean over positives of NLL/|y|  −  α · mean over negatives of NLL/|y|

    With sequence weights the means are Σ w·NLL/|y| / Σ w, each over its own sequences.

    Args:
        logprobs: [B, L], of the traces' tokens. positive: [B], nonzero for a correct trace.
        mask: [B, L]; |y| = Σ mask. token_weights: [B, L] multiply the tokens' NLL but not |y|.
        alpha: α ≥ 0; 1 is symmetric and unstable, the paper uses 0.8.
        sequence_weights: [B], such as QCRD's quality of a rationale (arXiv 2405.13014).

    Returns:
        A scalar; a side without traces contributes 0.
    """
    logprobs = checked_floats("logprobs", logprobs)
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must have shape [B, L]; got {tuple(logprobs.shape)}")
    if not isinstance(positive, Tensor) or positive.shape != logprobs.shape[:1]:
        raise ValueError(f"positive must be a tensor of shape ({logprobs.shape[0]},); got {getattr(positive, 'shape', type(positive))}")
    if checked_number("alpha", alpha) < 0:
        raise ValueError(f"alpha must not be negative; got {alpha}")
    mask = checked_mask("mask", mask, logprobs, "logprobs")
    nll = over(_summed(-logprobs, mask, token_weights, "token_weights"), mask.sum(-1))
    weights = checked_mask("sequence_weights", sequence_weights, nll, "positive") * (mask != 0).any(-1)

    def mean(w: Tensor) -> Tensor:
        # a trace of the other side or of weight 0 may hold −inf or NaN
        return over((nll.masked_fill(w == 0, 0) * w).sum(), w.sum())

    return mean(weights * (positive != 0)) - alpha * mean(weights * (positive == 0))


def token_dpo(
    chosen_logprobs: Tensor, chosen_reference: Tensor, rejected_logprobs: Tensor, rejected_reference: Tensor, *, chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None, chosen_weights: Tensor | None = None, rejected_weights: Tensor | None = None, beta: float = 0.1,
    length_normalize: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Direct preference optimisation with token masks and weights (cDPO, arXiv 2411.19943; DPO with weights 1).

        loss = −log σ( β·Σ_t w_t (log π − log π_ref)(chosen) − β·Σ_t w_t (log π − log π_ref)(rejected) ),  mean over pairs

    Args:
        chosen_logprobs, chosen_reference: [B, L]; rejected_…: [B, L']. The reference's get no gradient.
        …_mask: tokens that count: a step alone gives per-step DPO. …_weights: w_t, no gradient.
        beta: β. length_normalize: divide each sum by its Σ mask.
        reduction: "mean", "sum" or "none" ([B]).
    """
    sides = []
    for side, logprobs, reference, mask, weights in (
        ("chosen", chosen_logprobs, chosen_reference, chosen_mask, chosen_weights),
        ("rejected", rejected_logprobs, rejected_reference, rejected_mask, rejected_weights),
    ):
        logprobs = checked_floats(f"{side}_logprobs", logprobs)
        reference = checked_floats(f"{side}_reference", reference, logprobs.shape, f"{side}_logprobs")
        mask = checked_mask(f"{side}_mask", mask, logprobs, f"{side}_logprobs")
        gain = _summed(logprobs - reference.detach(), mask, weights, f"{side}_weights")
        sides.append(over(gain, mask.sum(-1)) if length_normalize else gain)
    if sides[0].shape != sides[1].shape:
        raise ValueError(f"rejected_logprobs must have as many sequences as chosen_logprobs, {tuple(sides[0].shape)}; got {tuple(sides[1].shape)}")
    loss = -torch.nn.functional.logsigmoid(checked_number("beta", beta) * (sides[0] - sides[1]))
    if reduction == "mean":
        return loss.sum() / max(loss.numel(), 1)
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")
    return loss.sum() if reduction == "sum" else loss


def _summed(values: Tensor, mask: Tensor, weights: Tensor | None, name: str) -> Tensor:
    """Σ_t mask·weight·value; what is masked out may be NaN."""
    values = values.masked_fill(mask == 0, 0) * mask
    if weights is not None:
        weights = checked_mask(name, weights, values, "the log-probs").masked_fill(mask == 0, 0)
        values = values * weights
    return values.sum(-1)


# rows of [V] whose contrast exists at once: 8 MB stay in a CPU's last-level cache
_BLOCK_BYTES = 8 << 20


@torch.no_grad()
def contrastive_token_weights(
    positive_logits: Tensor, negative_logits: Tensor, ids: Tensor, *, contrast: float = 1.0, valid_vocab: int | None = None, backend: str | None = None
) -> Tensor:
    """s_t = softmax((1 + γ)·z_pos − γ·z_neg)[y_t] in [0, 1], from a model of good traces and one of bad ones (cDPO, arXiv 2411.19943).

    A critical token of a bad trace has a low s_t. The released code has γ = 1, and weighs chosen traces by s_t and rejected
    ones by 1 − s_t in :func:`token_dpo`.

    Args:
        positive_logits, negative_logits: [..., V]. ids: [...], y_t. contrast: γ ≥ 0.

    Returns:
        [...] float32 (float64 for float64 logits). A block of rows of the contrast exists at a time.
    """
    checked_logits(positive_logits, "positive_logits")
    checked_logits(negative_logits, "negative_logits")
    if negative_logits.shape != positive_logits.shape:
        raise ValueError(f"negative_logits must have the shape of positive_logits, {tuple(positive_logits.shape)}; got {tuple(negative_logits.shape)}")
    if not isinstance(ids, Tensor) or ids.shape != positive_logits.shape[:-1]:
        raise ValueError(f"ids must be a tensor of shape {tuple(positive_logits.shape[:-1])}; got {getattr(ids, 'shape', type(ids))}")
    contrast = checked_number("contrast", contrast)
    if contrast < 0:
        raise ValueError(f"contrast must not be negative; got {contrast}")
    vocab = positive_logits.shape[-1]
    good, bad, targets = positive_logits.reshape(-1, vocab), negative_logits.reshape(-1, vocab), ids.reshape(-1)
    wide = torch.promote_types(torch.float32, torch.promote_types(good.dtype, bad.dtype))
    step = max(1, _BLOCK_BYTES // (vocab * wide.itemsize))
    found = []
    for start in range(0, max(len(targets), 1), step):
        rows = slice(start, start + step)
        z_good, z_bad = good[rows].to(wide), bad[rows].to(wide)
        # a column that either masks is masked: −inf in the negative alone would make +inf of it
        z = torch.lerp(z_bad, z_good, 1 + contrast).masked_fill_((z_good == -torch.inf) | (z_bad == -torch.inf), -torch.inf)
        found.append(token_logprobs(z, targets[rows], valid_vocab=valid_vocab, backend=backend).exp())
    return torch.cat(found).view(ids.shape)
