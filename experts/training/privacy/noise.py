"""Cryptographic pseudo-random numbers from a secret key.

Differential privacy requires that the noise and the sampled blocks are unknown to an observer of the result. Both are
derived from a key by SHAKE-256, so every number is a function of key, purpose and step. A resumed run therefore uses
the same numbers, and without the key they are indistinguishable from random.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....core.artefacts.files import os_errors_as_user_errors
from ....core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

KEY_FILE = "privacy.key"
KEY_BYTES = 32


@dataclass(frozen=True)
class NoiseSource:
    """A keyed random number generator; the same purpose gives the same numbers."""

    key: bytes = field(repr=False)

    def uniform(self, purpose: str, count: int) -> NDArray[Any]:
        """Return uniformly distributed numbers in the open interval (0, 1), float64 (count,)."""
        import numpy as np

        label = len(self.key).to_bytes(2, "big") + self.key + purpose.encode("utf-8")
        words = np.frombuffer(hashlib.shake_256(label).digest(8 * count), dtype="<u8")
        numbers: NDArray[Any] = ((words >> 11).astype(np.float64) + 0.5) * 2.0**-53
        return numbers

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers by the Box-Muller transform, float64."""
        import torch

        count = math.prod(shape)
        numbers = torch.from_numpy(self.uniform(purpose, 2 * -(-count // 2)))
        first, second = numbers.chunk(2)
        radius, angle = torch.sqrt(-2.0 * torch.log(first)), 2.0 * torch.pi * second
        normals = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])
        return normals[:count].reshape(tuple(shape))

    def drawn(self, purpose: str, size: int, rate: float) -> NDArray[Any]:
        """Return the indices of the sampled examples out of `size`, each with probability `rate` (Poisson sampling)."""
        import numpy as np

        return np.flatnonzero(self.uniform(purpose, size) < rate)


def secret_source(state_folder: Path) -> NoiseSource:
    """Return the noise source of a run; its key is created in the state folder, which is deleted when the run ends.

    Only the file's owner can read the key. Raises `UserError` if the key is damaged.
    """
    path = state_folder / KEY_FILE
    with os_errors_as_user_errors(path):
        if not path.exists():
            state_folder.mkdir(parents=True, exist_ok=True)
            _write_secret(path, secrets.token_bytes(KEY_BYTES))
        key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise UserError(
            f"{path} is damaged, so the run cannot resume with the same noise; delete {state_folder} to train from "
            "the start"
        )
    return NoiseSource(key)


def _write_secret(path: Path, content: bytes) -> None:
    """Atomically write a file that only its owner can read."""
    partial = path.with_name(f"{path.name}.new")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def seeded_source(seed: int) -> NoiseSource:
    """Return a reproducible source from a random seed, which does not protect the text."""
    return NoiseSource(hashlib.sha256(f"expertctl differential privacy {seed}".encode()).digest())
