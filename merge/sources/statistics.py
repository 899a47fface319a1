"""Finding what `expertctl stats` gathered on experts, for the methods that merge by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...core.artefacts.files import read_json
from ...core.artefacts.layout import Layout
from ...core.artefacts.lineage import manifest_path, read_manifest
from ...core.artefacts.safetensors_io import Checkpoint
from ...core.artefacts.statistics_files import (
    STATISTICS_FOLDER,
    STATISTICS_FORMAT,
    statistics_manifest,
    statistics_weights,
)
from ...core.errors import UserError
from ...core.hooks.merging import MergeMethod
from ..recipes.recipe import Recipe
from .models import StoredTensor


def find_statistics(
    method: MergeMethod, recipe: Recipe, layout: Layout | None
) -> Mapping[str, Mapping[str, StoredTensor]] | None:
    """Return, by expert and tensor, what a method asks for; None where it asks for nothing.

    They lie in the workspace's `statistics/EXPERT/KIND`, or beside an expert's folder in `statistics/NAME/KIND`.
    Raises `UserError` that names the command when an expert has none, or was trained again since.
    """
    if method.statistics is None:
        return None
    return {name: _opened(name, recipe.models[name], method.statistics, layout) for name in recipe.experts}


def _opened(name: str, expert: Path, kind: str, layout: Layout | None) -> dict[str, StoredTensor]:
    folder = _folder(name, expert, kind, layout)
    command = f"expertctl stats {name} --kind {kind}"
    if folder is None:
        raise UserError(f"there are no {kind} statistics on expert '{name}'; gather them with `{command}`")
    manifest = read_json(statistics_manifest(folder))
    if manifest.get("format") != STATISTICS_FORMAT:
        raise UserError(
            f"{statistics_manifest(folder)} has format {manifest.get('format')}; make it again: `{command}`"
        )
    if manifest_path(expert) is not None and manifest.get("expert_digest") != read_manifest(expert).digest:
        raise UserError(
            f"the {kind} statistics in {folder} are of an earlier expert '{name}'; gather them again with "
            f"`{command} --force`"
        )
    digests = manifest.get("tensors", {})
    checkpoint = Checkpoint([statistics_weights(folder)])
    return {
        tensor: StoredTensor(entry, digests.get(tensor), name=tensor)
        for tensor, entry in checkpoint.entries.items()
    }


def _folder(name: str, expert: Path, kind: str, layout: Layout | None) -> Path | None:
    places = [expert.parent / STATISTICS_FOLDER / name / kind]
    if layout is not None:
        places.insert(0, layout.statistics / name / kind)
    return next((place for place in places if statistics_manifest(place).is_file()), None)
