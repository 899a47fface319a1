"""Clusters of text embeddings: hidden states of a language model or sentence embeddings.

Embeddings are centred before normalization, since they share a large common component. Shapes: N = texts, d =
embedding size, K = clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ....core.artefacts.files import write_json
from ....core.artefacts.safetensors_io import write_tensors
from ....core.errors import UserError
from ....core.hooks.text import DiscoveryInputs, Document
from ....core.text.clustering.clusterer import unit_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TENSORS_FILE = "centres.safetensors"
WORDS_FILE = "centres.json"
Embed = Callable[[Sequence[str]], "NDArray[np.float32]"]
"""Returns the embeddings of texts, (N, d)."""


@dataclass(frozen=True)
class VectorClusters:
    """Domains that are clusters of text embeddings."""

    embed: Embed
    mean: NDArray[np.float32]
    """Mean embedding, subtracted before normalization, (d,)."""
    centres: NDArray[np.float32]
    """Cluster centres, (K, d)."""
    words: tuple[tuple[str, ...], ...]
    """Characteristic words of each cluster."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Cluster numbers, zero-padded."""
        return numbered(len(self.centres))

    def distances(self, documents: Sequence[Document]) -> NDArray[np.float64]:
        """Return squared distances to the centres, (N, K)."""
        from ....core.text.clustering.balanced_kmeans import squared_distances

        vectors = self.embed([document.text for document in documents])
        return squared_distances(unit_rows(vectors - self.mean), self.centres)

    def top_words(self, domain: int) -> tuple[str, ...]:
        """Return words that are more frequent in the cluster than in the others."""
        return self.words[domain]

    def write(self, folder: Path) -> None:
        """Write `centres.safetensors` and `centres.json`."""
        import torch

        write_tensors(
            folder / TENSORS_FILE, {"mean": torch.from_numpy(self.mean), "centres": torch.from_numpy(self.centres)}
        )
        write_json(folder / WORDS_FILE, {"words": [list(words) for words in self.words]})


@dataclass(frozen=True, kw_only=True)
class VectorOptions:
    """Options of k-means on text vectors."""

    balanced: bool = True
    """Whether k-means fits clusters of equal size."""
    rounds: int = 20
    """Maximum number of k-means iterations."""


def fit_vector_clusters(embed: Embed, inputs: DiscoveryInputs, options: VectorOptions) -> VectorClusters:
    """Fit k-means to the embeddings of texts, which must fit into memory.

    Raises `UserError` for fewer texts than clusters.
    """
    import numpy as np

    from ....core.text.clustering.balanced_kmeans import fit, squared_distances
    from ....core.text.clustering.words import distinct_words

    texts, clusters = inputs.sample(), num_clusters(inputs)
    if len(texts) < clusters:
        raise UserError(f"{clusters} clusters need at least as many texts, and there are {len(texts)}; request fewer")
    vectors = embed(texts)
    mean = vectors.mean(axis=0)
    points = unit_rows(vectors - mean)
    fitted = fit(points, clusters, seed=inputs.random_seed, rounds=options.rounds, balanced=options.balanced)
    groups = squared_distances(points, fitted.centres).argmin(axis=1)
    return VectorClusters(
        embed,
        mean.astype(np.float32),
        fitted.centres.astype(np.float32),
        distinct_words(texts, groups.tolist(), clusters),
    )


def num_clusters(inputs: DiscoveryInputs) -> int:
    """Return the requested number of clusters; raises `UserError` if there is none."""
    if inputs.clusters is None:
        raise UserError("the number of clusters is missing; add --clusters K")
    return inputs.clusters


def numbered(count: int) -> tuple[str, ...]:
    """Return `0`, `1` ..., zero-padded to equal length."""
    return tuple(f"{number:0{len(str(count - 1))}d}" for number in range(count))
