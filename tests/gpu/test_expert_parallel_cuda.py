"""Experts over ranks through peer memory, several processes on one GPU, against the definition on one rank in fp64."""

from __future__ import annotations

import torch

from megatron_m2.parallel.peer_memory import peer_memory
from tests.conftest import relative_error
from tests.gpu import DEVICE, needs_gpu
from tests.parallel.ranks import on_ranks
from tests.parallel.test_expert import TOLERANCE, axis_of_all, expected, on_this_rank

pytestmark = needs_gpu

HIDDEN = 40


def compare(slots):
    for dtype, slot_bytes in slots:
        memory = peer_memory(axis_of_all(), slot_bytes, torch.device(DEVICE))
        assert memory is not None
        for kind, chunks, options in (("spread", 1, {}), ("one rank", 4, {}), ("skewed", 4, {"fp8_payload": dtype != torch.float64})):
            actual = on_this_rank(kind, HIDDEN, dtype, DEVICE, chunks=chunks, exchange=memory, **options)
            by_messages = on_this_rank(kind, HIDDEN, dtype, DEVICE, chunks=chunks, **options)
            for a, b, wanted in zip(actual, by_messages, expected(kind, HIDDEN, dtype), strict=True):
                assert torch.equal(a, b)
                if a.numel() and not options.get("fp8_payload"):
                    assert relative_error(a.cpu(), wanted) < TOLERANCE[dtype]
        memory.close()


def test_equals_the_definition():
    """Slots for every message; for some, so that the others travel by all-to-all; for hardly any."""
    on_ranks(4, compare, [(torch.float32, 1 << 20), (torch.bfloat16, 1 << 20), (torch.float64, 4000), (torch.float32, 256)])


def overtake():
    """A rank that is ahead may not write over what another has not taken, however late that is."""
    import time

    axis = axis_of_all()
    memory = peer_memory(axis, 4096, torch.device(DEVICE))
    assert memory is not None
    (traffic,) = memory.traffic(torch.full((axis.size, 1, 2), 2, dtype=torch.int32, device=DEVICE))
    for i in range(6):
        if axis.rank == i % axis.size:
            time.sleep(0.05)

        def write(out, i=i):
            for r, block in enumerate(out):
                block.copy_(torch.full_like(block, 16 * i + 4 * axis.rank + r))

        messages = [memory.pack(write, 32, traffic, torch.device(DEVICE))]
        back = torch.full((2 * axis.size, 8), float(100 * i + axis.rank), device=DEVICE)
        messages.append(memory.send_back(back, traffic))
        if i % 2:  # the later one first: both are taken
            messages.reverse()
        first, second = (m.wait() for m in messages)
        rows, returned = (second, first) if i % 2 else (first, second)
        others = [r for r in range(axis.size) if r != axis.rank]
        assert rows[:, 0].tolist() == [16 * i + 4 * r + axis.rank for r in (*others, axis.rank) for _ in range(2)]
        assert returned[:, 0].tolist() == [100.0 * i + r for r in others for _ in range(2)]
    memory.close()


def test_nothing_is_overwritten_before_it_is_taken():
    on_ranks(3, overtake)
