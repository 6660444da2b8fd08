"""From the processes that torchrun started to a mesh."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_m2.parallel.layout import ParallelConfig
from megatron_m2.parallel.mesh import ONE, Mesh, build_mesh
from megatron_m2.parallel.watchdog import PATIENCE

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}


def world_size(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes this one was started with: torchrun says so, as do the launchers that imitate it."""
    return int(environment.get("WORLD_SIZE", "1"))


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks for all."""
    return int(environment.get("RANK", "0")) == 0


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Number of this process on its host, which is the number of its GPU."""
    return int(environment.get("LOCAL_RANK", "0"))


def end(status: int) -> NoReturn:
    """Ends a process that took part in a group, without taking Python down first: a thread of gloo may only then come to free the
    tensors of its last collective, and finding Python gone it would abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def join(config: ParallelConfig, device: torch.device, kv_heads: int) -> Iterator[Mesh]:
    """The mesh over all processes, torn down at a good end; a mesh of ones where there is one process.

    Args:
        device: of this rank's tensors: NCCL connects GPUs, gloo CPUs.
        kv_heads: of the model.
    """
    if world_size() == 1:
        yield ONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo raises in the rank that waits, and the watchdog takes it from there; NCCL ends the process, for which the watchdog comes first
    patience = config.timeout_s * (1 if device.type == "cuda" else PATIENCE)
    dist.init_process_group(BACKENDS[device.type], timeout=timedelta(seconds=patience))
    yield build_mesh(config, device.type, kv_heads)
    dist.destroy_process_group()  # not after an error: what others have begun would not end
