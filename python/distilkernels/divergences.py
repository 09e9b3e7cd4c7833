"""Divergences between a teacher p and a student q on buckets: callables ``(log_p, log_q) -> rows``.

`log_p` and `log_q` are [..., buckets] natural log-probabilities in float64 (−inf for an empty bucket); the result
is [...], one value per row in nats. Each is plain PyTorch that autograd differentiates: no kernel knows which one it
serves. 0·log 0 is 0 and has a finite gradient. Any callable of this form is accepted by the losses.

A parameter may be a number or a tensor with one value per token. The losses call two optional methods:
``rows(index)`` for the divergence on some of the flattened tokens, and ``buckets(has_tail)`` to say whether the last
bucket is the tail. ``mode_seeking`` marks those whose minimiser is no match of q to p when mass off S costs nothing.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from .primitives.boundary import plain_eager

_NONE = -math.inf


def _log(x: float | Tensor) -> float | Tensor:
    if isinstance(x, Tensor):
        return x.log()
    return math.log(x) if x > 0 else _NONE


def _wide(parameter: float | Tensor, like: Tensor) -> float | Tensor:
    """A per-token parameter broadcast over the buckets."""
    return parameter.to(like.dtype).unsqueeze(-1) if isinstance(parameter, Tensor) else parameter


def _kl_terms(log_a: Tensor, log_b: Tensor) -> Tensor:
    """a·log(a/b) per bucket; 0 where a = 0, with gradient 0 there."""
    nothing = log_a == _NONE
    return log_a.exp() * (log_a.masked_fill(nothing, 0) - log_b.masked_fill(nothing, 0))


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return _kl_terms(log_a, log_b).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float | Tensor) -> Tensor:
    """log(weight·p + (1 − weight)·q); logaddexp has no gradient where both are zero, so those are set aside."""
    nothing = (log_p == _NONE) & (log_q == _NONE)
    mixed = torch.logaddexp(log_p.masked_fill(nothing, 0) + _log(weight), log_q.masked_fill(nothing, 0) + _log(1 - weight))
    return mixed.masked_fill(nothing, _NONE)


class Divergence:
    """What the package's own divergences share."""

    mode_seeking: ClassVar[bool] = False

    def rows(self, index) -> Divergence:
        """This divergence on the tokens `index` (a slice or index tensor over flattened tokens)."""
        per_token = {name: value.reshape(-1)[index] for name, value in self.per_token().items()}
        return replace(self, **per_token) if per_token else self

    def per_token(self) -> dict[str, Tensor]:
        """The parameters that are tensors with one value per token."""
        parameters = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in parameters.items() if isinstance(value, Tensor) and value.dim() > 0}


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and plain_eager(tensor)


def _parameter(divergence: Divergence, name: str, low: float = -math.inf, high: float = math.inf) -> None:
    """A number in [low, high] or a tensor of them (looked at on a CPU only: elsewhere that would wait for the device)."""
    value, kind = getattr(divergence, name), type(divergence).__name__
    if isinstance(value, Tensor):
        if _on_host(value) and value.numel():
            least, most = value.aminmax()
            if not (least >= low and most <= high):
                raise ValueError(f"{kind}: {name} must be in [{low}, {high}]; got values from {least} to {most}")
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{kind}: {name} must be a number or a tensor; got {type(value).__name__}")
    elif not low <= value <= high:
        raise ValueError(f"{kind}: {name} must be in [{low}, {high}]; got {value}")


@dataclass(frozen=True, eq=False)
class ForwardKL(Divergence):
    """Σ p·log(p/q)."""

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _kl(log_p, log_q)


@dataclass(frozen=True, eq=False)
class ReverseKL(Divergence):
    """Σ q·log(q/p); +inf where p = 0 < q."""

    mode_seeking = True

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _kl(log_q, log_p)


@dataclass(frozen=True, eq=False)
class JSD(Divergence):
    """β·KL(p‖M) + (1−β)·KL(q‖M) with M = βp + (1−β)q; β = 0 is forward KL and β = 1 reverse KL (GKD, arXiv 2306.13649)."""

    beta: float | Tensor = 0.5

    def __post_init__(self):
        _parameter(self, "beta", 0, 1)

    @property
    def mode_seeking(self) -> bool:
        # per-token values are not looked at here; a single one on the host is
        return bool(self.beta == 1) if not isinstance(self.beta, Tensor) or (self.beta.dim() == 0 and self.beta.device.type == "cpu") else False

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        if not isinstance(self.beta, Tensor):
            if self.beta in (0, 1):
                return _kl(log_p, log_q) if self.beta == 0 else _kl(log_q, log_p)
            return self._between(log_p, log_q, self.beta)
        forward, reverse = self.beta == 0, self.beta == 1
        between = self._between(log_p, log_q, _wide(self.beta.masked_fill(forward | reverse, 0.5), log_p))
        # rows that take another branch compare q with itself here, so that no infinite value reaches the gradient
        f = forward.unsqueeze(-1)
        r = reverse.unsqueeze(-1)
        forward_kl = _kl(log_p, torch.where(f, log_q, log_p))
        reverse_kl = _kl(log_q, torch.where(r, log_p, log_q))
        return torch.where(forward, forward_kl, torch.where(reverse, reverse_kl, between))

    @staticmethod
    def _between(log_p: Tensor, log_q: Tensor, beta: float | Tensor) -> Tensor:
        log_m = _log_mixture(log_p, log_q, beta)
        return (beta * _kl_terms(log_p, log_m) + (1 - beta) * _kl_terms(log_q, log_m)).sum(-1)


@dataclass(frozen=True, eq=False)
class SkewForwardKL(Divergence):
    """KL(p ‖ αp + (1−α)q) (DistiLLM, arXiv 2402.03898)."""

    alpha: float | Tensor = 0.1

    def __post_init__(self):
        _parameter(self, "alpha", 0, 1)

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _kl(log_p, _log_mixture(log_p, log_q, _wide(self.alpha, log_p)))


@dataclass(frozen=True, eq=False)
class SkewReverseKL(Divergence):
    """KL(q ‖ (1−α)p + αq) (DistiLLM, arXiv 2402.03898)."""

    alpha: float | Tensor = 0.1
    mode_seeking = True

    def __post_init__(self):
        _parameter(self, "alpha", 0, 1)

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _kl(log_q, _log_mixture(log_q, log_p, _wide(self.alpha, log_p)))


@dataclass(frozen=True, eq=False)
class TotalVariation(Divergence):
    """½·Σ |p − q|."""

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


@dataclass(frozen=True, eq=False)
class AlphaBeta(Divergence):
    """−1/(αβ)·Σ [p^α q^β − αp − βq] on the line β = 1 − α, α ∉ {0, 1} (ABKD, arXiv 2505.04560).

    Off that line it is no f-divergence: the mass outside S would need its own sums of p^α q^β, p^{α+β} and q^{α+β}.
    """

    alpha: float | Tensor = 0.5
    beta: float | None = None

    def __post_init__(self):
        _parameter(self, "alpha")
        if self.beta is not None and (isinstance(self.alpha, Tensor) or not math.isclose(self.alpha + self.beta, 1)):
            raise ValueError(
                "AlphaBeta: only α + β = 1 is served: elsewhere it is no f-divergence and needs sums of p^α q^β, p^{α+β} and "
                f"q^{{α+β}} over the tail; got alpha={self.alpha}, beta={self.beta}"
            )
        at_limit = self.alpha in (0, 1) if not isinstance(self.alpha, Tensor) else _on_host(self.alpha) and ((self.alpha == 0) | (self.alpha == 1)).any()
        if at_limit:
            raise ValueError(f"AlphaBeta: alpha must not be 0 (that limit is reverse_kl) or 1 (forward_kl); got {self.alpha}")

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        alpha = _wide(self.alpha, log_p)
        beta = 1 - alpha
        nothing = (log_p == _NONE) & (log_q == _NONE)
        product = (alpha * log_p.masked_fill(nothing, 0) + beta * log_q.masked_fill(nothing, 0)).exp().masked_fill(nothing, 0)
        terms = product - alpha * log_p.exp() - beta * log_q.exp()
        return (terms / -(alpha * beta)).sum(-1)


@dataclass(frozen=True, eq=False)
class AdaptiveKL(Divergence):
    """(g_h·KL(p‖q) + g_t·KL(q‖p)) / (g_h + g_t), g the detached Σ|p − q| on the head and the tail of p (AKL, arXiv 2404.02657).

    The head is the longest prefix of p in descending order (stable) with cumulative mass ≤ `head_mass`, at least one
    bucket; the tail bucket of ``tail="bucket"`` always counts as tail. 0 where p = q.
    """

    head_mass: float | Tensor = 0.5
    has_tail: bool = False
    mode_seeking = True

    def __post_init__(self):
        _parameter(self, "head_mass", 0, 1)

    def buckets(self, has_tail: bool) -> AdaptiveKL:
        return replace(self, has_tail=has_tail)

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        with torch.no_grad():
            p, gap = log_p.exp(), (log_p.exp() - log_q.exp()).abs()
            listed = p[..., :-1] if self.has_tail else p
            ordered, order = listed.sort(dim=-1, descending=True, stable=True)
            in_head = ordered.cumsum(-1) <= _wide(self.head_mass, p)
            in_head[..., :1] = True
            head = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, order, in_head)
            g_head = gap.masked_fill(~head, 0).sum(-1)
            g_tail = gap.masked_fill(head, 0).sum(-1)
            total = g_head + g_tail
            scale = torch.where(total == 0, 0.0, 1 / total)
        return _weighted(g_head * scale, _kl(log_p, log_q)) + _weighted(g_tail * scale, _kl(log_q, log_p))


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, weight * value)


@dataclass(frozen=True, eq=False)
class ToDi(Divergence):
    """Σ w·p·log(p/q) + (1−w)·q·log(q/p) per bucket, w = σ(log p/q) detached (ToDi, arXiv 2505.16297)."""

    def __call__(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        with torch.no_grad():
            nothing = (log_p == _NONE) & (log_q == _NONE)
            w = torch.sigmoid((log_p - log_q).masked_fill(nothing, 0))
        return (_weighted(w, _kl_terms(log_p, log_q)) + _weighted(1 - w, _kl_terms(log_q, log_p))).sum(-1)


NAMES: dict[str, type[Divergence]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jsd": JSD,
    "skew_forward_kl": SkewForwardKL,
    "skew_reverse_kl": SkewReverseKL,
    "total_variation": TotalVariation,
    "alpha_beta": AlphaBeta,
    "adaptive_kl": AdaptiveKL,
    "todi": ToDi,
}


def resolve(divergence: str | Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The callable for a name (with its default parameters), or the callable itself."""
    if isinstance(divergence, str):
        if divergence not in NAMES:
            raise ValueError(f"divergence must be one of {', '.join(NAMES)} or a callable (log_p, log_q) -> rows; got {divergence!r}")
        return NAMES[divergence]()
    if not callable(divergence):
        raise TypeError(f"divergence must be a name or a callable (log_p, log_q) -> rows; got {type(divergence).__name__}")
    return divergence
