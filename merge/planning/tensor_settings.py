"""Options of the method and weights of the experts, as they hold for one tensor."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from ...core.errors import UserError
from ...core.hooks.merging import MergeMethod, PerExpert
from ...core.hooks.options import NoOptions, parse_options, unknown_option
from ..engine.tensor_plan import TensorPlan
from ..recipes.parameters import resolve
from ..recipes.recipe import WEIGHT, OutputSlice, Recipe, Scope, SourceSlice
from ..sources.models import StoredTensor


class TensorSettings:
    """Resolves the method's options and the experts' weights for each tensor."""

    def __init__(self, recipe: Recipe, method: MergeMethod) -> None:
        self.recipe, self.method = recipe, method
        kind = method.options or NoOptions
        hints = typing.get_type_hints(kind)
        self.shared = {_user_name(one.name) for one in fields(kind) if hints[one.name] != PerExpert}
        self.per_expert = {_user_name(one.name) for one in fields(kind) if hints[one.name] == PerExpert}
        self._parsed: dict[tuple[tuple[str, Any], ...], Any] = {}
        self._check_keys()

    def laid_over(
        self,
        plan: TensorPlan,
        part: OutputSlice,
        experts: Sequence[SourceSlice],
        inputs: Mapping[str, str],
        depth: float,
        seed: StoredTensor | None,
    ) -> TensorPlan:
        """Return the plan with the method's options, the weights, and the seed where the method reads it."""
        below = (part.parameters, *self.recipe.scopes)
        values = {key: resolve(key, below, plan.name, depth) for key in self.shared}
        self._check_required(values, f"'{plan.name}'")
        for key in self.per_expert:
            each = [resolve(key, (one.parameters, *below), inputs[one.model], depth) for one in experts]
            values[key] = each[0] if len(set(each)) == 1 else self._completed(key, each)
        options = self._options({key: value for key, value in values.items() if value is not None})
        given = [resolve(WEIGHT, (one.parameters, *below), inputs[one.model], depth) for one in experts]
        uses = self.method.uses_seed
        needs_seed = uses(options) if callable(uses) else uses
        if needs_seed and seed is None:
            raise UserError(
                f"merge method '{self.method.name}' compares experts with the seed they started from, and this "
                "merge names none; give it as base_model"
            )
        for one, weight in zip(experts, given, strict=True):
            self._check_required({WEIGHT: weight}, f"'{inputs[one.model]}' of '{one.model}'")
        weights = self._weights(given, [one.model for one in experts], plan.name)
        # rows that experts lack may come from the seed
        origin = seed if needs_seed or plan.is_vocabulary else None
        return replace(plan, options=options, weights=weights, seed=origin)

    def _check_required(self, values: Mapping[str, Any], tensor: str) -> None:
        for key, value in values.items():
            if value is None and key in self.recipe.required:
                raise UserError(
                    f"merge method '{self.method.name}' needs the parameter '{key}', and none is given for tensor "
                    f"{tensor}"
                )

    def _completed(self, key: str, each: Sequence[Any]) -> tuple[Any, ...]:
        """Return one value for each expert, the method's default where none is given."""
        kind = self.method.options or NoOptions
        default = next(getattr(kind(), one.name) for one in fields(kind) if _user_name(one.name) == key)
        return tuple(default if value is None else value for value in each)

    def _options(self, values: Mapping[str, Any]) -> Any:
        key = tuple(sorted(values.items()))
        if key not in self._parsed:
            what = f"merge method '{self.method.name}'"
            self._parsed[key] = parse_options(self.method.options, values, what)
        return self._parsed[key]

    def _weights(self, given: Sequence[Any], experts: Sequence[str], tensor: str) -> tuple[float, ...]:
        for name, weight in zip(experts, given, strict=True):
            if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float)):
                raise UserError(f"the weight of '{name}' is {weight!r}, which is no number")
        if self.method.weights == "factors":
            return tuple(1.0 if weight is None else float(weight) for weight in given)
        if all(weight is None for weight in given):
            return (1 / len(experts),) * len(experts)
        missing = [name for name, weight in zip(experts, given, strict=True) if weight is None]
        if missing:
            raise UserError(
                f"no weight is given for {', '.join(missing)}; name every expert, or leave it out of the merge"
            )
        for name, weight in zip(experts, given, strict=True):
            if weight < 0:
                raise UserError(
                    f"the weight of '{name}' is {weight}; weights of '{self.method.name}' are 0 or more"
                )
        total = math.fsum(given)
        if not total > 0:
            raise UserError(f"the weights of '{tensor}' sum to {total}; give at least one that is positive")
        return tuple(weight / total for weight in given)

    def _check_keys(self) -> None:
        """Raise `UserError` for a parameter that the method does not have."""
        known = {WEIGHT, *self.shared, *self.per_expert}
        for scope, is_source in self._scopes():
            for key in scope:
                if key not in known:
                    raise unknown_option(f"merge method '{self.method.name}'", key, known - {WEIGHT})
                if is_source and key in self.shared:
                    raise UserError(
                        f"option '{key}' of merge method '{self.method.name}' is one for all experts; give it for "
                        "the merge, not for one of them"
                    )

    def _scopes(self) -> Iterable[tuple[Scope, bool]]:
        for scope in self.recipe.scopes:
            yield scope, False
        for part in self.recipe.slices:
            yield part.parameters, False
            for one in part.sources:
                yield one.parameters, True


def _user_name(field: str) -> str:
    return field.rstrip("_")
