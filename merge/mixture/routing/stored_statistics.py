"""Statistics of router starts in the folder of a mixture: `router/EXPERT.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....core.artefacts.numeric import DTYPES
from ....core.artefacts.safetensors_io import Checkpoint
from ....core.manifests.manifest import Manifest
from ...planning.assembly import ROUTER_FOLDER

if TYPE_CHECKING:
    from numpy.typing import NDArray


def has_statistics(manifest: Manifest) -> bool:
    """Return whether the router of a mixture can be computed again without the text of its experts."""
    return any(name.startswith(f"{ROUTER_FOLDER}/") for name in manifest.files)


def read_statistics(folder: Path) -> dict[str, Mapping[str, NDArray[Any]]]:
    """Return the statistics in a mixture's folder by expert, memory-mapped; empty if its router start stores none."""
    return {file.stem: _read(file) for file in sorted((folder / ROUTER_FOLDER).glob("*.safetensors"))}


def _read(file: Path) -> dict[str, NDArray[Any]]:
    import numpy as np

    return {
        name: np.memmap(file, np.dtype(DTYPES[entry.dtype].numpy), "r", entry.begin, entry.shape)
        for name, entry in Checkpoint([file]).entries.items()
    }
