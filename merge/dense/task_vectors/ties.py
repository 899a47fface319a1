"""TIES: trim small elements of task vectors, elect a sign per element, average the values of that sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ....core.errors import UserError
from ....core.hooks.merging import KeptElements, PerExpert, Survey, TensorGroup
from ....core.hooks.option_checks import check_range
from ..largest import first_largest_mask, largest_magnitudes
from .changes import ElementFilter, add_task_vectors, density_filters
from .model_threshold import ModelThresholds, Threshold


@dataclass(frozen=True)
class TiesOptions:
    """Options of TIES."""

    density: PerExpert = 0.2
    """Fraction of each task vector's elements that is kept, largest magnitude first; 0.2 in the paper."""
    lambda_: float = 1.0
    """Scaling factor of the merged task vector."""
    normalize: bool = True
    """Divide by the sum of the weights of the experts that agree with the elected sign (disjoint mean)."""
    trim: Literal["tensor", "model"] = "tensor"
    """Whether `density` applies to every tensor by itself, or to all elements of a task vector together, as in the
    paper; `model` reads all tensors two or three times more."""
    at_threshold: Literal["all", "first"] = "all"
    """Elements with the smallest kept magnitude that are kept: `all`, or the `first` ones in the order of tensor names
    and positions, so that the number is exactly that of `density`."""

    def __post_init__(self) -> None:
        check_range("density", self.density, 0, 1)


def ties(group: TensorGroup, options: TiesOptions) -> Any:
    """Return seed + lambda * the disjoint mean of trimmed task vectors (arXiv:2306.01708, section 4)."""

    def trim(expert: int, density: float) -> ElementFilter:
        if options.trim == "model":
            thresholds: ModelThresholds = group.survey
            return ElementFilter(mask=thresholds.mask(group, expert))
        return _trim_tensor(group, expert, density, options.at_threshold)

    filters = density_filters(group, options.density, trim)
    return add_task_vectors(group, filters, scaling=options.lambda_, normalize=options.normalize, elect=True)


def _trim_tensor(group: TensorGroup, expert: int, density: float, at_threshold: str) -> ElementFilter:
    vector, size = group.experts[expert], math.prod(group.seed.shape)
    count = max(1, int(density * size))
    largest = largest_magnitudes(vector, count, group.seed)
    beyond = largest.beyond if at_threshold == "all" else 0
    group.tally(group.expert_names[expert], KeptElements(count + beyond, count, size))
    if beyond == largest.beyond:
        return ElementFilter(min_magnitude=largest.smallest)
    return ElementFilter(mask=first_largest_mask(vector, count, group.seed, largest.smallest))


# --- the threshold of whole models ---


def _trims_models(options: TiesOptions) -> bool:
    return options.trim == "model"


def _begin(settings: Sequence[tuple[Sequence[str], TiesOptions]], is_double: bool) -> ModelThresholds:
    densities: dict[str, float] = {}
    for names, options in settings:
        if options.trim != "model":
            raise UserError(
                "option trim of 'ties' differs between tensors; set trim: model for all of them or for none"
            )
        values = options.density if isinstance(options.density, tuple) else (options.density,) * len(names)
        for name, density in zip(names, values, strict=True):
            if densities.setdefault(name, density) != density:
                raise UserError(
                    f"with trim: model, the density of '{name}' applies to the whole model, and it is {densities[name]} for "
                    f"one tensor and {density} for another; give one number, or use trim: tensor"
                )
    return ModelThresholds(
        {name: Threshold(density) for name, density in densities.items() if 0 < density < 1},
        is_double,
        counts_equal=any(options.at_threshold == "first" for _, options in settings),
    )


TIES_SURVEY = Survey(
    is_needed=_trims_models,
    begin=_begin,
    measure=lambda group, state: state.measure(group),
    advance=lambda state, sums, sizes: state.advance(sums, sizes),
    is_complete=lambda state: state.is_complete,
    kept=lambda state: state.kept(),
)
"""Finds the thresholds for `trim: model`."""
