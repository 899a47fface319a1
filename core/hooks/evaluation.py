"""Evaluation: evaluators and the scores that they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..text.token_store import TokenBlocks


@dataclass(frozen=True)
class Score:
    """What one evaluator found for one model on one domain."""

    values: Mapping[str, float]
    """Metric name -> value, such as `{"bits_per_byte": 1.9}`."""
    tokens: int


@dataclass(frozen=True)
class Evaluator:
    """Scores a model on the validation part of a domain."""

    name: str
    summary: str
    metrics: tuple[str, ...]
    """Names of the values that it gives, the first one being what tables show."""
    evaluate: Callable[[PreTrainedModel, TokenBlocks], Score]
