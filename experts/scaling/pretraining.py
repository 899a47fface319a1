"""What pretraining a seed takes, from its shape: operations and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...core.config.settings import TrainingConfig
from .shape import shape_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class PretrainingCost:
    """The cost of pretraining one model."""

    parameters: int
    operations: float
    """Floating-point operations of all passes: 6 for each token and parameter that it is multiplied with, and 12 for each token,
    layer, hidden unit and position (arXiv:2204.02311, appendix B)."""
    state_bytes: int
    """Weights, gradients and two moments of AdamW in float32, without activations."""
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters; {self.tokens:,} tokens take {self.operations:.2g} floating-point operations; weights, "
            f"gradients and moments take {self.state_bytes / 1e6:,.0f} MB, activations come on top"
        )


def pretraining_cost(config: PretrainedConfig, training: TrainingConfig) -> PretrainingCost:
    """Return the cost of pretraining a model of a configuration; allocates none of it."""
    shape = shape_of(config)
    length = sum(len(steps) * length for steps, length in training.lengths) / training.steps
    attention = 12 * shape.layers * shape.hidden * length
    operations = float(training.trained_tokens) * (6 * shape.multiplied + attention)
    return PretrainingCost(shape.parameters, operations, 16 * shape.parameters, training.trained_tokens)
