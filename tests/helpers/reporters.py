"""Reporters that record what they receive."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertctl import Reporter


class Recorder(Reporter):
    """Records messages and progress."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps: list[tuple[str, int, int | None]] = []
        """(task, done, total)."""

    def say(self, line: str) -> None:
        self.lines.append(line)

    def progress(self, task: str, done: int, total: int | None = None, unit: str = "") -> None:
        self.steps.append((task, done, total))


class Notes(Reporter):
    """Records the notes of a run."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def run_progressed(self, run: Path, record: Mapping[str, Any]) -> None:
        self.lines.extend(record.get("notes", ()))
