"""Runs a merge: plan, lock, write the generalist and its manifest."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.artefacts.digests import MANIFEST_NAMES, TOKENIZER_FILES, digest_of_tokenizer
from ..core.artefacts.files import (
    exclusive,
    exclusive_output,
    link_or_copy,
    new_folder,
    refuse_existing,
    resumable_folder,
)
from ..core.artefacts.layout import Layout, check_name, require_free
from ..core.config.settings import MergeConfig
from ..core.errors import Interrupted, UserError, unknown_name
from ..core.hooks.events import MergeFinished
from ..core.hooks.manager import installed_plugins
from ..core.hooks.merging import Assembler, BuiltModel, MergeInputs, MergeMethod, ModelBuilder
from ..core.hooks.options import parse_options
from ..core.manifests.finishing import finish_artefact
from ..core.manifests.generalist import ExpertChange, GeneralistConfig, SearchRecord
from ..core.manifests.manifest import Manifest, Parent
from ..core.models.adapters.prompts import refuse_prompt
from .generalists.card import model_card
from .generalists.folder import method_version, write_generalist
from .planning.plan import MergePlan, check_output, prepare_merge
from .planning.plan import MergeRun as MergeRun
from .planning.search import search_weights
from .planning.tensor_planner import Stack
from .planning.used_text import UsedText, Validation
from .planning.weights import check_weights, posterior_weights, resolve_weights
from .recipes.recipe import WEIGHT, Recipe, Scope, Setting, whole_models
from .sources.licences import LicenceReport, check_licences, require_compatible
from .sources.models import Source, open_sources
from .sources.parents import SEED, check_lineage, expert_folders
from .sources.statistics import find_statistics

if TYPE_CHECKING:
    from numpy.typing import NDArray


def merge(
    layout: Layout,
    name: str,
    config: MergeConfig,
    *,
    output: Path | None = None,
    experts_folder: Path | None = None,
    validation: Validation = tuple,
    run: MergeRun | None = None,
) -> Manifest:
    """Merge experts of a workspace into `generalists/NAME` (or `output`) and return the manifest.

    All checks run before any work; they raise `UserError`. `validation` returns the text to fit priors and weights on
    and is called only if needed.
    """
    workspace_merge = _WorkspaceMerge(layout, name, config, output, run, experts_folder)
    text = UsedText(validation)
    if isinstance(workspace_merge.method, ModelBuilder):
        return workspace_merge.build(workspace_merge.method, text)
    return workspace_merge.merge_tensors(text)


def plan_merge(
    layout: Layout, name: str, config: MergeConfig, *, output: Path | None = None, run: MergeRun | None = None
) -> MergePlan:
    """Return the plan of a workspace's merge after all checks of `merge`; weights yet to be fitted are uniform."""
    return _WorkspaceMerge(layout, name, config, output, run).plan()


def merge_recipe(
    recipe: Recipe,
    output: Path,
    *,
    name: str | None = None,
    run: MergeRun | None = None,
    history: Sequence[ExpertChange] = (),
    validation: Validation = tuple,
    router_statistics: Mapping[str, Mapping[str, NDArray[Any]]] | None = None,
    fitted_on: Sequence[str] = (),
) -> Manifest:
    """Merge model folders into `output` according to a recipe, without a workspace, and return the manifest.

    The last four arguments are for a generalist that is derived from another one: the changes of its experts, the text
    of new experts, the statistics of its router, and the domains that these were measured on.
    """
    run = run or MergeRun()
    plan = plan_recipe(recipe, output, run=run)
    text = UsedText(validation)
    if plan.assembly is not None and not plan.assembly.is_fitted:
        plan = plan.with_recipe(recipe, text, run.reporter, router_statistics)
    with exclusive_output(output, f"generalist {output}"):
        refuse_existing(output, force=run.force, what="generalist")
        domains = tuple(dict.fromkeys([*fitted_on, *text.domains]))
        return _write(plan, output, name or output.name, run, domains, history=history)


def plan_recipe(recipe: Recipe, output: Path | None, *, run: MergeRun | None = None) -> MergePlan:
    """Return the plan of a merge without a workspace; raises the same `UserError`s as the checks of `merge_recipe`."""
    run = run or MergeRun()
    if output is None:
        return prepare_merge(recipe, run)
    refuse_existing(output, force=run.force, what="generalist")
    plan = prepare_merge(recipe, run)
    check_output(plan, output)
    return plan


class _WorkspaceMerge:
    """A merge of a workspace's experts: its settings, and its models, which are opened once."""

    def __init__(
        self,
        layout: Layout,
        name: str,
        config: MergeConfig,
        output: Path | None,
        run: MergeRun | None,
        experts_folder: Path | None = None,
    ) -> None:
        self.layout, self.name, self.config, self.run = layout, name, config, run or MergeRun()
        self.method = installed_plugins().offer(MergeMethod, config.method)
        self.target = output if output is not None else layout.generalists / check_name(name, "a generalist")
        if output is None:
            require_free(layout, name, self.target)
        refuse_existing(self.target, force=self.run.force, what="generalist")
        folders = expert_folders(layout, config.experts, experts_folder or layout.experts)
        check_weights(config.weights, folders)
        if not (layout.seed / MANIFEST_NAMES["seed"]).is_file():
            raise UserError(f"{layout.seed} has no finished seed; make it with `expertctl seed`")
        models = {SEED: layout.seed, **folders}
        self.sources = open_sources(models, SEED, allow_containers=isinstance(self.method, ModelBuilder))
        self.experts = {name: source for name, source in self.sources.items() if name != SEED}
        self.folders = {name: source.folder for name, source in self.experts.items()}

    def plan(self) -> MergePlan:
        """Check everything and return the plan; weights that have to be fitted are uniform in it."""
        if isinstance(self.method, ModelBuilder):
            plan = self._plan_build(self.method)
        else:
            check_lineage(self.sources, tensors=False, unrelated=self.run.allow_unrelated)
            recipe = self.recipe(self.config.weights if not isinstance(self.config.weights, str) else {})
            statistics = find_statistics(self.method, recipe.experts, self.sources, self.layout)
            plan = prepare_merge(recipe, self.run, sources=self.sources, statistics=statistics)
        check_output(plan, self.target)
        return plan

    def recipe(self, weights: Mapping[str, Setting]) -> Recipe:
        """Return the recipe of the merge; options given by expert become parameters of the experts."""
        scopes: dict[str, dict[str, Setting]] = {name: {} for name in self.experts}
        shared_scope: dict[str, Setting] = {}
        for name, weight in weights.items():
            scopes[name][WEIGHT] = weight
        mapping_options = _mapping_options(self.method)
        for key, setting in self.config.options.items():
            is_by_expert = isinstance(setting, Mapping) and setting and not {"filter", "value"} & set(setting)
            if key in mapping_options or not is_by_expert:
                shared_scope[key] = setting
                continue
            for name, value in setting.items():
                if name not in scopes:
                    raise unknown_name(f"expert in option '{key}'", name, scopes, listed_as="this merge takes")
                scopes[name][key] = value
        expert_scopes: Mapping[str, Scope] = scopes
        return Recipe(
            method=self.config.method,
            models={name: source.folder for name, source in self.sources.items()},
            slices=whole_models(tuple(scopes), expert_scopes),
            seed=SEED,
            scopes=(shared_scope,),
            dtype=self.config.stored_dtype,
            tokenizer=self.config.tokenizer,
        )

    def merge_tensors(self, text: UsedText) -> Manifest:
        """Merge tensor by tensor; the digests of tensors are verified while they are read."""
        if self.config.search is not None and isinstance(self.method, Assembler):
            raise UserError(
                f"merge method '{self.method.name}' does not support --search; search with --method average and use the "
                "found weights"
            )
        plan = self.plan()
        with exclusive(self.layout.lock(f"generalist-{self.target.name}"), f"generalist '{self.name}'"):
            search: SearchRecord | None = None
            if self.config.weights == "posterior" or self.config.search is not None:
                weights, search = self._fit_weights(plan, text)
                plan = plan.with_recipe(self.recipe(weights), text, self.run.reporter)
            elif plan.assembly is not None and not plan.assembly.is_fitted:
                plan = plan.with_recipe(plan.recipe, text, self.run.reporter)
            return _write(plan, self.target, self.name, self.run, text.domains, search)

    def _fit_weights(self, plan: MergePlan, text: UsedText) -> tuple[Mapping[str, Setting], SearchRecord | None]:
        """Return weights fitted on validation text, by the posterior or a search, and the record of the search."""
        if self.config.search is None or self.config.weights != "uniform":
            start = resolve_weights(self.config.weights, self.layout.seed, self.folders, text, self.run.reporter)
        else:  # a start need not carry information
            start = posterior_weights(self.layout.seed, self.folders, text, self.run.reporter)
        if self.config.search is None:
            return start, None
        if self.method.weights == "factors" and isinstance(self.config.weights, str):
            start = {expert: weight * len(start) for expert, weight in start.items()}  # factors have mean 1
        search = search_weights(
            lambda weights: plan.with_recipe(self.recipe(weights)),
            self.layout.seed,
            start,
            text(),
            self.config.search,
            self.layout.reports / f"search-{self.name}.jsonl",
            self.run.reporter,
        )
        self.run.reporter.say(
            f"best of {search.trials} trials: {search.bits_per_byte:.4f} bits per byte, "
            f"{search.start_bits_per_byte:.4f} at the start"
        )
        return search.weights, search

    # --- methods that build their own kind of model ---

    def _check_build(self, method: ModelBuilder, *, tensors: bool) -> tuple[Any, LicenceReport]:
        """Return the checked options and licences; with `tensors`, every byte of the experts is verified."""
        options = parse_options(
            method.options_class(self.config.options), self.config.options, f"merge method '{method.name}'"
        )
        if self.config.search is not None:
            raise UserError(f"merge method '{method.name}' does not support --search")
        for name, source in self.experts.items():
            if not method.takes_prompts:
                refuse_prompt(source.folder, f"merge method '{method.name}'")
            if source.kind == "expert":
                continue
            if not method.takes_models:
                raise UserError(
                    f"'{name}' ({source.folder}) is not an expert made by expertctl, which merge method '{method.name}' needs"
                )
            if digest_of_tokenizer(source.folder) != self.sources[SEED].tokenizer:
                raise UserError(
                    f"'{name}' ({source.folder}) has a different tokenizer than the seed; merge method '{method.name}' "
                    "needs the same one"
                )
        check_lineage(self.sources, tensors=tensors)
        licences = check_licences({name: source.licence for name, source in self.sources.items()})
        return options, require_compatible(licences, self.run.allow_licences)

    def _plan_build(self, method: ModelBuilder) -> MergePlan:
        _, licences = self._check_build(method, tensors=False)
        models = {name: source.folder for name, source in self.sources.items()}
        return MergePlan(
            recipe=Recipe(self.config.method, models, whole_models(tuple(self.experts)), seed=SEED),
            method=method,
            sources=self.sources,
            stack=Stack((), ()),
            shard_bytes=self.run.shard_bytes,
            licence=licences.agreed,
            notes=(
                f"'{method.name}' keeps its experts unchanged: their files are linked instead of copied if the file system "
                "allows it",
                *licences.conflicts,
                *licences.notes,
            ),
        )

    def build(self, method: ModelBuilder, text: UsedText) -> Manifest:
        """Let the method build its own kind of model from fully verified artefacts."""
        options, licences = self._check_build(method, tensors=True)
        seed, reporter = self.layout.seed, self.run.reporter
        with (
            exclusive(self.layout.lock(f"generalist-{self.target.name}"), f"generalist '{self.name}'"),
            new_folder(self.target, force=self.run.force, what="generalist") as partial,
        ):
            weights = resolve_weights(self.config.weights, seed, self.folders, text, reporter)
            inputs = MergeInputs(seed, self.folders, weights, self.config.weights != "uniform", text, reporter)
            for file in (*TOKENIZER_FILES, "generation_config.json"):
                if (seed / file).is_file():
                    link_or_copy(seed / file, partial / file)
            built = method.build(inputs, options, partial) or BuiltModel()
            weights = dict(weights if built.weights is None else built.weights)
            manifest = Manifest(
                kind="generalist",
                name=self.name,
                parents=tuple(_parent(source, weights.get(name)) for name, source in self.sources.items()),
                config=GeneralistConfig(
                    method=method.name,
                    kind=method.kind,
                    weights=weights,
                    options=asdict(options) | dict(built.resolved_options),
                    fitted_on=text.domains,
                    merge=self.config.model_dump(mode="json"),
                ),
                expert_data={
                    name: source.manifest.data
                    for name, source in self.experts.items()
                    if source.kind == "expert" and source.manifest is not None
                },
                licence=licences.result,
                versions=method_version(method),
            )
            manifest = finish_artefact(partial, manifest, card=model_card)
        installed_plugins().merge_finished(MergeFinished(self.name, self.target, method.name))
        return manifest


def _parent(source: Source, weight: float | None) -> Parent:
    """Return a model as a parent; models other than the seed and its experts are identified by their tensors."""
    if source.manifest is not None and source.kind in ("seed", "expert"):
        return Parent.of(source.manifest, source.name, weight)
    return Parent("model", source.name, source.digest({}), weight, licence=source.licence)


def _mapping_options(method: MergeMethod) -> set[str]:
    """Return the options of a method whose values are mappings, as opposed to one value per expert."""
    if method.options is None:
        return set()
    hints = typing.get_type_hints(method.options)
    return {key for key, hint in hints.items() if typing.get_origin(hint) is Mapping}


def _write(
    plan: MergePlan,
    target: Path,
    name: str,
    run: MergeRun,
    fitted_on: Sequence[str] = (),
    search: SearchRecord | None = None,
    history: Sequence[ExpertChange] = (),
) -> Manifest:
    try:
        with resumable_folder(target, force=run.force, resume=run.resume, what="generalist") as partial:
            manifest = write_generalist(
                plan, partial, name, fitted_on=fitted_on, search=search, history=history, reporter=run.reporter
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; the written part of {target} is kept; run the same command with --resume to resume"
        ) from None
    if not run.is_repetition:
        installed_plugins().merge_finished(MergeFinished(name, target, plan.method.name))
    return manifest
