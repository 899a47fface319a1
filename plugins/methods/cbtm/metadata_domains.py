"""Domains by what a field of metadata says: one for each value, rare ones together where fewer domains are asked for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ....core.artefacts.files import write_json
from ....core.errors import UserError
from ....core.hooks.text import DiscoveryInputs, Document
from ....core.text.clustering.distinct_words import distinct_words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VALUES_FILE = "values.json"
OTHER = "other"
WORDS_FROM = 200
"""Documents of each domain, at most, that its words are taken from."""


@dataclass(frozen=True)
class MetadataOptions:
    """What documents are told apart by."""

    field: str = "source"
    """Of each document's record; a text, a number or a truth value."""
    most: int = 64
    """Domains that may come out where their number is not asked for."""


@dataclass(frozen=True)
class MetadataDomains:
    """The values that are domains of their own, and whether a domain takes the rest."""

    field: str
    values: tuple[str, ...]
    """The most frequent first."""
    others: bool
    words: tuple[tuple[str, ...], ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The values, as far as they can be part of a folder's name; numbered where two would be called the same."""
        return _labels([*self.values, *([OTHER] if self.others else [])])

    def distances(self, documents: Sequence[Document]) -> NDArray[np.float64]:
        """Return 0 for each document's own domain, 1 for all others, (N, K)."""
        import numpy as np

        places = {value: number for number, value in enumerate(self.values)}
        found = np.ones((len(documents), len(self.labels)))
        for row, document in enumerate(documents):
            place = places.get(str(document.value), len(self.values) if self.others else None)
            if place is None:
                raise UserError(
                    f"'{self.field}' is '{document.value}' in validation text only; add training text of it, or ask for a "
                    "number of clusters, the last of which takes what is rare"
                )
            found[row, place] = 0
        return found

    def top_words(self, domain: int) -> tuple[str, ...]:
        """Return words that are more frequent in the domain than elsewhere."""
        return self.words[domain]

    def write(self, folder: Path) -> None:
        """Write `values.json`."""
        write_json(
            folder / VALUES_FILE, {"field": self.field, "values": list(self.values), "others": self.others}
        )


def fit_metadata(inputs: DiscoveryInputs, options: MetadataOptions) -> MetadataDomains:
    """Count the values of a field over all training text.

    Raises `UserError` for fewer values than clusters are asked for, and for too many where no number is.
    """
    counts: Counter[str] = Counter()
    texts: dict[str, list[str]] = {}
    for document in inputs.documents():
        value = str(document.value)
        counts[value] += 1
        if counts[value] <= WORDS_FROM and len(texts) <= 10 * options.most:
            texts.setdefault(value, []).append(document.text)
    ranked = sorted(counts, key=lambda value: (-counts[value], value))
    wanted = inputs.clusters or len(ranked)
    if not ranked:
        raise UserError("there is no training text to sort; add some")
    if inputs.clusters is None and len(ranked) > options.most:
        raise UserError(
            f"'{options.field}' has {len(ranked):,} values; ask for a number of clusters, the last of which takes what is "
            f"rare, or set most above {options.most}"
        )
    if wanted > len(ranked):
        raise UserError(f"'{options.field}' has {len(ranked)} values, too few for {wanted} clusters")
    others = wanted < len(ranked)
    kept = tuple(ranked[: wanted - 1] if others else ranked)
    places = {value: number for number, value in enumerate(kept)}
    told = [(text, places.get(value, len(kept))) for value, some in texts.items() for text in some]
    words = distinct_words([text for text, _ in told], [place for _, place in told], wanted)
    return MetadataDomains(options.field, kept, others, words)


def _labels(values: Sequence[str]) -> tuple[str, ...]:
    found: list[str] = []
    for value in values:
        plain = re.sub(r"[^a-z0-9]+", "-", value.lower()).strip("-")[:40] or "value"
        label, number = plain, 2
        while label in found:
            label, number = f"{plain}-{number}", number + 1
        found.append(label)
    return tuple(found)
