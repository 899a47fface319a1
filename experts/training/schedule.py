"""The learning rate as a function of progress through the whole schedule.

Branch-Train-Merge's experts continue the seed's schedule (arXiv:2208.03306 and its released scripts): the
seed runs from 0 to, say, 0.5 of it, and each expert from there to 1, however many steps either takes.
"""

from __future__ import annotations

import math

from ...core.config.settings import TrainingConfig


def learning_rate(config: TrainingConfig, progress: float) -> float:
    """Return the learning rate at `progress` (0 to 1) of the whole schedule."""
    if progress < config.warmup:
        return config.learning_rate * progress / config.warmup
    if config.schedule == "constant" or config.warmup >= 1:
        return config.learning_rate
    done = (progress - config.warmup) / (1 - config.warmup)
    falling = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    floor = config.final_learning_rate
    return config.learning_rate * (floor + (1 - floor) * falling)


def progress_at(config: TrainingConfig, step: int) -> float:
    """Return how far the middle of step `step` (0-based) of a run lies in the whole schedule.

    The middle, so that neither the first step of a warm-up nor the last of a decay to zero is wasted.
    """
    begin = config.schedule_begin or 0.0
    return begin + (config.schedule_end - begin) * (step + 0.5) / config.steps
