"""What a method that assembles a model is given."""

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
    """Models of a merge, opened by their headers, and what may be read for it."""

    recipe: Recipe
    sources: Mapping[str, Source]
    dense: Callable[[Recipe], Sequence[TensorPlan]]
    """`dense(recipe)` plans the weighted mean of the models, tensor by tensor, with their one vocabulary."""
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options that the merge gives for single experts."""
    validation: Callable[[], Sequence[ValidationText]] | None = None
    """None: only the plan is wanted, so that nothing is to be fitted."""
    say: Callable[[str], None] = field(default=lambda line: None)

    @property
    def leading(self) -> Source:
        """The seed, else the first model."""
        return self.sources[self.recipe.seed or self.recipe.slices[0].sources[0].model]
