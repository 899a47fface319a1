"""Method options and expert weights, resolved for single tensors."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from ...core.errors import UserError
from ...core.hooks.merging import PerExpert, TensorMerge
from ...core.hooks.options import NoOptions, parse_options, unknown_option
from ..engine.tensor_plan import TensorPlan
from ..recipes.parameters import resolve
from ..recipes.recipe import WEIGHT, OutputSlice, Recipe, Scope, SourceSlice
from ..sources.models import StoredTensor


class TensorSettings:
    """Resolves the method's options and the experts' weights for each tensor."""

    def __init__(self, recipe: Recipe, method: TensorMerge) -> None:
        self.recipe, self.method = recipe, method
        options_class = method.options or NoOptions
        hints = typing.get_type_hints(options_class)
        self.shared = {_user_name(option.name) for option in fields(options_class) if hints[option.name] != PerExpert}
        self.per_expert = {
            _user_name(option.name) for option in fields(options_class) if hints[option.name] == PerExpert
        }
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
        """Return the plan with method options and weights, and with the seed if the method reads it.

        Raises `UserError` for missing or invalid parameters.
        """
        scopes = (output_slice.parameters, *self.recipe.scopes)
        values = {key: resolve(key, scopes, plan.name, depth) for key in self.shared}
        self._check_required(values, f"'{plan.name}'")
        for key in self.per_expert:
            expert_values = [
                resolve(key, (source.parameters, *scopes), inputs[source.model], depth) for source in experts
            ]
            values[key] = expert_values[0] if len(set(expert_values)) == 1 else self._fill_defaults(key, expert_values)
        options = self._parse({key: value for key, value in values.items() if value is not None})
        given_weights = [
            resolve(WEIGHT, (source.parameters, *scopes), inputs[source.model], depth) for source in experts
        ]
        uses_seed = self.method.uses_seed
        needs_seed = uses_seed(options) if callable(uses_seed) else uses_seed
        if needs_seed and seed is None:
            raise UserError(
                f"merge method '{self.method.name}' compares experts with their seed, but this merge has no "
                "seed; set base_model"
            )
        for source, weight in zip(experts, given_weights, strict=True):
            self._check_required({WEIGHT: weight}, f"'{inputs[source.model]}' of '{source.model}'")
        weights = self._normalise_weights(given_weights, [source.model for source in experts], plan.name)
        # missing rows of experts may come from the seed
        seed_input = seed if needs_seed or plan.is_vocabulary else None
        return replace(plan, options=options, weights=weights, seed=seed_input)

    def _check_required(self, values: Mapping[str, Any], tensor: str) -> None:
        for key, value in values.items():
            if value is None and key in self.recipe.required:
                raise UserError(
                    f"merge method '{self.method.name}' needs the parameter '{key}', which is not set for tensor "
                    f"{tensor}"
                )

    def _fill_defaults(self, key: str, expert_values: Sequence[Any]) -> tuple[Any, ...]:
        """Return one value per expert; missing values are the method's default."""
        options_class = self.method.options or NoOptions
        default = next(
            getattr(options_class(), option.name) for option in fields(options_class) if _user_name(option.name) == key
        )
        return tuple(default if value is None else value for value in expert_values)

    def _parse(self, values: Mapping[str, Any]) -> Any:
        key = tuple(sorted(values.items()))
        if key not in self._parsed:
            owner = f"merge method '{self.method.name}'"
            self._parsed[key] = parse_options(self.method.options, values, owner)
        return self._parsed[key]

    def _normalise_weights(self, values: Sequence[Any], experts: Sequence[str], tensor: str) -> tuple[float, ...]:
        for name, weight in zip(experts, values, strict=True):
            if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float)):
                raise UserError(f"the weight of '{name}' is {weight!r}, which is not a number")
        if self.method.weights == "factors":
            return tuple(1.0 if weight is None else float(weight) for weight in values)
        if all(weight is None for weight in values):
            return (1 / len(experts),) * len(experts)
        missing = [name for name, weight in zip(experts, values, strict=True) if weight is None]
        if missing:
            raise UserError(f"no weight is given for {', '.join(missing)}; give a weight for every expert of the merge")
        for name, weight in zip(experts, values, strict=True):
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
        known = {WEIGHT, *self.shared, *self.per_expert}
        for scope, is_source in self._scopes():
            for key in scope:
                if key not in known:
                    raise unknown_option(f"merge method '{self.method.name}'", key, known - {WEIGHT})
                if is_source and key in self.shared:
                    raise UserError(
                        f"option '{key}' of merge method '{self.method.name}' applies to all experts; set it for "
                        "the merge, not for a single expert"
                    )

    def _scopes(self) -> Iterable[tuple[Scope, bool]]:
        for scope in self.recipe.scopes:
            yield scope, False
        for output_slice in self.recipe.slices:
            yield output_slice.parameters, False
            for source in output_slice.sources:
                yield source.parameters, True


def _user_name(field: str) -> str:
    return field.rstrip("_")
