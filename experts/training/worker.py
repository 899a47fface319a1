"""The worker process of one run: `python -m expertctl.experts.training.worker RUN_FOLDER`, or the same by `torchrun -m`.

It writes JSON lines to standard output, or to the file `--records`, and stops with a checkpoint on SIGINT, SIGTERM or SIGUSR1,
which clusters send ahead of a time limit. With `--leash`, it exits at
once when that pipe closes because the process that started it is gone: a killed command leaves no lock behind.
Started by torchrun, on one machine or many that share the workspace's folder, the processes train the run together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from ...core.artefacts.files import exclusive, user_fixable_error
from ...core.artefacts.layout import Layout
from ...core.errors import Interrupted, UserError
from ...core.manifests.run import RunSpec, read_run
from ...core.process.allocator import keep_freed_memory
from ...core.process.environment import prepare_libraries
from ...core.reporting import Reporter
from .distributed.ranks import STRATEGIES, TIMEOUT_S, joined, leave

LOCK_PATIENCE_S = 5.0
JOB_LOCK_PATIENCE_S = 180.0
"""Longest wait for the lock of a worker that may be gone: a network file system keeps those of a failed node for a while."""


def main(arguments: list[str]) -> int:
    """Train the run in a folder and return the exit status."""
    parser = argparse.ArgumentParser(prog="expertctl.experts.training.worker")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--leash", type=int, metavar="FD", help="inherited end of a pipe; exit when it closes")
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="of the model over several processes")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds that processes wait for each other")
    parser.add_argument("--time-limit", type=float, metavar="S", help="seconds after which to save the state and stop")
    parser.add_argument("--records", type=Path, metavar="FILE", help="append JSON lines here, for a job of a cluster")
    given = parser.parse_args(arguments)
    records = _JsonLines(given.records)
    if given.leash is not None:
        threading.Thread(target=_exit_with_parent, args=(given.leash,), daemon=True).start()
    stop, is_main = _stop_signal(), os.environ.get("RANK", "0") == "0"
    if given.time_limit is not None:
        _stop_later(stop, given.time_limit)
    prepare_libraries()
    keep_freed_memory()
    folder = given.run
    try:
        with ExitStack() as held:
            try:
                run: RunSpec | UserError = _open_run(folder, held, given, is_main=is_main)
            except UserError as error:
                if os.environ.get("WORLD_SIZE", "1") == "1":
                    raise
                run = error
            import torch

            from .run import train_run

            with joined(given.timeout) as ranks:
                with ranks.failing_together():  # the others would wait for this one
                    if isinstance(run, UserError):
                        raise run
                torch.set_num_threads(run.training.threads)
                train_run(folder, records, stop.is_set, ranks, given.strategy)
    except Interrupted as error:
        if is_main:
            records.write({"event": "interrupted", "message": str(error)})
        return error.exit_status
    except Exception as error:
        message = _user_message(error)
        if message is None:
            raise
        records.write({"event": "error", "message": message})
        return 1
    if is_main:
        records.write({"event": "finished"})
    return 0


def _open_run(folder: Path, held: ExitStack, given: argparse.Namespace, *, is_main: bool) -> RunSpec:
    """Return the specification of a run, for which the main process holds the lock; raises `UserError` if it cannot."""
    spec = read_run(folder)
    lock = Layout.find(folder).lock(f"run-{folder.name}")
    patience_s = LOCK_PATIENCE_S if given.records is None else JOB_LOCK_PATIENCE_S
    if is_main:
        held.enter_context(exclusive(lock, f"{spec.kind} '{spec.name}'", patience_s=patience_s))
    os.environ["OMP_NUM_THREADS"] = str(spec.training.threads)  # before torch starts any thread
    return spec


def _user_message(error: Exception) -> str | None:
    """Return the message of an error that the user can fix, such as a full disk or low memory, otherwise None."""
    user_error = user_fixable_error(error) if isinstance(error, OSError) else error
    if isinstance(user_error, UserError):
        return str(user_error)
    # torch raises different errors on GPUs and CPUs
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return "out of memory; lower training.batch_size (and raise accumulation), or sequence_length"
    if "InvalidCxxCompiler" in f"{type(error).__name__} {error}":
        return "training.compile needs a C++ compiler; install one, or set compile: false"
    return None


class _JsonLines(Reporter):
    """Writes the records of the run, for the launcher to read."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def run_progressed(self, run: Path, record: Mapping[str, Any]) -> None:
        self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        if self._path is None:
            print(json.dumps(record), flush=True)
        else:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _stop_signal() -> threading.Event:
    """Return an event that SIGINT, SIGTERM or SIGUSR1 sets; a second signal has its default effect."""
    stop = threading.Event()

    def request_stop(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, request_stop)
    return stop


def _stop_later(stop: threading.Event, seconds: float) -> None:
    timer = threading.Timer(seconds, stop.set)
    timer.daemon = True  # a run that ends earlier does not wait for it
    timer.start()


def _exit_with_parent(leash: int) -> None:
    # os.read, since a buffered read holds a lock that interpreter shutdown waits for
    while os.read(leash, 1024):
        pass
    with contextlib.suppress(OSError):  # standard error may have gone with the parent
        os.write(2, b"the process that started this training is gone; resume it with `expertctl train`\n")
    os._exit(1)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
