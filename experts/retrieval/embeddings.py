"""Search by embeddings: cosines of mean hidden states of a local sentence-embedding model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError
from ...core.reporting import SILENT, Reporter
from ...core.text.word_search import Ranked, best
from .passages import Passages

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Embed = Callable[[Sequence[str]], "NDArray[np.float32]"]
"""Returns the embeddings of texts, (N, d)."""
FILE = "embeddings.npy"
BATCH = 256


def build_embeddings(folder: Path, passages: Passages, embed: Embed, reporter: Reporter = SILENT) -> None:
    """Write the unit embeddings of passages, (N, d) in float32, batch by batch; raises `UserError` for one that has no length."""
    import numpy as np

    written: Any = None
    batches = range(0, len(passages), BATCH)
    for begin in batches:
        units = unit_rows(embed([passages[number].text for number in range(begin, min(begin + BATCH, len(passages)))]))
        if written is None:
            written = np.lib.format.open_memmap(
                folder / FILE, mode="w+", dtype=np.float32, shape=(len(passages), units.shape[1])
            )
        written[begin : begin + len(units)] = units
        reporter.progress("embedding", begin + len(units), len(passages), unit="passages")
    written.flush()


def unit_rows(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return embeddings (N, d) divided by their lengths; raises `UserError` if one is 0 or not finite."""
    import numpy as np

    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not np.all(np.isfinite(lengths) & (lengths > 0)):
        raise UserError("the embedding model gives embeddings that are zero or not finite; use another one")
    units: NDArray[np.float32] = embeddings / lengths
    return units


class Embeddings:
    """The embeddings of a folder, which stay on disk."""

    def __init__(self, folder: Path, embed: Embed) -> None:
        import numpy as np

        self._embed = embed
        self._units: NDArray[np.float32] = np.load(folder / FILE, mmap_mode="r")

    def search(self, queries: Sequence[str], count: int) -> list[list[Ranked]]:
        """Return the passages with the highest cosines to each query, best first; exact search."""
        products = unit_rows(self._embed(queries)) @ self._units.T
        return [best(row, count) for row in products]
