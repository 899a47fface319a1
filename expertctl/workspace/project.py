"""The project of a workspace: its paths, its settings, and launching of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from expertctl.core.artefacts.layout import Layout
from expertctl.core.config.project import load_project
from expertctl.core.config.settings import LauncherConfig, ProjectConfig, validate_settings
from expertctl.core.manifests.manifest import Manifest
from expertctl.core.reporting import SILENT, Reporter
from expertctl.core.tracking.tracking import check_trackers
from expertctl.experts.runs.launching import JobCount, TrainResult, launch
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
        jobs: JobCount = None,
        launcher: str | LauncherConfig | None = None,
        own_launchers: Mapping[Path, LauncherConfig] | None = None,
        detach: bool = False,
        track: Sequence[str] = (),
        reporter: Reporter = SILENT,
    ) -> TrainResult:
        """Train runs with a launcher; a failed run does not raise.

        `launcher` is above those of single runs (`own_launchers`), these above the project's: another launcher replaces it,
        options of the same one are added to its own. `track` are trackers beside those of the project.
        """
        self.check_trackers(track)
        for run in runs:
            note_tracking(run, track, self.config.tracking, reporter)
        if isinstance(launcher, str):
            launcher = validate_settings(LauncherConfig, {"name": launcher}, "launcher")
        declared = self.config.launcher
        own = {run: declared.overlay(own).overlay(launcher) for run, own in (own_launchers or {}).items()}
        return launch(runs, jobs, declared.overlay(launcher), reporter, own_launchers=own, detach=detach)

    def check_trackers(self, names: Sequence[str] = ()) -> None:
        """Raise `UserError` if a tracker of the project, or one of `names`, cannot be used."""
        check_trackers({**{name: {} for name in names}, **self.config.tracking})

    def tracked(self, folder: Path, merged: Manifest) -> Manifest:
        """Record a finished merge in the project's trackers and return its manifest."""
        track_merge(self.config.tracking, self.layout, folder, merged)
        return merged
