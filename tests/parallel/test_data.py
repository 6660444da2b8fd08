"""Sharded optimizers on any layout of ranks train as plain AdamW on one rank does: weights, states, router bias, norms."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_m2.forest import TokenForest
from megatron_m2.model.m2 import M2Model, build_model
from megatron_m2.ops.router import update_router_bias
from megatron_m2.parallel.box import Box
from megatron_m2.parallel.collectives import total
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.mesh import ONE, Mesh, build_mesh
from megatron_m2.parallel.placement import placement_of
from megatron_m2.parallel.sharding import Sharding
from megatron_m2.training.config import OptimConfig
from megatron_m2.training.losses import LossWeights, forest_loss
from megatron_m2.training.optimizer import MasterAdamW
from tests.conftest import random_forest, tiny_config
from tests.parallel.ranks import on_ranks

STEPS, FORESTS, MTP = 3, 4, 1
CONFIG = tiny_config(num_mtp_modules=MTP, router_aux_loss_coef=0.01)
OPTIM = OptimConfig(lr=3e-3, grad_clip=0.5, weight_decay=0.1)


def forests_of(step: int) -> list[TokenForest]:
    """Branching trees and documents of ragged length."""
    documents = [[(7 * i + j + step) % 97 for j in range(n)] for i, n in enumerate((1, 11, 5, 2, 17, 3))]
    packed = TokenForest.from_documents(documents)
    packed = replace(packed, multiplicity=torch.ones(len(packed), dtype=torch.int32))
    return [random_forest(10 * step + i, count=6, length=12) if i % 2 == 0 else packed for i in range(FORESTS)]


def backward(model: M2Model, forest: TokenForest, everything: list[TokenForest]) -> torch.Tensor:
    output = model(forest)
    forest_loss(output, forest, LossWeights.of(everything, MTP), 0.3, len(everything)).total.backward()
    return output.expert_counts


def move_bias(model: M2Model, counts: torch.Tensor) -> None:
    for router, layer in zip(model.routers(), counts, strict=True):
        update_router_bias(router.bias, layer, 0.01)


def plain(dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    """The reference, written apart: sums and masters kept by hand, torch's unfused AdamW and clipping."""
    model = build_model(CONFIG, dtype, seed=1)
    wide = {n: torch.nn.Parameter(p.detach().clone().to(torch.promote_types(p.dtype, torch.float32))) for n, p in model.named_parameters()}
    groups = [{"params": [p for p in wide.values() if (p.dim() > 1) == decay], "weight_decay": OPTIM.weight_decay * decay}
              for decay in (True, False)]
    adamw = torch.optim.AdamW(groups, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps, foreach=False)
    norms = []
    for step in range(STEPS):
        for p in wide.values():
            p.grad = torch.zeros_like(p)
        counts = torch.zeros(0)
        for forest in forests_of(step):
            c = backward(model, forest, forests_of(step))
            counts = counts + c if len(counts) else c
            for name, p in model.named_parameters():
                wide[name].grad += p.grad
                p.grad = None
        norms.append(torch.nn.utils.clip_grad_norm_(wide.values(), OPTIM.grad_clip))
        for group in adamw.param_groups:
            group["lr"] = OPTIM.lr / (step + 1)
        adamw.step()
        move_bias(model, counts)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(wide[name])
    state = {n: {"master": p.detach(), **{k: adamw.state[p][k] for k in ("exp_avg", "exp_avg_sq")}} for n, p in wide.items()}
    state[""] = {"norms": torch.stack(norms), **{f"bias{i}": r.bias for i, r in enumerate(model.routers())}}
    return state


def sharded(dtype: torch.dtype, mesh: Mesh, sharding: Sharding, forests: int = FORESTS, optim: OptimConfig = OPTIM
            ) -> tuple[M2Model, MasterAdamW, list[float]]:
    model = build_model(CONFIG, dtype, seed=1, mesh=mesh)
    optimizer = MasterAdamW(model.named_parameters(), optim, mesh, sharding)
    norms = []
    for step in range(STEPS):
        counts = torch.zeros(0)
        everything = forests_of(step)[:forests]
        mine = everything[mesh.dp.rank :: mesh.dp.size]
        for i, forest in enumerate(mine):
            optimizer.before_backward(last=i + 1 == len(mine))
            c = backward(model, forest, everything)
            counts = counts + c if len(counts) else c
        for bucket in optimizer.gradients.buckets:  # all was started in the backwards; an embedding's may belong to two stages
            each = sharding.zero == 2 and bucket.replicas.shards.size > 1 and bucket.names != ["embed_tokens.weight"]
            assert bucket.rounds == (len(mine) if each else 1)
        norms.append(optimizer.step(OPTIM.lr / (step + 1)))
        move_bias(model, total(counts, mesh.stage))
    return model, optimizer, norms


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max()) if actual.numel() else 0.0


def compare(cases, expected):
    """Against :func:`plain`, within :data:`TOLERANCE`."""
    for sizes, sharding, dtypes in cases:
        mesh = build_mesh(ParallelConfig(**sizes), "cpu", CONFIG.num_key_value_heads)
        for dtype in dtypes:
            model, optimizer, norms = sharded(dtype, mesh, sharding)
            reference, tolerance = expected[dtype], TOLERANCE[dtype]
            where = (sizes, sharding, dtype)
            assert error(torch.tensor(norms, dtype=torch.float64), reference[""]["norms"].double()) < tolerance["norm"], (where, norms)
            for i, router in enumerate(model.routers()):
                assert torch.equal(router.bias, reference[""][f"bias{i}"]), where
            for name, p in model.named_parameters():
                assert error(p, placement_of(p).of(reference[name]["master"])) < tolerance["master"], (where, name)
            for name, values in optimizer.state_dict().items():
                assert float(values["step"]) == STEPS
                for key in ("master", "exp_avg", "exp_avg_sq"):
                    value, whole = values[key], reference[name][key]
                    mine, whole = (value.local, value.of(whole)) if isinstance(value, Box) else (value, whole)
                    assert mine.dtype == whole.dtype
                    assert mine.shape == whole.shape
                    assert error(mine, whole) < tolerance[key], (where, name, key, error(mine, whole))


# Gradients agree to 1e-5 in fp32; three steps feed that back, and AdamW divides a gradient that is mostly rounding by its own size.
TOLERANCE = {torch.float64: dict.fromkeys(("norm", "master", "exp_avg", "exp_avg_sq"), 1e-11),
             torch.float32: {"norm": 1e-5, "master": 1e-4, "exp_avg": 3e-5, "exp_avg_sq": 3e-5}}
BOTH = (torch.float64, torch.float32)
F64 = (torch.float64,)
SMBOTH = 4000  # bytes of a bucket: a handful of buckets per axis
CASES = [
    ({}, Sharding(zero=1, bucket_bytes=SMBOTH), BOTH),
    ({}, Sharding(zero=0), F64), ({}, Sharding(zero=2, ranks=2, bucket_bytes=SMBOTH), F64),
    ({"tp": 2}, Sharding(zero=2, bucket_bytes=SMBOTH), BOTH), ({"tp": 2}, Sharding(zero=0, bucket_bytes=1), F64),
    ({"tp": 4}, Sharding(zero=1), F64), ({"ep": 2}, Sharding(zero=1, ranks=2, bucket_bytes=SMBOTH), BOTH),
    ({"cp": 2}, Sharding(zero=2), F64), ({"cp": 2, "tp": 2, "ep": 4}, Sharding(zero=2, ranks=2), F64),
]


def test_training_equals_one_rank():
    on_ranks(4, compare, CASES, {dtype: plain(dtype) for dtype in BOTH})


def bits_and_bytes():
    """Two replicas: a sum of two numbers has one value, so what is sharded ends with the same bits as what is not."""
    results = []
    for sharding in (None, Sharding(zero=0), Sharding(zero=1, bucket_bytes=SMBOTH), Sharding(zero=2, bucket_bytes=SMBOTH)):
        mesh = ONE if sharding is None else build_mesh(ParallelConfig(), "cpu", 2)
        model, optimizer, _ = sharded(torch.bfloat16, mesh, sharding or Sharding(), forests=2, optim=replace(OPTIM, grad_clip=1e6))
        results.append({n: p.detach() for n, p in model.named_parameters()})
        for name, values in optimizer.state_dict().items():
            for key, value in values.items():
                results[-1][f"{name}.{key}"] = value
        parts = 1 if sharding is None or sharding.zero == 0 else 2
        states = [values[k] for values in optimizer.state_dict().values() for k in ("master", "exp_avg", "exp_avg_sq")]
        states = [s.local if isinstance(s, Box) else s for s in states]
        elements = 3 * sum(p.numel() for p in model.parameters())
        assert sum(v.numel() for v in states) == elements // parts  # every dimension here is even
        assert sum(v.nbytes for v in states) == 4 * elements // parts
        kept = sum(b._sums_SW.nbytes for b in optimizer.gradients.buckets if b._sums_SW is not None)
        in_buckets = {n: p.numel() for n, p in model.named_parameters() if n not in optimizer.gradients.bare}
        # under ZeRO-2 only the embedding's: with MTP it may belong to two stages of a pipeline
        assert kept == 4 * (in_buckets["embed_tokens.weight"] if parts == 2 and sharding.zero == 2 else sum(in_buckets.values()))
    for other in results[1:]:
        for name, value in results[0].items():
            mine, whole = (other[name].local, other[name].of(value)) if isinstance(other[name], Box) else (other[name], value)
            assert torch.equal(mine, whole), name


def test_two_replicas_have_the_bits_of_one_rank_and_half_the_states():
    on_ranks(2, bits_and_bytes)
