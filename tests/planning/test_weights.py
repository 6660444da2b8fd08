"""The weights that the planner counts are those of the built model, part by part, rank by rank, with as many replicas."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megatron_m2.model.config import ModelConfig
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.placement import placement_of
from megatron_m2.planning.cluster import ClusterConfig
from megatron_m2.planning.dry_run import fake_mesh
from megatron_m2.planning.job import Job, Layout, stages
from megatron_m2.planning.weights import stage_weights
from megatron_m2.training.stages import ModelStages
from tests.conftest import tiny_config
from tests.planning.measure import job_of

# Of a parameter's name, the first that it contains.
PARTS = {"mtp.": "mtp", "embed_tokens": "embedding", "lm_head": "head", "self_attn": "attention", "router": "router", "_proj": "experts",
         "norm": "norms"}


def part_of(name: str) -> str:
    return next(part for key, part in PARTS.items() if key in name)


def counted(built: ModelStages, mesh) -> Counter:
    """(part, replicas, fp32, trained) -> weights of real stages."""
    sums: Counter = Counter()
    for name, p in built.named_parameters():
        sums[part_of(name), placement_of(p).axis(mesh).size, p.dtype == torch.float32, True] += p.numel()
    for model in built.stages.values():
        for name, b in model.named_buffers():
            sums[part_of(name), mesh.stage.size, True, False] += b.numel()
    return sums


LAYOUTS = [(1, {}), (4, {"tp": 2, "ep": 2}), (4, {"tp": 4}), (8, {"cp": 2, "tp": 2, "ep": 8}), (6, {"ep": 2}), (2, {"pp": 2}),
           (4, {"pp": 2, "vpp": 2, "schedule": "zbv", "ep": 2}), (6, {"pp": 3, "vpp": 2, "schedule": "interleaved", "tp": 2}),
           (16, {"pp": 4, "tp": 2, "cp": 2, "ep": 2})]


@pytest.mark.parametrize(("world", "sizes"), LAYOUTS)
@pytest.mark.parametrize("mtp", [0, 2])
def test_equal_to_the_built_model_on_every_rank(world, sizes, mtp):
    """A vocabulary that no tp divides, fewer key/value heads than tp, the embedding on two stages or on one."""
    config = tiny_config(num_mtp_modules=mtp, num_hidden_layers=6)
    parallel = ParallelConfig(**sizes)
    job, layout = job_of(config, world, 16, 64), Layout(parallel, 16)
    laid, total = stages(job, layout), 0
    for rank in range(world):
        with fake_mesh(parallel, world, rank, config.num_key_value_heads) as mesh:
            built = ModelStages(config, parallel, mesh, torch.bfloat16, "meta", None, job.seq_len // 2)
            stage = laid[mesh.pp.rank]
            assert [m.span.stop - m.span.start for m in built.stages.values()] == list(stage.layers)
            found: Counter = Counter()
            for g in stage_weights(job, layout, stage, mesh.tp.rank):
                found[g.part, g.replicas, g.wide, g.trained] += g.count
                total += g.count / g.replicas
            assert found == counted(built, mesh), (rank, sizes)
    assert total == pytest.approx(config.num_parameters(), rel=1e-12)  # every weight once


@pytest.mark.parametrize("mtp", [0, 1, 3])
@pytest.mark.parametrize("sizes", [{}, {"pp": 4}, {"pp": 8, "vpp": 2, "schedule": "interleaved"}, {"pp": 8, "vpp": 2, "schedule": "zbv"},
                                   {"pp": 31, "vpp": 2, "schedule": "zero_bubble"}])
def test_stages_add_up_to_the_model(mtp, sizes):
    """Each weight once; with MTP modules on another rank than the first layers the embedding twice."""
    parallel = ParallelConfig(**sizes)
    job = Job(ModelConfig(num_mtp_modules=mtp), ClusterConfig(parallel.pp, 1, "h100"), 8192, 2**25)
    layout = Layout(parallel, 8192)
    total = sum(g.count for stage in stages(job, layout) for g in stage_weights(job, layout, stage))
    copy = job.model.vocab_size * job.model.hidden_size if mtp and not parallel.first_stage_with_last else 0
    assert total == job.model.num_parameters() + copy


def test_released_m2_on_2048():
    """Over all ranks a weight exists as often as it says it has replicas."""
    job = Job(ModelConfig(num_mtp_modules=1), ClusterConfig(256, 8, "h100"), 8192, 2**25)
    layout = Layout(ParallelConfig(pp=8, cp=2, tp=4, ep=32), 8192)
    whole = sum(2048 // 8 * g.count / g.replicas for stage in stages(job, layout) for g in stage_weights(job, layout, stage))
    assert whole == job.model.num_parameters()
