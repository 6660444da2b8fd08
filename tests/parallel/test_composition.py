"""Any layout of ranks computes what one rank computes: losses, gradients, expert counts, on forests with branches and ragged documents."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_m2.forest import TokenForest
from megatron_m2.model.m2 import build_model
from megatron_m2.parallel.collectives import total
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.mesh import ONE, build_mesh
from megatron_m2.parallel.placement import placement_of
from megatron_m2.training.losses import LossWeights, forest_loss
from tests.conftest import random_forest, tiny_config
from tests.parallel.ranks import on_ranks

MTP = 2


def forests(count: int = 8) -> list[TokenForest]:
    """Trees with branches and multiplicities, documents of ragged length, in turn."""
    documents = [[7 * i + j for j in range(n)] for i, n in enumerate((1, 11, 5, 2, 17, 3))]
    packed = TokenForest.from_documents([[t % 97 for t in d] for d in documents])
    packed = replace(packed, multiplicity=torch.ones(len(packed), dtype=torch.int32))
    return [random_forest(i, count=6, length=12) if i % 2 == 0 else packed for i in range(count)]


def model_of(dtype, mesh, recompute=False, **changes):
    config = tiny_config(num_mtp_modules=MTP, router_aux_loss_coef=0.01, **changes)
    model = build_model(config, dtype, seed=1, mesh=mesh, recompute=recompute)
    for i, router in enumerate(model.routers()):
        router.bias.copy_(torch.randn(config.num_experts, generator=torch.Generator().manual_seed(i)) * 0.05)
    return model


def forward_backward(model, mine, everything):
    """This rank's shares of loss and counts, its gradients summed over the forests."""
    weights = LossWeights.of(everything, MTP)
    losses, counts = [], torch.zeros(0)
    for forest in mine:
        output = model(forest)
        loss = forest_loss(output, forest, weights, 0.3, len(everything))
        loss.total.backward()
        losses.append(torch.stack([loss.total.detach(), loss.lm, loss.mtp, loss.aux]))
        counts = output.expert_counts if len(counts) == 0 else counts + output.expert_counts
    return torch.stack(losses).sum(0), counts


def reference(dtype, **changes):
    model = model_of(dtype, ONE, **changes)
    losses, counts = forward_backward(model, forests(), forests())
    return {"losses": losses, "counts": counts, "grads": {n: p.grad for n, p in model.named_parameters()}}


def compare(layouts, dtype, tolerance, changes, expected):
    for sizes, recompute in layouts:
        config = ParallelConfig(**sizes)
        mesh = build_mesh(config, "cpu", changes.get("num_key_value_heads", 2))
        model = model_of(dtype, mesh, recompute, **changes)
        losses, counts = forward_backward(model, forests()[mesh.dp.rank :: mesh.dp.size], forests())
        losses, counts = total(losses, mesh.stage), total(counts, mesh.stage)
        assert torch.equal(counts, expected["counts"]), (sizes, "expert counts")
        assert float((losses / expected["losses"] - 1).abs().max()) < tolerance, (sizes, losses, expected["losses"])
        for name, p in model.named_parameters():
            placement = placement_of(p)
            assert p.grad is not None, (sizes, name)
            grad, whole = total(p.grad, placement.axis(mesh)), expected["grads"][name]
            assert grad.shape == placement.of(whole).shape
            error = float((grad - placement.of(whole)).abs().max() / whole.abs().max())
            assert error < tolerance, (sizes, recompute, name, error)


PAIRS = [{"cp": 2, "tp": 2}, {"cp": 2, "ep": 2}, {"tp": 2, "ep": 2}, {"cp": 2}, {"tp": 2}, {"ep": 2}, {"tp": 4}, {"cp": 4}, {"ep": 4}, {},
         {"cp": 2, "tp": 2, "ep": 2}, {"cp": 2, "tp": 2, "ep": 4}]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_four_ranks_equal_one(dtype, tolerance):
    """Data parallelism takes the ranks that a layout leaves."""
    layouts = [(sizes, i % 2 == 1) for i, sizes in enumerate(PAIRS)]
    on_ranks(4, compare, layouts, dtype, tolerance, {}, reference(dtype))
