"""File paths of an expert's statistics: one folder per kind, with tensors and a manifest."""

from __future__ import annotations

from pathlib import Path

STATISTICS_FORMAT = 1
STATISTICS_FOLDER = "statistics"


def statistics_weights(folder: Path) -> Path:
    """Return the path of the tensors in the folder of one kind of statistics."""
    return folder / "statistics.safetensors"


def statistics_manifest(folder: Path) -> Path:
    """Return the path of the manifest in the folder of one kind of statistics."""
    return folder / "statistics.json"
