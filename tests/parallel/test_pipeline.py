"""Stages are balanced, schedules are complete and free of deadlock, and weight gradients may come later."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_m2.ops.weight_grad import Later, Linear, compute_left
from megatron_m2.parallel.layout import Limits, ParallelConfig, check
from megatron_m2.parallel.pipeline import schedule, split_layers, stage_ranks


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 20), st.data())
def test_the_split_is_the_best_there_is(costs, after, data):
    stages = data.draw(st.integers(1, len(costs) + 1))
    spans = split_layers(costs, after, stages)
    assert [s.first for s in spans] == [i == 0 for i in range(stages)]
    assert [s.last for s in spans] == [i == stages - 1 for i in range(stages)]
    assert [layer for s in spans for layer in range(s.start, s.stop)] == list(range(len(costs)))
    assert all(s.start < s.stop for s in spans[:-1])
    found = max(sum(costs[s.start : s.stop]) + (after if s.last else 0) for s in spans)
    items = [*costs, after]
    every = (([0, *cuts, len(items)]) for cuts in itertools.combinations(range(1, len(items)), stages - 1))
    assert found == min(max(sum(items[a:b]) for a, b in itertools.pairwise(edges)) for edges in every)


def test_more_stages_than_layers_and_head_are_refused():
    with pytest.raises(ValueError, match="pp x vpp = 4 stages for 2 layers and the head; at most 3"):
        split_layers([1, 1], 1, 4)


SHAPES = [("1f1b", pp, 1, n) for pp in (1, 2, 4) for n in (1, 3, 8)]
SHAPES += [(name, pp, vpp, n) for name in ("interleaved", "zero_bubble") for pp in (2, 4) for vpp in (2, 3) for n in (1, 4, 8)]
SHAPES += [("zbv", pp, 2, n) for pp in (2, 3, 4) for n in (1, 5, 8)]


@pytest.mark.parametrize(("name", "pp", "vpp", "microbatches"), SHAPES)
def test_every_microbatch_passes_every_stage_once_each_way(name, pp, vpp, microbatches):
    orders = schedule(name, pp, vpp, microbatches)
    rank_of = stage_ranks(orders)
    assert len(rank_of) == pp * vpp
    did = [(a.kind, a.stage, a.microbatch) for order in orders for a in order if len(a.kind) == 1]
    assert len(did) == len(set(did))
    for stage, m in itertools.product(range(pp * vpp), range(microbatches)):
        kinds = {kind for kind, s, n in did if (s, n) == (stage, m)}
        assert kinds in ({"F", "B"}, {"F", "I", "W"})
    if name == "zbv":
        assert rank_of == [*range(pp), *reversed(range(pp))]
    else:
        assert rank_of == [*range(pp)] * vpp


@pytest.mark.parametrize(("name", "pp", "vpp", "microbatches"), SHAPES)
def test_ranks_never_wait_crosswise(name, pp, vpp, microbatches):
    """Even if a transfer blocked both its ranks, and each rank's transfers kept their order (as on one NCCL stream)."""
    orders = schedule(name, pp, vpp, microbatches)
    rank_of, at = stage_ranks(orders), [0] * len(orders)
    computed: set[tuple[str, int, int]] = set()
    while any(i < len(order) for i, order in zip(at, orders, strict=True)):
        moved = False
        for rank, order in enumerate(orders):
            if at[rank] == len(order):
                continue
            kind, stage, m = order[at[rank]]
            if len(kind) == 1:
                if kind in "BI" and stage + 1 < len(rank_of):  # the gradient came, or was computed here
                    assert rank_of[stage + 1] != rank or {("B", stage + 1, m), ("I", stage + 1, m)} & computed
                computed.add((kind, stage, m))
                at[rank], moved = at[rank] + 1, True
            elif kind.startswith("SEND"):
                to = stage + (1 if kind == "SEND_F" else -1)
                peer = rank_of[to]
                if at[peer] < len(orders[peer]) and orders[peer][at[peer]] == (kind.replace("SEND", "RECV"), to, m):
                    at[rank], at[peer], moved = at[rank] + 1, at[peer] + 1, True
        assert moved, [order[i] if i < len(order) else None for i, order in zip(at, orders, strict=True)]


def test_one_forward_one_backward_keeps_few_activations():
    """Stage s of p holds at most p - s microbatches (PipeDream-Flush)."""
    for pp, order in ((4, order) for order in schedule("1f1b", 4, 1, 12)):
        held, most = 0, 0
        for action in order:
            held += {"F": 1, "B": -1}.get(action.kind, 0)
            most = max(most, held)
        assert most == pp - order[0].stage


LIMITS = Limits(heads=48, kv_heads=8, experts=256, layers=62, forests_per_step=64, tokens_per_forest=8192)


@pytest.mark.parametrize(("sizes", "world", "message"), [
    ({"pp": 2, "vpp": 2}, 2, "parallel.vpp = 2: with pp = 2 and schedule = 1f1b, nearest is 1"),
    ({"pp": 2, "vpp": 1, "schedule": "interleaved"}, 2, "parallel.vpp = 1: with pp = 2 and schedule = interleaved, nearest is 2"),
    ({"pp": 2, "vpp": 3, "schedule": "zbv"}, 2, "parallel.vpp = 3: with pp = 2 and schedule = zbv, nearest is 2"),
    ({"pp": 1, "vpp": 2}, 2, "parallel.vpp = 2: with pp = 1"),
    ({"pp": 2, "schedule": "gpipe"}, 2, "parallel.schedule = gpipe: must be one of 1f1b"),
    ({"pp": 64}, 64, "parallel.pp = 64: pp x vpp = 64 stages for 62 layers and the head; at most 63"),
    ({"pp": 32, "vpp": 3, "schedule": "zero_bubble"}, 32, "parallel.vpp = 3: pp x vpp = 96 stages for 62 layers and the head; at most 1"),
    ({"pp": 5, "vpp": 2, "schedule": "interleaved"}, 5, "stage.forests_per_step = 64: interleaved runs 12 rounds, which must divide the "
     "64 forests per dp rank; nearest is 65"),
    ({"timeout_s": 0}, 1, "parallel.timeout_s = 0: must be positive"),
])
def test_a_pipeline_that_cannot_be_is_refused(sizes, world, message):
    with pytest.raises(ValueError) as error:
        check(ParallelConfig(**sizes), world, LIMITS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_nearest_number_of_forests_is_legal():
    for pp, forests in itertools.product((2, 3, 5), range(1, 40)):
        limits = Limits(48, 8, 256, 62, forests, 8192)
        config = ParallelConfig(pp=pp, vpp=2, schedule="interleaved")
        try:
            check(config, pp, limits)
        except ValueError as error:
            nearest = int(str(error).rsplit(" ", 1)[1])
            check(config, pp, Limits(48, 8, 256, 62, nearest, 8192))
            schedule("interleaved", pp, 2, nearest)
        else:
            schedule("interleaved", pp, 2, forests)


def test_weight_gradients_come_at_once_or_later():
    torch.manual_seed(0)
    x = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    plain, deferred = Linear(4, 3, torch.float64), Linear(4, 3, torch.float64)
    with torch.no_grad():
        deferred.weight.copy_(plain.weight)
    later = Later(deferred.parameters())
    (expected_x, expected_w) = torch.autograd.grad(plain(x).square().sum(), [x, plain.weight])
    deferred(x).square().sum().backward()  # nobody collects: at once
    assert torch.allclose(deferred.weight.grad, expected_w, rtol=1e-12)
    assert torch.allclose(x.grad, expected_x, rtol=1e-12)
    with later.collecting() as left:
        deferred(x).square().sum().backward()
    assert len(left) == 1
    arrived = []
    deferred.weight.register_post_accumulate_grad_hook(lambda p: arrived.append(p.grad.clone()))
    assert torch.allclose(deferred.weight.grad, expected_w, rtol=1e-12)  # unchanged
    compute_left(left)
    assert torch.allclose(deferred.weight.grad, 2 * expected_w, rtol=1e-12)
    assert len(arrived) == 1
    assert left == []
