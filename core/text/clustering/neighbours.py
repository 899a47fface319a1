"""Approximate k-nearest-neighbour search by cosine similarity.

A large set of points is divided into cells around centres (an inverted file index); each point searches its own cell
and the nearest cells. Shapes: N = points, d = width, k = neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .balanced_kmeans import first_centres, squared_distances

CELL = 5_000
"""Mean number of points per cell."""
PROBES = 4
"""Cells searched for each point, including its own."""
ROWS = 512
"""Points per batch, which holds `ROWS * PROBES * CELL` similarities in memory, about 40 MB."""
SAMPLE = 50_000
"""Maximum number of points from which the cell centres are drawn."""


@dataclass(frozen=True)
class Neighbours:
    """Nearest neighbours of each point, most similar first."""

    places: NDArray[np.int64]
    """Indices of the neighbours, (N, k), padded with -1."""
    similarities: NDArray[np.float32]
    """Cosine similarities, (N, k), padded with -1."""


def nearest_neighbours(points_Nd: NDArray[np.float32], count: int, seed: int = 0) -> Neighbours:
    """Return up to `count` neighbours of each unit vector; a zero vector has none and is not a neighbour of any other.

    Exact for up to `PROBES * CELL` points. Time is linear in N, memory in N * k.
    """
    num_points = len(points_Nd)
    places = np.full((num_points, count), -1, np.int64)
    similarities = np.full((num_points, count), -1, np.float32)
    nonzero = np.flatnonzero((points_Nd != 0).any(axis=1))
    for members, candidates in _cells(points_Nd, nonzero, seed):
        for begin in range(0, len(members), ROWS):
            rows = members[begin : begin + ROWS]
            cosines = points_Nd[rows] @ points_Nd[candidates].T
            cosines[rows[:, None] == candidates] = -np.inf
            kept = min(count, len(candidates) - 1)
            if kept < 1:
                continue
            best = np.argpartition(-cosines, kept - 1, axis=1)[:, :kept]
            best_cosines = np.take_along_axis(cosines, best, axis=1)
            order = np.lexsort((candidates[best], -best_cosines), axis=1)
            best_cosines = np.take_along_axis(best_cosines, order, axis=1)
            is_similar = best_cosines > 0
            places[rows, :kept] = np.where(is_similar, candidates[np.take_along_axis(best, order, axis=1)], -1)
            similarities[rows, :kept] = np.where(is_similar, best_cosines, -1)
    return Neighbours(places, similarities)


def _cells(
    points_Nd: NDArray[np.float32], nonzero: NDArray[np.int64], seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return (points of a cell, candidate neighbours of those points); the cells partition the nonzero points."""
    count = len(nonzero) // CELL
    if count <= PROBES:
        return [(nonzero, nonzero)] if len(nonzero) else []
    generator = np.random.default_rng(seed)
    sample = points_Nd[generator.choice(nonzero, min(SAMPLE, len(nonzero)), replace=False)]
    centres = first_centres(sample, count, seed)
    nearest_cells = np.concatenate(
        [
            squared_distances(points_Nd[nonzero[begin : begin + ROWS]], centres).argmin(axis=1)
            for begin in range(0, len(nonzero), ROWS)
        ]
    )
    members = [nonzero[nearest_cells == cell] for cell in range(count)]
    near = np.argsort(squared_distances(centres, centres), axis=1, kind="stable")[:, :PROBES]
    return [
        (members[cell], np.sort(np.concatenate([members[probe] for probe in {cell, *near[cell].tolist()}])))
        for cell in range(count)
        if len(members[cell])
    ]
