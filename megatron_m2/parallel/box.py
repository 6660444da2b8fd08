"""A part of a whole tensor, with its place in the whole: what checkpoints are made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from megatron_m2.parallel.placement import placement_of


@dataclass(frozen=True, eq=False)
class Box:
    """``local`` is [offsets, offsets + local.shape) of a tensor of shape ``whole``; it may be empty."""

    local: Tensor
    offsets: tuple[int, ...]
    whole: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """The same part of a whole tensor, a view."""
        for dim, (start, size) in enumerate(zip(self.offsets, self.local.shape, strict=True)):
            tensor = tensor.narrow(dim, start, size)
        return tensor


def boxed(local: Tensor, offsets: tuple[int, ...], whole: tuple[int, ...]) -> Tensor | Box:
    """The tensor itself where it is the whole."""
    return local if tuple(local.shape) == whole else Box(local, offsets, whole)


def module_boxes(module: nn.Module) -> dict[str, Tensor | Box]:
    """``module.state_dict()`` with parameters at their place in the whole weight."""
    state: dict[str, Tensor | Box] = dict(module.state_dict())
    for name, p in module.named_parameters():
        placement = placement_of(p)
        state[name] = boxed(p.detach(), placement.offsets(p.dim()), placement.whole_shape(tuple(p.shape)))
    return state
