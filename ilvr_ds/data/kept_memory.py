"""Freed memory that a process keeps, instead of giving it back and asking for it again with every picture."""

from __future__ import annotations

import ctypes
import functools
import platform

KEPT = 128 << 20  # bytes at most, per process
_LARGEST = 32 << 20  # larger pieces come from the system directly; glibc allows no more than this
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@functools.cache  # once in a process
def keep_freed_memory() -> bool:
    """Let glibc's allocator keep what is freed, up to `KEPT`, for the rest of this process; False where there is none.

    A picture's buffers are a few megabytes each. By default glibc hands such pieces back to the system as soon as they
    are free, and the system clears every page of the next ones: 0.4 ms for each drawing of a build. A decoding worker
    gains little: its pixels have memory of their own (`step_memory`, `benchmarks/loader.py`).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, KEPT))
