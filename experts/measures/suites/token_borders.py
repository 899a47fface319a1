"""Where the tokens of a prompt end and those of its continuation begin."""

from __future__ import annotations

from collections.abc import Sequence

from ....core.text.tokenizer import TextEncoder

Pair = tuple[list[int], list[int]]
"""Prefix and target, in tokens."""


def split_texts(encoder: TextEncoder, prefixes: Sequence[str], targets: Sequence[str]) -> list[Pair]:
    """Return the tokens of prefix and target for alternatives that are compared with each other.

    A text is tokenised as a whole, as a model reads text, so that a token may lie across the border of prefix and target.
    It belongs to the target, and so do as many tokens of the other alternatives' prefixes: for all of them, the same
    stretch of text is scored. The token that precedes documents begins a prefix that would be empty otherwise.
    """
    alone = encoder.encode(prefixes)
    whole = encoder.encode([prefix + target for prefix, target in zip(prefixes, targets, strict=True)])
    moved = max(len(own) - _num_common(own, ids) for own, ids in zip(alone, whole, strict=True))
    borders = [max(len(own) - moved, 0) for own in alone]
    begin = encoder.begin_of_text
    if not begin and min(borders) == 0:
        begin = (encoder.separator,)
    return [([*begin, *ids[:border]], ids[border:]) for ids, border in zip(whole, borders, strict=True)]


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences share at their beginning."""
    return next(
        (number for number, (left, right) in enumerate(zip(first, second, strict=False)) if left != right),
        min(len(first), len(second)),
    )
