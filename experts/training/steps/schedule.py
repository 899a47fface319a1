"""Learning rate schedule as a function of progress from 0 to 1.

Branch-Train-Merge's experts continue the seed's schedule (arXiv:2208.03306 and its released scripts): the seed covers
it from 0 to, for example, 0.5, and each expert from there to 1, independent of their numbers of steps.
"""

from __future__ import annotations

import math

from ....core.config.settings import TrainingConfig


def learning_rate(config: TrainingConfig, progress: float) -> float:
    """Return the learning rate at `progress` (0 to 1) through the full schedule.

    While a run anneals, it falls linearly to 0, from where the schedule is then.
    """
    annealing = _position(config, config.annealing_begin)
    if config.annealing is not None and progress > annealing:
        return learning_rate(config, annealing) * (config.schedule_end - progress) / (config.schedule_end - annealing)
    if progress < config.warmup:
        return config.learning_rate * progress / config.warmup
    if config.schedule == "constant" or config.warmup >= 1:
        return config.learning_rate
    floor = config.final_learning_rate
    return config.learning_rate * (
        floor + (1 - floor) * _height(config, (progress - config.warmup) / (1 - config.warmup))
    )


def _height(config: TrainingConfig, decayed: float) -> float:
    """Return the height of the learning rate above its floor, from 1 to 0, at `decayed` (0 to 1) after the warm-up."""
    if config.schedule == "linear":
        return 1 - decayed
    if config.schedule == "wsd":  # warm-up, stable, decay: arXiv:2404.06395, section 4.2
        if config.annealing is not None:
            return 1.0  # it decays while the run anneals
        share = config.decay / (1 - config.warmup)
        return min((1 - decayed) / share, 1.0) if share > 0 else 1.0
    if config.schedule == "restarts":  # SGDR: arXiv:1608.03983, section 3
        decayed = min(decayed * config.cycles % 1.0, 1.0) if decayed < 1 else 1.0
    return 0.5 * (1 + math.cos(math.pi * decayed))


def progress_at(config: TrainingConfig, step: int) -> float:
    """Return the position in the full schedule of the midpoint of a run's step `step` (0-based).

    With the midpoint, neither the first step of a warm-up nor the last step of a decay to zero has learning rate 0.
    """
    return _position(config, step + 0.5)


def _position(config: TrainingConfig, steps: float) -> float:
    """Return the position in the full schedule after a number of a run's steps."""
    begin = config.schedule_begin or 0.0
    return begin + (config.schedule_end - begin) * steps / config.steps
