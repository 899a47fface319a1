"""The best passages by their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Ranked:
    """A passage by its number, and its score; a higher one is better."""

    number: int
    score: float


def best(scores: NDArray[Any], count: int) -> list[Ranked]:
    """Return the highest scores, best first, the lower number first among equals."""
    import numpy as np

    candidates = np.arange(len(scores))
    if count < len(scores):
        least = np.partition(scores, len(scores) - count)[len(scores) - count]
        candidates = np.flatnonzero(scores >= least)
    order = candidates[np.lexsort((candidates, -scores[candidates]))][:count]
    return [Ranked(int(number), float(scores[number])) for number in order]
