"""Which texts are most alike: the nearest points of every point, near enough and without looking at all pairs.

Many points are first divided into cells around centres; a point then looks for neighbours in its own cell and in those next to it.
Shapes: N = points, d = width, k = neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .balanced_kmeans import first_centres, squared_distances

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CELL = 5_000
"""Points of a cell, on average."""
PROBES = 4
"""Cells in which a point looks for neighbours, its own among them."""
ROWS = 512
"""Points that are looked at together: `ROWS * PROBES * CELL` similarities are held, some 40 MB."""
SAMPLE = 50_000
"""Points that centres of cells are drawn from."""


@dataclass(frozen=True)
class Neighbours:
    """The most similar points of each point, the best first."""

    places: NDArray[np.int64]
    """(N, k); -1 where there are fewer."""
    similarities: NDArray[np.float32]
    """(N, k), cosines; -1 where there are fewer."""


def nearest_neighbours(points_Nd: NDArray[np.float32], count: int, seed: int = 0) -> Neighbours:
    """Return up to `count` neighbours of points of length 1 (or 0: such a point has none and is nobody's).

    Exact for up to `PROBES * CELL` points. Time grows as N, memory by N * k.
    """
    import numpy as np

    num_points = len(points_Nd)
    places = np.full((num_points, count), -1, np.int64)
    similarities = np.full((num_points, count), -1, np.float32)
    real = np.flatnonzero((points_Nd != 0).any(axis=1))
    for members, candidates in _cells(points_Nd, real, seed):
        for begin in range(0, len(members), ROWS):
            rows = members[begin : begin + ROWS]
            cosines = points_Nd[rows] @ points_Nd[candidates].T
            cosines[rows[:, None] == candidates] = -np.inf
            kept = min(count, len(candidates) - 1)
            if kept < 1:
                continue
            best = np.argpartition(-cosines, kept - 1, axis=1)[:, :kept]
            found = np.take_along_axis(cosines, best, axis=1)
            order = np.lexsort((candidates[best], -found), axis=1)
            found = np.take_along_axis(found, order, axis=1)
            similar = found > 0
            places[rows, :kept] = np.where(similar, candidates[np.take_along_axis(best, order, axis=1)], -1)
            similarities[rows, :kept] = np.where(similar, found, -1)
    return Neighbours(places, similarities)


def _cells(
    points_Nd: NDArray[np.float32], real: NDArray[np.int64], seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return (points of a cell, points among which they look for neighbours), which together are all real ones."""
    import numpy as np

    count = len(real) // CELL
    if count <= PROBES:
        return [(real, real)] if len(real) else []
    source = np.random.default_rng(seed)
    sample = points_Nd[source.choice(real, min(SAMPLE, len(real)), replace=False)]
    centres = first_centres(sample, count, seed)
    own = np.concatenate(
        [
            squared_distances(points_Nd[real[begin : begin + ROWS]], centres).argmin(axis=1)
            for begin in range(0, len(real), ROWS)
        ]
    )
    members = [real[own == cell] for cell in range(count)]
    near = np.argsort(squared_distances(centres, centres), axis=1, kind="stable")[:, :PROBES]
    return [
        (members[cell], np.sort(np.concatenate([members[one] for one in {cell, *near[cell].tolist()}])))
        for cell in range(count)
        if len(members[cell])
    ]
