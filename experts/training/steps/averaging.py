"""Averages of the weights over the last steps, which can take the place of the last weights (arXiv:1803.05407, section 3).

`last`: the mean of `average_points` states of the weights, `average_every` steps apart, the last of them at the end. `ema`: the
exponential moving average of every step's weights, which begins at the first. Of a run that anneals, both have only weights of the
annealing (arXiv:2407.21783, section 3.4.3).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ....core.config.settings import TrainingConfig

FIELD = "average"
"""Name of the average beside the fields of a parameter's optimiser state."""


class WeightAverage:
    """The average of a run's trained parameters so far; part of its checkpoints."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self.tensors: dict[str, Tensor] = {}
        """The average by parameter, in float32; empty before the first weights that it includes."""

    def number_at(self, step: int) -> int:
        """Return the number of states of the weights that the average of `step` finished steps includes; 0: none."""
        config = self._config
        if config.average == "none":
            return 0
        begin = config.annealing_begin if config.annealing is not None else 0
        if config.average == "ema":
            return max(step - begin, 0)
        first = max(config.steps - (config.average_points - 1) * config.average_every, 1)
        if config.annealing is not None:
            points = min(config.average_points, (config.steps - begin - 1) // config.average_every + 1)
            first = config.steps - (points - 1) * config.average_every
        return 0 if step < first else 1 + (step - first) // config.average_every

    @torch.no_grad()
    def update(self, step: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the weights after `step` finished steps into account."""
        number = self.number_at(step)
        if number == self.number_at(step - 1):
            return
        share = 1 / number if self._config.average == "last" else max(1 - self._config.average_decay, 1 / number)
        for name, parameter in parameters.items():
            if number == 1:
                self.tensors[name] = parameter.detach().float().clone()
            else:
                self.tensors[name].lerp_(parameter.detach().float(), share)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the average of a checkpoint; without one, it begins anew."""
        self.tensors = dict(tensors)

    @torch.no_grad()
    def apply(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put the average in the place of the weights, if there is one."""
        for name, tensor in self.tensors.items():
            parameters[name].copy_(tensor)
