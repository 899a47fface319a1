"""Renaming artefacts that nothing was made of yet."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..artefacts.digests import CARD_FILE, MANIFEST_NAMES
from ..artefacts.files import exclusive, link_or_copy, new_folder, remove_tree
from ..artefacts.layout import Layout, check_name, require_free
from ..errors import UserError
from .finishing import finish_artefact
from .manifest import Manifest, find_manifest
from .removal import dependents, removable
from .run import RUN_FILE, RunSpec


def rename(layout: Layout, name: str, new_name: str, card: Callable[[Manifest], str]) -> Manifest:
    """Rename a finished expert, baseline or generalist; its tensors and their digests stay. Returns the new manifest.

    `card` writes the model card of an artefact that has one. Raises `UserError` for the seed, for an unfinished run, for a
    name that is taken, and if other artefacts were made of it, since they record its name.
    """
    folder = removable(layout, name)
    manifest = find_manifest(folder)
    if manifest is None:
        raise UserError(
            f"'{name}' is not finished; finish it before it is renamed, or remove it with `expertctl remove`"
        )
    if manifest.kind == "seed":
        raise UserError("every workspace has its seed under this name; rename the folder of the workspace instead")
    if children := dependents(layout, folder):
        raise UserError(
            f"'{name}' cannot be renamed, because other artefacts record its name: "
            f"{', '.join(child.name for child in children)}; remove them first, and make them again afterwards"
        )
    target = folder.parent / check_name(new_name, f"a {manifest.kind}")
    require_free(layout, new_name, target)
    with (
        exclusive(layout.lock(f"run-{name}"), f"'{name}'", patience_s=0.5),
        exclusive(layout.lock(f"generalist-{name}"), f"'{name}'", patience_s=0.5),
        new_folder(target, what=manifest.kind) as partial,
    ):
        shutil.copytree(folder, partial, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        renamed = write_under_name(partial, manifest, new_name, card)
    remove_tree(folder)
    remove_tree(layout.statistics / name)  # they name their expert
    return renamed


def write_under_name(folder: Path, manifest: Manifest, name: str, card: Callable[[Manifest], str]) -> Manifest:
    """Give the artefact in a folder that may be changed another name; returns the new manifest."""
    (folder / MANIFEST_NAMES[manifest.kind]).unlink()
    renamed = replace(manifest, name=name)
    if isinstance(manifest.config, RunSpec):
        run = replace(manifest.config, name=name)
        renamed = replace(renamed, config=run)
        if (folder / RUN_FILE).is_file():
            (folder / RUN_FILE).unlink()  # it may be a link
            run.write(folder)
    has_card = (folder / CARD_FILE).is_file()
    (folder / CARD_FILE).unlink(missing_ok=True)
    return finish_artefact(folder, renamed, card=card if has_card else None, known=manifest.tensors)


def _link(source: Any, target: Any) -> None:
    link_or_copy(Path(source), Path(target))
