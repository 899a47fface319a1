"""The order of In-Context Pretraining (Shi et al. 2023, arXiv:2310.10638, algorithm 1): related documents stand side by side.

Documents that share a context window can then say something of each other. Each document is tied to its most similar ones; a path
through that graph begins where there are fewest ties, goes on to the most similar document that was not visited, and begins anew
where there is none. The paper embeds documents with a retrieval model and drops near duplicates; here points are those of the
words (tf-idf and truncated SVD), and every document stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...core.errors import UserError
from ...core.text.clustering.clusterer import BATCH, ClustererSettings, fit_clusterer
from ...core.text.clustering.neighbours import Neighbours, nearest_neighbours

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NEIGHBOURS = 10
SAMPLE = 50_000
"""Documents that words are learnt from."""


def in_context_order(texts: Sequence[str]) -> list[int]:
    """Return the documents' numbers in their new order: a permutation, the same for the same texts.

    `texts` is read a few at a time; what is held are 100 numbers and `NEIGHBOURS` ties for each.
    """
    points = text_points(texts)
    if points is None:
        return list(range(len(texts)))
    return greedy_path(nearest_neighbours(points, NEIGHBOURS))


def text_points(texts: Sequence[str]) -> NDArray[np.float32] | None:
    """Return the texts' points of length 1, (N, d); None where no word is in two of them."""
    import numpy as np

    step = -(-len(texts) // SAMPLE) or 1
    try:
        words = fit_clusterer(
            [texts[place] for place in range(0, len(texts), step)], ClustererSettings(clusters=1, rounds=1)
        )
    except UserError:  # which says that texts have too little in common for clusters: here that is no fault
        return None
    return np.concatenate(
        [words.points(texts[begin : begin + BATCH]) for begin in range(0, len(texts), BATCH)]
    )


def greedy_path(neighbours: Neighbours) -> list[int]:
    """Return a path through all documents: always to the most similar neighbour that was not visited."""
    import numpy as np
    from scipy.sparse import csr_matrix

    count, width = neighbours.places.shape
    rows, columns = np.repeat(np.arange(count), width), neighbours.places.ravel()
    real = columns >= 0
    values = neighbours.similarities.ravel()[real]
    ties = csr_matrix((values, (rows[real], columns[real])), shape=(count, count))
    ties = ties.maximum(ties.T).tocsr()  # a tie goes both ways
    degrees = np.diff(ties.indptr)
    visited = np.zeros(count, bool)
    path: list[int] = []
    for start in np.argsort(degrees, kind="stable").tolist():
        place: int | None = start
        while place is not None and not visited[place]:
            visited[place] = True
            path.append(place)
            begin, end = ties.indptr[place], ties.indptr[place + 1]
            others, similarities = ties.indices[begin:end], ties.data[begin:end]
            free = ~visited[others]
            if not free.any():
                break
            best = np.lexsort((others[free], -similarities[free]))[0]
            place = int(others[free][best])
    return path
