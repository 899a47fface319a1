"""Supervised child process of Flower, restarted with back-off whenever it ends."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ....core.errors import UserError

PAUSES_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
"""Back-off of everything that is retried: processes, connections and training runs."""
SETTLED_S = 60.0
"""Lifetime in seconds after which the back-off starts again with the shortest pause."""
COMMAND_S = 120
"""Time limit of one `flwr` command, in seconds."""
LOG_TAIL = 40_000
"""Bytes that `recent_output` returns at most."""
MAX_LOG = 20 << 20
"""Size in bytes at which the log is moved to `.old`."""


def backoff_s(failures: int) -> float:
    """Return the pause in seconds before the next attempt after 1 or more failures in a row."""
    return PAUSES_S[min(failures, len(PAUSES_S)) - 1]


class Child:
    """A command to keep running: the owner of the object calls `poll`, and `start` when `is_due`."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._restart_at = 0.0
        self._failures = 0
        self._log_start = 0
        """Size of the log at the last start, in bytes."""

    @property
    def is_running(self) -> bool:
        """Whether the process is running."""
        return self._process is not None and self._process.poll() is None

    def poll(self) -> int | None:
        """If the process has ended since the last call, schedule its restart and return its exit status; else None.

        Moves the content of a log that has grown too large to `.old`.
        """
        self._shorten_log()
        if self._process is None or (status := self._process.poll()) is None:
            return None
        self._close()
        now = time.monotonic()
        self._failures = 1 if now - self._started_at > SETTLED_S else self._failures + 1
        self._restart_at = now + backoff_s(self._failures)
        return status

    def _shorten_log(self) -> None:
        if self.log.is_file() and self.log.stat().st_size > MAX_LOG:
            shutil.copyfile(self.log, self.log.with_suffix(".old"))
            os.truncate(self.log, 0)  # the process goes on appending to it
            self._log_start = 0

    def is_due(self) -> bool:
        """Return whether the command should be started now."""
        return self._process is None and time.monotonic() >= self._restart_at

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the command; its output is appended to the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._shorten_log()
        with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            self._log_start = os.fstat(log.fileno()).st_size
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "expertctl.plugins.flower.processes.leash", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=dict(environment),
                start_new_session=True,
            )
        self._started_at = time.monotonic()

    def recent_output(self) -> str:
        """Return the end of the output since the last start."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - LOG_TAIL))
            return file.read().decode("utf-8", "replace")

    def stop(self) -> None:
        """Stop the process and wait for its end."""
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
    """Return the environment of Flower's processes: no telemetry, and this installation's commands first on PATH.

    Commands in the folders `first` take precedence.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    folders = [*(str(folder) for folder in first), str(Path(sys.executable).parent)]
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
    """Return the path of a Flower command; raises `UserError` if the extra is not installed."""
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise UserError(NOT_INSTALLED)
    return str(path)


def run_flwr(*arguments: str, environment: Mapping[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a `flwr` command in a folder to its end; raises `UserError` if it takes longer than `COMMAND_S`."""
    command = [flower_command("flwr"), *arguments]
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            cwd=folder,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"`flwr {arguments[0]}` did not answer in {COMMAND_S} s") from None


def last_line(errors: str) -> str:
    """Return the last line of a command's error output."""
    return (errors.strip().splitlines() or ["no reason given"])[-1]


def require_flower() -> None:
    """Raise `UserError` if Flower is not installed."""
    from importlib.util import find_spec

    if find_spec("flwr") is None:
        raise UserError(NOT_INSTALLED)
    flower_command("flower-superlink")


NOT_INSTALLED = (
    'joining over a network needs Flower, which is not installed here: pip install "expertctl[federation]" '
    "(without it, use `federate pack`, `work` and `deliver`, which exchange files)"
)


def free_port() -> int:
    """Return an unused port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
