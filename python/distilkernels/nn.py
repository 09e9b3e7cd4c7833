"""Modules: the linear-fused losses where a sharded or compiled model can hook into them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .linear import linear_topk_distill_loss
from .primitives.shard import VocabShard


class DistillHead(nn.Module):
    """An lm_head that returns a loss: ``loss(hidden, lm_head.weight, *args, bias=lm_head.bias, **options)`` in its forward.

    FSDP2 gathers a module's parameters in hooks around its forward, so the loss must be called inside one that owns the
    lm_head: wrap the head in a DistillHead and call ``fully_shard`` on that. A weight that is a DTensor with Shard(0) on
    one mesh dimension is a vocabulary-parallel lm_head: the loss then runs on this rank's columns with the
    :class:`VocabShard` of that mesh dimension, and the gradient returns as a DTensor. A replicated DTensor is used as it is.

    Args:
        lm_head: a module with `weight` [V, H] and perhaps `bias` [V], such as ``model.lm_head``; tied weights stay tied.
        loss: any linear-fused loss of the package, or a callable with that signature.
        **options: keyword arguments of every call, such as divergence, temperature, logit_scale or softcap; those given
            to the forward take precedence.

    What not to do:
        - activation checkpointing around this module: the gradient is computed in the forward, so that runs all three
          GEMMs twice and saves nothing. Checkpoint the layers before it.
        - one call per pipeline microbatch with a frozen-size schedule: each call makes a whole d weight. Gather the
          microbatches' hidden states and call once, or freeze the head.
        - a replicated DTensor weight with different tokens on each rank: its gradient is this rank's own, and nothing
          averages it. Shard the data under FSDP2, or reduce the gradient yourself.
        - reading ``lm_head.weight`` outside the forward under FSDP2: it is a shard there.

    Raises:
        TypeError: lm_head has no weight. ValueError: a DTensor layout that is neither replicated nor sharded by columns of
        the vocabulary on one mesh dimension.
    """

    def __init__(self, lm_head: nn.Module, loss: Callable[..., object] = linear_topk_distill_loss, **options):
        super().__init__()
        if not isinstance(getattr(lm_head, "weight", None), Tensor):
            raise TypeError(f"lm_head must have a weight [V, H]; got {type(lm_head).__name__}")
        self.lm_head, self.loss, self.options = lm_head, loss, options

    def forward(self, hidden: Tensor, *args, **options):
        """hidden [..., H] and whatever the loss takes after the weight: a teacher, or ids and a function."""
        weight, shard = _local(self.lm_head.weight, "lm_head.weight")
        bias = getattr(self.lm_head, "bias", None)
        if bias is not None:
            bias, _ = _local(bias, "lm_head.bias")
        if _is_dtensor(hidden):
            hidden = hidden.full_tensor()
        options = {**self.options, **options, "bias": bias}
        if shard is not None:
            options["shard"] = shard
        return self.loss(hidden, weight, *args, **options)

    def extra_repr(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"loss={getattr(self.loss, '__name__', self.loss)}" + (f", {given}" if given else "")


def _is_dtensor(tensor: Tensor) -> bool:
    # a plain tensor needs no import of torch.distributed.tensor
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "placements")


def _local(parameter: Tensor, name: str) -> tuple[Tensor, VocabShard | None]:
    """This rank's part of a parameter, and which columns of the vocabulary it is."""
    if not _is_dtensor(parameter):
        return parameter, None
    from torch.distributed.tensor import Shard

    sharded = [dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    if not sharded:
        return parameter.to_local(), None
    if len(sharded) > 1 or parameter.placements[sharded[0]] != Shard(0):
        raise ValueError(
            f"{name} must be replicated, or Shard(0) on one mesh dimension (a vocabulary-parallel head); got {parameter.placements}. Under "
            "FSDP2 call fully_shard on the DistillHead itself, so that its hooks gather the weight"
        )
    mesh, dim = parameter.device_mesh, sharded[0]
    if -(-parameter.shape[0] // mesh.size(dim)) * (mesh.size(dim) - 1) >= parameter.shape[0]:
        raise ValueError(f"{name} has {parameter.shape[0]} columns, too few for a shard on each of {mesh.size(dim)} ranks")
    # DTensor cuts like torch.chunk: all parts but the last have the rounded-up size
    size, world = parameter.shape[0], mesh.size(dim)
    part = -(-size // world)
    start = min(mesh.get_local_rank(dim) * part, size)
    local = parameter.to_local()
    return local, VocabShard(start, start + local.shape[0], mesh.get_group(dim))
