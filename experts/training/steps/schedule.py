"""Learning rate schedule as a function of progress from 0 to 1.

Branch-Train-Merge's experts continue the seed's schedule (arXiv:2208.03306 and its released scripts): the seed covers
it from 0 to, for example, 0.5, and each expert from there to 1, independent of their numbers of steps.
"""

from __future__ import annotations

import math

from ....core.config.settings import TrainingConfig


def learning_rate(config: TrainingConfig, progress: float) -> float:
    """Return the learning rate at `progress` (0 to 1) through the full schedule."""
    if progress < config.warmup:
        return config.learning_rate * progress / config.warmup
    if config.schedule == "constant" or config.warmup >= 1:
        return config.learning_rate
    decayed = (progress - config.warmup) / (1 - config.warmup)
    factor = 1 - decayed if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * decayed))
    floor = config.final_learning_rate
    return config.learning_rate * (floor + (1 - floor) * factor)


def progress_at(config: TrainingConfig, step: int) -> float:
    """Return the position in the full schedule of the midpoint of a run's step `step` (0-based).

    With the midpoint, neither the first step of a warm-up nor the last step of a decay to zero has learning rate 0.
    """
    begin = config.schedule_begin or 0.0
    return begin + (config.schedule_end - begin) * (step + 0.5) / config.steps
