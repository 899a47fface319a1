"""Method options and expert weights, resolved for single tensors."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from ...core.errors import UserError
from ...core.hooks.merging import PerExpert, TensorMerge
from ...core.hooks.options import NoOptions, parse_options, unknown_option
from ..engine.tensor_plan import TensorPlan
from ..recipes.parameters import resolve
from ..recipes.places import placed
from ..recipes.recipe import WEIGHT, OutputSlice, Recipe, SourceSlice
from ..sources.models import StoredTensor
from .weights import require_all_weights


class TensorSettings:
    """Resolves the method's options and the experts' weights for each tensor."""

    def __init__(self, recipe: Recipe, method: TensorMerge) -> None:
        self.recipe, self.method = recipe, method
        options_class = method.options or NoOptions
        hints = typing.get_type_hints(options_class)
        defaults = options_class()
        names = {option.name: option.name.rstrip("_") for option in fields(options_class)}  # as users write them
        self._per_expert = {name: getattr(defaults, key) for key, name in names.items() if hints[key] == PerExpert}
        """Option -> default."""
        self._shared = set(names.values()) - self._per_expert.keys()
        self._parsed: dict[tuple[tuple[str, Any], ...], Any] = {}
        self._check_keys()

    def resolve_for(
        self,
        plan: TensorPlan,
        output_slice: OutputSlice,
        experts: Sequence[SourceSlice],
        inputs: Mapping[str, str],
        depth: float,
        seed: StoredTensor | None,
    ) -> TensorPlan:
        """Return the plan with options, weights and, if needed, its seed; raises `UserError` for invalid parameters."""
        scopes = (output_slice.parameters, *self.recipe.scopes)

        def by_expert(key: str) -> list[Any]:
            return [resolve(key, (source.parameters, *scopes), inputs[source.model], depth) for source in experts]

        values = {key: resolve(key, scopes, plan.name, depth) for key in self._shared}
        for key, value in values.items():
            self._check_required(key, value, f"'{plan.name}'")
        for key, default in self._per_expert.items():
            expert_values = by_expert(key)
            is_same = len(set(expert_values)) == 1
            values[key] = (
                expert_values[0] if is_same else tuple(default if value is None else value for value in expert_values)
            )
        options = self._parse({key: value for key, value in values.items() if value is not None})
        uses_seed = self.method.uses_seed
        needs_seed = uses_seed(options) if callable(uses_seed) else uses_seed
        if needs_seed and seed is None:
            raise UserError(
                f"merge method '{self.method.name}' compares experts with their seed, but this merge has no "
                "seed; set base_model"
            )
        expert_weights = by_expert(WEIGHT)
        for source, weight in zip(experts, expert_weights, strict=True):
            with placed(source.place):
                self._check_required(WEIGHT, weight, f"'{inputs[source.model]}' of '{source.model}'")
                _check_number(weight, source.model)
        weights = self._normalise_weights(expert_weights, [source.model for source in experts], plan.name)
        # missing rows of experts may come from the seed
        seed_input = seed if needs_seed or plan.is_vocabulary else None
        return replace(plan, options=options, weights=weights, seed=seed_input)

    def _check_required(self, key: str, value: Any, tensor: str) -> None:
        if value is None and key in self.recipe.required:
            raise UserError(
                f"merge method '{self.method.name}' needs the parameter '{key}', which is not set for tensor {tensor}"
            )

    def _parse(self, values: Mapping[str, Any]) -> Any:
        key = tuple(sorted(values.items()))
        if key not in self._parsed:
            self._parsed[key] = parse_options(self.method.options, values, f"merge method '{self.method.name}'")
        return self._parsed[key]

    def _normalise_weights(self, values: Sequence[Any], experts: Sequence[str], tensor: str) -> tuple[float, ...]:
        by_name = dict(zip(experts, values, strict=True))
        if self.method.weights == "factors":
            return tuple(1.0 if weight is None else float(weight) for weight in values)
        if all(weight is None for weight in values):
            return (1 / len(experts),) * len(experts)
        require_all_weights([name for name, weight in by_name.items() if weight is None])
        for name, weight in by_name.items():
            if weight < 0:
                raise UserError(
                    f"the weight of '{name}' is {weight}; weights of '{self.method.name}' must be 0 or more"
                )
        total = math.fsum(values)
        if not total > 0:
            raise UserError(f"the weights of '{tensor}' sum to {total}; give at least one positive weight")
        return tuple(weight / total for weight in values)

    def _check_keys(self) -> None:
        """Raise `UserError` for unknown parameters."""
        slices = self.recipe.slices
        sources = [source for output_slice in slices for source in output_slice.sources]
        by_source = [source.parameters for source in sources]
        known = {*self._shared, *self._per_expert}
        for scope in (*self.recipe.scopes, *(output_slice.parameters for output_slice in slices), *by_source):
            for key in scope:
                if key not in known and key != WEIGHT:
                    raise unknown_option(f"merge method '{self.method.name}'", key, known)
        for source in sources:
            for key in source.parameters:
                if key in self._shared:
                    with placed(source.place):
                        raise UserError(
                            f"option '{key}' of merge method '{self.method.name}' applies to all experts; set it for "
                            "the merge, not for a single expert"
                        )


def _check_number(weight: Any, model: str) -> None:
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float)):
        raise UserError(f"the weight of '{model}' is {weight!r}, which is not a number")
