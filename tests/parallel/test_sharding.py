"""Cutting weights into boxes, and what the configuration refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_m2.parallel.sharding import Cut, Sharding


@given(st.lists(st.integers(0, 7), min_size=1, max_size=3), st.integers(1, 9))
def test_boxes_tile_the_tensor(shape, shards):
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    cut = Cut.of(tuple(shape), shards)
    rows = torch.full((shards, cut.width + 2), -1.0)  # a bucket is wider than one weight
    for boxes, place in cut.pairs(tensor, rows[:, 1:]):
        assert boxes.shape == place.shape
        place.copy_(boxes)
    for shard in range(shards):
        start, stop = cut.bounds(shard)
        box = tensor.narrow(cut.dim, start, stop - start)
        assert cut.box(shard) == tuple(box.shape)
        assert torch.equal(rows[shard, 1 : 1 + box.numel()], box.flatten())
        assert bool((rows[shard, 1 + box.numel() :] == -1).all())
    back = torch.zeros_like(tensor)
    for boxes, place in cut.pairs(back, rows[:, 1:]):
        boxes.copy_(place)
    assert torch.equal(back, tensor)


def test_the_dimension_that_balances_best():
    assert Cut.of((8, 48, 32), 4) == Cut((8, 48, 32), 0, 4)
    assert Cut.of((2, 48, 32), 4) == Cut((2, 48, 32), 1, 4)
    assert Cut.of((5, 7), 2) == Cut((5, 7), 1, 2)  # 4 of 7 columns beat 3 of 5 rows
    assert [Cut.of((3,), 4).bounds(i) for i in range(4)] == [(0, 1), (1, 2), (2, 3), (3, 3)]


def test_how_many_shards():
    assert [Sharding(zero=z).shards(6, "heads") for z in (0, 1, 2)] == [1, 6, 6]
    assert Sharding(ranks=2).shards(6, "heads") == 2
    assert Sharding(ranks=8).shards(6, "heads") == 6


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Sharding(zero=3), r"sharding.zero = 3: must be 0, 1 or 2; nearest is 2"),
    (lambda: Sharding(bucket_bytes=0), r"sharding.bucket_bytes = 0: must be at least 1"),
    (lambda: Sharding(ranks=-1), r"sharding.ranks = -1: must be at least 0; nearest is 0"),
    (lambda: Sharding(zero=0, ranks=2), r"sharding.ranks = 2: must be 0 where zero = 0; nearest is 0"),
    (lambda: Sharding(ranks=4).shards(6, "kv"), r'sharding.ranks = 4: must divide the 6 replicas of axis "kv"; nearest is 3'),
])
def test_what_cannot_be_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
