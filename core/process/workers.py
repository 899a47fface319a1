"""Worker processes on this machine, which answer one task at a time.

A worker computes what a function of a module prepares: `prepare(*arguments)` runs once in the process and returns the
function that answers its tasks. Arguments, tasks and answers are pickled. The processes are spawned, so that they share
no threads and no GPU state with this one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any

from ..errors import UserError
from .compute import available_cores

MAX_PER_CORE = 4
"""Processes per CPU core; more of them only take memory, even if they wait for disks."""

Prepare = Callable[..., Callable[[Any], Any]]


class Worker:
    """One process; to be used by one thread."""

    def __init__(self, what: str, prepare: Prepare, arguments: Sequence[Any]) -> None:
        """Start the process, which is called `what` in errors."""
        self._what = what
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_work, args=(theirs, prepare, tuple(arguments)), name=what, daemon=True)
        with _interrupts_blocked():
            self._process.start()
        theirs.close()  # the only other end is then the worker's, so that we notice when it ends

    @property
    def pid(self) -> int | None:
        """Number of the process."""
        return self._process.pid

    def ask(self, task: Any) -> Any:
        """Return the answer to a task; raises the worker's `UserError`, and one if the process has ended."""
        try:
            self._connection.send(task)
            kind, content = self._connection.recv()
        except (OSError, EOFError):
            self._process.join(timeout=10)
            # an error of the system: what was done so far is worth keeping
            raise UserError(self._end()) from ChildProcessError(self._process.exitcode)
        if kind == "bug":
            raise RuntimeError(f"{self._what} failed:\n{content}")
        if kind == "error":
            error, cause = content
            raise error from cause
        return content

    def stop(self) -> None:
        """Kill the process."""
        self._process.kill()

    def close(self) -> None:
        """Free the process's resources after `stop`, once no thread asks it any more."""
        self._process.join()
        self._connection.close()
        self._process.close()

    def _end(self) -> str:
        code = self._process.exitcode
        if code is not None and code < 0:
            how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
            return f"{self._what} {how}; if memory ran out, use fewer processes"
        return (
            f"{self._what} ended with status {code} (its own message is above); a script has to call this under "
            'if __name__ == "__main__":'
        )


def require_cores(count: int) -> None:
    """Raise `UserError` for more processes than this machine can use."""
    cores = available_cores()
    if count > MAX_PER_CORE * cores:
        raise UserError(
            f"{count} processes are too many for the {cores} CPU cores of this machine; give at most {MAX_PER_CORE * cores}"
        )


def with_workers(count: int, start: Callable[[int], Worker], lane: Callable[[Worker], bool]) -> None:
    """Call `lane(worker)` for `count` workers, made by `start(number)`, each in a thread of its own; then stop them.

    A lane returns whether all work is done, so that the others need not end. The first error, or an interruption, stops
    all processes at once and is raised.
    """
    workers: list[Worker] = []
    pool = ThreadPoolExecutor(max_workers=count)
    try:
        for number in range(count):
            workers.append(start(number))
        lanes = [pool.submit(lane, worker) for worker in workers]
        for finished in as_completed(lanes):
            if finished.result():
                break
    finally:
        for worker in workers:
            worker.stop()
        pool.shutdown()
        for worker in workers:
            worker.close()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start processes within the block that never receive Ctrl-C, which this process handles for them."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _work(connection: Connection, prepare: Prepare, arguments: Sequence[Any]) -> None:
    """Answer tasks until the parent process has no more or has ended."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answer: Callable[[Any], Any] | None = None
    with suppress(OSError, EOFError):
        while True:
            task = connection.recv()
            try:
                answer = answer or prepare(*arguments)
                reply: tuple[str, Any] = ("done", answer(task))
            except UserError as error:
                reply = ("error", (error, error.__cause__))  # which a pickled error does not keep
            except Exception:
                reply = ("bug", traceback.format_exc())
            connection.send(reply)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)
