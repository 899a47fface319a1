"""Clusters of texts that a model turns into vectors: hidden states of a language model, sentence embeddings.

Such vectors share a large common part, which is taken off before they are brought to length 1. Shapes: N = texts, d = width, K = clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ....core.artefacts.files import write_json
from ....core.artefacts.safetensors_io import write_tensors
from ....core.errors import UserError
from ....core.hooks.text import Document
from ....core.text.clustering.balanced_kmeans import fit, squared_distances
from ....core.text.clustering.clusterer import unit_rows
from ....core.text.clustering.distinct_words import distinct_words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TENSORS_FILE = "centres.safetensors"
WORDS_FILE = "centres.json"
Embed = Callable[[Sequence[str]], "NDArray[np.float32]"]
"""Returns the vectors of texts, (N, d)."""


@dataclass(frozen=True)
class VectorClusters:
    """Knows centres; see `fit_vector_clusters`."""

    embed: Embed
    mean: NDArray[np.float32]
    """(d,): what is taken off."""
    centres: NDArray[np.float32]
    """(K, d)."""
    words: tuple[tuple[str, ...], ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The clusters' numbers."""
        return numbered(len(self.centres))

    def distances(self, documents: Sequence[Document]) -> NDArray[np.float64]:
        """Return squared distances to the centres, (N, K)."""
        vectors = self.embed([document.text for document in documents])
        return squared_distances(unit_rows(vectors - self.mean), self.centres)

    def top_words(self, domain: int) -> tuple[str, ...]:
        """Return words that are more frequent in the cluster than elsewhere."""
        return self.words[domain]

    def write(self, folder: Path) -> None:
        """Write `centres.safetensors` and `centres.json`."""
        import torch

        write_tensors(
            folder / TENSORS_FILE,
            {"mean": torch.from_numpy(self.mean), "centres": torch.from_numpy(self.centres)},
        )
        write_json(folder / WORDS_FILE, {"words": [list(one) for one in self.words]})


def fit_vector_clusters(
    embed: Embed,
    texts: Sequence[str],
    clusters: int,
    *,
    seed: int = 0,
    rounds: int = 20,
    balanced: bool = True,
) -> VectorClusters:
    """Learn centres from texts, which should be a sample that fits into memory.

    Raises `UserError` for fewer texts than clusters.
    """
    import numpy as np

    if len(texts) < clusters:
        raise UserError(f"{clusters} clusters need as many texts, and there are {len(texts)}; ask for fewer")
    vectors = embed(texts)
    mean = vectors.mean(axis=0)
    points = unit_rows(vectors - mean)
    found = fit(points, clusters, seed=seed, rounds=rounds, balanced=balanced)
    groups = squared_distances(points, found.centres).argmin(axis=1)
    return VectorClusters(
        embed,
        mean.astype(np.float32),
        found.centres.astype(np.float32),
        distinct_words(texts, groups.tolist(), clusters),
    )


def numbered(count: int) -> tuple[str, ...]:
    """Return `0`, `1` ... in digits of one length."""
    return tuple(f"{number:0{len(str(count - 1))}d}" for number in range(count))
