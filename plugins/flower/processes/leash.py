"""Wrapper that stops a command when its parent ends: `python -m expertctl.plugins.flower.processes.leash COMMAND...`.

Its standard input is a pipe from the parent. When the parent ends for any reason, the pipe closes and the wrapper stops the
command, so that a killed coordinator or owner leaves no process behind that holds a port or a key.
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
"""Seconds between SIGTERM and SIGKILL."""


def main(command: list[str]) -> int:
    """Run the command until it or the parent ends; return its exit status."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    stop = threading.Event()

    def watch_parent() -> None:
        while os.read(0, 1024):
            pass
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=watch_parent, daemon=True).start()
    while child.poll() is None and not stop.is_set():
        time.sleep(0.05)
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(PATIENCE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the rest of the command's process group
        os.killpg(child.pid, signal.SIGKILL)
    status = child.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
