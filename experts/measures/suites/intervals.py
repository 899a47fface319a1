"""Bootstrap intervals over units that are evaluated independently: questions, documents. Shapes: N = units, R = resamples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
NUMBERS_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference has a sign that the interval does not doubt."""
        return self.low > 0 or self.high < 0

    def as_json(self) -> dict[str, float]:
        """Return the three numbers by name."""
        return {"value": self.value, "low": self.low, "high": self.high}


class Bootstrap:
    """Resamples of N units with replacement, the same ones for all that is measured on the units (Efron 1979).

    What is computed from the same resamples is paired: the interval of a difference of two models is that of their
    difference on the same units, from which the units' own difficulty has gone.
    """

    def __init__(self, num_units: int, *, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.num_units, self.resamples, self._seed = num_units, resamples, seed

    def sums(self, values_NM: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sums of M quantities over each resample, (R, M)."""
        import numpy as np

        random = np.random.default_rng(self._seed)
        shares = np.full(self.num_units, 1 / self.num_units)
        rows = max(NUMBERS_AT_A_TIME // self.num_units, 1)
        pieces = []
        for begin in range(0, self.resamples, rows):
            counts = random.multinomial(self.num_units, shares, size=min(rows, self.resamples - begin))
            pieces.append(counts @ values_NM)
        return np.concatenate(pieces)

    def means(self, values: Sequence[float]) -> NDArray[np.float64]:
        """Return the mean over each resample, (R,)."""
        import numpy as np

        return self.sums(np.asarray(values, dtype=np.float64)[:, None])[:, 0] / self.num_units


def interval_of(value: float, resampled: NDArray[np.float64]) -> Interval:
    """Return an estimate with the percentile interval of its resamples."""
    import numpy as np

    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of one value per unit with its interval."""
    return interval_of(sum(values) / len(values), Bootstrap(len(values)).means(values))


def share_interval(values: Sequence[float]) -> Interval:
    """Return the mean of values from 0 to 1, such as right answers, with its interval.

    Resamples of units that are all right, or all wrong, are all equal; the exact binomial limit (Clopper and Pearson 1934)
    takes the place of theirs then.
    """
    interval = mean_interval(values)
    bound = ((1 - LEVEL) / 2) ** (1 / len(values))
    if all(value == 1 for value in values):
        return Interval(1.0, bound, 1.0)
    return Interval(0.0, 0.0, 1 - bound) if not any(values) else interval


def mean_difference(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Return how much larger the mean is than that of others on the same units, with its paired interval."""
    return mean_interval([value - other for value, other in zip(values, others, strict=True)])


def paired(names: Sequence[str], difference: Callable[[str, str], Interval]) -> list[tuple[str, str, Interval]]:
    """Return the difference of every two models, the later one as the first."""
    return [
        (second, first, difference(second, first))
        for number, first in enumerate(names)
        for second in names[number + 1 :]
    ]
