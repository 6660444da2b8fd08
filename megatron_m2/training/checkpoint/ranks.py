"""What ranks do together when they write or read a checkpoint: if it fails on one, all of them say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_m2.parallel.mesh import Mesh
from megatron_m2.training.checkpoint.folder import CheckpointError, reason

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Ranks that share a checkpoint; ``group`` is None for one alone."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, mesh: Mesh, backend: str | None = None) -> Ranks:
        """All of a mesh, in a new group of that backend if one is named (then it is collective), else in the mesh's own."""
        if mesh.alone:
            return cls()
        group = mesh.world.group if backend is None else dist.new_group(backend=backend)
        return cls(mesh.world.rank, mesh.world.size, group)

    def together(self, what: str, work: Callable[[], T]) -> list[T]:
        """Calls ``work`` on every rank and returns all results, by rank.

        Raises:
            CheckpointError: on every rank, ``what`` and the first failure; what no checkpoint should meet (a wrong type, say) passes
                as it is on the rank where it arose.
        """
        result, failure = None, None
        try:
            result = work()
        except (Exception, CheckpointException) as error:  # raised below, after the other ranks were told; DCP's is no Exception
            failure = error
        mine = (result, None if failure is None else self._cause(failure))
        outcomes = [mine] * self.size
        if self.size > 1:
            try:
                dist.all_gather_object(outcomes, mine, group=self.group)
            except RuntimeError as error:
                raise CheckpointError(f"{what}: lost another rank ({reason(error)})") from error
        if failure is not None and not isinstance(failure, (OSError, CheckpointException, RuntimeError, ValueError, KeyError)):
            raise failure
        for _, cause in outcomes:
            if cause is not None:
                raise CheckpointError(f"{what}: {cause}") from failure
        return [value for value, _ in outcomes]  # type: ignore[misc]

    def _cause(self, error: BaseException) -> str:
        """One line; DCP wraps what happened on each rank."""
        rank = self.rank
        if isinstance(error, CheckpointException) and error.failures:
            rank, (error, _) = min(error.failures.items())
        return (f"rank {rank}: " if self.size > 1 else "") + reason(error)

    def on_first(self, what: str, work: Callable[[], T]) -> T:
        """Calls ``work`` on rank 0; every rank gets its result or raises."""
        return self.together(what, lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

