"""Finding what `expertctl stats` gathered on experts, for the methods that merge by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..core.types import MergeMethod
from ..core.workspace import Layout
from .recipe import Recipe
from .sources import StoredTensor


def statistics_file(layout: Layout, expert: str, kind: str) -> Path:
    """Return where a workspace keeps statistics of one kind (`gram`, `fisher`) on an expert."""
    return layout.root / "statistics" / expert / f"{kind}.safetensors"


def find_statistics(
    method: MergeMethod, recipe: Recipe, layout: Layout | None
) -> Mapping[str, Mapping[str, StoredTensor]] | None:
    """Return, by expert and tensor, what a method asks for; None where it asks for nothing.

    Raises `UserError` that names the command when an expert has none, or was trained again since.
    """
    if method.statistics is None:
        return None
    raise NotImplementedError
