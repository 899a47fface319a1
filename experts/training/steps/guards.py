"""Guards against diverging: when steps are skipped too often, and when the loss has risen for good.

A step is skipped if its loss or gradient is not finite. A spike is a loss that stays high: the median of the last five losses
is above the median of a window before them by more than `spike_deviations` robust standard deviations, which are 1.4826
times the median absolute deviation in the window and at least 0.01 nats.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....core.config.settings import TrainingConfig
from ....core.errors import UserError

RECENT = 5
"""Steps whose median loss is compared with the window before them."""
LEAST_DEVIATION = 0.01
"""Smallest robust standard deviation, in nats, so that a nearly constant loss does not make every change a spike."""
WATCHED = 100
"""Steps among which at most `skipped_steps` may be skipped."""


@dataclass(frozen=True)
class Spike:
    """A rise of the loss that lasted."""

    first_step: int
    """The first of the last steps whose loss was above the limit."""
    loss: float
    """Median of the last losses, in nats per token."""
    limit: float


class Guards:
    """What is known of a run's last steps; part of its checkpoints."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._losses: deque[tuple[int, float]] = deque(maxlen=config.spike_window + RECENT)
        self._skipped: deque[int] = deque(maxlen=config.skipped_steps + 1)
        self.rollbacks = 0

    def watch(self, step: int, loss: float, *, skipped: bool) -> Spike | None:
        """Take a step into account; returns the spike that it completes, if any.

        Raises `UserError` if too many steps were skipped, or training was taken back too often.
        """
        if skipped:
            self._skipped.append(step)
            if len(self._skipped) > self._config.skipped_steps and step - self._skipped[0] < WATCHED:
                raise UserError(
                    f"training diverged: loss or gradient was not finite in {len(self._skipped)} of the last {WATCHED} steps, "
                    f"lastly in step {step}; start over with a lower learning_rate, or set clip"
                )
            return None
        part_begin = max((begin for begin in self._config.part_begins if begin < step), default=0)
        if self._losses and self._losses[-1][0] <= part_begin:
            self._losses.clear()  # losses of other blocks tell nothing of these
        self._losses.append((step, loss))
        spike = self._spike()
        if spike is not None and self.rollbacks == self._config.rollbacks:
            raise UserError(
                f"training diverged: at step {step} the loss {spike.loss:.3f} is above {spike.limit:.3f} after {self.rollbacks} "
                "returns to a checkpoint; start over with a lower learning_rate, or raise spike_deviations"
            )
        return spike

    @property
    def is_calm(self) -> bool:
        """Whether the last loss is no part of a spike, so that a checkpoint is worth keeping."""
        limit = self._limit()
        return limit is None or self._losses[-1][1] <= limit

    @property
    def is_ready(self) -> bool:
        """Whether the window is full, so that a spike would be found."""
        return self._config.spike_deviations is not None and len(self._losses) == self._losses.maxlen

    def _limit(self) -> float | None:
        """Return the loss above which recent losses are a spike; None before the window is full."""
        if not self.is_ready or self._config.spike_deviations is None:
            return None
        window = [loss for _, loss in self._losses][:-RECENT]
        middle = statistics.median(window)
        deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in window)
        return middle + self._config.spike_deviations * max(deviation, LEAST_DEVIATION)

    def _spike(self) -> Spike | None:
        limit = self._limit()
        if limit is None:
            return None
        recent = list(self._losses)[-RECENT:]
        middle = statistics.median(loss for _, loss in recent)
        if middle <= limit:
            return None
        return Spike(next(step for step, loss in recent if loss > limit), middle, limit)

    # --- state ---

    def state(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return {
            "losses": [list(pair) for pair in self._losses],
            "skipped": list(self._skipped),
            "rollbacks": self.rollbacks,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Load a state; one of a checkpoint without guards is empty."""
        self._losses.clear()
        self._losses.extend((int(step), float(loss)) for step, loss in state.get("losses", ()))
        self._skipped.clear()
        self._skipped.extend(int(step) for step in state.get("skipped", ()))
        self.rollbacks = int(state.get("rollbacks", 0))


def is_finite(loss: Tensor, gradient_norm: Tensor) -> bool:
    """Return whether a step may change the weights; waits for the device once."""
    return bool(torch.isfinite(loss + gradient_norm))
