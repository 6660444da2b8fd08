"""Host memory of a training process."""

from __future__ import annotations

import ctypes
import platform

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
