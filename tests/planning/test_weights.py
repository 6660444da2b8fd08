"""The weights that the planner counts are those of the built model, part by part, rank by rank, with as many replicas."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from megatron_m2.model.config import ModelConfig
from megatron_m2.model.m2 import build_model
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.placement import placement_of
from megatron_m2.planning.cluster import ClusterConfig
from megatron_m2.planning.job import Job, Layout, Stage, split_layers, stages
from megatron_m2.planning.weights import stage_weights
from tests.conftest import tiny_config
from tests.planning.measure import job_of, mesh_of

# Of a parameter's name, the first that it contains.
PARTS = {"mtp.": "mtp", "embed_tokens": "embedding", "lm_head": "head", "self_attn": "attention", "router": "router", "_proj": "experts",
         "norm": "norms"}


def part_of(name: str) -> str:
    return next(part for key, part in PARTS.items() if key in name)


def counted(model, mesh) -> Counter:
    """(part, replicas, fp32, trained) -> weights of a real model."""
    sums: Counter = Counter()
    for name, p in model.named_parameters():
        sums[part_of(name), placement_of(p).axis(mesh).size, p.dtype == torch.float32, True] += p.numel()
    for name, b in model.named_buffers():
        sums[part_of(name), mesh.stage.size, True, False] += b.numel()
    return sums


LAYOUTS = [(1, {}), (4, {"tp": 2, "ep": 2}), (4, {"tp": 4}), (8, {"cp": 2, "tp": 2, "ep": 8}), (8, {"cp": 4, "ep": 2}), (6, {"ep": 2}),
           (16, {"tp": 4, "cp": 2, "ep": 4})]


@pytest.mark.parametrize(("world", "sizes"), LAYOUTS)
@pytest.mark.parametrize("mtp", [0, 2])
def test_equal_to_the_built_model_on_every_rank(world, sizes, mtp):
    """A vocabulary that no tp divides, fewer key/value heads than tp."""
    config = tiny_config(num_mtp_modules=mtp)
    parallel = ParallelConfig(**sizes)
    job, layout = job_of(config, world, 16, 64), Layout(parallel, 16)
    (stage,) = stages(job, layout)
    for rank in range(world):
        mesh = mesh_of(parallel, world, rank, config.num_key_value_heads)
        expected = counted(build_model(config, torch.bfloat16, "meta", mesh=mesh), mesh)
        found: Counter = Counter()
        for g in stage_weights(job, layout, stage, mesh.tp.rank):
            found[g.part, g.replicas, g.wide, g.trained] += g.count
        assert found == expected, (rank, sizes)


def m2(cluster: ClusterConfig, mtp: int = 0) -> Job:
    return Job(ModelConfig(num_mtp_modules=mtp), cluster, 8192, 2**25)


@pytest.mark.parametrize("mtp", [0, 1, 3])
@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (4, 1), (8, 2), (16, 1), (31, 2)])
def test_stages_add_up_to_the_model(mtp, pp, vpp):
    """Each weight once, and with MTP modules on a stage of their own the embedding twice."""
    job = m2(ClusterConfig(pp, 1, "h100"), mtp)
    layout = Layout(ParallelConfig(pp=pp), 8192, vpp=vpp)
    total = sum(g.count for stage in stages(job, layout) for g in stage_weights(job, layout, stage))
    copy = job.model.vocab_size * job.model.hidden_size if pp > 1 and mtp else 0
    assert total == job.model.num_parameters() + copy


def test_every_weight_has_its_replicas():
    """Over all ranks a weight exists as often as it says it has replicas."""
    job = m2(ClusterConfig(256, 8, "h100"), 1)
    layout = Layout(ParallelConfig(pp=8, cp=2, tp=4, ep=32), 8192)
    ranks_of_stage = 2048 // 8
    whole = sum(ranks_of_stage * g.count / g.replicas for stage in stages(job, layout) for g in stage_weights(job, layout, stage))
    assert whole == job.model.num_parameters() + job.model.vocab_size * job.model.hidden_size


def test_split_balances_layers_and_tail():
    for layers, chunks, tail in [(62, 4, 3.0), (62, 32, 6.7), (7, 7, 0.5), (12, 5, 2.2), (9, 4, 20.0)]:
        counts = split_layers(layers, chunks, tail)
        assert sum(counts) == layers
        assert len(counts) == chunks
        assert min(counts[:-1]) >= 1
        assert max(counts[:-1]) - min(counts[:-1]) <= 1
        dearest = max(*counts[:-1], counts[-1] + tail)
        for other in range(layers - chunks + 2):  # no other share for the last chunk is better
            assert dearest <= max(-(-(layers - other) // (chunks - 1)), other + tail)
    assert split_layers(5, 1, 3.0) == (5,)


def test_chunks_go_round_the_stages():
    job = m2(ClusterConfig(4, 1, "h100"))
    laid = stages(job, Layout(ParallelConfig(pp=4), 8192, vpp=2))
    assert [len(stage.layers) for stage in laid] == [2] * 4
    assert [stage.embedding for stage in laid] == [True, False, False, False]
    assert [stage.head for stage in laid] == [False, False, False, True]
    assert stages(replace(job, cluster=ClusterConfig(1, 1, "h100")), Layout(ParallelConfig(), 8192)) == [Stage((62,))]
