"""One long-lived process of Flower's that is started again whenever it ends, with growing pauses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ....core.errors import UserError

PAUSES_S = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
SETTLED_S = 60.0
"""A process that lived so long begins again with the shortest pause."""
LOG_TAIL = 40_000
MAX_LOG = 20 << 20


class Child:
    """A command that is to run; `tick()` starts it, and starts it again."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._next = 0.0
        self._failures = 0
        self._log_from = 0

    @property
    def runs(self) -> bool:
        """Whether it runs now."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Of the leash that holds it."""
        return self._process.pid if self._process is not None else None

    def ended(self) -> int | None:
        """Return the exit status of a process that has ended since the last call, and plan the next start; else None."""
        if self._process is None or (status := self._process.poll()) is None:
            return None
        self._close()
        lived = time.monotonic() - self._started
        self._failures = 0 if lived > SETTLED_S else self._failures + 1
        self._next = time.monotonic() + PAUSES_S[min(self._failures, len(PAUSES_S) - 1)]
        return status

    def is_due(self) -> bool:
        """Tell whether it should be started now."""
        return self._process is None and time.monotonic() >= self._next

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the command; what it says goes to the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.log.is_file() and self.log.stat().st_size > MAX_LOG:
            self.log.replace(self.log.with_suffix(".old"))
        with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            self._log_from = os.fstat(log.fileno()).st_size
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "expertctl.plugins.flower.processes.leash", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=dict(environment),
                start_new_session=True,
            )
        self._started = time.monotonic()

    def said(self) -> str:
        """Return the end of what it has said since its last start."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_from, size - LOG_TAIL))
            return file.read().decode("utf-8", "replace")

    def stop(self) -> None:
        """End it and wait."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._close()

    def _close(self) -> None:
        assert self._process is not None
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None


def environment(home: Path, *first: Path) -> dict[str, str]:
    """Return the environment of Flower's processes: nothing phones home, and its commands are those of this installation.

    `first` are folders that are searched before it.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    folders = [*(str(folder) for folder in first), str(_commands())]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("FLWR_")},
        "PATH": os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONSAFEPATH": "1",
    }


def flower_command(name: str) -> str:
    """Return one of Flower's console commands; raises `UserError` where the extra is not installed."""
    path = _commands() / name
    if not path.is_file():
        raise UserError(NOT_INSTALLED)
    return str(path)


def require_flower() -> None:
    """Raise `UserError` where Flower is not installed."""
    from importlib.util import find_spec

    if find_spec("flwr") is None:
        raise UserError(NOT_INSTALLED)
    flower_command("flower-superlink")


NOT_INSTALLED = (
    'owners join through Flower, which is not installed here: pip install "expertctl[federation]" '
    "(without it, `federate pack`, `work` and `deliver` do the same by files)"
)


def free_port() -> int:
    """Return a port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _commands() -> Path:
    return Path(sys.executable).parent
