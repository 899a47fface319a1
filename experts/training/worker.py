"""The process that trains one run: `python -m expertctl.experts.training.worker RUN_FOLDER`.

It speaks JSON lines on standard output, stops after a checkpoint on SIGINT or SIGTERM, and ends at once when
the process that started it is gone (its standard input closes), so that a killed command leaves nobody
holding a lock.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from ...core.artefacts.files import exclusive, mendable
from ...core.artefacts.layout import Layout
from ...core.errors import Interrupted, UserError
from ...core.process.allocator import keep_freed_memory
from ...core.process.environment import prepare_libraries
from ..runs.specification import read_run


def main(arguments: list[str]) -> int:
    """Train the run in the given folder; return the exit status."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stop = _stop_signal()
    prepare_libraries()
    keep_freed_memory()
    folder = Path(arguments[0])
    try:
        spec = read_run(folder)
        layout = Layout.find(folder)
        with exclusive(layout.lock(f"run-{folder.name}"), f"{spec.kind} '{spec.name}'"):
            _prepare_torch(spec.training.threads)
            from .run import train_run

            train_run(folder, _tell, stop.is_set)
    except Interrupted as error:
        _tell({"event": "interrupted", "message": str(error)})
        return error.exit_status
    except UserError as error:
        return _fail(str(error))
    except Exception as error:
        message = _what_to_do(error)
        if message is None:
            raise
        return _fail(message)
    _tell({"event": "finished"})
    return 0


def _fail(message: str) -> int:
    _tell({"event": "error", "message": message})
    return 1


def _what_to_do(error: Exception) -> str | None:
    """Return what a user can do about a full disk, a missing permission or too little memory; else None."""
    if isinstance(error, OSError):
        trouble = mendable(error)
        return str(trouble) if trouble is not None else None
    # torch names it differently on GPUs and on CPUs
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return "out of memory; lower training.batch_size (and raise accumulation), or sequence_length"
    if "InvalidCxxCompiler" in f"{type(error).__name__} {error}":
        return "training.compile needs a C++ compiler, and there is none; install one, or set compile: false"
    return None


def _tell(record: Mapping[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def _stop_signal() -> threading.Event:
    """Return an event that SIGINT or SIGTERM sets; a second signal ends the process the usual way."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return stop


def _end_with_parent() -> None:
    # A raw read: a buffered one holds a lock that interpreter shutdown would wait for.
    while os.read(0, 1024):
        pass
    os._exit(1)


def _prepare_torch(threads: int) -> None:
    """Give torch its threads before it starts any; more of them than cores wait for each other."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
