"""Repeats a merge from the manifest of a generalist and compares the result byte by byte."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...core.artefacts.digests import CARD_FILE, MANIFEST_NAMES
from ...core.artefacts.hub_cache import cached_model, download_command, split_commit
from ...core.artefacts.layout import Layout
from ...core.errors import UserError
from ...core.manifests.manifest import Manifest, manifest_path, read_manifest
from ..merging import MergeRun, merge_recipe
from ..recipes.recipe import Recipe, recipe_from_json
from ..sources.parents import SEED


@dataclass(frozen=True)
class Reproduction:
    """Result of repeating a merge."""

    same: bool
    differences: tuple[str, ...]
    """One sentence per difference; empty if the result is byte-identical."""
    versions: tuple[str, ...]
    """Version changes of tools since the merge, which can explain differences."""


def reproduce(
    manifest: Manifest,
    folder: Path,
    *,
    layout: Layout | None = None,
    models: Mapping[str, Path] | None = None,
    run: MergeRun | None = None,
) -> Reproduction:
    """Repeat the merge of `manifest` in a temporary folder beside `folder` and compare the results.

    Models are found by name in the workspace, beside `folder`, or in the current folder, and in the Hugging Face cache;
    `models` gives the folders of other models. Raises `UserError` for manifests of other artefacts and for missing models.
    """
    merged = manifest.merged
    # the recipe does not hold the text that a router was fitted on
    is_fitted = merged is not None and merged.mixture is not None and merged.mixture.router.uses_text
    if merged is None or merged.recipe is None or merged.shard_bytes is None or is_fitted:
        raise UserError(f"{folder} cannot be reproduced from its manifest alone: it {_why_not(manifest)}")
    recipe = locate(manifest, merged.recipe, folder, layout, models or {})
    run = run or MergeRun()
    repeated_run = replace(
        run,
        allow_unrelated=True,  # as the original merge was allowed
        allow_licences=True,
        settings=replace(run.settings, allow_nonfinite=True),
        shard_bytes=merged.shard_bytes,
        is_repetition=True,
    )
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        repeated_manifest = merge_recipe(recipe, Path(scratch) / folder.name, run=repeated_run, name=manifest.name)
    return compare(manifest, repeated_manifest)


def _why_not(manifest: Manifest) -> str:
    if manifest.merged is None:
        return "is not a generalist"
    if manifest.is_shared:
        return "was trained in rounds with weights that only the owners have"
    if manifest.tunings:
        return "was trained after the merge; repeat its `expertctl tune`"
    if manifest.merged.fitted_on:
        return "was fitted on text; repeat its `expertctl merge`"
    return (
        f"is of the kind '{manifest.merged.kind}', which holds its experts unchanged; `expertctl verify` compares them"
    )


def compare(before: Manifest, after: Manifest) -> Reproduction:
    """Return the differences between two merges of a generalist."""
    parents = {parent.name: parent.digest for parent in after.parents}
    replaced = {event.expert for event in before.history if event.change == "replaced"}
    differences = [
        f"{parent.kind} '{parent.name}' has changed: {parent.digest[:12]} then, "
        f"{parents.get(parent.name, 'none')[:12]} now"
        + (
            f"; it replaced another expert, so give its folder: --model {parent.name}=DIR"
            if parent.name in replaced
            else ""
        )
        for parent in before.parents
        if parents.get(parent.name) != parent.digest
    ]
    # an evaluation or a change of experts after the merge changed the card
    ignored = {CARD_FILE} if "gate" in before.metrics or before.history else set()
    for item, then, now in (("tensor", before.tensors, after.tensors), ("file", before.files, after.files)):
        differences += [
            f"{item} {name} differs" if name in then and name in now else f"{item} {name} is in only one of the two"
            for name in sorted({*then, *now} - ignored)
            if then.get(name) != now.get(name)
        ]
    versions = tuple(
        f"{name} {before.versions.get(name, 'none')} then, {after.versions.get(name, 'none')} now"
        for name in sorted({*before.versions, *after.versions})
        if before.versions.get(name) != after.versions.get(name)
    )
    return Reproduction(not differences, tuple(differences), versions)


def locate(
    manifest: Manifest,
    recipe: Mapping[str, Any],
    folder: Path,
    layout: Layout | None,
    folders: Mapping[str, Path],
    *,
    require_digest: bool = False,
) -> Recipe:
    """Return a generalist's recipe with the folders of its models, matched by the digests in its manifest.

    Raises `UserError` for missing models and, with `require_digest`, for models with another digest.
    """
    names = [*recipe["models"], *(f"base of {name}" for name in recipe["adapter_bases"])]
    digests = {parent.name: parent.digest for parent in manifest.parents}
    references = recipe.get("references", {})
    located = {
        name: folders[name]
        if name in folders
        else _find(name, references.get(name), digests.get(name), folder, layout, require_digest)
        for name in names
    }
    return recipe_from_json(recipe, located)


def _find(
    name: str, reference: str | None, digest: str | None, folder: Path, layout: Layout | None, require_digest: bool
) -> Path:
    """Return the folder of a model by its digest, its name, or its `reference` in the file of the merge, if any."""
    beside = [place / text for text in (reference, name) if text for place in (folder.resolve().parent, Path.cwd())]
    on_hub = split_commit(reference or "")
    if on_hub is not None and (cached := cached_model(*on_hub)) is not None:
        beside.insert(0, cached)
    inside = []
    if layout is not None:
        inside = [layout.seed if name == SEED else layout.experts / name, layout.generalists / name]
    marks = ("config.json", "adapter_config.json", *MANIFEST_NAMES.values())
    named = [place for place in (*inside, *beside) if any((place / file).is_file() for file in marks)]
    others: Iterable[Path] = layout.finished() if layout is not None and digest is not None else ()
    for candidate in (*named, *others):
        has_manifest = manifest_path(candidate) is not None
        if digest is None or (candidate in named and not has_manifest):
            return candidate  # folders without manifest have no digest; the merge compares their tensors
        if has_manifest and read_manifest(candidate).digest == digest:
            return candidate
    if named and not require_digest:
        return named[0]
    if named:
        raise UserError(
            f"{named[0]} is not the '{name}' that {folder} was made from ({str(digest)[:12]}); restore that model in the "
            "workspace, or replace it as well"
        )
    download = f" download it with `{download_command(*on_hub)}`, or" if on_hub is not None else ""
    raise UserError(f"model '{name}' was not found;{download} give its folder: --model {name}=DIR")
