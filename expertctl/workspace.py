"""The verbs of expertctl on one workspace: what the command line and other programs call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertctl.core.artefacts.layout import Layout
from expertctl.core.config.project import load_project
from expertctl.core.config.settings import (
    ExpertConfig,
    LauncherConfig,
    MergeConfig,
    ProjectConfig,
    TrainingConfig,
    validate_settings,
)
from expertctl.core.errors import UserError, unknown_name
from expertctl.core.hooks.manager import installed_plugins
from expertctl.core.hooks.merging import MergeMethod
from expertctl.core.hooks.text import ValidationText
from expertctl.core.hooks.training import RunReporter
from expertctl.core.manifests.manifest import Manifest, manifest_path, read_manifest
from expertctl.experts.runs.launching import TrainResult, launch

if TYPE_CHECKING:
    from expertctl.comparison import Comparison
    from expertctl.core.manifests.run import RunSpec
    from expertctl.core.models.generation import Generation
    from expertctl.experts.measures.evaluation import EvaluationTable
    from expertctl.experts.text.corpora import PreparedDomain
    from expertctl.experts.text.discovery import Discovery
    from expertctl.experts.text.proxy_corpus import Proxy
    from expertctl.merge.merging import MergeRun
    from expertctl.merge.mixture.absence import Absence
    from expertctl.merge.mixture.routing.report import RoutingReport
    from expertctl.merge.planning.plan import MergePlan


class Workspace:
    """A project folder and everything that can be done in it.

    >>> ws = Workspace("demo")                                   # doctest: +SKIP
    >>> ws.branch("law", domain="law", trains="feed_forward")    # doctest: +SKIP
    >>> ws.train("law")                                          # doctest: +SKIP
    >>> ws.merge("forest", method="ensemble")                    # doctest: +SKIP
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.layout = Layout.find(Path(folder) if folder is not None else None)

    @cached_property
    def config(self) -> ProjectConfig:
        """The checked content of `expertctl.yaml`."""
        return load_project(self.layout.config_file)

    @property
    def root(self) -> Path:
        return self.layout.root

    @property
    def experts(self) -> Path:
        return self.layout.experts

    @property
    def generalists(self) -> Path:
        return self.layout.generalists

    # --- text ---

    def prepare(
        self,
        domains: Sequence[str] | None = None,
        *,
        force: bool = False,
        tell: Callable[[str, int], None] = lambda domain, documents: None,
    ) -> list[PreparedDomain]:
        """Tokenise domains (default: all) with the seed's tokenizer; what is done already costs nothing."""
        from expertctl.experts.text.corpora import domain_config, prepare_domain

        self._require_tokenizer()
        return [
            prepare_domain(
                self.layout,
                name,
                domain_config(self.config, name),
                self.layout.seed,
                force=force,
                tell=lambda documents, name=name: tell(name, documents),  # type: ignore[misc]  # mypy infers no lambda with a default
            )
            for name in domains or self.config.domains
        ]

    def prepared(self) -> dict[str, PreparedDomain | None]:
        """Return every domain of the project, with its tokens if its current text lies in the cache."""
        from expertctl.experts.text.corpora import prepared_domain

        return {
            name: prepared_domain(self.layout, name, domain, self.layout.seed)
            for name, domain in self.config.domains.items()
        }

    def proxy(
        self,
        name: str,
        *,
        like: str,
        source: str,
        documents: int | None = None,
        seed: int = 0,
        force: bool = False,
        tell: Callable[[str, int], None] = lambda work, documents: None,
    ) -> Proxy:
        """Pick from the domain `source` the documents that look most like `like`, into `proxies/NAME.jsonl`.

        No text of `like` is written. Not given, `documents` is a tenth of the source's, at most 1,000.
        """
        from expertctl.experts.text.proxy_corpus import ProxySettings, make_proxy

        return make_proxy(
            self.layout,
            self.config,
            name,
            like=like,
            source=source,
            documents=documents,
            settings=ProxySettings(seed=seed),
            force=force,
            tell=tell,
        )

    def discover(
        self,
        name: str,
        clusters: int | None = None,
        *,
        by: str = "tfidf",
        domains: Sequence[str] | None = None,
        sample: int | None = None,
        seed: int = 0,
        jobs: int | None = None,
        force: bool = False,
        say: Callable[[str], None] = lambda line: None,
        tell: Callable[[str, int], None] = lambda work, documents: None,
        **options: Any,
    ) -> Discovery:
        """Sort the documents of domains into clusters, which become domains themselves: `NAME-0`, `NAME-1` ...

        `by` names a discoverer, `options` are its own. Default: all domains that were not discovered.
        """
        from expertctl.experts.text.discovery import SAMPLE, discover

        found = discover(
            self.layout,
            self.config,
            name,
            clusters,
            by=by,
            options=options,
            domains=domains,
            sample=sample or SAMPLE,
            seed=seed,
            jobs=jobs,
            force=force,
            say=say,
            tell=tell,
        )
        self.__dict__.pop("config", None)  # which now has more domains
        return found

    def _require_tokenizer(self) -> None:
        if not (self.layout.seed / "config.json").exists():
            raise UserError(
                "text is tokenised with the seed's tokenizer, and there is no seed yet; run `expertctl seed`"
            )

    # --- seed and experts ---

    def seed(
        self,
        source: str | Path | None = None,
        *,
        scratch: bool = False,
        preset: str | None = None,
        force: bool = False,
        launcher: str | LauncherConfig | None = None,
        reporter: RunReporter | None = None,
    ) -> Manifest:
        """Make the seed: import a Hugging Face folder (`source`, or `seed.from`), else pretrain from scratch.

        `scratch` pretrains even where `seed.from` is set; `preset` goes before `seed.preset`.
        """
        from expertctl.experts.runs.seed import import_seed, start_pretraining

        wanted = source if source is not None or scratch else self.config.seed.from_
        if wanted is not None:
            folder = Path(wanted).expanduser()
            absolute = folder if folder.is_absolute() or source is not None else self.root / folder
            return import_seed(self.layout, absolute, licence=self.config.seed.licence, force=force)
        project = self.config
        if preset is not None:
            project = project.model_copy(update={"seed": project.seed.model_copy(update={"preset": preset})})
        run = start_pretraining(self.layout, project, force=force)
        self._launch([run], 1, launcher, reporter).raise_for_failures()
        return read_manifest(run)

    def branch(self, name: str, *, force: bool = False, **settings: Any) -> RunSpec:
        """Start an expert: `domain`, `trains`, `start` ('seed', 'auto' or weights by expert), `training` ...

        What is not given comes from `experts.NAME` in `expertctl.yaml`, if it stands there.
        """
        from expertctl.experts.runs.branching import branch

        return branch(self.layout, self.config, name, self._expert_config(name, settings), force=force)

    def branch_clusters(self, clusters: str, *, force: bool = False, **settings: Any) -> list[RunSpec]:
        """Start an expert for each cluster of a set that `discover` made, all together with the budget of one.

        The same total of tokens for any number of clusters is the protocol of Cluster-Branch-Train-Merge.
        """
        from expertctl.core.config.discovered import cluster_sets

        sets = cluster_sets(self.root)
        if clusters not in sets:
            raise unknown_name("set of clusters", clusters, sets, listed_as="there are")
        names = sets[clusters]
        given = dict(settings.get("training") or {})
        total = int(given.get("tokens") or self.config.training.tokens)
        training = {**given, "tokens": max(total // len(names), 1)}
        return [self.branch(name, domain=name, force=force, **{**settings, "training": training}) for name in names]

    def _expert_config(self, name: str, settings: Mapping[str, Any]) -> ExpertConfig:
        given = {("from" if key == "start" else key): value for key, value in settings.items() if value is not None}
        declared = self.config.experts.get(name)
        if declared is not None:
            given = _laid_over(declared.model_dump(by_alias=True, exclude_unset=True), given)
        if "domain" not in given:
            raise UserError(f"expert '{name}' is not in expertctl.yaml; say which domain it is for: --domain DOMAIN")
        return validate_settings(ExpertConfig, given, f"expert '{name}'")

    def train(
        self,
        *names: str,
        jobs: int = 1,
        launcher: str | LauncherConfig | None = None,
        reporter: RunReporter | None = None,
    ) -> TrainResult:
        """Train experts that were branched or stand in `expertctl.yaml`; with no name, all of them.

        Goes on where an earlier try stopped. One that fails does not touch the others, so nothing is raised for it:
        the result says what finished, failed and was interrupted, and its `raise_for_failures()` raises as `seed` does.
        """
        from expertctl.core.artefacts.files import remove_tree
        from expertctl.core.manifests.run import STATE_FOLDER, is_finished
        from expertctl.experts.runs.waves import next_wave

        wanted = names or self.expert_names()
        if not wanted:
            raise UserError("there is no expert to train; start one with `expertctl branch NAME --domain DOMAIN`")
        for name in wanted:
            if not (self.experts / name).is_dir() and name not in self.config.experts:
                known = {*self.config.experts, *self.expert_names()}
                raise unknown_name("expert", name, known, listed_as="branched or in expertctl.yaml")
        finished = [name for name in wanted if is_finished(self.experts / name)]
        for name in finished:
            remove_tree(self.experts / name / STATE_FOLDER)  # left by a kill after the last byte of the expert
        pending = [name for name in wanted if name not in finished]
        failed: dict[str, str] = {}
        interrupted: list[str] = []
        while pending and not interrupted:
            wave = next_wave(pending, self.config.experts, self.experts)
            pending = [name for name in pending if name not in wave]
            runs = self._branched(wave, failed)
            result = self._launch(runs, jobs, launcher, reporter) if runs else TrainResult(())
            finished += result.finished
            failed |= result.failed
            interrupted += result.interrupted
        return TrainResult(tuple(name for name in wanted if name in finished), failed, (*interrupted, *pending))

    def _branched(self, names: Sequence[str], failed: dict[str, str]) -> list[Path]:
        """Branch what is not branched yet and return the runs; what cannot be branched is noted in `failed`."""
        from expertctl.core.manifests.run import RUN_FILE

        runs = []
        for name in names:
            try:
                if not (self.experts / name / RUN_FILE).is_file():
                    self.branch(name)
                runs.append(self.experts / name)
            except UserError as error:
                failed[name] = str(error)
        return runs

    def expert_names(self) -> tuple[str, ...]:
        """Return the experts that `train` without names trains: branched or in `expertctl.yaml`, sorted."""
        from expertctl.core.manifests.run import RUN_FILE

        branched = {path.parent.name for path in self.experts.glob(f"*/{RUN_FILE}")}
        return tuple(sorted({*branched, *self.config.experts}))

    def unfinished(self) -> dict[str, str]:
        """Return the runs and merges that were begun and have not ended, each with the command that goes on with it."""
        from expertctl.experts.runs.unfinished import unfinished

        return unfinished(self.layout, self.config)

    def _launch(
        self,
        runs: Sequence[Path],
        jobs: int,
        launcher: str | LauncherConfig | None,
        reporter: RunReporter | None,
    ) -> TrainResult:
        chosen = (
            validate_settings(LauncherConfig, {"name": launcher}, "launcher") if isinstance(launcher, str) else launcher
        )
        return launch(runs, jobs, chosen or self.config.launcher, reporter)

    def statistics(
        self,
        name: str,
        *,
        kind: str = "gram",
        domain: str | None = None,
        samples: int = 256,
        output: str | Path | None = None,
        force: bool = False,
        tell: Callable[[int], None] = lambda done: None,
    ) -> dict[str, Any]:
        """Gather statistics on an expert (`gram` for RegMean, `fisher`), and return what was written and where.

        The text is the training part of the expert's own domain, or of `domain`.
        """
        from expertctl.core.artefacts.files import exclusive
        from expertctl.core.models.loading import max_positions
        from expertctl.core.text.token_store import TokenBlocks
        from expertctl.experts.measures.statistics import KINDS, write_statistics
        from expertctl.merge.sources.parents import expert_folders

        if kind not in KINDS:
            raise unknown_name("kind of statistics", kind, KINDS, listed_as="there are")
        (expert,) = expert_folders(self.layout, (name,), self.experts).values()
        domains = [domain] if domain is not None else self.trained_domains([expert])
        if len(domains) != 1:
            raise UserError(
                f"expert '{name}' was trained on {', '.join(domains) or 'no domain of this project'}; choose one with --domain"
            )
        (prepared,) = self.prepare(domains)
        size = min(self.config.training.sequence_length, max_positions(self.layout.seed))
        folder = Path(output) if output is not None else self.layout.statistics / name
        with exclusive(self.layout.lock(f"statistics-{name}"), f"statistics of '{name}'"):
            written = write_statistics(
                expert,
                self.layout.seed,
                TokenBlocks(prepared.open("train"), size),
                kind,
                folder,
                domain={"name": prepared.name, "digest": prepared.train.digest},
                samples=samples,
                force=force,
                tell=tell,
            )
        return {
            "kind": kind,
            "folder": str(folder / kind),
            "domain": written["domain"],
            "blocks": written["blocks"],
            "digest": written["digest"],
        }

    # --- generalists ---

    def tune(
        self,
        name: str,
        base: str | Path | None = None,
        *,
        trains: str | None = None,
        domains: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        force: bool = False,
        launcher: str | LauncherConfig | None = None,
        reporter: RunReporter | None = None,
    ) -> Manifest:
        """Train a generalist further (its `router`, the default, or a whole `mixture`) into a new one called `name`.

        `base` is a generalist of this workspace, or `seed`. A tuning that was interrupted goes on when it is called again
        with the name alone, or with the same settings.
        """
        from expertctl.core.manifests.run import RUN_FILE, is_finished
        from expertctl.experts.runs.tuning import require_same, start_tuning

        folder = self.generalists / name
        base = str(base) if base is not None else None
        settings = validate_settings(TrainingConfig, training or {}, "training")
        begun = (folder / RUN_FILE).is_file() and not is_finished(folder) and not force
        if not begun:
            if base is None:
                raise UserError(
                    f"there is no unfinished tuning '{name}' to go on with; say what to train: --from GENERALIST "
                    "--domains A,B"
                )
            folder = start_tuning(
                self.layout,
                self.config,
                name,
                base=base,
                trains=trains or "router",
                domains=domains,
                options=options or {},
                training=settings,
                force=force,
            )
        else:
            require_same(folder, base, trains, domains, options or {}, settings)
        self._launch([folder], 1, launcher, reporter).raise_for_failures()
        return read_manifest(folder)

    def merge(
        self,
        name: str,
        *,
        method: str | None = None,
        experts: Sequence[str] | None = None,
        weights: str | Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        fit_on: Sequence[str] | None = None,
        dtype: str | None = None,
        tokenizer: str | None = None,
        search: Mapping[str, Any] | None = None,
        output: str | Path | None = None,
        force: bool = False,
        resume: bool = False,
        run: MergeRun | None = None,
    ) -> Manifest:
        """Merge experts into a generalist; what is not given comes from `merges.NAME` in `expertctl.yaml`.

        `experts` are names of finished experts, or folders of models and LoRA adapters. `fit_on` names the domains
        whose validation text priors and posterior weights are fitted on (default: those that the experts were
        trained on). `run` says how it runs: threads, device, file size, progress, what the user insists on.
        """
        from expertctl.merge.merging import MergeRun, merge
        from expertctl.merge.sources.parents import expert_folders

        config = self._merge_config(
            name,
            method=method,
            experts=experts,
            weights=weights,
            fit_on=fit_on,
            dtype=dtype,
            tokenizer=tokenizer,
            options=options,
            search=search,
        )
        folders = expert_folders(self.layout, config.experts, self.experts)
        domains = config.fit_on or self.trained_domains(list(folders.values()))
        given = run or MergeRun()
        how = replace(given, force=force or given.force, resume=resume or given.resume)
        return merge(
            self.layout,
            name,
            config,
            output=Path(output) if output is not None else None,
            validation=lambda: self.validation(domains),
            run=how,
        )

    def plan(
        self, name: str, *, output: str | Path | None = None, run: MergeRun | None = None, **settings: Any
    ) -> MergePlan:
        """Return what `merge` with the same settings would do, once everything that can be refused was checked."""
        from expertctl.merge.merging import plan_merge

        config = self._merge_config(name, **settings)
        target = Path(output) if output is not None else None
        return plan_merge(self.layout, name, config, output=target, run=run)

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
        """Write a generalist with other experts, without training, as `output`: a name here, or a folder.

        Experts that join, or take the place of one (`replace`: which one -> by whom), are names or folders.
        """
        from expertctl.merge.mixture.changing import Change
        from expertctl.merge.remaking.expert_changes import change_experts

        change = Change(
            tuple(dict.fromkeys([remove] if isinstance(remove, str) else remove)),
            {folder.name: folder for folder in map(self.layout.artefact, [add] if isinstance(add, str) else add)},
            {name: self.layout.artefact(by) for name, by in (replace or {}).items()},
        )
        target = self.layout.generalist(output)
        return change_experts(self.layout.artefact(model), target, change, layout=self.layout, run=run)

    def absence(self, model: str, expert: str) -> Absence:
        """Look for an expert in a model: `found` and `merged` are empty and None where nothing of it is there."""
        from expertctl.merge.mixture.absence import find_expert, find_own_expert

        folder = self.layout.artefact(model)
        return find_own_expert(folder, expert) or find_expert(folder, self.layout.artefact(expert))

    def _merge_config(self, name: str, *, options: Mapping[str, Any] | None = None, **settings: Any) -> MergeConfig:
        """Return the settings of a merge: what is given, over what `expertctl.yaml` says; all names checked."""
        from expertctl.experts.text.corpora import domain_config

        given = {key: value for key, value in settings.items() if value is not None}
        declared = self.config.merges.get(name)
        base = declared.model_dump(exclude_unset=True) if declared is not None else {}
        if "search" in given:
            given["search"] = {**(base.get("search") or {}), **given["search"]}
        if options is not None:
            given["options"] = {**base.get("options", {}), **options}
        if "method" not in base | given:
            raise UserError(f"merge '{name}' is not in expertctl.yaml; say how: --method METHOD")
        config = validate_settings(MergeConfig, base | given, f"merge '{name}'")
        installed_plugins().offer(MergeMethod, config.method)
        for domain in config.fit_on or ():
            domain_config(self.config, domain)
        return config

    def trained_domains(self, experts: Sequence[Path]) -> list[str]:
        """Return the domains that experts were trained on and that this project still has, sorted."""
        found: set[str] = set()
        for folder in experts:
            if manifest_path(folder) is not None:
                found |= set(read_manifest(folder).domains)
        return sorted(found & set(self.config.domains))

    def validation(self, domains: Sequence[str]) -> list[ValidationText]:
        """Return the validation parts of domains, prepared, in blocks that the seed can read."""
        from expertctl.core.models.loading import max_positions
        from expertctl.core.text.token_store import TokenBlocks

        size = min(self.config.training.sequence_length, max_positions(self.layout.seed))
        return [
            ValidationText(prepared.name, TokenBlocks(prepared.open("valid"), size))
            for prepared in (self.prepare(domains) if domains else [])
        ]

    def compare(
        self,
        model: str,
        against: Sequence[str] | None = None,
        domains: Sequence[str] | None = None,
        *,
        jobs: int | None = None,
        say: Callable[[str], None] = lambda line: None,
        tell: Callable[[str, str], None] = lambda model, domain: None,
    ) -> Comparison:
        """Score a generalist beside its seed, best expert, average and ensemble (or those that `against` names)."""
        from expertctl.comparison import BASELINES, compare

        return compare(self, model, against or BASELINES, domains, jobs=jobs, say=say, tell=tell)

    def routing(self, model: str, domains: Sequence[str] | None = None, *, blocks: int = 32) -> RoutingReport:
        """Return how a mixture's routers spread the validation text of domains (default: all) over its experts."""
        from expertctl.core.models.feed_forwards import spread_blocks
        from expertctl.core.models.loading import load_model
        from expertctl.core.process.compute import best_device
        from expertctl.merge.mixture.routing.measuring import routing_of
        from expertctl.merge.mixture.routing.report import RoutingReport

        folder = self.layout.artefact(model)
        merged = read_manifest(folder).merged
        if merged is None or not merged.experts:
            raise UserError(f"{folder} is no mixture of experts: its manifest names none")
        network, _ = load_model(folder, dtype="float32")
        network.to(best_device())
        found = {
            text.domain: routing_of(network, spread_blocks(text.blocks, blocks))
            for text in self.validation(domains or list(self.config.domains))
        }
        if not found:
            raise UserError("there is no domain to look at; add one under 'domains' in expertctl.yaml")
        return RoutingReport(merged.experts, found)

    def evaluate(
        self,
        *models: str,
        domains: Sequence[str] | None = None,
        evaluator: str = "perplexity",
        jobs: int | None = None,
        tell: Callable[[str, str], None] = lambda model, domain: None,
    ) -> EvaluationTable:
        """Score models (names of this workspace, or folders; default: all there are) on domains."""
        from expertctl.experts.measures.evaluation import evaluate

        names = models or tuple(folder.name for folder in self.layout.finished())
        if not names:
            raise UserError("there is no finished model to evaluate yet; make a seed with `expertctl seed`")
        folders = {name: self.layout.artefact(name) for name in names}
        return evaluate(self.layout, self.config, folders, domains, evaluator=evaluator, jobs=jobs, tell=tell)

    def generate(
        self,
        model: str,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_p: float = 1.0,
        seed: int = 0,
        without: Sequence[str] = (),
        shares: bool = False,
    ) -> Generation:
        """Sample a continuation of `prompt`; with `shares`, also which expert of an ensemble carried each token.

        `without` names experts of an ensemble or a mixture that are switched off for it.
        """
        from expertctl.core.models.generation import generate

        return generate(
            self.layout.artefact(model),
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            without=without,
            shares=shares,
        )

    # --- baselines ---

    def dense_baseline(
        self, *, same_batch: bool = False, reporter: RunReporter | None = None, force: bool = False
    ) -> Manifest:
        """Train the compute-matched dense model: the seed goes on, on all domains, for the experts' tokens.

        It takes an expert's steps with as much larger a batch as there are experts, or, with `same_batch`, an
        expert's batch and as many more steps.
        """
        from expertctl.experts.runs.baselines import start_dense

        run = start_dense(self.layout, same_batch=same_batch, force=force)
        self._launch([run], 1, None, reporter).raise_for_failures()
        return read_manifest(run)

    def random_split_baseline(
        self, *, jobs: int = 1, reporter: RunReporter | None = None, force: bool = False
    ) -> Manifest:
        """Train as many experts as there are, on random slices of all text, and make their ensemble."""
        from expertctl.core.manifests.run import is_finished
        from expertctl.experts.runs.baselines import start_random_split
        from expertctl.merge.merging import MergeRun, merge

        runs = start_random_split(self.layout, force=force)
        self._launch(runs, jobs, None, reporter).raise_for_failures()
        names = tuple(run.name for run in runs)
        target = self.layout.baselines / "random-split"
        if not force and is_finished(target):
            return read_manifest(target)
        return merge(
            self.layout,
            "random-split",
            MergeConfig(method="ensemble", experts=names),
            output=target,
            experts_folder=self.layout.baselines,
            validation=lambda: self.validation(self.trained_domains(runs)),
            run=MergeRun(force=force),
        )


def _laid_over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with what `own` gives; `training` and `options` key by key, since each is a section."""
    sections = {key: {**base[key], **own[key]} for key in ("training", "options") if key in base and key in own}
    return {**base, **own, **sections}


__all__ = ["TrainResult", "Workspace"]
