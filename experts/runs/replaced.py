"""What a new run takes the place of: kept beside it until it trains, since a trainer may still refuse."""

from __future__ import annotations

from pathlib import Path

from ...core.artefacts.files import remove_tree
from .specification import is_finished


def set_aside(folder: Path) -> None:
    """Make room for a run; a try that never trained gives way to what it had set aside itself."""
    if not folder.exists():
        return
    if _place(folder).exists() and not is_finished(folder):
        remove_tree(folder)
        return
    remove_tree(_place(folder))
    folder.rename(_place(folder))


def put_back(folder: Path) -> None:
    """Remove a run that was refused; what it took the place of is there again, if there was anything."""
    remove_tree(folder)
    if _place(folder).exists():
        _place(folder).rename(folder)


def forget_replaced(folder: Path) -> None:
    """Remove what a run took the place of, now that it trains."""
    remove_tree(_place(folder))


def _place(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")
