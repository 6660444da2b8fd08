"""Runs a function on several gloo ranks of this machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_m2.parallel.launch import end


def _rank(rank: int, world: int, store: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        work(*arguments)
    finally:
        dist.destroy_process_group()
    end(0)


def on_ranks(world: int, work: Callable[..., None], *arguments: Any) -> None:
    """Calls ``work(*arguments)`` on every rank; an exception on any of them is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, f"{folder}/store", work, arguments), world)
