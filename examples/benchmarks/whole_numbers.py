"""Whole numbers that the benchmarks' options take."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads a whole number of at least `least`, for the parser to refuse others by itself."""

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
    """Return what reads `8,2`: two whole numbers of at least 1, named for the message."""

    def read(text: str) -> tuple[int, int]:
        try:
            one, other = (at_least(1)(part) for part in text.split(","))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise argparse.ArgumentTypeError(f"'{text}' is no {first},{second} such as 8,2") from error
        return one, other

    return read
