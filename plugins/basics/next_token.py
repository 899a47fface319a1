"""The objective of next-token prediction."""

from __future__ import annotations

from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.steps import Objective, ObjectiveContext, TrainingObjective


@hookimpl
def objectives() -> list[Objective]:
    """Return the default objective."""
    return [Objective("next_token", "cross-entropy of the next token, of all that count", prepare)]


def prepare(context: ObjectiveContext) -> TrainingObjective:
    """Return the loss and the blocks that every run has by default."""
    return TrainingObjective()
