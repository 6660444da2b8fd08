"""Which part of a whole weight a rank holds, and with whom it shares that part."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from megatron_m2.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class Placement:
    """A part of a whole weight.

    Attributes:
        dim, start, stop: the part is [start, stop) of dimension ``dim``; the whole is ``size`` there. dim -1: all of it.
        replicas: the mesh's axis of ranks that hold this same part: "stage", "heads", "kv", "embedding" or "experts".
    """

    dim: int = -1
    start: int = 0
    stop: int = 0
    size: int = 0
    replicas: str = "stage"

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the whole, from the part's."""
        return shape if self.dim < 0 else (*shape[: self.dim], self.size, *shape[self.dim + 1 :])

    def offsets(self, dims: int) -> tuple[int, ...]:
        """Where the part begins in the whole."""
        return tuple(self.start if d == self.dim else 0 for d in range(dims))

    def of(self, whole: Tensor) -> Tensor:
        """The part of a whole tensor, a view."""
        return whole if self.dim < 0 else whole.narrow(self.dim, self.start, self.stop - self.start)

    def axis(self, mesh: Mesh) -> Axis:
        found: Axis = getattr(mesh, self.replicas)
        return found


def placed(parameter: Tensor, dim: int, bounds: tuple[int, int], size: int, replicas: str) -> nn.Parameter:
    """Marks a parameter as such a part."""
    assert isinstance(parameter, nn.Parameter)
    parameter.placement = Placement(dim, *bounds, size, replicas)  # type: ignore[attr-defined]
    return parameter


def shared_by(module: nn.Module, replicas: str) -> None:
    """Says of a module's own weights that other ranks hold the same part of them."""
    for parameter in module.parameters(recurse=False):
        parameter.placement = replace(placement_of(parameter), replicas=replicas)  # type: ignore[attr-defined]


def placement_of(parameter: Tensor) -> Placement:
    """Of a parameter; one that nobody marked is whole on every rank of its stage."""
    found: Placement = getattr(parameter, "placement", None) or Placement()
    return found
