"""Evaluation: evaluators and the scores that they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..text.token_store import TokenWindows, Windows


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
class Division:
    """How an evaluator scores a text batch by batch, so that several processes can share the batches.

    Batches do not depend on the number of processes, so that the score does not either. All functions belong to a module.
    """

    batch_size: Callable[[PreTrainedModel, TokenWindows], int]
    """`batch_size(model, windows)` is the number of windows in a batch."""
    partial: Callable[[PreTrainedModel, Windows], Any]
    """`partial(model, batch)` measures one batch, without gradients; what it returns can be pickled."""
    merge_scores: Callable[[TokenWindows, Sequence[Any]], Score]
    """`merge_scores(windows, partials)` returns the score of the whole text; `partials` are those of all batches, in order."""

    def partials(
        self, model: PreTrainedModel, windows: TokenWindows, begin: int = 0, end: int | None = None
    ) -> list[Any]:
        """Return what `partial` returns for the batches with numbers `begin` to `end` (None: to the last)."""
        import torch

        with torch.inference_mode():
            batches = windows.batches(self.batch_size(model, windows), begin, end)
            return [self.partial(model, batch) for batch in batches]

    def evaluate(self, model: PreTrainedModel, windows: TokenWindows) -> Score:
        """Return the score of the whole text, in this process."""
        return self.merge_scores(windows, self.partials(model, windows))


@dataclass(frozen=True)
class Evaluator:
    """Scores a model on the test part of a domain."""

    name: str
    summary: str
    metrics: tuple[Metric, ...]
    """The values that it returns; comparisons and gates use the first one."""
    evaluate: Callable[[PreTrainedModel, TokenWindows], Score]
    """`evaluate(model, windows)`; `Score.values` holds a number for every metric."""
    division: Division | None = None
    """How several processes share a text, with `evaluate` as its `evaluate`; None: only one process can score it."""
