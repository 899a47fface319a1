"""The objective `infill`: spans of a document are moved to its end, so that a model learns to fill holes.

`Left Span Right` becomes `Left <mask> Right <mask> Span <end>`, by causal masking (CM3, arXiv:2201.07520, section 3.1; InCoder,
arXiv:2204.05999, section 2.1), or, with the suffix first, `<mask> Right <mask> Left Span <end>` (arXiv:2207.14255, section 3), where the span
follows what it has to continue. Masks do not count as targets, the end does. A block without a span stays plain text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ...core.errors import UserError
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.option_checks import check_at_least, check_positive
from ...core.hooks.steps import Objective, ObjectiveContext, TrainingObjective
from ...core.text.token_store import Row
from ...core.text.tokenizer import TextEncoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.random import Generator
    from numpy.typing import NDArray

    Order = Callable[[NDArray[np.int64], Sequence[tuple[int, int]], Sequence[int], int], Row]

MASK, END = "<|mask:{}|>", "<|endofmask|>"
"""InCoder's names of the tokens."""


@dataclass(frozen=True)
class InfillOptions:
    """Options of `infill`."""

    rate: float = 1.0
    """Mean of the Poisson distribution that the number of spans in a block is drawn from."""
    most_spans: int = 4
    """Largest number of spans in a block; the tokenizer needs as many masks."""
    order: Literal["causal_masking", "suffix_first"] = "causal_masking"
    """Order of the pieces; with the suffix first, a block has one span, and small models learn to fill holes with less text."""

    def __post_init__(self) -> None:
        check_positive("rate", self.rate)
        check_at_least("most_spans", self.most_spans, 1)
        if self.order == "suffix_first" and self.most_spans != 1:
            raise ValueError("a block has one span if the suffix comes first; set most_spans: 1")


@hookimpl
def objectives() -> list[Objective]:
    """Return the objective."""
    summary = "next tokens of text whose spans are moved to its end, so that a model learns to fill holes"
    return [Objective("infill", summary, prepare, InfillOptions, reads=("text",), require=require_masks)]


def require_masks(folder: Path, options: InfillOptions) -> None:
    """Raise `UserError` unless a tokenizer has all masks."""
    _token_ids(TextEncoder.of_folder(folder), options)


def _token_ids(encoder: TextEncoder, options: InfillOptions) -> list[int]:
    """Return the ids of the masks and of the end; raises `UserError` if one is missing."""
    names = [*map(MASK.format, range(options.most_spans)), END]
    ids = {name: encoder.tokenizer.token_to_id(name) for name in names}
    known = [token for token in ids.values() if token is not None]
    if len(known) < len(names):
        raise UserError(
            f"objective 'infill' needs the tokens {', '.join(names)}, which the tokenizer lacks; add them to the seed with "
            f"seed.tokens: {json.dumps(names)}"
        )
    encoder.require_rows(known)
    return known


def prepare(context: ObjectiveContext) -> TrainingObjective:
    """Find the masks in the tokenizer; raises `UserError` if one is missing."""
    encoder = TextEncoder.of_folder(context.tokenizer_folder)
    *masks, end = _token_ids(encoder, context.options)
    order = moved if context.options.order == "causal_masking" else suffix_first
    return Infilling(masks, end, encoder.separator, context.options.rate, order)


class Infilling(TrainingObjective):
    """Blocks with spans moved to their end."""

    def __init__(self, masks: Sequence[int], end: int, separator: int, rate: float, order: Order | None = None) -> None:
        self._masks, self._end, self._separator, self._rate = tuple(masks), end, separator, rate
        self._order = order or moved

    def row(self, row: Row, random: Generator) -> Row:
        """Return a block with its spans behind it; the text is cut to make room for masks."""
        number = min(int(random.poisson(self._rate)), len(self._masks))
        text = row.tokens[: len(row.tokens) - 3 * number]
        spans = self._spans(text, number, random)
        return self._order(row.tokens[: len(row.tokens) - 3 * len(spans)], spans, self._masks, self._end)

    def _spans(self, text: NDArray[np.int64], number: int, random: Generator) -> list[tuple[int, int]]:
        """Return spans (begin, end) that do not touch, each inside one document; fewer if they would."""
        spans: list[tuple[int, int]] = []
        for _ in range(number):
            ends = sorted(int(end) for end in random.integers(1, len(text) + 1, 2))
            begin, end = ends[0], min(ends[1], _end_of_document(text, ends[0], self._separator))
            if begin < end and all(end < first or begin > last for first, last in spans):
                spans.append((begin, end))
        return sorted(spans)


def _end_of_document(text: NDArray[np.int64], begin: int, separator: int) -> int:
    """Return the place of the first separator from `begin` on, else the end of the text."""
    import numpy as np

    found = np.flatnonzero(text[begin:] == separator)
    return begin + int(found[0]) if len(found) else len(text)


def moved(text: NDArray[np.int64], spans: Sequence[tuple[int, int]], masks: Sequence[int], end: int) -> Row:
    """Return a text with its spans behind it, and with the tokens that count: all but masks."""
    if not spans:
        return Row(text)
    pieces: list[Sequence[int] | NDArray[np.int64]] = []
    position = 0
    for mask, (first, last) in zip(masks, spans, strict=False):
        pieces += [text[position:first], [mask]]
        position = last
    pieces.append(text[position:])
    for mask, (first, last) in zip(masks, spans, strict=False):
        pieces += [[mask], text[first:last], [end]]
    return _row(pieces, masks[: len(spans)])


def suffix_first(text: NDArray[np.int64], spans: Sequence[tuple[int, int]], masks: Sequence[int], end: int) -> Row:
    """Return the text behind a span, that before it, and the span, with the tokens that count: all but masks."""
    if not spans:
        return Row(text)
    ((_, last),) = spans
    return _row([[masks[0]], text[last:], [masks[0]], text[:last], [end]], masks[:1])


def _row(pieces: Sequence[Sequence[int] | NDArray[np.int64]], masks: Sequence[int]) -> Row:
    import numpy as np

    tokens = np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces])
    return Row(tokens, ~np.isin(tokens, masks))
