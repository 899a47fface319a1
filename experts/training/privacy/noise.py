"""Cryptographic pseudo-random numbers from a secret key.

Differential privacy requires that the noise and the sampled blocks are unknown to an observer of the result. Both are
derived from a key by SHAKE-256, so every number is a function of key, purpose and step. A resumed run therefore uses
the same numbers, and without the key they are indistinguishable from random.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....core.artefacts.files import os_errors_as_user_errors, replacement_file
from ....core.errors import UserError
from .accounting import Release

KEY_FILE = "privacy.key"
KEY_BYTES = 32


@dataclass(frozen=True)
class NoiseSource:
    """A keyed random number generator; the same purpose gives the same numbers."""

    key: bytes = field(repr=False)

    def uniform(self, purpose: str, count: int) -> NDArray[Any]:
        """Return uniformly distributed numbers in the open interval (0, 1), float64 (count,)."""
        label = len(self.key).to_bytes(2, "big") + self.key + purpose.encode("utf-8")
        words = np.frombuffer(hashlib.shake_256(label).digest(8 * count), dtype="<u8")
        numbers: NDArray[Any] = ((words >> 11).astype(np.float64) + 0.5) * 2.0**-53
        return numbers

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers by the Box-Muller transform, float64."""
        count = math.prod(shape)
        numbers = torch.from_numpy(self.uniform(purpose, 2 * -(-count // 2)))
        first, second = numbers.chunk(2)
        radius, angle = torch.sqrt(-2.0 * torch.log(first)), 2.0 * torch.pi * second
        normals = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])
        return normals[:count].reshape(tuple(shape))

    def sampled_indices(self, purpose: str, size: int, rate: float) -> NDArray[Any]:
        """Return the indices of the sampled examples out of `size`, each with probability `rate` (Poisson sampling)."""
        return np.flatnonzero(self.uniform(purpose, size) < rate)


def secret_source(state_folder: Path) -> NoiseSource:
    """Return the noise source of a run; its key is created in the state folder, which is deleted when the run ends.

    Only the file's owner can read the key. Raises `UserError` if the key is damaged.
    """
    path = state_folder / KEY_FILE
    with os_errors_as_user_errors(path):
        if not path.exists():
            state_folder.mkdir(parents=True, exist_ok=True)
            with replacement_file(path, mode=0o600) as file:
                file.write(secrets.token_bytes(KEY_BYTES))
        key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise UserError(
            f"{path} is damaged, so the run cannot resume with the same noise; delete {state_folder} to train from "
            "the start"
        )
    return NoiseSource(key)


def seeded_source(seed: int) -> NoiseSource:
    """Return a reproducible source from a random seed, which does not protect the text."""
    return NoiseSource(hashlib.sha256(f"expertctl differential privacy {seed}".encode()).digest())


class Releases:
    """Noisy means for trainers before training: Gaussian mechanisms over all blocks of a text.

    `history` records them for the accountant.
    """

    def __init__(self, source: NoiseSource, embedding_noise: float | None) -> None:
        self.source, self._embedding_noise = source, embedding_noise
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
        noise_n = self.source.normal(purpose, total.shape).to(total.device)
        self.history.append((self._embedding_noise, 1.0, 1))
        return (total + self._embedding_noise * clip * noise_n) / count
