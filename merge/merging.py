"""One merge from beginning to end: plan, lock, make the generalist, write where it comes from."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.artefacts.files import exclusive, link_or_copy, new_folder, refuse_existing, resumable_folder
from ..core.artefacts.layout import Layout, check_name, require_free
from ..core.artefacts.lineage import (
    MANIFEST_NAMES,
    TOKENIZER_FILES,
    Manifest,
    digest_of_tensors,
    digest_of_tokenizer,
    digests_of_folder,
    tool_versions,
)
from ..core.config.settings import MergeConfig
from ..core.errors import Interrupted, UserError, unknown_name
from ..core.hooks.events import MergeFinished
from ..core.hooks.manager import PluginManager, installed_plugins
from ..core.hooks.merging import BuiltModel, MergeInputs, MergeMethod
from ..core.hooks.options import parse_options
from ..core.hooks.text import ValidationText
from .engine.calculator import EngineSettings
from .engine.shards import DEFAULT_SHARD_BYTES
from .generalists.card import CARD_FILE, model_card
from .generalists.folder import write_generalist
from .planning.plan import MergePlan, Permissions, check_output, open_sources, prepare_merge
from .planning.search import SearchResult, search_weights
from .planning.tensor_planner import Stack
from .planning.weights import check_weights, resolve_weights
from .recipes.recipe import WEIGHT, Recipe, Scope, Setting, whole_models
from .sources.licences import LicenceReport, check_licences, licence_of_folder, require_compatible
from .sources.parents import SEED, check_lineage, expert_folders, parents_of
from .sources.statistics import find_statistics

Say = Callable[[str], None]


@dataclass(frozen=True)
class MergeRun:
    """How a merge runs and what the user insists on; nothing here decides the bytes of the result but `shard_bytes`."""

    force: bool = False
    resume: bool = False
    permissions: Permissions = field(default_factory=Permissions)
    settings: EngineSettings = field(default_factory=EngineSettings)
    shard_bytes: int = DEFAULT_SHARD_BYTES
    say: Say = lambda line: None
    tell: Callable[[int, int], None] = lambda done, total: None
    """Told the bytes written so far and in all."""


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

    Everything that can be refused is refused before any work. `validation` gives the text that priors and weights
    are fitted on, and is called only if something is.
    """
    how = run or MergeRun()
    method = installed_plugins().merge_method(config.method)
    target = _target(layout, name, output, how)
    folders = expert_folders(layout, config.experts, experts_folder or layout.experts)
    check_weights(config.weights, folders)
    if method.build is not None:
        return _build(layout, name, config, method, folders, target, validation, how)
    return _stream(layout, name, config, folders, target, validation, how)


def plan_merge(
    layout: Layout,
    name: str,
    config: MergeConfig,
    *,
    output: Path | None = None,
    experts_folder: Path | None = None,
    run: MergeRun | None = None,
) -> MergePlan:
    """Return the plan of a workspace's merge; raises every `UserError` that `merge` would raise before its work.

    Weights that have to be fitted first stand in it as equal ones.
    """
    how = run or MergeRun()
    target = _target(layout, name, output, how)
    folders = expert_folders(layout, config.experts, experts_folder or layout.experts)
    check_weights(config.weights, folders)
    check_lineage(layout.seed, folders, tensors=False, unrelated=how.permissions.unrelated)
    method = installed_plugins().merge_method(config.method)
    if method.build is not None:
        plan = _build_plan(layout, config, method, folders, how)
        check_output(plan, target)
        return plan
    given = config.weights if not isinstance(config.weights, str) else {}
    plan = _planned(recipe_of(layout.seed, folders, config, given), how, layout)
    check_output(plan, target)
    return plan


def merge_recipe(
    recipe: Recipe,
    output: Path,
    *,
    name: str | None = None,
    run: MergeRun | None = None,
    history: Sequence[Mapping[str, Any]] = (),
) -> Manifest:
    """Merge any folders into `output` as a recipe says, without a workspace, and return the manifest.

    `history` is what its manifest says of who left and joined, where it is another generalist made again.
    """
    how = run or MergeRun()
    plan = plan_recipe(recipe, output, run=how)
    if plan.method.assemble is not None:
        plan = _planned(recipe, how, None, tuple)  # what needs a model is fitted now
    lock = output.with_name(f".{output.name}.lock")
    with exclusive(lock, f"generalist {output}"):
        refuse_existing(output, force=how.force, what="generalist")
        try:
            return _written(plan, output, name or output.name, how, history=history)
        finally:
            lock.unlink(missing_ok=True)


def plan_recipe(recipe: Recipe, output: Path | None, *, run: MergeRun | None = None) -> MergePlan:
    """Return the plan of a merge outside a workspace; raises every `UserError` that comes before its work."""
    how = run or MergeRun()
    if output is not None:
        refuse_existing(output, force=how.force, what="generalist")
    plan = _planned(recipe, how, None)
    if output is not None:
        check_output(plan, output)
    return plan


def recipe_of(
    seed: Path, experts: Mapping[str, Path], config: MergeConfig, weights: Mapping[str, Setting]
) -> Recipe:
    """Return the recipe of a project's merge; options given by expert become the experts' own."""
    scopes: dict[str, dict[str, Setting]] = {name: {} for name in experts}
    shared: dict[str, Setting] = {}
    for name, weight in weights.items():
        scopes[name][WEIGHT] = weight
    whole = _mapping_options(installed_plugins().merge_method(config.method))
    for key, setting in config.options.items():
        if key in whole:
            shared[key] = setting
        elif isinstance(setting, Mapping) and setting and not {"filter", "value"} & set(setting):
            for name, value in setting.items():
                if name not in experts:
                    raise unknown_name(
                        f"expert in option '{key}'", name, experts, listed_as="this merge takes"
                    )
                scopes[name][key] = value
        else:
            shared[key] = setting
    own: Mapping[str, Scope] = scopes
    return Recipe(
        method=config.method,
        models={SEED: seed, **experts},
        slices=whole_models(tuple(experts), own),
        seed=SEED,
        scopes=(shared,),
        dtype=config.stored_dtype,
        tokenizer=config.tokenizer,
    )


def _mapping_options(method: MergeMethod) -> set[str]:
    """Return the options of a method that are mappings themselves, not one value for each expert."""
    if method.options is None:
        return set()
    hints = typing.get_type_hints(method.options)
    return {key for key, hint in hints.items() if typing.get_origin(hint) is Mapping}


def _target(layout: Layout, name: str, output: Path | None, how: MergeRun) -> Path:
    target = output if output is not None else layout.generalists / check_name(name, "a generalist")
    if output is None:
        require_free(layout, name, target)
    refuse_existing(target, force=how.force, what="generalist")
    return target


def _planned(
    recipe: Recipe,
    how: MergeRun,
    layout: Layout | None,
    validation: Callable[[], Sequence[ValidationText]] | None = None,
) -> MergePlan:
    method = installed_plugins().merge_method(recipe.method)
    return prepare_merge(
        recipe,
        permissions=how.permissions,
        settings=how.settings,
        shard_bytes=how.shard_bytes,
        statistics=find_statistics(method, recipe, layout),
        validation=validation,
        say=how.say,
    )


def _stream(
    layout: Layout,
    name: str,
    config: MergeConfig,
    folders: Mapping[str, Path],
    target: Path,
    validation: Callable[[], Sequence[ValidationText]],
    how: MergeRun,
) -> Manifest:
    """Merge tensor by tensor; tensors are compared with the manifests' digests while they are read."""
    check_lineage(layout.seed, folders, tensors=False, unrelated=how.permissions.unrelated)
    if config.search is not None and installed_plugins().merge_method(config.method).assemble is not None:
        raise UserError(
            f"merge method '{config.method}' is not searched; search with --method average, and give what it finds as weights"
        )
    weights: Mapping[str, Setting] = config.weights if not isinstance(config.weights, str) else {}
    plan = _planned(recipe_of(layout.seed, folders, config, weights), how, layout)
    check_output(plan, target)
    with _locked(layout, name, target):
        found: SearchResult | None = None
        text = _Text(validation)
        if config.weights == "posterior" or config.search is not None:
            weights, found = _fitted(layout, name, config, folders, text(), how)
            plan = _planned(recipe_of(layout.seed, folders, config, weights), how, layout, text)
        elif plan.method.assemble is not None:
            plan = _planned(plan.recipe, how, layout, text)
        fitted_on = [one.domain for one in text.read]
        return _written(plan, target, name, how, fitted_on, found)


class _Text:
    """The validation text of a merge, prepared when it is first asked for; knows whether it was."""

    def __init__(self, prepare: Callable[[], Sequence[ValidationText]]) -> None:
        self._prepare = prepare
        self.read: Sequence[ValidationText] = ()

    def __call__(self) -> Sequence[ValidationText]:
        self.read = self.read or tuple(self._prepare())
        return self.read


def _fitted(
    layout: Layout,
    name: str,
    config: MergeConfig,
    folders: Mapping[str, Path],
    texts: Sequence[ValidationText],
    how: MergeRun,
) -> tuple[Mapping[str, Setting], SearchResult | None]:
    """Return the weights that fit validation text: the posterior's, and where a search is asked for, its best."""
    start = resolve_weights(
        "posterior" if config.weights == "uniform" else config.weights,
        layout.seed,
        folders,
        lambda: texts,
        how.say,
    )
    if config.search is None:
        return start, None
    method = installed_plugins().merge_method(config.method)
    if method.weights == "factors" and isinstance(config.weights, str):
        start = {
            expert: weight * len(start) for expert, weight in start.items()
        }  # 1 on average: their default
    found = search_weights(
        lambda weights: _planned(recipe_of(layout.seed, folders, config, weights), how, layout),
        layout.seed,
        start,
        texts,
        config.search,
        layout.reports / f"search-{name}.jsonl",
        how.say,
    )
    how.say(
        f"best of {found.trials} trials: {found.bits_per_byte:.4f} bits per byte, {found.start_bits_per_byte:.4f} at "
        "the start"
    )
    return found.weights, found


def _locked(layout: Layout, name: str, target: Path) -> AbstractContextManager[None]:
    return exclusive(layout.lock(f"generalist-{target.name}"), f"generalist '{name}'")


def _written(
    plan: MergePlan,
    target: Path,
    name: str,
    how: MergeRun,
    fitted_on: Sequence[str] = (),
    found: SearchResult | None = None,
    history: Sequence[Mapping[str, Any]] = (),
) -> Manifest:
    for note in plan.notes:
        how.say(note)
    try:
        with resumable_folder(target, force=how.force, resume=how.resume, what="generalist") as partial:
            manifest = write_generalist(
                plan,
                partial,
                name,
                fitted_on=fitted_on,
                found=found,
                history=history,
                say=how.say,
                tell=how.tell,
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; what is written of {target} is kept: the same command with --resume goes on"
        ) from None
    installed_plugins().merge_finished(MergeFinished(name, target, plan.method.name))
    return manifest


def _checked_build(
    layout: Layout,
    config: MergeConfig,
    method: MergeMethod,
    folders: Mapping[str, Path],
    how: MergeRun,
    *,
    tensors: bool,
) -> tuple[Any, Manifest, dict[str, Manifest], LicenceReport]:
    """Return options, manifests and licences of a merge whose method makes its own kind of model, all checked."""
    options = parse_options(method.options, config.options, f"merge method '{method.name}'")
    if config.search is not None:
        raise UserError(f"merge method '{method.name}' has no weights to search for tensor by tensor")
    for expert, folder in folders.items():
        if (folder / MANIFEST_NAMES["expert"]).is_file():
            continue
        if not method.takes_models:
            raise UserError(
                f"'{expert}' ({folder}) is no expert of ours; merge method '{method.name}' needs one"
            )
        if digest_of_tokenizer(folder) != digest_of_tokenizer(layout.seed):
            raise UserError(
                f"'{expert}' ({folder}) has another tokenizer than the seed, so that both cannot read one text"
            )
    seed, experts = check_lineage(layout.seed, folders, tensors=tensors)
    licences = check_licences(
        {SEED: seed.licence, **{name: licence_of_folder(folder) for name, folder in folders.items()}}
    )
    require_compatible(licences, how.permissions.licences)
    return options, seed, experts, licences


def _build_plan(
    layout: Layout, config: MergeConfig, method: MergeMethod, folders: Mapping[str, Path], how: MergeRun
) -> MergePlan:
    """Return the plan of a merge that writes no tensors of its own: its files are links, or the method's to make."""
    licences = _checked_build(layout, config, method, folders, how, tensors=False)[3]
    recipe = Recipe(config.method, {SEED: layout.seed, **folders}, whole_models(tuple(folders)), seed=SEED)
    return MergePlan(
        recipe,
        method,
        open_sources(recipe),
        Stack((), ()),
        (),
        how.shard_bytes,
        None,
        licences.result if not licences.conflicts else None,
        (
            f"'{method.name}' keeps its experts as they are: their files are linked, not copied, where the disk allows it",
            *licences.conflicts,
            *licences.notes,
        ),
    )


def _build(
    layout: Layout,
    name: str,
    config: MergeConfig,
    method: MergeMethod,
    folders: Mapping[str, Path],
    target: Path,
    validation: Callable[[], Sequence[ValidationText]],
    how: MergeRun,
) -> Manifest:
    """Let the method make a model of its own kind from artefacts whose every byte was checked."""
    options, seed, experts, licences = _checked_build(layout, config, method, folders, how, tensors=True)
    texts = _Text(validation)
    plugins = installed_plugins()
    with _locked(layout, name, target), new_folder(target, force=how.force, what="generalist") as partial:
        weights = resolve_weights(config.weights, layout.seed, folders, texts, how.say)
        inputs = MergeInputs(layout.seed, folders, weights, config.weights != "uniform", texts, how.say)
        for file in (*TOKENIZER_FILES, "generation_config.json"):
            if (layout.seed / file).is_file():
                link_or_copy(layout.seed / file, partial / file)
        assert method.build is not None
        built = method.build(inputs, options, partial) or BuiltModel()
        weights = dict(weights if built.weights is None else built.weights)
        manifest = Manifest(
            kind="generalist",
            name=name,
            digest="",
            tensors={},
            files={},
            tokenizer=digest_of_tokenizer(partial),
            parents=parents_of(seed, folders, experts, weights),
            config={
                "method": method.name,
                "kind": method.kind,
                "weights": weights,
                "options": asdict(options) | dict(built.settled),
                "fitted_on": [text.domain for text in texts.read],
                "merge": config.model_dump(mode="json"),
            },
            data={parent: one.data for parent, one in experts.items()},
            licence=licences.result,
            versions=tool_versions() | plugin_version(plugins, method),
        )
        card = model_card(manifest)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
        tensors, files = digests_of_folder(partial)
        manifest = replace(manifest, tensors=tensors, files=files, digest=digest_of_tensors(tensors))
        manifest.write(partial)
    plugins.merge_finished(MergeFinished(name, target, method.name))
    return manifest


def plugin_version(plugins: PluginManager, method: MergeMethod) -> dict[str, str]:
    """Return the version of the distribution that brought the method."""
    provider = plugins.provider("merge_methods", method.name)
    return {provider.distribution: provider.version}
