"""What a trainer may learn of private text before training begins: means of clipped vectors, with noise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .accounting import Release
from .noise import NoiseSource

if TYPE_CHECKING:
    from torch import Tensor


class Releases:
    """Gaussian mechanisms over every block of a text; what they cost stands in `history`."""

    def __init__(self, source: NoiseSource, embedding_noise: float | None) -> None:
        self._source, self._embedding_noise = source, embedding_noise
        self.history: list[Release] = []

    @property
    def releases_embedding(self) -> bool:
        return self._embedding_noise is not None

    def embedding_mean(self, rows: Iterable[Tensor], clip: float) -> Tensor:
        """Return the mean of vectors (n,), each cut to norm `clip`, with noise.

        Adding or removing one vector moves their sum by `clip` at most, which is what the noise is measured by. Their
        number counts as known, as it does everywhere else.
        """
        assert self._embedding_noise is not None, "no embedding may be released"
        total: Tensor | None = None
        count = 0
        for row_n in rows:
            vector_n = row_n.double()
            cut_n = vector_n * min(1.0, clip / max(float(vector_n.norm()), 1e-12))
            total = cut_n if total is None else total + cut_n
            count += 1
        assert total is not None, "a text has at least one block"
        purpose = f"embedding/{len(self.history)}"
        noise_n = self._source.normal(purpose, total.shape).to(total.device)
        self.history.append((self._embedding_noise, 1.0, 1))
        return (total + self._embedding_noise * clip * noise_n) / count
