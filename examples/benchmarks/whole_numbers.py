"""Integer types of the benchmarks' command-line options."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type for integers of at least `least`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number of {least} or more")
        return number

    return read


def pair_of(first: str, second: str) -> Callable[[str], tuple[int, int]]:
    """Return an argparse type for two integers of at least 1 such as `8,2`; the error message names them `first` and `second`."""

    def read(text: str) -> tuple[int, int]:
        try:
            smallest, other = (at_least(1)(part) for part in text.split(","))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise argparse.ArgumentTypeError(f"'{text}' is no {first},{second} such as 8,2") from error
        return smallest, other

    return read
