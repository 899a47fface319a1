"""Merge parameters per layer and per module: numbers, gradients over layers, and values by filter.

A parameter can be set in several places; the first of these that has a value for the tensor applies:

1. a model (`weights: {law: ...}`, `parameters` of a source)
2. `parameters` of a slice
3. `parameters` of a module
4. `options` or `parameters` of the merge
5. the method's default

In a list of `{filter, value}`, the first filter that matches applies. A filter is a substring of the tensor's name
(`mlp`) or a shell-style pattern (`*.layers.[0-7].*`); a missing filter, or `*`, matches all tensors. A list of numbers
is a gradient: its values are spread evenly over the layers of the slice and interpolated linearly; tensors outside the
layers use the first value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ...core.errors import UserError
from .recipe import Scope, Setting

_KEYS = {"filter", "value"}


def resolve(key: str, scopes: Iterable[Scope], tensor: str, depth: float) -> Any:
    """Return the value of parameter `key` for one tensor; None if no scope sets it.

    `depth` is the relative position of the layer in its slice, from 0 to 1. Raises `UserError` for a malformed setting.
    """
    for scope in scopes:
        if key in scope:
            value = evaluate(key, scope[key], tensor, depth)
            if value is not None:
                return value
    return None


def evaluate(key: str, setting: Setting, tensor: str, depth: float) -> Any:
    """Return the value of one setting for one tensor, as described above; None if no filter matches."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list | tuple):
        return setting
    check_setting(key, setting)
    if isinstance(setting[0], Mapping):
        return _first_match(key, setting, tensor, depth)
    return _interpolate(list(setting), depth)


def check_setting(key: str, setting: Setting) -> None:
    """Raise `UserError` for a setting that is neither a value, a gradient nor a list of conditions."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list | tuple):
        return
    if not setting:
        raise UserError(f"parameter '{key}' is an empty list; give a number, or numbers for a gradient")
    if any(isinstance(item, list | tuple) for item in setting):
        raise UserError(f"parameter '{key}' is a list of lists; a gradient is a list of numbers")
    conditions = [item for item in setting if isinstance(item, Mapping)]
    if conditions and len(conditions) < len(setting):
        raise UserError(f"parameter '{key}' mixes numbers and {{filter, value}}; use only one of the two")
    for condition in conditions:
        is_filter = isinstance(condition.get("filter"), str | None)
        if "value" not in condition or set(condition) - _KEYS or not is_filter:
            raise UserError(
                f"parameter '{key}': {dict(condition)} is not a condition; write {{filter: mlp, value: 0.5}}"
            )
        if isinstance(condition["value"], list | tuple):
            check_setting(key, condition["value"])


def is_varied(setting: Setting) -> bool:
    """Return whether a setting can have different values for different tensors."""
    return isinstance(setting, Mapping | list | tuple)


def _first_match(key: str, conditions: Iterable[Mapping[str, Any]], tensor: str, depth: float) -> Any:
    for condition in conditions:
        if matches(condition.get("filter"), tensor):
            value = condition["value"]
            return evaluate(key, value, tensor, depth) if isinstance(value, list | tuple) else value
    return None


def matches(pattern: str | None, tensor: str) -> bool:
    """Return whether a filter (substring or shell-style pattern) matches a tensor name."""
    if pattern is None or pattern == "*" or pattern in tensor:
        return True
    return any(wildcard in pattern for wildcard in "*?[") and fnmatchcase(tensor, pattern)


def _interpolate(points: list[Any], depth: float) -> Any:
    """Return the value at `depth`: interpolated linearly for numbers, piecewise constant otherwise."""
    if not all(isinstance(point, int | float) and not isinstance(point, bool) for point in points):
        return points[int(depth * (len(points) - 1))]
    position = depth * (len(points) - 1)
    left = int(position)
    right = min(left + 1, len(points) - 1)
    fraction = position - left
    return (1 - fraction) * points[left] + fraction * points[right]
