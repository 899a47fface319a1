"""Noise and scale of the feed-forward networks of single experts, as in mergekit-moe."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

NOISE, RESIDUAL = "noise_scale", "residual_scale"
"""Options of an expert: standard deviation of the noise, and factor for what its network adds to the residual stream."""
_RESIDUAL_PROJECTION = ".down_proj."


@dataclass(frozen=True)
class Perturbation:
    """Normally distributed noise for a tensor, and a factor for their sum."""

    noise: float
    """Standard deviation."""
    scale: float
    stream: str
    """Name of the random stream."""

    def apply(self, numbers: NDArray[Any]) -> NDArray[Any]:
        """Return the perturbed numbers, in their dtype."""
        import numpy as np

        if self.noise:
            key = hashlib.sha256(self.stream.encode()).digest()
            generator = np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "little")))
            numbers = numbers + generator.standard_normal(numbers.shape, numbers.dtype) * numbers.dtype.type(self.noise)
        scaled: NDArray[Any] = numbers * numbers.dtype.type(self.scale)
        return scaled


def perturbations(options: Mapping[str, Any], expert: str, tensors: tuple[str, ...]) -> dict[str, Perturbation]:
    """Return the perturbed tensors of an expert's feed-forward network, for its `noise_scale` and `residual_scale`.

    Raises `UserError` for other values than numbers, and for networks without the projection that `residual_scale` scales.
    """
    noise, residual = _number(options, NOISE, 0.0, expert), _number(options, RESIDUAL, 1.0, expert)
    if noise < 0:
        raise UserError(f"{NOISE} of '{expert}' is {noise}; it must be 0 or more")
    if residual != 1 and not any(_RESIDUAL_PROJECTION in name for name in tensors):
        raise UserError(
            f"{RESIDUAL} of '{expert}' scales the tensors 'down_proj', which feed-forward networks of this family do not have"
        )
    scales = {name: residual if _RESIDUAL_PROJECTION in name else 1.0 for name in tensors}
    return {
        name: Perturbation(noise, scale, f"{expert}:{name}") for name, scale in scales.items() if noise or scale != 1
    }


def _number(options: Mapping[str, Any], key: str, default: float, expert: str) -> float:
    value = options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{key} of '{expert}' is {value!r}, which is not a number")
    return float(value)
