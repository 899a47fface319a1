"""Processes that score delivered experts, kept for the next delivery: starting one takes longer than scoring a small expert."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from queue import LifoQueue
from typing import Any

from ....core.artefacts.layout import Layout
from ....core.config.project import load_project
from ....core.errors import UserError
from ....core.process.compute import available_cores
from .acceptance import HeldOut
from .held_out import public_domains

MOST = 4
"""Most processes; each loads a model."""
IDLE_S = 300.0
"""Seconds after which a process without work ends."""


class Judges:
    """Scores deliveries in up to `count` processes at a time; a `Measure`."""

    def __init__(self, layout: Layout, count: int | None = None) -> None:
        self._layout = layout
        self.count = count or min(available_cores(), MOST)
        self._free: LifoQueue[_Judge | None] = LifoQueue()
        for _ in range(self.count):
            self._free.put(None)

    def __call__(self, seed: Path, folder: Path) -> HeldOut | None:
        """Return the losses of a seed and an expert on the workspace's public text: the seed's domains, or all domains.

        Returns None without public text; the bound is then not checked. Raises `UserError` if the seed cannot be scored.
        """
        if not public_domains(self._layout, load_project(self._layout.config_file)):
            return None
        content = self._ask(seed, folder)
        if "error" in content:
            raise UserError(f"public text cannot be scored, so no delivery can be judged: {content['error']}")
        return HeldOut(content["seed"], float("nan") if content["expert"] is None else content["expert"])

    def _ask(self, seed: Path, folder: Path) -> dict[str, Any]:
        """Return the answer of the process that was used last, or of a new one if none is there or it has ended."""
        judge = self._free.get()
        try:
            if judge is not None and (content := judge.answer(seed, folder)) is not None:
                return content
            judge = _Judge(self._layout.root, available_cores() // self.count)
            if (content := judge.answer(seed, folder)) is not None:
                return content
            judge = None
            raise UserError("public text cannot be scored, so no delivery can be judged: the scoring process has ended")
        finally:
            self._free.put(judge)


class _Judge:
    """One process, which ends with this one, or after `IDLE_S` without work."""

    def __init__(self, root: Path, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "expertctl.experts.federation.judging.held_out", str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(max(threads, 1))},
        )
        self._lock = threading.Lock()
        self._idle: threading.Timer | None = None

    def answer(self, seed: Path, folder: Path) -> dict[str, Any] | None:
        """Return the answer to one request, or None if the process has ended."""
        if self._idle is not None:
            self._idle.cancel()
        with self._lock:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            try:
                self._process.stdin.write(json.dumps([str(seed), str(folder)]) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except (OSError, ValueError):  # it was killed, or has ended after a pause
                line = ""
            if not line:
                self._end()
                return None
        self._idle = threading.Timer(IDLE_S, self._end_if_idle)
        self._idle.daemon = True
        self._idle.start()
        content: dict[str, Any] = json.loads(line)
        return content

    def _end_if_idle(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was not flushed to a process that is gone
                if pipe is not None:
                    pipe.close()
