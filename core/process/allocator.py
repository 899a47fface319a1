"""glibc allocator settings of this process; no effect with another C library."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Constants of malloc.h."""


def keep_freed_memory() -> None:
    """Make this process reuse freed memory of any size instead of returning it to the system.

    Gradients are allocated anew in every step. By default, each one above 32 MB, which the experts of one layer
    reach, is mapped page by page, which takes a twelfth of a training step (`docs/log.md`).
    """
    _set_allocator({_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1})


def hand_back_freed_memory() -> None:
    """Make this process return freed blocks of at least 1 MiB to the system.

    For long-lived processes that handle large buffers: otherwise small live allocations between them fragment the
    heap, and memory grows with all data ever handled (`docs/log.md`).
    """
    _set_allocator({_MMAP_THRESHOLD: 1 << 20})


def _set_allocator(options: Mapping[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc: no `mallopt`
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in options.items():
            mallopt(option, value)
