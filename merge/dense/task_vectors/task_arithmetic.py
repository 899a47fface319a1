"""Task arithmetic: what the experts learned, added to the seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from .changes import EVERYTHING, add_task_vectors


@dataclass(frozen=True)
class TaskArithmeticOptions:
    """How far to go."""

    lambda_: float = 1.0
    """What the sum of the task vectors is multiplied by."""
    normalize: bool = False
    """Divide by the sum of the weights."""


def task_arithmetic(group: TensorGroup, options: TaskArithmeticOptions) -> Any:
    """Return seed + lambda * sum_i w_i (expert_i - seed) (arXiv:2212.04089, section 2)."""
    kept = [EVERYTHING] * len(group.experts)
    return add_task_vectors(group, kept, scaling=options.lambda_, normalize=options.normalize, elect=False)
