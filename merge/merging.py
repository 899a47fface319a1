"""One merge from beginning to end: check everything first, make the generalist, write its manifest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core.config import MergeConfig, parse_options
from ..core.errors import UserError, unknown_name
from ..core.files import exclusive, link_or_copy, new_folder, refuse_existing
from ..core.lineage import (
    MANIFEST_NAMES,
    TOKENIZER_FILES,
    Manifest,
    Parent,
    digest_of_tensors,
    digest_of_tokenizer,
    digests_of_folder,
    read_manifest,
    require_intact,
    tool_versions,
)
from ..core.plugin_manager import PluginManager, installed_plugins
from ..core.types import MergeFinished, MergeInputs, MergeMethod, ValidationText
from ..core.workspace import Layout, check_name, require_free
from .engine import merge_tensors
from .weights import resolve_weights

Say = Callable[[str], None]


def merge(
    layout: Layout,
    name: str,
    config: MergeConfig,
    *,
    output: Path | None = None,
    experts_folder: Path | None = None,
    validation: Callable[[], Sequence[ValidationText]] = tuple,
    force: bool = False,
    say: Say = lambda line: None,
) -> Manifest:
    """Merge experts into `generalists/NAME` (or `output`) and return the manifest.

    Everything that can be refused is refused before any work: unknown method or option, experts that are
    missing, of another seed, of another tokenizer, or not what their manifests say. `validation` gives the
    text that priors and weights are fitted on, and is called only if something is.
    """
    plugins = installed_plugins()
    method = plugins.merge_method(config.method)
    options = parse_options(method.options, config.options, f"merge method '{method.name}'")
    target = output if output is not None else layout.generalists / check_name(name, "a generalist")
    if output is None:
        require_free(layout, name, target)
    refuse_existing(target, force=force, what="generalist")
    folders = expert_folders(layout, config.experts, experts_folder or layout.experts)
    seed_manifest, expert_manifests = check_lineage(layout.seed, folders)

    fitted_on: list[ValidationText] = []

    @functools.cache
    def texts() -> Sequence[ValidationText]:
        fitted_on.extend(validation())
        return tuple(fitted_on)

    with exclusive(layout.lock(f"generalist-{target.name}"), f"generalist '{name}'"):
        weights = resolve_weights(config.weights, layout.seed, folders, texts, say)
        asked = config.weights != "uniform"
        inputs = MergeInputs(layout.seed, folders, weights, asked, texts, say)
        with new_folder(target, force=force, what="generalist") as partial:
            weights = dict(_make(method, inputs, options, partial) or weights)
            tensors, files = digests_of_folder(partial)
            manifest = Manifest(
                kind="generalist",
                name=name,
                digest=digest_of_tensors(tensors),
                tensors=tensors,
                files=files,
                tokenizer=digest_of_tokenizer(partial),
                parents=_parents(seed_manifest, expert_manifests, weights),
                config={
                    "method": method.name,
                    "kind": method.kind,
                    "weights": weights,
                    "options": asdict(options),
                    "fitted_on": [text.domain for text in fitted_on],
                },
                data={parent: one.data for parent, one in expert_manifests.items()},
                licence=_common([seed_manifest, *expert_manifests.values()]),
                versions=tool_versions() | _plugin_version(plugins, method),
            )
            manifest.write(partial)
    plugins.merge_finished(MergeFinished(name, target, method.name))
    return manifest


def expert_folders(layout: Layout, names: Sequence[str] | None, parent: Path) -> dict[str, Path]:
    """Return the folders of the named experts (default: every finished one), in the given order."""
    finished = sorted(path.parent.name for path in parent.glob(f"*/{MANIFEST_NAMES['expert']}"))
    wanted = list(names) if names is not None else finished
    if not wanted:
        raise UserError("there is no finished expert to merge; train one with `expertctl train`")
    repeated = {name for name in wanted if wanted.count(name) > 1}
    if repeated:
        raise UserError(f"expert '{sorted(repeated)[0]}' is named twice")
    for name in wanted:
        if name not in finished:
            if (parent / name).is_dir():
                raise UserError(f"expert '{name}' is not finished; go on with `expertctl train {name}`")
            raise unknown_name("expert", name, finished, listed_as="finished")
    return {name: parent / name for name in wanted}


def check_lineage(seed: Path, experts: Mapping[str, Path]) -> tuple[Manifest, dict[str, Manifest]]:
    """Return all manifests once every byte is checked; refuse experts of another seed or tokenizer."""
    if not (seed / MANIFEST_NAMES["seed"]).is_file():
        raise UserError(f"there is no finished seed in {seed}")
    origin = read_manifest(seed)
    manifests = {name: read_manifest(folder) for name, folder in experts.items()}
    for name, manifest in manifests.items():
        parent = next((parent for parent in manifest.parents if parent.kind == "seed"), None)
        if parent is None or parent.digest != origin.digest:
            theirs = parent.digest[:12] if parent else "none"
            raise UserError(
                f"expert '{name}' was branched from seed {theirs}, but this workspace's seed is {origin.digest[:12]}; "
                "experts of different seeds cannot be merged"
            )
        if manifest.tokenizer != origin.tokenizer:
            raise UserError(
                f"expert '{name}' was trained with tokenizer {manifest.tokenizer[:12]}, the seed has "
                f"{origin.tokenizer[:12]}; their tensors mean different tokens"
            )
    for folder in (seed, *experts.values()):
        require_intact(folder)
    return origin, manifests


def _make(method: MergeMethod, inputs: MergeInputs, options: Any, folder: Path) -> Mapping[str, float] | None:
    """Fill the folder: tokenizer and generation settings, then what the method makes.

    Returns how much each expert counts where the method decided that.
    """
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (inputs.seed / name).is_file():
            link_or_copy(inputs.seed / name, folder / name)
    if method.build is not None:
        return method.build(inputs, options, folder)
    link_or_copy(inputs.seed / "config.json", folder / "config.json")
    merge_tensors(method, inputs, options, folder)
    return None


def _parents(
    seed: Manifest, experts: Mapping[str, Manifest], weights: Mapping[str, float]
) -> tuple[Parent, ...]:
    return (
        Parent("seed", "seed", seed.digest),
        *(Parent("expert", name, manifest.digest, weights[name]) for name, manifest in experts.items()),
    )


def _common(manifests: Sequence[Manifest]) -> str | None:
    """Return the licence that all parents share, or a list of the different ones."""
    licences = sorted({manifest.licence for manifest in manifests if manifest.licence})
    return "; ".join(licences) or None


def _plugin_version(plugins: PluginManager, method: MergeMethod) -> dict[str, str]:
    """Return the version of the distribution that brought the method, when it is not ours."""
    provider = plugins.provider("merge_methods", method.name)
    return {provider.distribution: provider.version}
