"""Random numbers that nobody can make again who does not have the key.

Differential privacy rests on the noise, and on who was drawn, being unknown to whoever looks at the result. Both come from
a key through SHAKE-256, so every number is a function of key, purpose and step alone: a run that was killed goes on with
the same numbers, and without the key they cannot be told from chance.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....core.artefacts.files import readable_os_errors
from ....core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

KEY_FILE = "privacy.key"
KEY_BYTES = 32


@dataclass(frozen=True)
class NoiseSource:
    """Numbers by purpose; the same purpose gives the same numbers."""

    key: bytes = field(repr=False)

    def uniform(self, purpose: str, count: int) -> NDArray[Any]:
        """Return numbers above 0 and below 1, float64 (count,)."""
        import numpy as np

        label = len(self.key).to_bytes(2, "big") + self.key + purpose.encode("utf-8")
        words = np.frombuffer(hashlib.shake_256(label).digest(8 * count), dtype="<u8")
        numbers: NDArray[Any] = ((words >> 11).astype(np.float64) + 0.5) * 2.0**-53
        return numbers

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Return standard normal numbers, float64, by Box and Muller's method."""
        import torch

        count = math.prod(shape)
        numbers = torch.from_numpy(self.uniform(purpose, 2 * -(-count // 2)))
        first, second = numbers.chunk(2)
        radius, angle = torch.sqrt(-2.0 * torch.log(first)), 2.0 * torch.pi * second
        both = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])
        return both[:count].reshape(tuple(shape))

    def drawn(self, purpose: str, size: int, rate: float) -> NDArray[Any]:
        """Return which of `size` examples are drawn, each by itself with probability `rate` (Poisson sampling)."""
        import numpy as np

        return np.flatnonzero(self.uniform(purpose, size) < rate)


def secret_source(state_folder: Path) -> NoiseSource:
    """Return the source of a run's noise, whose key lies in its state folder and goes with that when the run is done.

    Only the owner of the file can read it. Raises `UserError` for a damaged key.
    """
    path = state_folder / KEY_FILE
    with readable_os_errors(path):
        if not path.exists():
            state_folder.mkdir(parents=True, exist_ok=True)
            _write_secret(path, secrets.token_bytes(KEY_BYTES))
        key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise UserError(
            f"{path} is damaged, and the run's noise cannot be gone on with; delete {state_folder} to train from the start"
        )
    return NoiseSource(key)


def _write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read, at once or not at all."""
    partial = path.with_name(f"{path.name}.new")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def seeded_source(seed: int) -> NoiseSource:
    """Return a source that anybody can make again: for repeating a run, not for protecting text."""
    return NoiseSource(hashlib.sha256(f"expertctl differential privacy {seed}".encode()).digest())
