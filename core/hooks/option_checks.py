"""Checks of options that cost no import: plugins run them in `__post_init__`, long before pydantic reads values."""

from __future__ import annotations

import math
from dataclasses import is_dataclass


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise `ValueError` unless an option is a finite number that is not below `least`."""
    if not (value >= least and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; it is {least:g} or more")


def check_positive(name: str, value: float) -> None:
    """Raise `ValueError` unless an option is a finite number above 0."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; it is more than 0")


def check_options_class(options: type | None, owner: str) -> None:
    """Raise `ValueError` unless a plugin's options are a dataclass or None; `owner` names the offer in the message."""
    if options is not None and not is_dataclass(options):
        raise ValueError(f"options of {owner} are no dataclass")
