"""Runs are handed to a launcher, and what became of each of them is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import Interrupted, UserError
from ...core.hooks.manager import installed_plugins
from ...core.hooks.training import LaunchResult, RunReporter


@dataclass(frozen=True)
class TrainResult:
    """How training several runs ended; `raise_for_failures` for callers that want all of them or an error."""

    finished: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)
    """Name -> one-line error."""
    interrupted: tuple[str, ...] = ()

    def raise_for_failures(self) -> None:
        """Raise `UserError` that names every run that failed, or `Interrupted` if runs were stopped.

        Does nothing when all of them finished.
        """
        if self.interrupted:
            raise Interrupted(
                f"{', '.join(self.interrupted)}: stopped, state saved; the same command goes on"
            )
        if self.failed:
            raise UserError("; ".join(f"{name}: {error}" for name, error in self.failed.items()))


def launch(runs: Sequence[Path], jobs: int, launcher: str, reporter: RunReporter | None) -> TrainResult:
    """Train runs with the launcher of that name, `jobs` at a time; none of their failures is raised.

    Raises UserError if there is no such launcher.
    """
    results = installed_plugins().launcher(launcher).launch(runs, jobs, reporter or _Silent())
    return TrainResult(
        finished=tuple(result.run.name for result in results if not result.error and not result.interrupted),
        failed={result.run.name: result.error for result in results if result.error},
        interrupted=tuple(result.run.name for result in results if result.interrupted),
    )


class _Silent:
    """A reporter for callers that do not watch."""

    def started(self, run: Path, total_steps: int) -> None: ...
    def progressed(self, run: Path, record: Mapping[str, Any]) -> None: ...
    def finished(self, result: LaunchResult) -> None: ...
