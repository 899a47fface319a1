"""Running transfers in a few threads: settings, progress, and an early end after the first failure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event, Lock
from typing import TypeVar

from ..reporting import SILENT, Reporter

Item = TypeVar("Item")

PART_BYTES = 4 << 20
"""Bytes of one ranged read; an interruption costs at most one part in each thread."""


@dataclass(frozen=True)
class Transfer:
    """How files are transferred."""

    jobs: int = 4
    """Transfers at the same time."""
    part_bytes: int = PART_BYTES
    reporter: Reporter = SILENT


class Count:
    """Counts transferred bytes for the progress display; `total` are those still to be transferred."""

    def __init__(self, reporter: Reporter, task: str, total: int) -> None:
        self.done, self.total = 0, total
        self._reporter, self._task, self._lock = reporter, task, Lock()

    def add(self, num_bytes: int) -> None:
        """Add the bytes of a finished transfer."""
        with self._lock:
            self.done += num_bytes
            self._reporter.progress(self._task, self.done, self.total, "bytes")


def run_all(jobs: int, action: Callable[[Item], None], items: Iterable[Item], stop: Event) -> None:
    """Run an action for all items in threads; after a failure or an interruption, those that have not begun are dropped.

    `stop` is set then, for actions that have begun.
    """
    pool = ThreadPoolExecutor(max_workers=jobs)
    try:
        futures = [pool.submit(action, item) for item in items]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
