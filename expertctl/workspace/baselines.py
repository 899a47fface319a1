"""Baselines of a workspace's experiments: the compute-matched dense model, and experts on random splits."""

from __future__ import annotations

from collections.abc import Sequence

from expertctl.core.config.settings import MergeConfig
from expertctl.core.manifests.manifest import Manifest, read_manifest
from expertctl.core.manifests.run import is_finished
from expertctl.core.reporting import SILENT, Reporter
from expertctl.experts.runs.baselines import start_dense, start_random_split
from expertctl.experts.runs.launching import JobCount

from .data import Data
from .project import Project


class Baselines:
    """The baselines in `baselines/`."""

    def __init__(self, project: Project, data: Data) -> None:
        self._project, self._data = project, data

    def dense(
        self,
        *,
        experts: Sequence[str] | None = None,
        same_batch: bool = False,
        force: bool = False,
        reporter: Reporter = SILENT,
    ) -> Manifest:
        """Train the compute-matched dense model: the seed, on the domains of `experts`, for the tokens of all of them.

        It takes an expert's number of steps with a batch larger by the number of experts, or, with `same_batch`, an
        expert's batch size and as many more steps.
        """
        run = start_dense(self._project.layout, experts=experts, same_batch=same_batch, force=force)
        self._project.launch([run], reporter=reporter).raise_for_failures()
        return read_manifest(run)

    def random_split(self, *, jobs: JobCount = None, force: bool = False, reporter: Reporter = SILENT) -> Manifest:
        """Train as many experts as there are, on random splits of all text, and make their ensemble."""
        from expertctl.merge.merging import MergeRun, merge

        layout = self._project.layout
        runs = start_random_split(layout, force=force)
        self._project.launch(runs, jobs=jobs, reporter=reporter).raise_for_failures()
        target = layout.baselines / "random-split"
        if not force and is_finished(target):
            return read_manifest(target)
        manifest = merge(
            layout,
            "random-split",
            MergeConfig(method="ensemble", experts=tuple(run.name for run in runs)),
            output=target,
            experts_folder=layout.baselines,
            validation=lambda: self._data.validation(self._data.trained_domains(runs)),
            run=MergeRun(force=force),
        )
        return self._project.tracked(target, manifest)
