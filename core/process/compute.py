"""Running several models side by side on this machine without their threads getting in each other's way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

SMALL_MODEL_BYTES = 1 << 30


def concurrently(
    work: Callable[[Item], Result], items: Iterable[Item], *, bytes_each: int, jobs: int | None = None
) -> list[Result]:
    """Return `work(item)` for every item, in order, as fast as the machine allows.

    On a CPU, small models run two at a time with one torch thread each: that beats two threads in one model,
    and on a busy machine by far. Large ones, and those on a GPU, go one after the other with all threads.
    """
    import torch

    todo = list(items)
    cores = available_cores()
    parallel = jobs if jobs is not None else 2 if bytes_each <= SMALL_MODEL_BYTES else 1
    if torch.cuda.is_available():
        parallel = 1
    parallel = max(min(parallel, cores, len(todo)), 1)
    before = torch.get_num_threads()
    torch.set_num_threads(max(cores // parallel, 1))
    try:
        if parallel == 1:
            return [work(item) for item in todo]
        with ThreadPoolExecutor(max_workers=parallel) as pool:
            return list(pool.map(work, todo))
    finally:
        torch.set_num_threads(before)


def available_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best_device() -> str:
    """Return the device that models compute on where nothing else is asked for: a GPU when there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
