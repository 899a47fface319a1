"""A reporter that records what it receives."""

from __future__ import annotations

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
