"""Running several models in parallel on one machine, and the choice of device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

SMALL_MODEL_BYTES = 1 << 30
SINGLE_THREAD_BYTES = 64 << 20
"""Weights up to which one thread generates faster than several (`docs/log.md`)."""


def concurrently(
    work: Callable[[Item], Result], items: Iterable[Item], *, bytes_each: int, jobs: int | None = None
) -> list[Result]:
    """Return `work(item)` for every item, in order, in parallel where that is faster.

    On a CPU, small models (`bytes_each`) run two at a time with half of the torch threads each, which is faster
    than one model with all threads, especially on a busy machine. Large models and models on a GPU run one after
    the other with all threads. `jobs` overrides the number of parallel models on a CPU.
    """
    import torch

    pending = list(items)
    cores = available_cores()
    parallel = jobs if jobs is not None else 2 if bytes_each <= SMALL_MODEL_BYTES else 1
    if torch.cuda.is_available():
        parallel = 1
    parallel = max(min(parallel, cores, len(pending)), 1)
    previous_threads = torch.get_num_threads()
    torch.set_num_threads(max(cores // parallel, 1))
    try:
        if parallel == 1:
            return [work(item) for item in pending]
        with ThreadPoolExecutor(max_workers=parallel) as pool:
            return list(pool.map(work, pending))
    finally:
        torch.set_num_threads(previous_threads)


@contextmanager
def threads_for_tokens(num_bytes: int) -> Iterator[None]:
    """Run the block, which generates token by token with weights of `num_bytes`, on as many threads as are worth it.

    Products of a small model's matrices with one token take microseconds; threads that wait for each other in between take
    longer, most of all on busy cores.
    """
    import torch

    previous = torch.get_num_threads()
    torch.set_num_threads(1 if num_bytes <= SINGLE_THREAD_BYTES else previous)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def available_cores() -> int:
    """Return the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best_device() -> str:
    """Return the default device: `cuda` if a GPU is available, otherwise `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
