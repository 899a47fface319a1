"""Making a generalist again from its manifest, and comparing every byte."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.artefacts.layout import Layout
from ...core.artefacts.lineage import MANIFEST_NAMES, Manifest, manifest_path, read_manifest
from ...core.errors import UserError
from ..generalists.card import CARD_FILE
from ..merging import MergeRun, merge_recipe
from ..planning.plan import Permissions
from ..recipes.recipe import Recipe, recipe_from_json
from ..sources.history import history_of
from ..sources.parents import SEED


@dataclass(frozen=True)
class Reproduction:
    """What came out of making a generalist again."""

    same: bool
    differences: tuple[str, ...]
    """A sentence each; empty when every byte is the same."""
    versions: tuple[str, ...]
    """Tools whose versions are others than then: the likely reason for a difference."""


def reproduce(
    manifest: Manifest,
    folder: Path,
    *,
    layout: Layout | None = None,
    models: Mapping[str, Path] | None = None,
    run: MergeRun | None = None,
) -> Reproduction:
    """Merge again what `manifest` describes, into a temporary folder beside `folder`, and compare.

    `models` says where models are that are not found by their names: in the workspace, beside `folder`, or in the
    current folder. Raises `UserError` for manifests of other artefacts and for models that are not found.
    """
    if manifest.kind != "generalist" or "recipe" not in manifest.config or _has_a_fitted_router(manifest):
        raise UserError(f"{folder} cannot be made again from its manifest alone: it {_why_not(manifest)}")
    recipe = locate(manifest, manifest.config["recipe"], folder, layout, models or {})
    how = run or MergeRun()
    insisted = MergeRun(
        permissions=Permissions(unrelated=True, licences=True),  # it was merged like this once
        settings=how.settings,
        shard_bytes=int(manifest.config["shard_bytes"]),
        say=how.say,
        tell=how.tell,
    )
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        again = merge_recipe(recipe, Path(scratch) / folder.name, run=insisted, name=manifest.name)
    return compare(manifest, again)


def _why_not(manifest: Manifest) -> str:
    if manifest.kind != "generalist":
        return "is no generalist"
    if manifest.config.get("kind") == "shared":
        return "was trained in rounds, whose weights are with their owners"
    if (manifest.config.get("mixture") or {}).get("tuned"):
        return "was trained after its merge; run its `tune` again"
    return "is fitted on text; run its `merge` again"


def _has_a_fitted_router(manifest: Manifest) -> bool:
    """Tell whether a mixture's router began from text, which its recipe does not hold."""
    return bool(((manifest.config.get("mixture") or {}).get("router") or {}).get("uses_text"))


def compare(before: Manifest, after: Manifest) -> Reproduction:
    """Return what differs between two makings of a generalist."""
    found: list[str] = []
    parents = {parent.name: parent.digest for parent in after.parents}
    replaced = {event["expert"] for event in history_of(before) if event["what"] == "replaced"}
    found += [
        f"{parent.kind} '{parent.name}' is not what it was: {parent.digest[:12]} then, "
        f"{parents.get(parent.name, 'none')[:12]} now"
        + (
            f"; another had taken its place, say where that is: --model {parent.name}=DIR"
            if parent.name in replaced
            else ""
        )
        for parent in before.parents
        if parents.get(parent.name) != parent.digest
    ]
    for what, then, now in (
        ("tensor", before.tensors, after.tensors),
        ("file", before.files, after.files),
    ):
        found += [
            f"{what} {name} is another"
            if name in then and name in now
            else f"{what} {name} is in one of the two only"
            for name in sorted({*then, *now})
            if then.get(name) != now.get(name) and not (name == CARD_FILE and _has_a_later_card(before))
        ]
    versions = tuple(
        f"{name} {before.versions.get(name, 'none')} then, {after.versions.get(name, 'none')} now"
        for name in sorted({*before.versions, *after.versions})
        if before.versions.get(name) != after.versions.get(name)
    )
    return Reproduction(not found, tuple(found), versions)


def _has_a_later_card(manifest: Manifest) -> bool:
    """Tell whether a card says more than a merge knows: how it was evaluated, or who left and joined since."""
    return "gate" in manifest.metrics or bool(history_of(manifest))


def locate(
    manifest: Manifest,
    recipe: Mapping[str, Any],
    folder: Path,
    layout: Layout | None,
    given: Mapping[str, Path],
    *,
    insist: bool = False,
) -> Recipe:
    """Return a generalist's recipe with the folders of its models: those with the digests that its manifest names.

    Raises `UserError` for one that is not found; with `insist` also where all that has its name is another.
    """
    names = [*recipe["models"], *(f"base of {name}" for name in recipe["adapter_bases"])]
    digests = {parent.name: parent.digest for parent in manifest.parents}
    found = {
        name: given[name] if name in given else _find(name, digests.get(name), folder, layout, insist)
        for name in names
    }
    return recipe_from_json(recipe, found)


def _find(name: str, digest: str | None, folder: Path, layout: Layout | None, insist: bool) -> Path:
    named = [
        place
        for place in _places(name, folder, layout)
        if (place / "config.json").is_file() or any((place / file).is_file() for file in _MARKS)
    ]
    others: Iterable[Path] = layout.finished() if layout is not None and digest is not None else ()
    for place in (*named, *others):
        if digest is None or (place in named and manifest_path(place) is None):
            return place  # a plain folder says nothing of itself; the merge compares its tensors
        if manifest_path(place) is not None and read_manifest(place).digest == digest:
            return place
    if named and not insist:
        return named[0]
    if named:
        raise UserError(
            f"{named[0]} is not the '{name}' that {folder} was made of ({str(digest)[:12]}): it was made again, or another had "
            "taken its place; put that one into the workspace, or replace it too"
        )
    raise UserError(f"model '{name}' is not found; say where it is: --model {name}=DIR")


_MARKS: Sequence[str] = (*MANIFEST_NAMES.values(), "adapter_config.json")


def _places(name: str, folder: Path, layout: Layout | None) -> list[Path]:
    beside = [folder.resolve().parent / name, Path.cwd() / name]
    if layout is None:
        return beside
    return [layout.seed if name == SEED else layout.experts / name, layout.generalists / name, *beside]
