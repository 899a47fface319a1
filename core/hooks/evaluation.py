"""Evaluation: evaluators and the scores that they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..text.token_store import TokenWindows


@dataclass(frozen=True)
class Score:
    """The values of one evaluator for one model on one domain."""

    values: Mapping[str, float]
    """Metric name -> value, such as `{"bits_per_byte": 1.9}`."""
    tokens: int
    """Number of scored tokens."""


@dataclass(frozen=True)
class Metric:
    """One value that an evaluator returns."""

    name: str
    """Key in `Score.values` and in JSON output."""
    title: str
    """Name in tables, such as `bits per byte`."""
    higher_is_better: bool = False

    def best(self, values: Mapping[str, float]) -> str:
        """Return the model with the best value, the first one of equals."""
        return (max if self.higher_is_better else min)(values, key=lambda model: values[model])

    def is_worse(self, value: float, other: float) -> bool:
        """Return whether `value` is worse than `other`."""
        return value < other if self.higher_is_better else value > other


@dataclass(frozen=True)
class Evaluator:
    """Scores a model on the test part of a domain."""

    name: str
    summary: str
    metrics: tuple[Metric, ...]
    """The values that it returns; comparisons and gates use the first one."""
    evaluate: Callable[[PreTrainedModel, TokenWindows], Score]
    """`evaluate(model, windows)`; `Score.values` holds a number for every metric."""
