"""Document order of In-Context Pretraining (Shi et al. 2023, arXiv:2310.10638, algorithm 1).

Similar documents are placed next to each other, so that they share a context window. Documents are connected to their
nearest neighbours. A path through this graph starts at the document of lowest degree, continues with the most similar
unvisited neighbour, and restarts where there is none. The paper embeds documents with a retrieval model and drops
near-duplicates; here embeddings are tf-idf with truncated SVD, and every document is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...core.errors import UserError
from ...core.text.clustering.clusterer import BATCH, ClustererSettings, fit_clusterer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...core.text.clustering.neighbours import Neighbours

NEIGHBOURS = 10
SAMPLE = 50_000
"""Maximum number of documents for fitting the embedding (approximately)."""


def in_context_order(texts: Sequence[str]) -> list[int]:
    """Return the permutation of document indices, deterministic for the same texts.

    `texts` is read in batches; memory holds 100 numbers and `NEIGHBOURS` neighbours per document.
    """
    from ...core.text.clustering.neighbours import nearest_neighbours

    points = text_points(texts)
    if points is None:
        return list(range(len(texts)))
    return greedy_path(nearest_neighbours(points, NEIGHBOURS))


def text_points(texts: Sequence[str]) -> NDArray[np.float32] | None:
    """Return the normalised embeddings of texts, (N, d); None if no two texts share a word."""
    import numpy as np

    step = -(-len(texts) // SAMPLE) or 1
    try:
        clusterer = fit_clusterer(
            [texts[index] for index in range(0, len(texts), step)], ClustererSettings(clusters=1, rounds=1)
        )
    except UserError:  # no shared words, which is not an error here
        return None
    return np.concatenate([clusterer.points(texts[begin : begin + BATCH]) for begin in range(0, len(texts), BATCH)])


def greedy_path(neighbours: Neighbours) -> list[int]:
    """Return a path through all documents that always continues with the most similar unvisited neighbour."""
    import numpy as np
    from scipy.sparse import csr_matrix

    count, width = neighbours.places.shape
    rows, columns = np.repeat(np.arange(count), width), neighbours.places.ravel()
    is_edge = columns >= 0
    values = neighbours.similarities.ravel()[is_edge]
    edges = csr_matrix((values, (rows[is_edge], columns[is_edge])), shape=(count, count))
    edges = edges.maximum(edges.T).tocsr()  # undirected
    degrees = np.diff(edges.indptr)
    visited = np.zeros(count, bool)
    path: list[int] = []
    for start in np.argsort(degrees, kind="stable").tolist():
        document = start
        while not visited[document]:
            visited[document] = True
            path.append(document)
            begin, end = edges.indptr[document], edges.indptr[document + 1]
            others, similarities = edges.indices[begin:end], edges.data[begin:end]
            unvisited = ~visited[others]
            if not unvisited.any():
                break
            best = np.lexsort((others[unvisited], -similarities[unvisited]))[0]
            document = int(others[unvisited][best])
    return path
