"""k-means whose clusters have equal sizes (Cluster-Branch-Train-Merge, arXiv:2303.14177, section 2.1).

The paper assigns points by an auction among documents. With few clusters and many points, coordinate ascent on the
dual problem is faster: each cluster has a price, each point is assigned to the cluster with the lowest distance plus
price, and each price in turn is set to match demand with the cluster's capacity.
Shapes: N = points, K = clusters, d = width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SWEEPS = 50
"""Maximum number of sweeps over all prices."""
EXCHANGES = 200
"""Maximum number of cyclic exchanges."""


@dataclass(frozen=True)
class Fit:
    """Result of k-means."""

    centres: NDArray[np.float64]
    """(K, d)."""
    rounds: int
    """Number of rounds run."""
    shift: float
    """Summed movement of the centres in the last round."""


def fit(points_Nd: NDArray[Any], count: int, *, seed: int = 0, rounds: int = 20, balanced: bool = True) -> Fit:
    """Return the centres of `count` clusters; with `balanced`, cluster sizes differ by at most one point."""
    centres = first_centres(points_Nd, count, seed)
    shift, rounds_run = float("inf"), 0
    for rounds_run in range(1, rounds + 1):  # noqa: B007  # reported in the result
        cost = squared_distances(points_Nd, centres)
        assignment = balanced_assignment(cost) if balanced else cost.argmin(axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, assignment, points_Nd)
        sizes = np.bincount(assignment, minlength=count)[:, None]
        new_centres = np.where(sizes > 0, sums / np.maximum(sizes, 1), centres)
        shift = float(np.linalg.norm(new_centres - centres, axis=1).sum())
        centres = new_centres
        if shift < 1e-3:
            break
    return Fit(centres, rounds_run, shift)


def first_centres(points_Nd: NDArray[Any], count: int, seed: int) -> NDArray[np.float64]:
    """Return initial centres by k-means++ seeding, (count, d)."""
    generator = np.random.default_rng(seed)
    chosen = [int(generator.integers(len(points_Nd)))]
    nearest = squared_distances(points_Nd, points_Nd[chosen]).ravel()
    while len(chosen) < count:
        total = nearest.sum()
        probabilities = nearest / total if total > 0 else None  # uniform if all points are duplicates
        chosen.append(int(generator.choice(len(points_Nd), p=probabilities)))
        nearest = np.minimum(nearest, squared_distances(points_Nd, points_Nd[chosen[-1:]]).ravel())
    return np.asarray(points_Nd[chosen], dtype=np.float64)


def squared_distances(points_Nd: NDArray[Any], centres_Kd: NDArray[Any]) -> NDArray[np.float64]:
    """Return squared Euclidean distances, (N, K)."""
    points = np.asarray(points_Nd, dtype=np.float64)
    centres = np.asarray(centres_Kd, dtype=np.float64)
    cross = points @ centres.T
    distances: NDArray[np.float64] = (points**2).sum(axis=1)[:, None] - 2 * cross + (centres**2).sum(axis=1)
    return np.maximum(distances, 0, out=distances)


def balanced_assignment(cost_NK: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return each point's cluster with near-minimal total cost, subject to sizes that differ by at most one; (N,).

    Prices come first. The remaining imbalance is removed by moving the points with the least regret. Cyclic exchanges
    of points then lower the total cost, up to `EXCHANGES` times; the result is optimal once no such exchange is left.
    """
    num_points, count = cost_NK.shape
    sizes = np.full(count, num_points // count)
    sizes[: num_points % count] += 1
    prices = np.zeros(count)
    for _ in range(SWEEPS):
        previous_prices = prices.copy()
        for cluster in range(count):
            others = np.delete(cost_NK + prices, cluster, axis=1)
            if not others.shape[1]:
                return np.zeros(num_points, np.int64)
            margin = others.min(axis=1) - cost_NK[:, cluster]
            prices[cluster] = _price(margin, int(sizes[cluster]))
        prices -= prices.mean()
        assignment = (cost_NK + prices).argmin(axis=1)
        if np.abs(np.bincount(assignment, minlength=count) - sizes).sum() <= count or np.allclose(
            prices, previous_prices, rtol=0, atol=1e-9
        ):
            break
    priced_NK = cost_NK + prices
    return _exchange_cyclically(cost_NK, _balance(priced_NK, priced_NK.argmin(axis=1), sizes))


def _price(margin_N: NDArray[np.float64], size: int) -> float:
    """Return the price at which exactly `size` points have a larger margin."""
    if size == 0:
        return float(margin_N.max()) + 1.0
    if size >= len(margin_N):
        return float(margin_N.min()) - 1.0
    ordered = np.partition(margin_N, (len(margin_N) - size - 1, len(margin_N) - size))
    return float((ordered[len(margin_N) - size - 1] + ordered[len(margin_N) - size]) / 2)


def _balance(
    cost_NK: NDArray[np.float64], assignment_N: NDArray[np.int64], sizes_K: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Move points out of clusters over their size, in order of increasing loss."""
    assignment = assignment_N.astype(np.int64)
    excess = np.bincount(assignment, minlength=len(sizes_K)) - sizes_K
    while (excess > 0).any():
        full = np.flatnonzero(excess > 0)
        free = np.flatnonzero(excess < 0)
        movable = np.flatnonzero(np.isin(assignment, full))
        loss = cost_NK[np.ix_(movable, free)] - cost_NK[movable, assignment[movable]][:, None]
        best = loss.argmin(axis=1)
        for index in np.argsort(loss[np.arange(len(movable)), best], kind="stable"):
            point, target = movable[index], free[best[index]]
            if excess[assignment[point]] > 0 and excess[target] < 0:
                excess[assignment[point]] -= 1
                excess[target] += 1
                assignment[point] = target
    return assignment


def _exchange_cyclically(cost_NK: NDArray[np.float64], assignment_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Exchange points along cycles of clusters while that lowers the total cost."""
    assignment, count = assignment_N, cost_NK.shape[1]
    rows = np.arange(len(assignment))
    for _ in range(EXCHANGES):
        increase = cost_NK - cost_NK[rows, assignment][:, None]
        cheapest, mover = np.full((count, count), np.inf), np.zeros((count, count), np.int64)
        for cluster in range(count):
            members = np.flatnonzero(assignment == cluster)
            if members.size:
                best = increase[members].argmin(axis=0)
                mover[cluster] = members[best]
                cheapest[cluster] = increase[members[best], np.arange(count)]
        np.fill_diagonal(cheapest, np.inf)
        cycle = _negative_cycle(cheapest)
        if not cycle:
            break
        for cluster, target in zip(cycle, (*cycle[1:], cycle[0]), strict=True):
            assignment[mover[cluster, target]] = target
    return assignment


def _negative_cycle(weights_KK: NDArray[np.float64]) -> list[int]:
    """Return the clusters of a negative-weight cycle in order (Bellman-Ford), empty if there is none."""
    count = len(weights_KK)
    distance, predecessor = np.zeros(count), np.full(count, -1)
    for _ in range(count):
        through = distance[:, None] + weights_KK
        best = through.argmin(axis=0)
        shorter = through[best, np.arange(count)] < distance - 1e-12
        if not shorter.any():
            return []
        distance = np.where(shorter, through[best, np.arange(count)], distance)
        predecessor[shorter] = best[shorter]
    cluster = int(np.flatnonzero(shorter)[0])
    for _ in range(count):  # after `count` steps back the walk is inside the cycle
        cluster = int(predecessor[cluster])
    cycle = [cluster]
    while (cluster := int(predecessor[cluster])) != cycle[0]:
        cycle.append(cluster)
    return cycle[::-1]
