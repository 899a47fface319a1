"""Removing artefacts, with a look at what was made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..artefacts.files import exclusive, read_json, remove_tree
from ..artefacts.layout import MEMORY_MANIFEST, Layout
from ..errors import UserError, unknown_name
from .manifest import find_manifest, read_manifest


@dataclass(frozen=True)
class Dependent:
    """An artefact that was made of another one."""

    name: str
    reads_files: bool
    """It cannot be loaded without the files of the other one; otherwise, it can only not be reproduced or changed."""


def removable(layout: Layout, name: str) -> Path:
    """Return the folder of an artefact or an unfinished run; raises `UserError` that lists them if there is none."""
    places = {
        folder.name: folder
        for parent in (layout.experts, layout.baselines, layout.generalists)
        if parent.is_dir()
        for folder in sorted(parent.iterdir())
        if folder.is_dir() and not folder.name.startswith(".")
    }
    if layout.seed.is_dir():
        places[layout.seed.name] = layout.seed
    if name not in places:
        raise unknown_name("artefact", name, places, listed_as="this workspace has")
    return places[name]


def dependents(layout: Layout, folder: Path) -> list[Dependent]:
    """Return the finished artefacts of a workspace that have the artefact in `folder` among their parents."""
    manifest = find_manifest(folder)
    if manifest is None:
        return []
    others = []
    for other in layout.finished():
        if other == folder:
            continue
        made = read_manifest(other)
        is_child = manifest.digest in {parent.digest for parent in made.parents}
        loads_seed = is_child and (manifest.kind, made.kind) == ("seed", "expert")
        reads_files = loads_seed or folder.resolve() in _referenced(other)
        if is_child or reads_files:
            others.append(Dependent(other.name, reads_files))
    for memory in layout.finished_memories():  # of no use without the model that made its keys
        if read_json(memory / MEMORY_MANIFEST).get("model", {}).get("digest") == manifest.digest:
            others.append(Dependent(memory.name, reads_files=True))
    return others


def remove(layout: Layout, name: str, *, force: bool = False) -> list[Dependent]:
    """Remove an artefact or an unfinished run from its workspace; returns what was made of it.

    Raises `UserError` if there is anything, unless `force`, and if another process is working on it.
    """
    folder = removable(layout, name)
    others = dependents(layout, folder)
    if others and not force:
        readers = [other.name for other in others if other.reads_files]
        makers = [other.name for other in others if not other.reads_files]
        effects = [f"{', '.join(readers)} could not be loaded without its files"] if readers else []
        effects += [f"{', '.join(makers)} could not be reproduced or changed any more"] if makers else []
        raise UserError(
            f"'{name}' is part of other artefacts: {'; '.join(effects)}; use --force to remove it all the same"
        )
    with (
        exclusive(layout.lock(f"run-{name}"), f"'{name}'", patience_s=0.5),
        exclusive(layout.lock(f"generalist-{name}"), f"'{name}'", patience_s=0.5),
    ):
        remove_tree(folder)
        remove_tree(layout.statistics / name)
    return others


def _referenced(folder: Path) -> set[Path]:
    """Return the folders that an artefact reads files from: members of a stitched model, and targets of links."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    members = config.get("members") if config.get("model_type") == "expertctl_stitched" else None
    linked = {file.resolve().parent for file in folder.rglob("*") if file.is_symlink()}
    return linked | {(folder / str(member.get("folder"))).resolve() for member in members or ()}
