"""The project of a workspace: its paths, its settings, and launching of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from expertctl.core.artefacts.layout import Layout
from expertctl.core.config.project import load_project
from expertctl.core.config.settings import LauncherConfig, ProjectConfig, validate_settings
from expertctl.core.manifests.manifest import Manifest
from expertctl.core.reporting import SILENT, Reporter
from expertctl.core.tracking.tracking import check_trackers
from expertctl.experts.runs.launching import TrainResult, launch
from expertctl.experts.runs.tracking import note_tracking
from expertctl.merge.generalists.tracked_merge import track_merge


@dataclass
class Project:
    """The project file and the paths around it; every group of operations works on one."""

    layout: Layout

    @cached_property
    def config(self) -> ProjectConfig:
        """The checked content of `expertctl.yaml`."""
        return load_project(self.layout.config_file)

    def reload(self) -> None:
        """Read the settings again when they are next used."""
        self.__dict__.pop("config", None)

    def launch(
        self,
        runs: Sequence[Path],
        *,
        jobs: int = 1,
        launcher: str | LauncherConfig | None = None,
        track: Sequence[str] = (),
        reporter: Reporter = SILENT,
    ) -> TrainResult:
        """Train runs with a launcher (default: the project's); a failed run does not raise.

        `track` are trackers beside those of the project.
        """
        self.check_trackers(track)
        for run in runs:
            note_tracking(run, track, self.config.tracking, reporter)
        if isinstance(launcher, str):
            launcher = validate_settings(LauncherConfig, {"name": launcher}, "launcher")
        return launch(runs, jobs, launcher or self.config.launcher, reporter)

    def check_trackers(self, names: Sequence[str] = ()) -> None:
        """Raise `UserError` if a tracker of the project, or one of `names`, cannot be used."""
        check_trackers({**{name: {} for name in names}, **self.config.tracking})

    def tracked(self, folder: Path, merged: Manifest) -> Manifest:
        """Record a finished merge in the project's trackers and return its manifest."""
        track_merge(self.config.tracking, self.layout, folder, merged)
        return merged
