"""Bootstrap intervals: what they cover, and that differences are paired."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from expertctl.experts.measures.suites.intervals import (
    Bootstrap,
    mean_difference,
    mean_interval,
    paired,
    share_interval,
)


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=400)
    interval = mean_interval(list(values))
    error = values.std() / np.sqrt(len(values))
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_nineteen_of_twenty_intervals_cover_the_truth() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        interval = share_interval((random.random(100) < 0.7).astype(float).tolist())
        covered += interval.low <= 0.7 <= interval.high
    assert 178 <= covered <= 198


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_shares_of_none_and_all_have_the_exact_binomial_limit(value: float) -> None:
    interval = share_interval([value] * 20)
    exact = binomtest(int(value * 20), 20).proportion_ci(0.95, method="exact")
    assert (interval.low, interval.high) == pytest.approx((exact.low, exact.high))


def test_a_difference_is_paired() -> None:
    random = np.random.default_rng(2)
    hard = random.normal(0, 10, size=200)
    better = hard + random.normal(0.5, 0.1, size=200)
    difference = mean_difference(list(better), list(hard))
    assert difference.excludes_zero
    assert difference.high - difference.low < 0.1
    apart = mean_interval(list(better)).high - mean_interval(list(better)).low
    assert apart > 2, "without pairing, the units' own differences hide it"


def test_resamples_are_the_same_for_all_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from expertctl.experts.measures.suites import intervals

    values = np.random.default_rng(3).random((50, 2))
    sums = Bootstrap(50).sums(values)
    assert sums.shape == (2000, 2)
    assert np.allclose(sums[:, 1], Bootstrap(50).sums(values[:, 1:])[:, 0])
    monkeypatch.setattr(intervals, "NUMBERS_AT_A_TIME", 50 * 7)
    assert np.allclose(Bootstrap(50).sums(values), sums)


def test_every_two_models_are_compared_once() -> None:
    values = {"a": [1.0, 0.0], "b": [1.0, 1.0], "c": [0.0, 0.0]}
    found = paired(list(values), lambda one, other: mean_difference(values[one], values[other]))
    assert [(one, other, interval.value) for one, other, interval in found] == [
        ("b", "a", 0.5),
        ("c", "a", -0.5),
        ("c", "b", -1.0),
    ]
