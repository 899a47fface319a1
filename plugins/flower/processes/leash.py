"""A process that ends with whoever started it: `python -m expertctl.plugins.flower.processes.leash COMMAND...`.

Its standard input is a pipe that nobody writes to. When the starter ends, however it ends, the pipe closes, and the command is
ended too; so a killed coordinator or owner leaves no server behind that holds a port or a key.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

PATIENCE_S = 8.0


def main(command: list[str]) -> int:
    """Run the command until it ends or the starter does; return its exit status."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    ending = threading.Event()

    def end(*_: object) -> None:
        ending.set()

    def watch() -> None:
        while os.read(0, 1024):
            pass
        end()

    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, end)
    threading.Thread(target=watch, daemon=True).start()
    while child.poll() is None and not ending.is_set():
        time.sleep(0.05)
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE_S)
    _end_group(child.pid)
    status = child.wait()
    return status if status >= 0 else 128 - status


def _end_group(group: int) -> None:
    """End what is left of the command's own children."""
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
