"""What this process's C library does with memory that is freed, where it is glibc; elsewhere nothing changes."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Names of malloc.h."""


def keep_freed_memory() -> None:
    """Let this process reuse freed memory of any size instead of handing it back.

    Gradients are made anew in every step. Above 32 MB, which the experts of one layer reach, each of them is
    otherwise fresh memory from the system, page by page: a twelfth of a training step (`docs/log.md`).
    """
    _set_allocator({_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1})


def hand_back_freed_memory() -> None:
    """Let this process hand back whatever is freed of a mebibyte and more.

    For processes that live long and handle large pieces: otherwise a small thing that stays between two large ones that went
    keeps their place from being used again, and memory grows with all that was ever handled (`docs/log.md`).
    """
    _set_allocator({_MMAP_THRESHOLD: 1 << 20})


def _set_allocator(options: Mapping[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc: no `mallopt`
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in options.items():
            mallopt(option, value)
