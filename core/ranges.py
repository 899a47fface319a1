"""Numbers that options take, checked where they stand, so that plugins need not load the library that reads them."""

from __future__ import annotations

import math


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise `ValueError` unless an option is a finite number that is not below `least`."""
    if not (value >= least and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; it is {least:g} or more")


def check_positive(name: str, value: float) -> None:
    """Raise `ValueError` unless an option is a finite number above 0."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; it is more than 0")
