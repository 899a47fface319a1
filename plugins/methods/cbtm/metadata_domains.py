"""Domains by a metadata field: one per value; rare values share a domain if fewer domains are requested."""

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

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

VALUES_FILE = "values.json"
OTHER = "other"
DOCUMENTS_FOR_WORDS = 200
"""Maximum number of documents per domain from which its characteristic words are taken."""


@dataclass(frozen=True)
class MetadataOptions:
    """Options of the discoverer `metadata`."""

    field: str = "source"
    """Field of each document's record: a string, number or boolean."""
    most: int = 64
    """Maximum number of domains if no number is requested."""


@dataclass(frozen=True)
class MetadataDomains:
    """Domains by the values of a metadata field."""

    field: str
    values: tuple[str, ...]
    """Values with a domain of their own, most frequent first."""
    others: bool
    """Whether a last domain contains all other values."""
    words: tuple[tuple[str, ...], ...]
    """Characteristic words of each domain."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Values converted to folder names, numbered if two would be equal."""
        labels: list[str] = []
        for value in (*self.values, *([OTHER] if self.others else [])):
            plain = re.sub(r"[^a-z0-9]+", "-", value.lower()).strip("-")[:40] or "value"
            label, number = plain, 2
            while label in labels:
                label, number = f"{plain}-{number}", number + 1
            labels.append(label)
        return tuple(labels)

    def distances(self, documents: Sequence[Document]) -> NDArray[np.float64]:
        """Return distances (N, K): 0 to a document's own domain, 1 to the others."""
        import numpy as np

        indices = {value: number for number, value in enumerate(self.values)}
        distances = np.ones((len(documents), len(self.labels)))
        for row, document in enumerate(documents):
            index = indices.get(str(document.value), len(self.values) if self.others else None)
            if index is None:
                raise UserError(
                    f"'{self.field}' is '{document.value}' in validation text only; add training text with "
                    "this value, or request a number of clusters, the last of which contains rare values"
                )
            distances[row, index] = 0
        return distances

    def top_words(self, domain: int) -> tuple[str, ...]:
        """Return words that are more frequent in the domain than in the others."""
        return self.words[domain]

    def write(self, folder: Path) -> None:
        """Write `values.json`."""
        write_json(folder / VALUES_FILE, {"field": self.field, "values": list(self.values), "others": self.others})


def fit_metadata(inputs: DiscoveryInputs, options: MetadataOptions) -> MetadataDomains:
    """Fit domains to the values of a field over all training text.

    Raises `UserError` for fewer values than requested clusters, and for more than `most` values if no number
    is requested.
    """
    from ....core.text.clustering.words import distinct_words

    counts: Counter[str] = Counter()
    texts: dict[str, list[str]] = {}
    for document in inputs.documents():
        value = str(document.value)
        counts[value] += 1
        if counts[value] <= DOCUMENTS_FOR_WORDS and len(texts) <= 10 * options.most:
            texts.setdefault(value, []).append(document.text)
    ranked = sorted(counts, key=lambda value: (-counts[value], value))
    count = inputs.clusters or len(ranked)
    if not ranked:
        raise UserError("there is no training text; add some to the configuration")
    if inputs.clusters is None and len(ranked) > options.most:
        raise UserError(
            f"'{options.field}' has {len(ranked):,} values; request a number of clusters, the last of which "
            f"contains rare values, or set most above {options.most}"
        )
    if count > len(ranked):
        raise UserError(f"'{options.field}' has {len(ranked)} values, too few for {count} clusters; request fewer")
    others = count < len(ranked)
    kept = tuple(ranked[: count - 1] if others else ranked)
    indices = {value: number for number, value in enumerate(kept)}
    samples = [(text, indices.get(value, len(kept))) for value, value_texts in texts.items() for text in value_texts]
    words = distinct_words([text for text, _ in samples], [index for _, index in samples], count)
    return MetadataDomains(options.field, kept, others, words)
