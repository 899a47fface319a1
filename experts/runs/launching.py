"""Order and launching of training runs, and collection of their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...core.config.settings import ExpertConfig, LauncherConfig
from ...core.errors import Interrupted, UserError
from ...core.hooks.manager import installed_plugins
from ...core.hooks.options import parse_options
from ...core.hooks.training import Launcher
from ...core.manifests.run import RUN_FILE
from ...core.reporting import SILENT, Reporter


@dataclass(frozen=True)
class TrainResult:
    """Results of several training runs, by run name."""

    finished: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)
    """Run name -> one-line error."""
    interrupted: tuple[str, ...] = ()

    def raise_for_failures(self) -> None:
        """Raise `UserError` that lists every failed run, or `Interrupted` if runs were stopped."""
        if self.interrupted:
            raise Interrupted(f"{', '.join(self.interrupted)}: stopped, state saved; rerun the same command to resume")
        if self.failed:
            raise UserError("; ".join(f"{name}: {error}" for name, error in self.failed.items()))


def launch(runs: Sequence[Path], jobs: int, launcher: LauncherConfig, reporter: Reporter = SILENT) -> TrainResult:
    """Train runs with a launcher, `jobs` at a time; a failed run does not raise.

    Raises `UserError` for an unknown launcher or invalid options.
    """
    plugin = installed_plugins().offer(Launcher, launcher.name)
    options = parse_options(plugin.options, launcher.options, f"launcher '{plugin.name}'")
    results = plugin.launch(runs, jobs, reporter, options)
    return TrainResult(
        finished=tuple(result.run.name for result in results if not result.error and not result.interrupted),
        failed={result.run.name: result.error for result in results if result.error},
        interrupted=tuple(result.run.name for result in results if result.interrupted),
    )


def next_wave(pending: Sequence[str], declared: Mapping[str, ExpertConfig], experts: Path) -> list[str]:
    """Return the pending experts to train next: first those from the seed or already branched, then their children.

    `declared` are the experts of `expertctl.yaml`, which must include those not yet branched below `experts`.
    """
    starts = {name: "seed" if (experts / name / RUN_FILE).is_file() else declared[name].from_ for name in pending}
    ready = [name for name, start in starts.items() if start == "seed"]
    if ready:
        return ready
    ready = [
        name
        for name, start in starts.items()
        if start != "auto" and not set([start] if isinstance(start, str) else start) & set(pending)
    ]
    return ready or list(pending[:1])  # `auto` one at a time: each can start from those before it
