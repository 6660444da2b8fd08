"""Memory of a training process."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep freed memory for the next step instead of handing it back and faulting it in again.

    A training step allocates the same tensors every time; without this each of them costs page faults (tens of thousands a step,
    5-10 % of the time on a CPU). Does nothing where the C library is another.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
        libc.mallopt(option, value)


def peak_bytes(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most that torch's allocator held during ``work`` beyond what it held before, temporaries of kernels included."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = sorted((e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    assert events, "the profiler saw no allocation"
    held = most = 0
    for _, size in events:
        held += size
        most = max(most, held)
    return most
