"""Clusters of equal size: exact assignment as the oracle, sizes, duplicates, and the plain kind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from expertctl.core.text.clustering.balanced_kmeans import (
    balanced_assignment,
    first_centres,
    fit,
    squared_distances,
)


def best_cost(cost: np.ndarray) -> float:
    """Return the least cost of equal clusters, by the exact algorithm over as many copies of each as it has places."""
    points, clusters = cost.shape
    places = np.repeat(np.arange(clusters), -(-points // clusters))
    rows, columns = linear_sum_assignment(cost[:, places])
    return float(cost[:, places][rows, columns].sum())


@given(st.integers(1, 80), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_sizes_differ_by_one_at_most_at_nearly_the_least_cost(points: int, clusters: int, seed: int) -> None:
    cost = np.random.default_rng(seed).random((points, clusters))
    chosen = balanced_assignment(cost)
    sizes = np.bincount(chosen, minlength=clusters)
    assert sizes.max() - sizes.min() <= 1
    if points % clusters == 0:
        assert cost[np.arange(points), chosen].sum() <= best_cost(cost) + 1e-9


def test_equal_points_are_divided_all_the_same() -> None:
    cost = np.ones((1000, 7))
    assert set(np.bincount(balanced_assignment(cost)).tolist()) == {142, 143}


def test_many_points_near_one_centre_overflow_to_the_next() -> None:
    cost = np.stack([np.linspace(0, 1, 900), np.full(900, 2.0), np.full(900, 3.0)], axis=1)
    chosen = balanced_assignment(cost)
    assert (chosen[:300] == 0).all()  # those with least to lose go
    assert np.bincount(chosen).tolist() == [300, 300, 300]


def points(seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    middles = np.eye(3, 8) * 5
    return np.concatenate(
        [generator.normal(middle, 0.1, (size, 8)) for middle, size in zip(middles, (60, 60, 60), strict=True)]
    )


def test_groups_that_are_far_apart_are_found() -> None:
    for balanced in (True, False):
        fitted = fit(points(), 3, seed=1, balanced=balanced)
        labels = squared_distances(points(), fitted.centres).argmin(axis=1)
        assert sorted(np.bincount(labels).tolist()) == [60, 60, 60]
        assert len({tuple(set(labels[begin : begin + 60])) for begin in (0, 60, 120)}) == 3


def test_the_same_random_seed_gives_the_same_centres() -> None:
    first, same, other = (fit(points(), 3, seed=seed).centres for seed in (1, 1, 2))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_first_centres_of_duplicates_are_those_duplicates() -> None:
    assert np.array_equal(first_centres(np.ones((5, 2)), 3, seed=0), np.ones((3, 2)))
    assert fit(np.ones((5, 2)), 3).centres.shape == (3, 2)


@pytest.mark.parametrize("count", [1, 5])
def test_one_cluster_and_as_many_as_points(count: int) -> None:
    fitted = fit(np.arange(10.0).reshape(5, 2), count)
    assert sorted(fitted.centres.tolist()) == ([[4.0, 5.0]] if count == 1 else np.arange(10.0).reshape(5, 2).tolist())
