"""The ranks of a run as a mesh. A mesh of ones is a laptop: no process group, and every collective is the identity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatron_m2.parallel.layout import ParallelConfig


@dataclass(frozen=True)
class Axis:
    """Ranks that work together in one way.

    Attributes:
        size, rank: how many, and which of them this is.
        group: their process group; None for one rank alone.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """This rank's place on every axis. Global rank = ((pp * DP + dp) * CP + cp) * TP + tp.

    Attributes:
        pp, dp, cp, tp: the axes of :class:`~megatron_m2.parallel.layout.ParallelConfig`.
        sequence: cp x tp, the ranks that share one forest's tokens.
        stage: dp x cp x tp, the ranks of one pipeline stage: replicas of a weight that nothing splits.
        heads: dp x cp, replicas of a weight that tp splits.
        kv: replicas of a key/value weight: ``heads`` times the tp ranks that hold the same head.
        embedding: replicas of an embedding that MTP modules use too: ``heads`` of the first and of the last stage.
        ep: ranks that split the experts, neighbours within the stage; experts: replicas of one expert.
        world: everybody.
    """

    pp: Axis = Axis()
    dp: Axis = Axis()
    cp: Axis = Axis()
    tp: Axis = Axis()
    sequence: Axis = Axis()
    stage: Axis = Axis()
    heads: Axis = Axis()
    kv: Axis = Axis()
    embedding: Axis = Axis()
    ep: Axis = Axis()
    experts: Axis = Axis()
    world: Axis = Axis()

    @property
    def alone(self) -> bool:
        return self.world.size == 1


ONE = Mesh()


def build_mesh(config: ParallelConfig, device_type: str, kv_heads: int) -> Mesh:
    """The mesh of the initialised process group; every rank calls it once, with the same configuration.

    Args:
        device_type: "cpu" or "cuda".
        kv_heads: of the model; tp ranks beyond them hold copies of a head.
    """
    world = dist.get_world_size()
    if world == 1:
        return ONE
    pp, cp, tp, dp = config.pp, config.cp, config.tp, config.dp(world)
    grid = init_device_mesh(device_type, (pp, dp, cp, tp), mesh_dim_names=("pp", "dp", "cp", "tp"))
    sequence, heads, stage = (grid[names]._flatten("_".join(names)) for names in (("cp", "tp"), ("dp", "cp"), ("dp", "cp", "tp")))
    folded = init_device_mesh(device_type, (pp, dp * cp * tp // config.ep, config.ep), mesh_dim_names=("pp", "experts", "ep"))
    copies, ranks = max(1, tp // kv_heads), torch.arange(world)
    kv = embedding = _axis(heads)
    if copies > 1:
        kv = _axis_of(ranks.view(pp, dp * cp, tp // copies, copies).permute(0, 2, 1, 3).reshape(-1, dp * cp * copies))
    if pp > 1 and not config.first_stage_with_last:
        embedding = _axis_of(ranks.view(pp, dp * cp, tp)[[0, pp - 1]].permute(2, 0, 1).reshape(tp, -1))
    return Mesh(pp=_axis(grid["pp"]), dp=_axis(grid["dp"]), cp=_axis(grid["cp"]), tp=_axis(grid["tp"]), sequence=_axis(sequence),
                stage=_axis(stage), heads=_axis(heads), kv=kv, embedding=embedding, ep=_axis(folded["ep"]),
                experts=_axis(folded["experts"]), world=Axis(world, dist.get_rank(), dist.group.WORLD))


def _axis(mesh: DeviceMesh) -> Axis:
    return Axis(mesh.size(), mesh.get_local_rank(), mesh.get_group()) if mesh.size() > 1 else Axis()


def _axis_of(rows: torch.Tensor) -> Axis:
    """The row of ranks that this rank is in; alone if in none."""
    group, _ = dist.new_subgroups_by_enumeration(rows.tolist())
    return Axis() if group is None else Axis(group.size(), group.rank(), group)
