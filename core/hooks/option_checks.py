"""Checks of options that cost no import: plugins run them in `__post_init__`, long before pydantic reads values."""

from __future__ import annotations

import math
from dataclasses import is_dataclass

from ..errors import UserError


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise `ValueError` unless an option is a finite number that is not below `least`."""
    if not (value >= least and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; it must be at least {least:g}")


def check_positive(name: str, value: float) -> None:
    """Raise `ValueError` unless an option is a finite number above 0."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; it must be greater than 0")


def check_range(name: str, option: float | tuple[float, ...], low: float, high: float) -> None:
    """Raise `ValueError` unless an option lies in [low, high], for every expert if it is set per expert."""
    for value in option if isinstance(option, tuple) else (option,):
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; it must be in the range {low:g} to {high:g}")


def check_top_k(top_k: int | None, num_experts: int) -> None:
    """Raise `UserError` unless an option is a number of experts, or None for all."""
    if top_k is not None and not 1 <= top_k <= num_experts:
        raise UserError(f"top_k is {top_k}; with {num_experts} experts it must be in the range 1 to {num_experts}")


def check_options_class(options: type | None, owner: str) -> None:
    """Raise `ValueError` unless a plugin's options are a dataclass or None; `owner` names the offer in the message."""
    if options is not None and not is_dataclass(options):
        raise ValueError(f"options of {owner} must be a dataclass")
