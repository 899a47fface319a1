"""Finds the statistics of `expertctl stats` for the merge methods that need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...core.artefacts.files import read_json
from ...core.artefacts.layout import (
    STATISTICS_FOLDER,
    STATISTICS_FORMAT,
    STATISTICS_MANIFEST,
    STATISTICS_WEIGHTS,
    Layout,
)
from ...core.artefacts.safetensors_io import Checkpoint
from ...core.errors import UserError
from ...core.hooks.merging import MergeMethod, TensorMerge
from .models import Source, StoredTensor

Statistics = Mapping[str, Mapping[str, StoredTensor]]
"""Statistics of tensors, by expert and tensor."""


def find_statistics(
    method: MergeMethod, experts: Sequence[str], sources: Mapping[str, Source], layout: Layout | None
) -> Statistics:
    """Return the statistics that a method needs; empty if it needs none.

    Statistics are in the workspace's `statistics/EXPERT/KIND`, or in `statistics/NAME/KIND` beside an expert's folder.
    Raises `UserError` with the command to run if statistics are missing or outdated.
    """
    if not isinstance(method, TensorMerge) or method.statistics is None:
        return {}
    return {name: _open(sources[name], method.statistics, layout) for name in experts}


def _open(source: Source, kind: str, layout: Layout | None) -> dict[str, StoredTensor]:
    name = source.name
    candidates = [source.folder.parent / STATISTICS_FOLDER / name / kind]
    if layout is not None:
        candidates.insert(0, layout.statistics / name / kind)
    folder = next((candidate for candidate in candidates if (candidate / STATISTICS_MANIFEST).is_file()), None)
    command = f"expertctl stats {name} --kind {kind}"
    if folder is None:
        raise UserError(f"expert '{name}' has no {kind} statistics; collect them with `{command}`")
    manifest = read_json(folder / STATISTICS_MANIFEST)
    if manifest.get("format") != STATISTICS_FORMAT:
        raise UserError(
            f"{folder / STATISTICS_MANIFEST} has the unsupported format {manifest.get('format')}; collect it again with `{command}`"
        )
    if source.manifest is not None and manifest.get("expert_digest") != source.manifest.digest:
        raise UserError(
            f"the {kind} statistics in {folder} belong to an earlier version of expert '{name}'; collect them again with "
            f"`{command} --force`"
        )
    digests = manifest.get("tensors", {})
    checkpoint = Checkpoint([folder / STATISTICS_WEIGHTS])
    for tensor in checkpoint:
        if tensor not in source.tensors:  # without its statistics, a tensor would be averaged plainly
            raise UserError(
                f"the {kind} statistics in {folder} are of tensor '{tensor}', which the files of expert '{name}' do not have: "
                "its family is converted at loading; choose a merge method without statistics, such as linear"
            )
    return {tensor: StoredTensor(entry, digests.get(tensor)) for tensor, entry in checkpoint.entries.items()}
