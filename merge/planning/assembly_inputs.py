"""Inputs of merge methods that assemble a new model class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...core.hooks.text import ValidationText
from ..engine.tensor_plan import TensorPlan
from ..recipes.recipe import Recipe
from ..sources.models import Source


@dataclass(frozen=True)
class AssemblyInputs:
    """Recipe, opened sources and validation text for `Assembler.assemble`."""

    recipe: Recipe
    sources: Mapping[str, Source]
    dense: Callable[[Recipe], Sequence[TensorPlan]]
    """`dense(recipe)` plans the weighted mean of the models, tensor by tensor, with the merged vocabulary."""
    expert_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Expert name -> options that the recipe sets for this expert only."""
    validation: Callable[[], Sequence[ValidationText]] | None = None
    """Returns validation text; None: plan only, without fitting."""
    say: Callable[[str], None] = field(default=lambda line: None)

    @property
    def leading(self) -> Source:
        """The seed, or the first model of a recipe without a seed."""
        return self.sources[self.recipe.seed or self.recipe.slices[0].sources[0].model]
