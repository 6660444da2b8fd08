"""Buckets on their own, with weights of a few elements and gradients written by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_m2.parallel.data import Bucket, GradientBuckets
from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.mesh import ONE, build_mesh
from megatron_m2.parallel.placement import placed
from megatron_m2.parallel.sharding import Sharding
from megatron_m2.training.config import OptimConfig
from megatron_m2.training.optimizer import MasterAdamW
from tests.parallel.ranks import on_ranks

SHAPES = {"a": (5, 3), "b": (7,), "c": (2, 2, 3), "d": (1,), "e": (4, 4)}


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def gradient(name: str, rank: int, microbatch: int) -> torch.Tensor:
    """Small integers: their sums are exact in any order."""
    return torch.randint(-8, 9, SHAPES[name], generator=torch.Generator().manual_seed(100 * rank + 10 * microbatch + ord(name))).float()


def backward(named: dict[str, nn.Parameter], names: str, rank: int, microbatch: int) -> None:
    """The gradients of some weights, through autograd, so that hooks fire; the last of ``names`` first, as in a backward."""
    for name in reversed(names):
        (named[name].float() * gradient(name, rank, microbatch)).sum().backward()


def check_sums(buckets: GradientBuckets, expected: dict[str, torch.Tensor]) -> None:
    buckets.finish()
    for bucket in buckets.buckets:
        for name, cut, mine in zip(bucket.names, bucket.cuts, bucket.gradients(), strict=True):
            start, stop = cut.bounds(bucket.replicas.shards.rank)
            assert mine.dtype == torch.float32
            assert torch.equal(mine, expected[name].narrow(cut.dim, start, stop - start)), (name, mine, expected[name])
    buckets.reset()


def sums(microbatches: int, ranks: int, absent: tuple[tuple[str, int, int], ...] = ()) -> dict[str, torch.Tensor]:
    return {n: sum((gradient(n, r, m) for r in range(ranks) for m in range(microbatches) if (n, r, m) not in absent),
                   torch.zeros(SHAPES[n])) for n in SHAPES}


def watch_starts(buckets: GradientBuckets) -> list[str]:
    """A list to which each reduction adds its bucket's first weight when it starts."""
    started: list[str] = []

    def start(bucket: Bucket) -> None:
        started.append(bucket.names[0])
        Bucket.start(bucket)

    for bucket in buckets.buckets:
        bucket.start = partial(start, bucket)
    return started


def scenarios():
    """On two replicas: every way in which gradients come ends in the same exact sums, and reductions start in one order on both."""
    mesh = build_mesh(ParallelConfig(), "cpu", 2)
    rank = mesh.world.rank
    for sharding in (Sharding(0, 60), Sharding(1, 60), Sharding(2, 60), Sharding(2, 1), Sharding(1), Sharding(1, 60, 1)):
        named = weights()
        buckets = GradientBuckets(named.items(), mesh, sharding)
        started = watch_starts(buckets)
        # hooks and announced microbatches; nothing is left for finish
        for m in range(3):
            buckets.before_backward(last=m == 2)
            backward(named, "abcde", rank, m)
        assert all(b.rounds for b in buckets.buckets)
        check_sums(buckets, sums(3, 2))
        # nothing announced
        for m in range(2):
            backward(named, "abcde", rank, m)
        check_sums(buckets, sums(2, 2))
        # gradients written without hooks, swept twice
        for m in range(2):
            for name, p in named.items():
                p.grad = gradient(name, rank, m).bfloat16()
            buckets.gather()
            buckets.gather()
            assert all(p.grad is None for p in named.values())
        for name, p in named.items():
            p.grad = gradient(name, rank, 2).bfloat16()  # left for finish to sweep
        check_sums(buckets, sums(3, 2))
        # an interleaved pipeline: the chunk de runs ahead of the chunk abc; c and d share a bucket where it is large
        chunks = "de", "abc"
        for chunk, m in (0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2):
            buckets.before_backward(m == 2, [named[n] for n in chunks[chunk]])
            backward(named, chunks[chunk], rank, m)
        check_sums(buckets, sums(3, 2))
        if sharding.zero < 2:
            # the ranks get gradients in opposite orders, and rank 1 one of them never
            names = "abcde" if rank == 0 else "ecba"
            buckets.before_backward(last=True)
            backward(named, names, rank, 0)
            check_sums(buckets, sums(1, 2, absent=(("d", 1, 0),)))
            buckets.before_backward(last=True)
            backward(named, "abcde", rank, 0)
            with pytest.raises(AssertionError, match=r"a gradient of e came after its sum was reduced"):
                backward(named, "e", rank, 1)
            named["e"].grad = None
            check_sums(buckets, sums(1, 2))
        orders = [None, None]
        dist.all_gather_object(orders, started)
        assert orders[0] == orders[1]


def pipeline():
    """Two stages of one rank each: "x" is of the first, "y" of the second, both hold a copy of "tied"."""
    mesh = build_mesh(ParallelConfig(pp=2), "cpu", 2)
    stage, config = mesh.pp.rank, OptimConfig(grad_clip=1e9)
    whole = {n: nn.Parameter(torch.full((4, 3), float(i + 1))) for i, n in enumerate(("tied", "x", "y"))}
    grads = {"tied": torch.full((4, 3), 2.0), "x": torch.full((4, 3), 3.0), "y": torch.full((4, 3), 5.0)}
    single = MasterAdamW(whole.items(), config)
    named = {n: nn.Parameter(whole[n].detach().clone()) for n in ("tied", "xy"[stage])}
    placed(named["tied"], -1, (0, 0), 0, "world")
    optimizer = MasterAdamW(named.items(), config, mesh)
    for _ in range(2):
        for name, p in whole.items():
            p.grad = grads[name].clone()
        for name, p in named.items():
            p.grad = grads[name] * ((0.25, 0.75)[stage] if name == "tied" else 1)  # each stage has its share
        norm = optimizer.step(1e-2)
        assert norm == pytest.approx((12 * (4 + 9 + 25)) ** 0.5, rel=1e-6)
        assert single.step(1e-2) == pytest.approx(norm, rel=1e-6)
        for name, p in named.items():
            assert torch.allclose(p, whole[name], rtol=1e-6)
    assert optimizer.state_dict()["tied"]["master"].offsets == (2 * stage, 0)
    # one stage diverges: every rank says so, nothing moves, and the next step is an ordinary one
    before = {n: p.detach().clone() for n, p in named.items()}
    for name, p in named.items():
        p.grad = torch.full_like(p, float("nan") if name == "y" else 1.0)
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        optimizer.step(1e-2)
    assert all(torch.equal(p, before[n]) for n, p in named.items())
    for p in named.values():
        p.grad = torch.ones_like(p)
    assert optimizer.step(1e-2) > 0
    with pytest.raises(ValueError, match=r"sharding.ranks = 3: must divide"):
        GradientBuckets(named.items(), type(mesh)(world=type(mesh.world)(4, mesh.world.rank, mesh.world.group)), Sharding(ranks=3))


def two_ranks():
    scenarios()
    pipeline()


def test_two_ranks():
    on_ranks(2, two_ranks)


def test_buckets_follow_the_backward_and_are_no_larger_than_asked():
    named = weights()
    assert [b.names for b in GradientBuckets(named.items(), ONE, Sharding(bucket_bytes=80)).buckets] == [["e", "d"], ["c", "b"], ["a"]]
    assert [b.names for b in GradientBuckets(weights().items(), ONE, Sharding(bucket_bytes=1)).buckets] == [[n] for n in "edcba"]
    wide = GradientBuckets(weights(torch.float32).items(), ONE, Sharding())
    assert not wide.buckets  # .grad is the sum
    assert list(wide.bare) == list(SHAPES)
