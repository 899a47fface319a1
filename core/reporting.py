"""Reporting of messages and progress of long work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tabs and line ends, and those that reverse the direction of text."""


@dataclass(frozen=True)
class LaunchResult:
    """Outcome of one run."""

    run: Path
    error: str | None
    """One line, or None if the run finished."""
    interrupted: bool = False
    job: str | None = None
    """Id of the job in which the run goes on after the command has ended."""


def printable(text: str) -> str:
    """Return text with escapes in place of control characters, by which names from outside could control a terminal."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


class Reporter:
    """Ignores messages and progress; displays override the methods, which may be called from any thread."""

    def say(self, line: str) -> None:
        """Receive a message of one line."""

    def progress(self, task: str, done: int, total: int | None = None, unit: str = "") -> None:
        """Receive the units of a task that are done, such as 3 of 40 `documents`; `total` is None if unknown."""

    def run_started(self, run: Path, total_steps: int) -> None:
        """Receive the start of a training run."""

    def run_progressed(self, run: Path, record: Mapping[str, Any]) -> None:
        """Receive a record of a training run: `step`, and `loss`, `tokens_per_step`, `event` and `notes` if it has them."""

    def run_finished(self, result: LaunchResult) -> None:
        """Receive the end of a training run."""


SILENT = Reporter()
"""The default wherever a reporter may be passed."""


def reported(
    items: Iterable[Item], reporter: Reporter, task: str, unit: str, *, every: int = 1, done: int = 0
) -> Iterator[Item]:
    """Yield items and report their count, on top of `done`, after each `every` items."""
    for count, item in enumerate(items, start=done + 1):
        yield item
        if count % every == 0:
            reporter.progress(task, count, unit=unit)
