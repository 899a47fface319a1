"""The generalists of a workspace: merging, tuning, changing their experts, and measuring them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertctl.core.config.settings import LauncherConfig, MergeConfig, validate_settings
from expertctl.core.errors import UserError
from expertctl.core.hooks.manager import installed_plugins
from expertctl.core.hooks.merging import MergeMethod
from expertctl.core.hooks.text import ValidationText
from expertctl.core.manifests.manifest import Manifest, read_manifest
from expertctl.core.manifests.run import RUN_FILE, is_finished
from expertctl.core.reporting import SILENT, Reporter
from expertctl.experts.runs.tuning import TuningSettings, require_same, start_tuning
from expertctl.experts.text.corpora import domain_config
from expertctl.merge.sources.parents import expert_folders

from .comparison import BASELINES, Comparison, compare
from .data import Data
from .project import Project

if TYPE_CHECKING:
    from expertctl.merge.merging import MergeRun
    from expertctl.merge.mixture.absence import Absence
    from expertctl.merge.mixture.routing.report import RoutingReport
    from expertctl.merge.planning.plan import MergePlan


class Generalists:
    """The generalists in `generalists/`; `generalists / "forest"` is the folder of one."""

    def __init__(self, project: Project, data: Data) -> None:
        self._project, self._data = project, data
        self.folder = project.layout.generalists

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def merge(
        self,
        name: str,
        *,
        output: str | Path | None = None,
        force: bool = False,
        run: MergeRun | None = None,
        **settings: Any,
    ) -> Manifest:
        """Merge experts into a generalist.

        `settings` are fields of `merges.NAME` in `expertctl.yaml` (`method`, `experts`, `weights`, `options`, `fit_on`,
        `dtype`, `tokenizer`, `search`), which supplies those that are not passed. `experts` are names of finished
        experts, or folders of models and LoRA adapters. `run` has threads, device, file size, reporter and permissions.
        """
        from expertctl.merge.merging import MergeRun, merge

        config = self._merge_config(name, settings)
        run = run or MergeRun()

        def validation() -> list[ValidationText]:
            folders = expert_folders(self._project.layout, config.experts, self._project.layout.experts)
            return self._data.validation(config.fit_on or self._data.trained_domains(folders.values()))

        self._project.check_trackers()
        target = Path(output) if output is not None else None
        manifest = merge(
            self._project.layout,
            name,
            config,
            output=target,
            validation=validation,
            run=replace(run, force=force or run.force),
        )
        return self._project.tracked(target or self / name, manifest)

    def plan(
        self, name: str, *, output: str | Path | None = None, run: MergeRun | None = None, **settings: Any
    ) -> MergePlan:
        """Return the plan of `merge` with the same settings, after all its checks."""
        from expertctl.merge.merging import plan_merge

        target = Path(output) if output is not None else None
        return plan_merge(self._project.layout, name, self._merge_config(name, settings), output=target, run=run)

    def _merge_config(self, name: str, settings: Mapping[str, Any]) -> MergeConfig:
        """Return the settings of a merge: those passed, over those of `expertctl.yaml`; all names are checked."""
        fields = {key: value for key, value in settings.items() if value is not None}
        declared = self._project.config.merges.get(name)
        base = declared.model_dump(exclude_unset=True) if declared is not None else {}
        for section in ("search", "options"):
            if section in fields:
                fields[section] = {**(base.get(section) or {}), **fields[section]}
        if "method" not in base | fields:
            raise UserError(f"merge '{name}' is not in expertctl.yaml; give its method: --method METHOD")
        config = validate_settings(MergeConfig, base | fields, f"merge '{name}'")
        installed_plugins().offer(MergeMethod, config.method)
        for domain in config.fit_on or ():
            domain_config(self._project.config, domain)
        return config

    def tune(
        self,
        name: str,
        base: str | Path | None = None,
        settings: TuningSettings | None = None,
        *,
        force: bool = False,
        launcher: str | LauncherConfig | None = None,
        reporter: Reporter = SILENT,
    ) -> Manifest:
        """Train a generalist or the seed further as `name`; the name alone, or the same settings, resumes a tuning."""
        settings = settings or TuningSettings()
        base = str(base) if base is not None else None
        folder = self / name
        if (folder / RUN_FILE).is_file() and not is_finished(folder) and not force:
            require_same(folder, base, settings)
        elif base is not None:
            start_tuning(self._project.layout, self._project.config, name, base, settings, force=force)
        else:
            raise UserError(
                f"there is no unfinished tuning '{name}' to resume; to start one, give --from GENERALIST --domains A,B"
            )
        self._project.launch([folder], launcher=launcher, reporter=reporter).raise_for_failures()
        return read_manifest(folder)

    def change_experts(
        self,
        model: str,
        output: str | Path,
        *,
        remove: Sequence[str] = (),
        add: Sequence[str] = (),
        replace: Mapping[str, str] | None = None,
        run: MergeRun | None = None,
    ) -> Manifest:
        """Write a generalist with other experts as `output`, a name or a folder, without training.

        Added experts, and the new ones of `replace` (old name -> new expert), are names or folders.
        """
        from expertctl.merge.mixture.changing import Change
        from expertctl.merge.remaking.expert_changes import change_experts

        layout = self._project.layout
        removed, added = ([names] if isinstance(names, str) else names for names in (remove, add))
        change = Change(
            tuple(dict.fromkeys(removed)),
            {folder.name: folder for folder in map(layout.artefact, added)},
            {name: layout.artefact(new) for name, new in (replace or {}).items()},
        )

        def validation() -> list[ValidationText]:
            return self._data.validation(self._data.trained_domains(change.joining.values()))

        self._project.check_trackers()
        target = layout.generalist(output)
        manifest = change_experts(layout.artefact(model), target, change, layout=layout, run=run, validation=validation)
        return self._project.tracked(target, manifest)

    def absence(self, model: str, expert: str) -> Absence:
        """Search a model for an expert; if the expert is absent, `found` is empty and `merged` is None."""
        from expertctl.merge.mixture.absence import find_expert, find_own_expert

        folder = self._project.layout.artefact(model)
        return find_own_expert(folder, expert) or find_expert(folder, self._project.layout.artefact(expert))

    def compare(
        self,
        model: str,
        against: Sequence[str] | None = None,
        domains: Sequence[str] | None = None,
        *,
        jobs: int | None = None,
        nproc: int = 1,
        reporter: Reporter = SILENT,
    ) -> Comparison:
        """Compare a generalist with its seed, best expert, average and ensemble, or with the models `against`."""
        baselines = against or BASELINES
        return compare(self._project, self._data, model, baselines, domains, jobs=jobs, nproc=nproc, reporter=reporter)

    def routing(self, model: str, domains: Sequence[str] | None = None, *, blocks: int = 32) -> RoutingReport:
        """Return how a mixture's routers distribute the validation text of domains (default: all) over its experts."""
        from expertctl.core.models.feed_forwards import spread_blocks
        from expertctl.core.models.loading import load_model
        from expertctl.core.process.compute import best_device
        from expertctl.merge.mixture.routing.report import RoutingReport, routing_of

        folder = self._project.layout.artefact(model)
        merged = read_manifest(folder).merged
        if merged is None or not merged.experts:
            raise UserError(f"{folder} is not a mixture of experts: its manifest lists no experts")
        network, _ = load_model(folder, dtype="float32")
        network.to(best_device())
        routings = {
            text.domain: routing_of(network, spread_blocks(text.blocks, blocks))
            for text in self._data.validation(domains or list(self._project.config.domains))
        }
        if not routings:
            raise UserError("there is no domain to measure on; add one under 'domains' in expertctl.yaml")
        return RoutingReport(merged.experts, routings)
