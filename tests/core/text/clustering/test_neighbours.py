"""Nearest neighbours: what a look at all pairs finds, in cells too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertctl.core.text.clustering import neighbours
from expertctl.core.text.clustering.clusterer import unit_rows
from expertctl.core.text.clustering.neighbours import nearest_neighbours


def all_pairs(points: np.ndarray, count: int) -> list[list[tuple[int, float]]]:
    rankings = []
    for row in range(len(points)):
        cosines = [
            (other, float(points[row].astype(float) @ points[other])) for other in range(len(points)) if other != row
        ]
        ranked = sorted((pair for pair in cosines if pair[1] > 1e-7), key=lambda pair: -pair[1])
        rankings.append(ranked[:count])
    return rankings


@given(st.integers(0, 40), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_same_as_a_look_at_all_pairs(size: int, count: int, seed: int) -> None:
    points = unit_rows(np.random.default_rng(seed).normal(size=(size, 5)))
    neighbours = nearest_neighbours(points, count)
    assert neighbours.places.shape == neighbours.similarities.shape == (size, count)
    for row, expected in enumerate(all_pairs(points, count)):
        real = neighbours.places[row] >= 0
        assert real.sum() == len(expected)
        np.testing.assert_allclose(neighbours.similarities[row][real], [pair[1] for pair in expected], atol=1e-5)
        for place, cosine in zip(neighbours.places[row][real], neighbours.similarities[row][real], strict=True):
            assert place != row
            assert abs(points[row] @ points[place] - cosine) < 1e-5
        assert (neighbours.similarities[row][~real] == -1).all()


def test_points_without_length_have_no_neighbours_and_are_nobodys() -> None:
    points = np.array([[1, 0], [0, 0], [1, 0], [0, 0]], np.float32)
    neighbours = nearest_neighbours(points, 2)
    assert neighbours.places.tolist() == [[2, -1], [-1, -1], [0, -1], [-1, -1]]


def test_cells_find_nearly_what_all_pairs_do(monkeypatch: pytest.MonkeyPatch) -> None:
    source = np.random.default_rng(0)
    groups = np.repeat(source.normal(size=(30, 8)), 40, axis=0)
    points = unit_rows(groups + 0.2 * source.normal(size=groups.shape))
    exact = nearest_neighbours(points, 5)
    monkeypatch.setattr(neighbours, "CELL", 60)
    near = nearest_neighbours(points, 5)
    assert (near.places >= 0).all()
    same = np.mean([len(set(row) & set(other)) / 5 for row, other in zip(exact.places, near.places, strict=True)])
    assert same > 0.9
    again = nearest_neighbours(points, 5)
    assert (again.places == near.places).all()
