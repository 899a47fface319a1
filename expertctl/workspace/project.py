"""The project of a workspace: its paths, its settings, and launching of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from expertctl.core.artefacts.layout import Layout
from expertctl.core.config.project import load_project
from expertctl.core.config.settings import LauncherConfig, ProjectConfig, validate_settings
from expertctl.core.reporting import SILENT, Reporter
from expertctl.experts.runs.launching import TrainResult, launch


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
        reporter: Reporter = SILENT,
    ) -> TrainResult:
        """Train runs with a launcher (default: the project's); a failed run does not raise."""
        if isinstance(launcher, str):
            launcher = validate_settings(LauncherConfig, {"name": launcher}, "launcher")
        return launch(runs, jobs, launcher or self.config.launcher, reporter)
