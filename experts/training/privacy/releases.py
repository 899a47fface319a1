"""Private statistics for trainers before training: noisy means of clipped vectors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .accounting import Release
from .noise import NoiseSource

if TYPE_CHECKING:
    from torch import Tensor


class Releases:
    """Gaussian mechanisms over all blocks of a text; `history` records them for the accountant."""

    def __init__(self, source: NoiseSource, embedding_noise: float | None) -> None:
        self._source, self._embedding_noise = source, embedding_noise
        self.history: list[Release] = []

    @property
    def releases_embedding(self) -> bool:
        return self._embedding_noise is not None

    def embedding_mean(self, rows: Iterable[Tensor], clip: float) -> Tensor:
        """Return the noisy mean of vectors (n,), each clipped to norm `clip`.

        Adding or removing one vector changes the sum by at most `clip`, the sensitivity that scales the noise. The number
        of vectors is treated as public.
        """
        assert self._embedding_noise is not None, "the run has no budget for an embedding"
        total: Tensor | None = None
        count = 0
        for row_n in rows:
            vector_n = row_n.double()
            clipped_n = vector_n * min(1.0, clip / max(float(vector_n.norm()), 1e-12))
            total = clipped_n if total is None else total + clipped_n
            count += 1
        assert total is not None, "a text has at least one block"
        purpose = f"embedding/{len(self.history)}"
        noise_n = self._source.normal(purpose, total.shape).to(total.device)
        self.history.append((self._embedding_noise, 1.0, 1))
        return (total + self._embedding_noise * clip * noise_n) / count
