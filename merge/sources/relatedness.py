"""Estimates from sampled weights whether checkpoints descend from the same model.

Fine-tuning changes weights little relative to their size, so the matrices of related models have a high cosine
similarity, while two random initialisations are nearly orthogonal. This is a safeguard against mistakes, not a proof.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.artefacts.numeric import DTYPES, FLOATING, decode
from ...core.artefacts.safetensors_io import TensorEntry
from ...core.errors import UserError

RELATED = 0.2
"""Minimum median cosine of related checkpoints.

Two initialisations of the same shape are within 0.05 of 0, even if both are then trained on the same text. A model with
1.3 million parameters that is trained further for as long as its seed stays above 0.5.
"""
SAMPLED_TENSORS = 16
SAMPLED_PIECES = 4
PIECE_NUMBERS = 1024


def relatedness(first: Mapping[str, TensorEntry], second: Mapping[str, TensorEntry]) -> float | None:
    """Return the similarity of two checkpoints: 1 if identical, about 0 if unrelated, None if unknown.

    It is the median cosine of centred samples of the matrices with the same name and shape.
    """
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
    cosines = sorted(cosine for name in shared[::step] if (cosine := _cosine(first[name], second[name])) is not None)
    return cosines[len(cosines) // 2] if cosines else None


def require_related(
    first: tuple[str, Mapping[str, TensorEntry]], others: Mapping[str, Mapping[str, TensorEntry]]
) -> None:
    """Raise `UserError` for the first model that appears unrelated to `first` (name, tensors)."""
    name, tensors = first
    for other, entries in others.items():
        similarity = relatedness(tensors, entries)
        if similarity is not None and similarity < RELATED:
            raise UserError(
                f"'{other}' and '{name}' appear unrelated: their matrices have a cosine of {similarity:.2f}, while "
                f"models of the same seed have {RELATED} to 1; merging unrelated models gives noise "
                "(override: --allow-unrelated)"
            )


def _cosine(first: TensorEntry, second: TensorEntry) -> float | None:
    """Return the cosine of samples of two tensors; None if one of them is constant."""
    a, b = _sample(first), _sample(second)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale > 0 and np.isfinite(scale) else None


def _sample(entry: TensorEntry) -> NDArray[Any]:
    """Return evenly spaced pieces of a tensor, concatenated, as float64."""
    width = DTYPES[entry.dtype].num_bytes
    count = entry.num_bytes // width
    size = min(PIECE_NUMBERS, count)
    begins = [(count - size) * index // max(SAMPLED_PIECES - 1, 1) for index in range(SAMPLED_PIECES)]
    pieces = [
        decode(entry.read(begin * width, (begin + size) * width), entry.dtype, (size,))
        for begin in dict.fromkeys(begins)
    ]
    return np.concatenate(pieces).astype("f8")
