"""k-means whose clusters have equal sizes (Cluster-Branch-Train-Merge, arXiv:2303.14177, section 2.1).

The paper assigns by an auction among documents. With few clusters and many points the same problem is solved sooner from its
dual: each cluster has a price, every point goes where distance plus price is least, and prices are set, one
cluster at a time, to where exactly as many points want it as it may hold. Shapes: N = points, K = clusters, d = width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SWEEPS = 50
"""Rounds over all prices, at most."""
EXCHANGES = 200
"""Rings of points that change places, at most."""


@dataclass(frozen=True)
class Fit:
    """What k-means found."""

    centres: NDArray[np.float64]
    """(K, d)."""
    rounds: int
    shift: float
    """How far the centres moved in the last round, summed."""


def fit(
    points_Nd: NDArray[Any], count: int, *, seed: int = 0, rounds: int = 20, balanced: bool = True
) -> Fit:
    """Return centres of `count` clusters of points; with `balanced`, each of as many points as the others, within one."""
    import numpy as np

    centres = first_centres(points_Nd, count, seed)
    shift, done = float("inf"), 0
    for done in range(1, rounds + 1):  # noqa: B007  # told below
        cost = squared_distances(points_Nd, centres)
        chosen = balanced_assignment(cost) if balanced else cost.argmin(axis=1)
        sums = np.zeros_like(centres)
        np.add.at(sums, chosen, points_Nd)
        sizes = np.bincount(chosen, minlength=count)[:, None]
        moved = np.where(sizes > 0, sums / np.maximum(sizes, 1), centres)
        shift = float(np.linalg.norm(moved - centres, axis=1).sum())
        centres = moved
        if shift < 1e-3:
            break
    return Fit(centres, done, shift)


def first_centres(points_Nd: NDArray[Any], count: int, seed: int) -> NDArray[np.float64]:
    """Return starting centres: points drawn far from those drawn before (k-means++)."""
    import numpy as np

    generator = np.random.default_rng(seed)
    chosen = [int(generator.integers(len(points_Nd)))]
    nearest = squared_distances(points_Nd, points_Nd[chosen]).ravel()
    while len(chosen) < count:
        total = nearest.sum()
        chance = nearest / total if total > 0 else None  # duplicates only: any will do
        chosen.append(int(generator.choice(len(points_Nd), p=chance)))
        nearest = np.minimum(nearest, squared_distances(points_Nd, points_Nd[chosen[-1:]]).ravel())
    return np.asarray(points_Nd[chosen], dtype=np.float64)


def squared_distances(points_Nd: NDArray[Any], centres_Kd: NDArray[Any]) -> NDArray[np.float64]:
    """Return (N, K)."""
    import numpy as np

    points = np.asarray(points_Nd, dtype=np.float64)
    centres = np.asarray(centres_Kd, dtype=np.float64)
    cross = points @ centres.T
    found: NDArray[np.float64] = (points**2).sum(axis=1)[:, None] - 2 * cross + (centres**2).sum(axis=1)
    return np.maximum(found, 0, out=found)


def balanced_assignment(cost_NK: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return for each point its cluster, so that sizes differ by one at most, at nearly the least total cost.

    Prices come first; what they leave out of balance is moved by least regret, and then points change places in rings for as
    long as that lowers the total, `EXCHANGES` times at most. Where no ring is left, the total is the least there is.
    """
    import numpy as np

    num_points, count = cost_NK.shape
    sizes = np.full(count, num_points // count)
    sizes[: num_points % count] += 1
    prices = np.zeros(count)
    for _ in range(SWEEPS):
        before = prices.copy()
        for cluster in range(count):
            others = np.delete(cost_NK + prices, cluster, axis=1)
            if not others.shape[1]:
                return np.zeros(num_points, np.int64)
            margin = others.min(axis=1) - cost_NK[:, cluster]
            prices[cluster] = _price(margin, int(sizes[cluster]))
        prices -= prices.mean()
        chosen = (cost_NK + prices).argmin(axis=1)
        if np.abs(np.bincount(chosen, minlength=count) - sizes).sum() <= count or np.allclose(
            prices, before, rtol=0, atol=1e-9
        ):
            break
    return _exchanged(cost_NK, _evened(cost_NK + prices, (cost_NK + prices).argmin(axis=1), sizes))


def _price(margin_N: NDArray[np.float64], size: int) -> float:
    """Return the price at which exactly `size` points have more to gain than it costs."""
    import numpy as np

    if size == 0:
        return float(margin_N.max()) + 1.0
    if size >= len(margin_N):
        return float(margin_N.min()) - 1.0
    ordered = np.partition(margin_N, (len(margin_N) - size - 1, len(margin_N) - size))
    return float((ordered[len(margin_N) - size - 1] + ordered[len(margin_N) - size]) / 2)


def _evened(
    cost_NK: NDArray[np.float64], chosen_N: NDArray[np.int64], sizes_K: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Move points out of clusters that hold too many, those first that lose least."""
    import numpy as np

    chosen = chosen_N.astype(np.int64)
    excess = np.bincount(chosen, minlength=len(sizes_K)) - sizes_K
    while (excess > 0).any():
        full = np.flatnonzero(excess > 0)
        free = np.flatnonzero(excess < 0)
        movable = np.flatnonzero(np.isin(chosen, full))
        loss = cost_NK[np.ix_(movable, free)] - cost_NK[movable, chosen[movable]][:, None]
        best = loss.argmin(axis=1)
        for place in np.argsort(loss[np.arange(len(movable)), best], kind="stable"):
            point, target = movable[place], free[best[place]]
            if excess[chosen[point]] > 0 and excess[target] < 0:
                excess[chosen[point]] -= 1
                excess[target] += 1
                chosen[point] = target
    return chosen


def _exchanged(cost_NK: NDArray[np.float64], chosen_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Let points change places in rings through the clusters while that lowers the total cost."""
    import numpy as np

    chosen, count = chosen_N, cost_NK.shape[1]
    rows = np.arange(len(chosen))
    for _ in range(EXCHANGES):
        gained = cost_NK - cost_NK[rows, chosen][:, None]
        cheapest, mover = np.full((count, count), np.inf), np.zeros((count, count), np.int64)
        for cluster in range(count):
            members = np.flatnonzero(chosen == cluster)
            if members.size:
                best = gained[members].argmin(axis=0)
                mover[cluster] = members[best]
                cheapest[cluster] = gained[members[best], np.arange(count)]
        np.fill_diagonal(cheapest, np.inf)
        ring = _ring_below_zero(cheapest)
        if not ring:
            break
        for cluster, target in zip(ring, (*ring[1:], ring[0]), strict=True):
            chosen[mover[cluster, target]] = target
    return chosen


def _ring_below_zero(weights_KK: NDArray[np.float64]) -> list[int]:
    """Return clusters that form a ring of negative total weight, in order (Bellman and Ford); empty: there is none."""
    import numpy as np

    count = len(weights_KK)
    distance, before = np.zeros(count), np.full(count, -1)
    for _ in range(count):
        through = distance[:, None] + weights_KK
        best = through.argmin(axis=0)
        shorter = through[best, np.arange(count)] < distance - 1e-12
        if not shorter.any():
            return []
        distance = np.where(shorter, through[best, np.arange(count)], distance)
        before[shorter] = best[shorter]
    place = int(np.flatnonzero(shorter)[0])
    for _ in range(count):
        place = int(before[place])
    ring = [place]
    while (place := int(before[place])) != ring[0]:
        ring.append(place)
    return ring[::-1]
