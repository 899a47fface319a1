"""Parameters per layer and per module: numbers, gradients over the layers, and values by filter.

| where it is written | goes before |
|---|---|
| a model's own (`weights: {law: ...}`, a source's `parameters`) | all below |
| a slice's `parameters` | |
| a module's `parameters` | |
| the merge's `options` or `parameters` | |
| the method's default | |

Within one place the first `{filter, value}` that matches counts; if none does, the next place is asked. A filter is a
part of the tensor's name (`mlp`), or a shell-style pattern (`*.layers.[0-7].*`); without one, or as `*`, it matches all.
A list of numbers is a gradient: spread evenly over the layers of the slice, with straight lines between them; tensors
that belong to no layer take its first value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ...core.errors import UserError
from .recipe import Scope, Setting

_KEYS = {"filter", "value"}


def resolve(key: str, scopes: Iterable[Scope], tensor: str, depth: float) -> Any:
    """Return the value of parameter `key` for one tensor, None where no scope says anything.

    `depth` is where its layer lies in the slice, from 0 to 1. Raises `UserError` for a setting of no known form.
    """
    for scope in scopes:
        if key in scope:
            value = evaluate(key, scope[key], tensor, depth)
            if value is not None:
                return value
    return None


def evaluate(key: str, setting: Setting, tensor: str, depth: float) -> Any:
    """Return what one setting says for one tensor: see the module's description."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list | tuple):
        return setting
    if not setting:
        raise UserError(f"parameter '{key}' is an empty list; give a number, or numbers for a gradient")
    conditional = [isinstance(one, Mapping) for one in setting]
    if any(conditional):
        if not all(conditional):
            raise UserError(f"parameter '{key}' mixes numbers with {{filter, value}}; use one of the two")
        return _first_match(key, setting, tensor, depth)
    return _on_gradient(key, list(setting), depth)


def is_varied(setting: Setting) -> bool:
    """Tell whether a setting may give different tensors different values."""
    return isinstance(setting, Mapping | list | tuple)


def _first_match(key: str, conditions: Iterable[Mapping[str, Any]], tensor: str, depth: float) -> Any:
    for condition in conditions:
        if "value" not in condition or set(condition) - _KEYS:
            raise UserError(
                f"parameter '{key}': {dict(condition)} is not understood; write {{filter: mlp, value: 0.5}}"
            )
        if matches(condition.get("filter"), tensor):
            value = condition["value"]
            return evaluate(key, value, tensor, depth) if isinstance(value, list | tuple) else value
    return None


def matches(pattern: str | None, tensor: str) -> bool:
    """Tell whether a filter takes a tensor: by a part of its name, or by a shell-style pattern."""
    if pattern is None or pattern == "*" or pattern in tensor:
        return True
    return any(sign in pattern for sign in "*?[") and fnmatchcase(tensor, pattern)


def _on_gradient(key: str, points: list[Any], depth: float) -> Any:
    """Return the value at `depth`; numbers lie on straight lines, everything else changes in steps."""
    if not all(isinstance(point, int | float) and not isinstance(point, bool) for point in points):
        if any(isinstance(point, list | tuple) for point in points):
            raise UserError(f"parameter '{key}' is a list of lists; give numbers for a gradient")
        return points[int(depth * (len(points) - 1))]
    place = depth * (len(points) - 1)
    before = int(place)
    after = min(before + 1, len(points) - 1)
    share = place - before
    return (1 - share) * points[before] + share * points[after]
