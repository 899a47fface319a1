"""The experts of a workspace: branching, training, and statistics for merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expertctl.core.artefacts.files import exclusive
from expertctl.core.config.discovered import cluster_sets
from expertctl.core.config.settings import ExpertConfig, LauncherConfig, validate_settings
from expertctl.core.errors import UserError, unknown_name
from expertctl.core.manifests.run import RUN_FILE, RunSpec, is_finished, read_run
from expertctl.core.reporting import SILENT, Reporter
from expertctl.experts.runs.branching import branch
from expertctl.experts.runs.jobs.job_file import forget_job
from expertctl.experts.runs.launching import JobCount, TrainResult, next_wave
from expertctl.merge.sources.parents import expert_folders

from .data import Data
from .project import Project


class Experts:
    """The experts in `experts/`; `experts / "law"` is the folder of one."""

    def __init__(self, project: Project, data: Data) -> None:
        self._project, self._data = project, data
        self.folder = project.layout.experts

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def names(self) -> tuple[str, ...]:
        """Return the experts that `train` without names trains: branched or in `expertctl.yaml`, sorted."""
        branched = {path.parent.name for path in self.folder.glob(f"*/{RUN_FILE}")}
        return tuple(sorted({*branched, *self._project.config.experts}))

    def branch(self, name: str, *, force: bool = False, **settings: Any) -> RunSpec:
        """Start an expert: `domain`, `trains`, `start` ('seed', 'auto' or weights by expert), `training` ...

        `settings` are fields of `experts.NAME` in `expertctl.yaml`, which supplies those that are not passed.
        """
        config = self._expert_config(name, settings)
        return branch(self._project.layout, self._project.config, name, config, force=force)

    def branch_clusters(self, clusters: str, *, force: bool = False, **settings: Any) -> list[RunSpec]:
        """Start an expert for each cluster of a set that `discover` made; together they train for one expert's tokens.

        The same total of tokens for any number of clusters is the protocol of Cluster-Branch-Train-Merge.
        """
        sets = cluster_sets(self._project.layout.root)
        if clusters not in sets:
            raise unknown_name("set of clusters", clusters, sets, listed_as="there are")
        names = sets[clusters]
        training = dict(settings.get("training") or {})
        total = int(training.get("tokens") or self._project.config.training.tokens)
        settings["training"] = {**training, "tokens": max(total // len(names), 1)}
        return [self.branch(name, domain=name, force=force, **settings) for name in names]

    def _expert_config(self, name: str, settings: Mapping[str, Any]) -> ExpertConfig:
        fields = {("from" if key == "start" else key): value for key, value in settings.items() if value is not None}
        declared = self._project.config.experts.get(name)
        if declared is not None:
            fields = _merged_settings(declared.model_dump(by_alias=True, exclude_unset=True), fields)
        if "domain" not in fields:
            raise UserError(f"expert '{name}' is not in expertctl.yaml; give its domain: --domain DOMAIN")
        return validate_settings(ExpertConfig, fields, f"expert '{name}'")

    def train(
        self,
        *names: str,
        jobs: JobCount = None,
        launcher: str | LauncherConfig | None = None,
        detach: bool = False,
        track: Sequence[str] = (),
        reporter: Reporter = SILENT,
    ) -> TrainResult:
        """Train experts that were branched or are in `expertctl.yaml`; without names, all of them.

        `track` are experiment trackers beside those of `expertctl.yaml`, with their default options.
        Interrupted runs resume. A failed run does not affect the others and does not raise: the result lists finished,
        failed and interrupted runs, and its `raise_for_failures()` raises. With `detach`, jobs are submitted to the queue
        of the launcher and go on; a later call follows them.
        """
        self._project.check_trackers(track)
        declared = self._project.config.experts
        requested = names or self.names()
        if not requested:
            raise UserError("there is no expert to train; start one with `expertctl branch NAME --domain DOMAIN`")
        for name in requested:
            if not (self / name).is_dir() and name not in declared:
                known = {*declared, *self.names()}
                raise unknown_name("expert", name, known, listed_as="branched or in expertctl.yaml")
        finished = [name for name in requested if is_finished(self / name)]
        for name in finished:
            forget_job(self / name)
        pending = [name for name in requested if name not in finished]
        failed: dict[str, str] = {}
        submitted: dict[str, str] = {}
        interrupted: list[str] = []
        own_launchers = {self / name: own.launcher for name, own in declared.items() if own.launcher is not None}
        while pending and not (interrupted or submitted):
            wave = next_wave(pending, declared, self.folder)
            pending = [name for name in pending if name not in wave]
            if runs := self._branched(wave, failed, reporter):
                result = self._project.launch(
                    runs,
                    jobs=jobs,
                    launcher=launcher,
                    own_launchers=own_launchers,
                    detach=detach,
                    track=track,
                    reporter=reporter,
                )
                finished += result.finished
                failed |= result.failed
                submitted |= result.submitted
                interrupted += result.interrupted
        done = tuple(name for name in requested if name in finished)
        if not detach:
            return TrainResult(done, failed, (*interrupted, *pending))
        waiting = [name for name in requested if name not in {*finished, *failed, *submitted, *interrupted}]
        return TrainResult(done, failed, tuple(interrupted), submitted, tuple(waiting))

    def _branched(self, names: Sequence[str], failed: dict[str, str], reporter: Reporter) -> list[Path]:
        """Branch experts that are not branched yet and return the runs; errors are added to `failed`."""
        runs = []
        for name in names:
            try:
                if not (self / name / RUN_FILE).is_file():
                    self._branch_once(name)
                else:
                    self._note_changed_settings(name, reporter)
                runs.append(self / name)
            except UserError as error:
                failed[name] = str(error)
        return runs

    def _branch_once(self, name: str) -> None:
        try:
            self.branch(name)
        except UserError:
            if not (self / name / RUN_FILE).is_file():  # otherwise another command was faster
                raise

    def _note_changed_settings(self, name: str, reporter: Reporter) -> None:
        """Report training settings in which the project file differs from a run that will be resumed."""
        declared = self._project.config.experts.get(name)
        if declared is None:
            return
        wanted = self._project.config.training_of(declared.training)
        ours = read_run(self / name).training
        if wanted.schedule_begin is None:  # the branch filled it in
            wanted = wanted.model_copy(update={"schedule_begin": ours.schedule_begin})
        changed = [field for field in type(ours).model_fields if getattr(ours, field) != getattr(wanted, field)]
        if changed:
            pairs = ", ".join(f"{field} {getattr(ours, field)} (not {getattr(wanted, field)})" for field in changed)
            reporter.say(
                f"expert '{name}' keeps the settings of its branch where expertctl.yaml now has others: {pairs}; to use "
                f"those, start over with `expertctl branch {name} --force`"
            )

    def statistics(
        self,
        name: str,
        *,
        kind: str = "gram",
        domain: str | None = None,
        samples: int = 256,
        output: str | Path | None = None,
        force: bool = False,
        reporter: Reporter = SILENT,
    ) -> dict[str, Any]:
        """Compute statistics of an expert (`gram` for RegMean, `fisher`) on its own domain's training part, or `domain`'s.

        Returns kind, folder, domain, number of blocks and digest.
        """
        from expertctl.experts.measures.statistics import KINDS, write_statistics

        layout = self._project.layout
        if kind not in KINDS:
            raise unknown_name("kind of statistics", kind, KINDS, listed_as="there are")
        (expert,) = expert_folders(layout, (name,), self.folder).values()
        domains = [domain] if domain is not None else self._data.trained_domains([expert])
        if len(domains) != 1:
            trained = ", ".join(domains) or "no domain of this project"
            raise UserError(f"expert '{name}' was trained on {trained}; choose one with --domain")
        (prepared,) = self._data.prepare(domains)
        folder = Path(output) if output is not None else layout.statistics / name
        with exclusive(layout.lock(f"statistics-{name}"), f"statistics of '{name}'"):
            written = write_statistics(
                expert,
                layout.seed,
                self._data.blocks(prepared, "train"),
                kind,
                folder,
                domain={"name": prepared.name, "digest": prepared.train.digest},
                samples=samples,
                force=force,
                reporter=reporter,
            )
        return {"kind": kind, "folder": str(folder / kind)} | {
            key: written[key] for key in ("domain", "blocks", "digest")
        }


def _merged_settings(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes`; the sections `training` and `options` are merged key by key."""
    sections = {key: {**base[key], **changes[key]} for key in ("training", "options") if key in base and key in changes}
    return {**base, **changes, **sections}
