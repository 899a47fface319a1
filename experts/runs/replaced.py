"""Backup of a replaced run until the new run trains, since a trainer may still refuse it."""

from __future__ import annotations

from pathlib import Path

from ...core.artefacts.files import remove_tree
from ...core.manifests.run import is_finished


def back_up(folder: Path) -> None:
    """Move a folder to its backup; an unfinished folder that has a backup is deleted and the backup is kept."""
    if not folder.exists():
        return
    if _backup(folder).exists() and not is_finished(folder):
        remove_tree(folder)
        return
    remove_tree(_backup(folder))
    folder.rename(_backup(folder))


def restore_backup(folder: Path) -> None:
    """Delete a refused run and restore its backup, if there is one."""
    remove_tree(folder)
    if _backup(folder).exists():
        _backup(folder).rename(folder)


def delete_backup(folder: Path) -> None:
    """Delete the backup of the run that `folder` replaced."""
    remove_tree(_backup(folder))


def _backup(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")
