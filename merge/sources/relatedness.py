"""Whether checkpoints descend from one another, told in a moment from samples of their matrices.

Fine-tuning moves weights little against their size, so that the matrices of relatives point the same way, while two
random initialisations are orthogonal to each other. This is a check against accidents, not a proof of descent.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.artefacts.files import readable_os_errors
from ...core.artefacts.numeric import FLOATING, decode
from ...core.artefacts.safetensors_io import DTYPES, TensorEntry
from ...core.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

RELATED = 0.2
"""Median cosine from which two checkpoints count as relatives.

Two initialisations of the same shape come out within 0.05 of 0, even when both then train on the same text; a model
of 1.3 million parameters that trained on for as long as its seed stays above 0.5.
"""
SAMPLED_TENSORS = 16
SAMPLED_PIECES = 4
PIECE_NUMBERS = 1024


@dataclass(frozen=True)
class Kinship:
    """How alike two checkpoints are."""

    similarity: float
    """Median over the sampled matrices of the cosine between their centred samples: 1 the same, 0 strangers."""
    tensors: int
    """Matrices that were compared; with none, nothing is known."""


def kinship(first: Mapping[str, TensorEntry], second: Mapping[str, TensorEntry]) -> Kinship:
    """Compare a few thousand numbers of matrices that both checkpoints have in the same shape."""
    shared = [
        name
        for name, entry in first.items()
        if len(entry.shape) == 2
        and entry.dtype in FLOATING
        and name in second
        and second[name].shape == entry.shape
        and second[name].dtype in FLOATING
    ]
    step = max(len(shared) // SAMPLED_TENSORS, 1)
    found = [cosine for name in shared[::step] if (cosine := _cosine(first[name], second[name])) is not None]
    if not found:
        return Kinship(0.0, 0)
    ordered = sorted(found)
    return Kinship(ordered[len(ordered) // 2], len(ordered))


def require_related(
    first: tuple[str, Mapping[str, TensorEntry]], others: Mapping[str, Mapping[str, TensorEntry]]
) -> None:
    """Raise `UserError` for the first model that does not look like a relative of `first` (name, tensors)."""
    name, tensors = first
    for other, entries in others.items():
        found = kinship(tensors, entries)
        if found.tensors and found.similarity < RELATED:
            raise UserError(
                f"'{other}' and '{name}' do not look related: their matrices have a cosine of {found.similarity:.2f} "
                f"where models of one seed have {RELATED} to 1; merged tensor by tensor, strangers give noise "
                "(insist with --allow-unrelated)"
            )


def _cosine(first: TensorEntry, second: TensorEntry) -> float | None:
    """Return the cosine between samples of two tensors; None where one of them is constant."""
    import numpy as np

    a, b = _sample(first), _sample(second)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale > 0 and np.isfinite(scale) else None


def _sample(entry: TensorEntry) -> NDArray[Any]:
    """Return a few pieces of a tensor, spread evenly over it, as float64."""
    import numpy as np

    width = DTYPES[entry.dtype][1]
    count = entry.num_bytes // width
    size = min(PIECE_NUMBERS, count)
    begins = [(count - size) * index // max(SAMPLED_PIECES - 1, 1) for index in range(SAMPLED_PIECES)]
    with readable_os_errors(entry.file), entry.file.open("rb", buffering=0) as file:
        pieces = [
            decode(os.pread(file.fileno(), size * width, entry.begin + begin * width), entry.dtype, (size,))
            for begin in dict.fromkeys(begins)
        ]
    return np.concatenate(pieces).astype("f8")
