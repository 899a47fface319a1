"""A linear model of the time and memory of training steps on this machine, fitted to measured steps.

Time is a sum of terms in what a step does, memory of terms in what it holds; the coefficients are fitted by non-negative least
squares of relative errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .shape import ModelShape


@dataclass(frozen=True)
class Workload:
    """A training step: a model's shape and its batch."""

    shape: ModelShape
    batch: int
    """Blocks in a step."""
    length: int
    """Tokens of a block."""

    @property
    def tokens(self) -> int:
        return self.batch * self.length


Term = Callable[[Workload], float]
TIME_TERMS: Mapping[str, Term] = {
    "matrix products": lambda step: 6.0 * step.tokens * step.shape.multiplied,
    "attention": lambda step: float(step.tokens) * step.length * step.shape.hidden * step.shape.layers,
    "activations": lambda step: (
        float(step.tokens) * step.shape.layers * (4 * step.shape.hidden + step.shape.feed_forward)
    ),
    "logits": lambda step: float(step.tokens) * step.shape.vocabulary,
    "update": lambda step: float(step.shape.parameters),
    "calls": lambda step: float(step.shape.layers),
}
MEMORY_TERMS: Mapping[str, Term] = {
    "process": lambda step: 1.0,
    "weights, gradients, moments": lambda step: float(step.shape.parameters),
    "activations": lambda step: (
        float(step.tokens) * step.shape.layers * (4 * step.shape.hidden + step.shape.feed_forward)
    ),
    "logits": lambda step: float(step.tokens) * step.shape.vocabulary,
}


@dataclass(frozen=True)
class Measured:
    """The measured step of a workload."""

    workload: Workload
    seconds: float
    bytes: float
    """Largest memory of the process."""


@dataclass(frozen=True)
class StepModel:
    """Fitted coefficients: seconds and bytes per unit of each term."""

    seconds: Mapping[str, float]
    bytes: Mapping[str, float]

    def step_seconds(self, workload: Workload) -> float:
        """Return the predicted time of a step."""
        return sum(factor * TIME_TERMS[name](workload) for name, factor in self.seconds.items())

    def peak_bytes(self, workload: Workload) -> float:
        """Return the predicted largest memory of the process."""
        return sum(factor * MEMORY_TERMS[name](workload) for name, factor in self.bytes.items())


def fitted(measured: Sequence[Measured]) -> StepModel:
    """Fit the model to measured steps, of at least as many workloads as it has terms."""
    return StepModel(
        _fit(TIME_TERMS, measured, [one.seconds for one in measured]),
        _fit(MEMORY_TERMS, measured, [one.bytes for one in measured]),
    )


def _fit(terms: Mapping[str, Term], measured: Sequence[Measured], values: Sequence[float]) -> dict[str, float]:
    import numpy as np
    from scipy.optimize import nnls

    if len(measured) < len(terms):
        raise ValueError(f"{len(measured)} measured steps do not determine {len(terms)} coefficients")
    rows = np.array([[term(one.workload) for term in terms.values()] for one in measured]) / np.array(values)[:, None]
    scale = rows.max(axis=0)
    factors, _ = nnls(rows / scale, np.ones(len(values)))
    return dict(zip(terms, (factors / scale).tolist(), strict=True))
