"""Where statistics on an expert lie: a folder for each kind, with tensors and a manifest."""

from __future__ import annotations

from pathlib import Path

STATISTICS_FORMAT = 1
STATISTICS_FOLDER = "statistics"


def statistics_weights(folder: Path) -> Path:
    """Return the tensors in the folder of one kind."""
    return folder / "statistics.safetensors"


def statistics_manifest(folder: Path) -> Path:
    """Return the manifest in the folder of one kind."""
    return folder / "statistics.json"
