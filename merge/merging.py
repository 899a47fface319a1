"""Runs a merge: plan, lock, write the generalist and its manifest."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core.artefacts.digests import (
    MANIFEST_NAMES,
    TOKENIZER_FILES,
    digest_of_tokenizer,
)
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
from ..core.hooks.manager import PluginManager, installed_plugins
from ..core.hooks.merging import Assembler, BuiltModel, MergeInputs, MergeMethod, ModelBuilder
from ..core.hooks.options import parse_options
from ..core.hooks.text import ValidationText
from ..core.manifests.finishing import finish_artefact
from ..core.manifests.generalist import ExpertChange, GeneralistConfig, SearchRecord
from ..core.manifests.manifest import Manifest
from .engine.calculator import EngineSettings
from .engine.shards import DEFAULT_SHARD_BYTES
from .generalists.card import model_card
from .generalists.folder import write_generalist
from .planning.plan import MergePlan, Permissions, check_output, open_sources, prepare_merge
from .planning.search import search_weights
from .planning.tensor_planner import Stack
from .planning.weights import check_weights, resolve_weights
from .recipes.recipe import WEIGHT, Recipe, Scope, Setting, whole_models
from .sources.licences import LicenceReport, check_licences, licence_of_folder, require_compatible
from .sources.parents import SEED, check_lineage, expert_folders, parents_of
from .sources.statistics import find_statistics

Say = Callable[[str], None]


@dataclass(frozen=True)
class MergeRun:
    """Runtime settings and safety overrides of a merge; only `shard_bytes` affects the output files."""

    force: bool = False
    resume: bool = False
    permissions: Permissions = field(default_factory=Permissions)
    settings: EngineSettings = field(default_factory=EngineSettings)
    shard_bytes: int = DEFAULT_SHARD_BYTES
    say: Say = lambda line: None
    tell: Callable[[int, int], None] = lambda done, total: None
    """Progress callback, called with bytes written so far and in total."""


def merge(
    layout: Layout,
    name: str,
    config: MergeConfig,
    *,
    output: Path | None = None,
    experts_folder: Path | None = None,
    validation: Callable[[], Sequence[ValidationText]] = tuple,
    run: MergeRun | None = None,
) -> Manifest:
    """Merge experts of a workspace into `generalists/NAME` (or `output`) and return the manifest.

    All checks run before any work; they raise `UserError`. `validation` returns the text to fit priors and weights on
    and is called only if needed.
    """
    run = run or MergeRun()
    method = installed_plugins().offer(MergeMethod, config.method)
    target = _target(layout, name, output, run)
    folders = expert_folders(layout, config.experts, experts_folder or layout.experts)
    check_weights(config.weights, folders)
    if isinstance(method, ModelBuilder):
        return _build_model(layout, name, config, method, folders, target, validation, run)
    return _merge_tensors(layout, name, config, folders, target, validation, run)


def plan_merge(
    layout: Layout,
    name: str,
    config: MergeConfig,
    *,
    output: Path | None = None,
    experts_folder: Path | None = None,
    run: MergeRun | None = None,
) -> MergePlan:
    """Return the plan of a workspace's merge; raises the same `UserError`s as the checks of `merge`.

    Weights that have to be fitted are uniform in the plan.
    """
    run = run or MergeRun()
    target = _target(layout, name, output, run)
    folders = expert_folders(layout, config.experts, experts_folder or layout.experts)
    check_weights(config.weights, folders)
    check_lineage(layout.seed, folders, tensors=False, unrelated=run.permissions.unrelated)
    method = installed_plugins().offer(MergeMethod, config.method)
    if isinstance(method, ModelBuilder):
        plan = _plan_build(layout, config, method, folders, run)
        check_output(plan, target)
        return plan
    weights = config.weights if not isinstance(config.weights, str) else {}
    plan = _plan(recipe_of(layout.seed, folders, config, weights), run, layout)
    check_output(plan, target)
    return plan


def merge_recipe(
    recipe: Recipe,
    output: Path,
    *,
    name: str | None = None,
    run: MergeRun | None = None,
    history: Sequence[ExpertChange] = (),
) -> Manifest:
    """Merge model folders into `output` according to a recipe, without a workspace, and return the manifest.

    `history` lists the expert changes for the manifest of a generalist that is derived from another one.
    """
    run = run or MergeRun()
    plan = plan_recipe(recipe, output, run=run)
    if isinstance(plan.method, Assembler):
        plan = _plan(recipe, run, None, tuple)  # plan again to fit the router
    with exclusive_output(output, f"generalist {output}"):
        refuse_existing(output, force=run.force, what="generalist")
        return _write(plan, output, name or output.name, run, history=history)


def plan_recipe(recipe: Recipe, output: Path | None, *, run: MergeRun | None = None) -> MergePlan:
    """Return the plan of a merge without a workspace; raises the same `UserError`s as the checks of `merge_recipe`."""
    run = run or MergeRun()
    if output is not None:
        refuse_existing(output, force=run.force, what="generalist")
    plan = _plan(recipe, run, None)
    if output is not None:
        check_output(plan, output)
    return plan


def recipe_of(seed: Path, experts: Mapping[str, Path], config: MergeConfig, weights: Mapping[str, Setting]) -> Recipe:
    """Return the recipe of a project's merge; options given by expert become parameters of the experts."""
    scopes: dict[str, dict[str, Setting]] = {name: {} for name in experts}
    shared_scope: dict[str, Setting] = {}
    for name, weight in weights.items():
        scopes[name][WEIGHT] = weight
    mapping_options = _mapping_options(installed_plugins().offer(MergeMethod, config.method))
    for key, setting in config.options.items():
        if key in mapping_options:
            shared_scope[key] = setting
        elif isinstance(setting, Mapping) and setting and not {"filter", "value"} & set(setting):
            for name, value in setting.items():
                if name not in experts:
                    raise unknown_name(f"expert in option '{key}'", name, experts, listed_as="this merge takes")
                scopes[name][key] = value
        else:
            shared_scope[key] = setting
    expert_scopes: Mapping[str, Scope] = scopes
    return Recipe(
        method=config.method,
        models={SEED: seed, **experts},
        slices=whole_models(tuple(experts), expert_scopes),
        seed=SEED,
        scopes=(shared_scope,),
        dtype=config.stored_dtype,
        tokenizer=config.tokenizer,
    )


def _mapping_options(method: MergeMethod) -> set[str]:
    """Return the options of a method whose values are mappings, as opposed to one value per expert."""
    if method.options is None:
        return set()
    hints = typing.get_type_hints(method.options)
    return {key for key, hint in hints.items() if typing.get_origin(hint) is Mapping}


def _target(layout: Layout, name: str, output: Path | None, run: MergeRun) -> Path:
    target = output if output is not None else layout.generalists / check_name(name, "a generalist")
    if output is None:
        require_free(layout, name, target)
    refuse_existing(target, force=run.force, what="generalist")
    return target


def _plan(
    recipe: Recipe,
    run: MergeRun,
    layout: Layout | None,
    validation: Callable[[], Sequence[ValidationText]] | None = None,
) -> MergePlan:
    method = installed_plugins().offer(MergeMethod, recipe.method)
    return prepare_merge(
        recipe,
        permissions=run.permissions,
        settings=run.settings,
        shard_bytes=run.shard_bytes,
        statistics=find_statistics(method, recipe, layout),
        validation=validation,
        say=run.say,
    )


def _merge_tensors(
    layout: Layout,
    name: str,
    config: MergeConfig,
    folders: Mapping[str, Path],
    target: Path,
    validation: Callable[[], Sequence[ValidationText]],
    run: MergeRun,
) -> Manifest:
    """Merge tensor by tensor; the digests of tensors are verified while they are read."""
    check_lineage(layout.seed, folders, tensors=False, unrelated=run.permissions.unrelated)
    method = installed_plugins().offer(MergeMethod, config.method)
    if config.search is not None and isinstance(method, Assembler):
        raise UserError(
            f"merge method '{config.method}' does not support --search; search with --method average and use the found weights"
        )
    weights: Mapping[str, Setting] = config.weights if not isinstance(config.weights, str) else {}
    plan = _plan(recipe_of(layout.seed, folders, config, weights), run, layout)
    check_output(plan, target)
    with _lock(layout, name, target):
        search: SearchRecord | None = None
        text = _LazyText(validation)
        if config.weights == "posterior" or config.search is not None:
            weights, search = _fit_weights(layout, name, config, folders, text(), run)
            plan = _plan(recipe_of(layout.seed, folders, config, weights), run, layout, text)
        elif isinstance(plan.method, Assembler):
            plan = _plan(plan.recipe, run, layout, text)
        fitted_on = [validation_text.domain for validation_text in text.read]
        return _write(plan, target, name, run, fitted_on, search)


class _LazyText:
    """The validation text of a merge, prepared on first use; `read` holds the used text."""

    def __init__(self, prepare: Callable[[], Sequence[ValidationText]]) -> None:
        self._prepare = prepare
        self.read: Sequence[ValidationText] = ()

    def __call__(self) -> Sequence[ValidationText]:
        self.read = self.read or tuple(self._prepare())
        return self.read


def _fit_weights(
    layout: Layout,
    name: str,
    config: MergeConfig,
    folders: Mapping[str, Path],
    texts: Sequence[ValidationText],
    run: MergeRun,
) -> tuple[Mapping[str, Setting], SearchRecord | None]:
    """Return weights fitted on validation text, by the posterior or a search, and the record of the search."""
    start = resolve_weights(
        "posterior" if config.weights == "uniform" else config.weights,
        layout.seed,
        folders,
        lambda: texts,
        run.say,
    )
    if config.search is None:
        return start, None
    method = installed_plugins().offer(MergeMethod, config.method)
    if method.weights == "factors" and isinstance(config.weights, str):
        num_experts = len(start)  # factors have mean 1, their default
        start = {expert: weight * num_experts for expert, weight in start.items()}
    search = search_weights(
        lambda weights: _plan(recipe_of(layout.seed, folders, config, weights), run, layout),
        layout.seed,
        start,
        texts,
        config.search,
        layout.reports / f"search-{name}.jsonl",
        run.say,
    )
    run.say(
        f"best of {search.trials} trials: {search.bits_per_byte:.4f} bits per byte, {search.start_bits_per_byte:.4f} at "
        "the start"
    )
    return search.weights, search


def _lock(layout: Layout, name: str, target: Path) -> AbstractContextManager[None]:
    return exclusive(layout.lock(f"generalist-{target.name}"), f"generalist '{name}'")


def _write(
    plan: MergePlan,
    target: Path,
    name: str,
    run: MergeRun,
    fitted_on: Sequence[str] = (),
    search: SearchRecord | None = None,
    history: Sequence[ExpertChange] = (),
) -> Manifest:
    for note in plan.notes:
        run.say(note)
    try:
        with resumable_folder(target, force=run.force, resume=run.resume, what="generalist") as partial:
            manifest = write_generalist(
                plan,
                partial,
                name,
                fitted_on=fitted_on,
                search=search,
                history=history,
                say=run.say,
                tell=run.tell,
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; the written part of {target} is kept; run the same command with --resume to resume"
        ) from None
    installed_plugins().merge_finished(MergeFinished(name, target, plan.method.name))
    return manifest


def _check_build(
    layout: Layout,
    config: MergeConfig,
    method: ModelBuilder,
    folders: Mapping[str, Path],
    run: MergeRun,
    *,
    tensors: bool,
) -> tuple[Any, Manifest, dict[str, Manifest], LicenceReport]:
    """Check a merge whose method builds its own kind of model; return options, manifests and licences."""
    options = parse_options(method.options, config.options, f"merge method '{method.name}'")
    if config.search is not None:
        raise UserError(f"merge method '{method.name}' does not support --search")
    for expert, folder in folders.items():
        if (folder / MANIFEST_NAMES["expert"]).is_file():
            continue
        if not method.takes_models:
            raise UserError(
                f"'{expert}' ({folder}) is not an expert made by expertctl, which merge method '{method.name}' needs"
            )
        if digest_of_tokenizer(folder) != digest_of_tokenizer(layout.seed):
            raise UserError(
                f"'{expert}' ({folder}) has a different tokenizer than the seed; merge method '{method.name}' needs the same one"
            )
    seed, experts = check_lineage(layout.seed, folders, tensors=tensors)
    licences = check_licences(
        {SEED: seed.licence, **{name: licence_of_folder(folder) for name, folder in folders.items()}}
    )
    require_compatible(licences, run.permissions.licences)
    return options, seed, experts, licences


def _plan_build(
    layout: Layout, config: MergeConfig, method: ModelBuilder, folders: Mapping[str, Path], run: MergeRun
) -> MergePlan:
    """Return the plan of a merge whose method builds its own kind of model; it has no tensor plans."""
    licences = _check_build(layout, config, method, folders, run, tensors=False)[3]
    recipe = Recipe(config.method, {SEED: layout.seed, **folders}, whole_models(tuple(folders)), seed=SEED)
    return MergePlan(
        recipe,
        method,
        open_sources(recipe),
        Stack((), ()),
        (),
        run.shard_bytes,
        None,
        licences.result if not licences.conflicts else None,
        (
            f"'{method.name}' keeps its experts unchanged: their files are linked instead of copied if the file system allows it",
            *licences.conflicts,
            *licences.notes,
        ),
    )


def _build_model(
    layout: Layout,
    name: str,
    config: MergeConfig,
    method: ModelBuilder,
    folders: Mapping[str, Path],
    target: Path,
    validation: Callable[[], Sequence[ValidationText]],
    run: MergeRun,
) -> Manifest:
    """Let the method build its own kind of model from fully verified artefacts."""
    options, seed, experts, licences = _check_build(layout, config, method, folders, run, tensors=True)
    texts = _LazyText(validation)
    plugins = installed_plugins()
    with _lock(layout, name, target), new_folder(target, force=run.force, what="generalist") as partial:
        weights = resolve_weights(config.weights, layout.seed, folders, texts, run.say)
        inputs = MergeInputs(layout.seed, folders, weights, config.weights != "uniform", texts, run.say)
        for file in (*TOKENIZER_FILES, "generation_config.json"):
            if (layout.seed / file).is_file():
                link_or_copy(layout.seed / file, partial / file)
        built = method.build(inputs, options, partial) or BuiltModel()
        weights = dict(weights if built.weights is None else built.weights)
        manifest = Manifest(
            kind="generalist",
            name=name,
            parents=parents_of(seed, folders, experts, weights),
            config=GeneralistConfig(
                method=method.name,
                kind=method.kind,
                weights=weights,
                options=asdict(options) | dict(built.resolved_options),
                fitted_on=tuple(text.domain for text in texts.read),
                merge=config.model_dump(mode="json"),
            ),
            expert_data={parent: expert_manifest.data for parent, expert_manifest in experts.items()},
            licence=licences.result,
            versions=plugin_version(plugins, method),
        )
        manifest = finish_artefact(partial, manifest, card=model_card)
    plugins.merge_finished(MergeFinished(name, target, method.name))
    return manifest


def plugin_version(plugins: PluginManager, method: MergeMethod) -> dict[str, str]:
    """Return the version of the distribution that provides the method."""
    provider = plugins.provider(MergeMethod, method.name)
    return {provider.distribution: provider.version}
