"""A teacher's top-k next-token distribution."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .primitives.boundary import check_range
from .primitives.head import checked_positive


@dataclass(frozen=True, eq=False)
class TeacherTopK:
    """K ids per token and their log-probabilities under the teacher's full softmax.

    Args:
        ids: int32 or int64 [..., K], distinct within a row; −1 marks an empty slot.
        logprobs: float [..., K] in nats, under the full softmax at `temperature`.
        tail_logprob: float [...], log of the teacher's mass outside the ids, or None where the capture did not keep
            it. Then it is derived as 1 − Σ p, no smaller than the rounding error of that sum (16-bit log-probs can add
            up to more than 1).
        temperature: the softmax temperature the log-probs were taken at.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices. Values are looked at by :meth:`validate` only.
    """

    ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor | None = None
    temperature: float = 1.0

    def __post_init__(self):
        for name, tensor in (("ids", self.ids), ("logprobs", self.logprobs), ("tail_logprob", self.tail_logprob)):
            if not isinstance(tensor, Tensor) and not (name == "tail_logprob" and tensor is None):
                raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if self.ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids must be int32 or int64; got {self.ids.dtype}")
        for name, tensor in (("logprobs", self.logprobs), ("tail_logprob", self.tail_logprob)):
            if tensor is not None and not tensor.is_floating_point():
                raise TypeError(f"{name} must be floating point; got {tensor.dtype}")
        if self.ids.dim() == 0 or self.ids.shape != self.logprobs.shape:
            raise ValueError(f"ids and logprobs must share a shape [..., K]; got {tuple(self.ids.shape)} and {tuple(self.logprobs.shape)}")
        if self.tail_logprob is not None and self.tail_logprob.shape != self.shape:
            raise ValueError(f"tail_logprob must have the token shape {tuple(self.shape)}; got {tuple(self.tail_logprob.shape)}")
        for name in ("logprobs", "tail_logprob"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != self.ids.device:
                raise ValueError(f"{name} must be on {self.ids.device}, where ids is; got {tensor.device}")
        checked_positive("temperature", self.temperature)

    @property
    def k(self) -> int:
        """Slots per token."""
        return self.ids.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """The token shape, without K."""
        return self.ids.shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def __len__(self) -> int:
        return self.shape[0]

    def log_p(self) -> Tensor:
        """Log-probs in float64 [..., K], −inf in empty slots."""
        return self.logprobs.double().masked_fill(self.ids < 0, -math.inf)

    def mass(self) -> Tensor:
        """m = Σ p over the filled slots, float64 [...]."""
        return self.log_p().exp().sum(-1)

    def log_tail(self) -> Tensor:
        """log of the mass outside the ids, float64 [...]: `tail_logprob` as given, else derived from 1 − m."""
        if self.tail_logprob is not None:
            return self.tail_logprob.double()
        log_p = self.log_p()
        p = log_p.exp()
        mass = p.sum(-1)
        rounding = mass * 2.0**-23 + 0.5 * torch.finfo(self.logprobs.dtype).eps * (p * log_p.masked_fill(p == 0, 0).abs()).sum(-1)
        return torch.maximum(1 - mass, rounding).log()

    def _map(self, fn) -> TeacherTopK:
        tail = None if self.tail_logprob is None else fn(self.tail_logprob)
        return replace(self, ids=fn(self.ids), logprobs=fn(self.logprobs), tail_logprob=tail)

    def to(self, device, non_blocking: bool = False) -> TeacherTopK:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TeacherTopK:
        return self._map(Tensor.pin_memory)

    def __getitem__(self, index) -> TeacherTopK:
        """Tokens by any index over the token dimensions."""
        parts = index if isinstance(index, tuple) else (index,)
        if any(part is Ellipsis for part in parts):
            slots = (*parts, slice(None))
        else:
            slots = parts
            used = sum(p.dim() if isinstance(p, Tensor) and p.dtype == torch.bool else p is not None for p in parts)
            if used > len(self.shape):
                raise IndexError(f"the index is over tokens, of shape {tuple(self.shape)}; got {index!r}")
        tail = None if self.tail_logprob is None else self.tail_logprob[index]
        return replace(self, ids=self.ids[slots], logprobs=self.logprobs[slots], tail_logprob=tail)

    def reshape(self, *shape: int) -> TeacherTopK:
        """The same tokens in another token shape."""
        shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        ids = self.ids.reshape(*shape, self.k)
        tail = None if self.tail_logprob is None else self.tail_logprob.reshape(ids.shape[:-1])
        return replace(self, ids=ids, logprobs=self.logprobs.reshape(ids.shape), tail_logprob=tail)

    def truncate(self, k: int) -> TeacherTopK:
        """The `k` most probable slots (ties to the earlier one); the mass that is dropped joins the tail."""
        if isinstance(k, bool) or not isinstance(k, numbers.Integral):
            raise TypeError(f"k must be an int; got {type(k).__name__}")
        if not 0 < k <= self.k:
            raise ValueError(f"k must be in [1, {self.k}]; got {k}")
        log_p = self.log_p()
        ordered, order = log_p.sort(dim=-1, descending=True, stable=True)
        keep = order[..., :k]
        tail = self.tail_logprob
        if tail is not None:
            tail = torch.cat([tail.double().unsqueeze(-1), ordered[..., k:]], -1).logsumexp(-1).to(tail.dtype)
        return replace(self, ids=self.ids.gather(-1, keep), logprobs=self.logprobs.gather(-1, keep), tail_logprob=tail)

    def _only(self, log_p: Tensor, temperature: float | None = None) -> TeacherTopK:
        """A distribution on the K ids alone."""
        nothing = torch.full_like(log_p[..., 0], -math.inf, dtype=self.logprobs.dtype)
        temperature = self.temperature if temperature is None else temperature
        log_p = log_p.masked_fill(self.ids < 0, -math.inf).to(self.logprobs.dtype)
        return replace(self, logprobs=log_p, tail_logprob=nothing, temperature=temperature)

    def renormalize(self) -> TeacherTopK:
        """p/m on the ids, tail 0."""
        log_p = self.log_p()
        return self._only(log_p - log_p.logsumexp(-1, keepdim=True))

    def recalibrate(self, c: float) -> TeacherTopK:
        """softmax(p/c) over the ids, a softmax over *probabilities*, tail 0 (FIRST, arXiv 2408.12168)."""
        c = checked_positive("c", c)
        log_p = self.log_p()
        return self._only((log_p.exp() / c).masked_fill(log_p == -math.inf, -math.inf).log_softmax(-1))

    def retemper(self, temperature: float) -> TeacherTopK:
        """The distribution restricted to the ids, at another temperature; tail 0.

        p^{T₀/T} renormalised on the ids: the tail's shape is not stored, so its mass at another temperature is unknown.
        Use it with ``tail="renormalize"``, or capture again.
        """
        temperature = checked_positive("temperature", temperature)
        return self._only((self.log_p() * (self.temperature / temperature)).log_softmax(-1), temperature)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, for collators: ``TeacherTopK(**tensors, temperature=...)`` is the inverse."""
        found = {"ids": self.ids, "logprobs": self.logprobs, "tail_logprob": self.tail_logprob}
        return {name: t for name, t in found.items() if t is not None}

    def validate(self, vocab_size: int, tolerance: float = 1e-2) -> TeacherTopK:
        """Looks at every value (on a GPU this waits for it) and returns self.

        Raises ValueError naming the token for an id outside [−1, vocab_size), an id repeated within a row, a NaN or
        positive log-prob, or a mass above 1 + `tolerance`.
        """
        flat = self.reshape(-1)
        check_range(flat.ids, vocab_size) if flat.ids.numel() else None
        ordered = flat.ids.sort(-1).values
        log_p = flat.log_p()
        tail = flat.tail_logprob.double() if flat.tail_logprob is not None else torch.full_like(log_p[:, 0], -math.inf)
        # log-probs of an id that is certain may round to a little above 0
        limit = math.log1p(tolerance)
        problems = {
            "an id is repeated": ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(-1),
            "a log-prob is NaN": log_p.isnan().any(-1) | tail.isnan(),
            "a log-prob is positive": (log_p > limit).any(-1) | (tail > limit),
            f"the probabilities add up to more than 1 + {tolerance}": log_p.exp().sum(-1) + tail.exp() > 1 + tolerance,
        }
        for what, rows in problems.items():
            if rows.any():
                row = int(rows.nonzero()[0])
                raise ValueError(f"TeacherTopK: {what} at token {row}: ids {flat.ids[row].tolist()}, logprobs {flat.logprobs[row].tolist()}")
        return self

    @staticmethod
    def from_logprob_dicts(
        list_of_dicts: Sequence, k: int, *, tokenizer=None, token_form: str | None = None, temperature: float = 1.0, vocab_size: int | None = None
    ) -> TeacherTopK:
        """Rows [N, K] from what an inference server returns for one sequence: one row per entry, a leading None left out.

        So ``prompt_logprobs[i]`` becomes row i − 1, which predicts token i. Any other None, and an entry with fewer than
        `k` tokens, gives empty slots.

        Args:
            list_of_dicts: vLLM's ``prompt_logprobs`` or ``logprobs``: dicts of id to ``Logprob``, float, or their JSON form
                ``{"123": {"logprob": ...}}``; OpenAI-style chat ``logprobs.content``: ``{"token", "logprob", "bytes",
                "top_logprobs"}``; or ``logprobs.top_logprobs`` of text completions: dicts of token string to float.
            k: the most probable `k` are kept. What a server adds beside them (vLLM the prompt's own token, chat the sampled
                one) competes for the slots like any other.
            tokenizer: of transformers or tokenizers, for token strings (except "token_id:123"); with it, string keys over bare
                floats are token strings, without it they are ids. A string that does not name exactly one id is counted in
                the tail, and a warning says how many; an id listed twice counts once.
            token_form: what token strings are, "text" (vLLM and OpenAI: " the") or "piece" ("Ġthe"); None takes those that
                name the same id either way.
            temperature: what the server's log-probs were taken at. vLLM's default is the raw softmax, 1.0, whatever it
                samples at.
            vocab_size: where given, ids are checked against it.

        Returns:
            int32 ids by descending log-prob (ties by ascending id), float32 log-probs and tail. The tail is what the server
            did not list, 1 − Σ with its rounding as floor (as in :meth:`log_tail`), and the listed mass that no slot holds.

        Raises:
            ValueError, TypeError: naming the entry.
        """
        from .server_logprobs import from_logprob_dicts

        return from_logprob_dicts(
            list_of_dicts, k, tokenizer=tokenizer, token_form=token_form, temperature=temperature, vocab_size=vocab_size
        )

    @staticmethod
    def cat(teachers: Sequence[TeacherTopK], dim: int = 0) -> TeacherTopK:
        """Concatenates over a token dimension; smaller K are filled with empty slots, tails derived where one has none."""
        teachers = _alike(teachers)
        dims = len(teachers[0].shape)
        if not -dims <= dim < dims:
            raise ValueError(f"dim must be one of the {dims} token dimensions; got {dim}")
        dim %= dims
        tails = [t.tail_logprob for t in teachers]
        return replace(
            teachers[0],
            ids=torch.cat([t.ids for t in teachers], dim),
            logprobs=torch.cat([t.logprobs for t in teachers], dim),
            tail_logprob=None if tails[0] is None else torch.cat(tails, dim),
        )

    @staticmethod
    def pad(teachers: Sequence[TeacherTopK], length: int | None = None, side: str = "right") -> TeacherTopK:
        """Sequences [T_i, K] as one batch [B, T, K]; padding tokens have empty slots, so losses give them weight 0."""
        if side not in ("left", "right"):
            raise ValueError(f'side must be "left" or "right"; got {side!r}')
        teachers = _alike(teachers)
        longest = max(len(t) for t in teachers)
        length = longest if length is None else length
        if length < longest:
            raise ValueError(f"length must be at least the longest sequence, {longest}; got {length}")

        def padded(tensor: Tensor, value: float) -> Tensor:
            missing = length - tensor.shape[0]
            last = (0, 0) * (tensor.dim() - 1)
            return torch.nn.functional.pad(tensor, (*last, missing, 0) if side == "left" else (*last, 0, missing), value=value)

        tail = None if teachers[0].tail_logprob is None else torch.stack([padded(t.tail_logprob, 0.0) for t in teachers])
        return replace(
            teachers[0],
            ids=torch.stack([padded(t.ids, -1) for t in teachers]),
            logprobs=torch.stack([padded(t.logprobs, -math.inf) for t in teachers]),
            tail_logprob=tail,
        )


def _alike(teachers: Sequence[TeacherTopK]) -> list[TeacherTopK]:
    """The same teachers with one K, and either all with a tail or all without."""
    if not teachers:
        raise ValueError("teachers must hold at least one TeacherTopK; got none")
    for t in teachers:
        if not isinstance(t, TeacherTopK):
            raise TypeError(f"teachers must hold TeacherTopK; got {type(t).__name__}")
    temperatures = {t.temperature for t in teachers}
    if len(temperatures) > 1:
        raise ValueError(f"teachers must share a temperature; got {sorted(temperatures)}")
    k = max(t.k for t in teachers)
    with_tail = any(t.tail_logprob is not None for t in teachers)
    out = []
    for t in teachers:
        tail = t.log_tail().to(t.logprobs.dtype) if with_tail and t.tail_logprob is None else t.tail_logprob
        extra = k - t.k
        ids = torch.nn.functional.pad(t.ids, (0, extra), value=-1)
        out.append(replace(t, ids=ids, logprobs=torch.nn.functional.pad(t.logprobs, (0, extra), value=-math.inf), tail_logprob=tail))
    return out
