"""Task arithmetic: add the weighted sum of the task vectors to the seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from .changes import KEEP_ALL, add_task_vectors


@dataclass(frozen=True)
class TaskArithmeticOptions:
    """Options of task arithmetic."""

    lambda_: float = 1.0
    """Scaling factor of the summed task vectors."""
    normalize: bool = False
    """Divide by the sum of the weights."""


def task_arithmetic(group: TensorGroup, options: TaskArithmeticOptions) -> Any:
    """Return seed + lambda * sum_i w_i (expert_i - seed) (arXiv:2212.04089, section 2)."""
    filters = [KEEP_ALL] * len(group.experts)
    return add_task_vectors(group, filters, scaling=options.lambda_, normalize=options.normalize, elect=False)
