"""What dense methods share: the array library of their inputs, work in pieces, thresholds, inner products, random masks.

numpy on a CPU, so that torch, whose import costs seconds, is not needed there; torch on a GPU. Passes over arrays that
do not fit into a core's cache wait for memory, so element-wise work goes through them in pieces that do.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from ...core.types import PerExpert, TensorGroup

PIECE_NUMBERS = 1 << 16
Array = Any
"""A numpy array or a torch tensor."""


def is_numpy(array: Array) -> bool:
    """Tell whether an array is numpy's, not torch's."""
    import numpy as np

    return isinstance(array, np.ndarray | np.generic)  # numpy hands out numbers where an array has no axis


def namespace(array: Array) -> Any:
    """Return the array-API functions that go with an array."""
    from array_api_compat import array_namespace

    return array_namespace(array)


def each(option: PerExpert, group: TensorGroup) -> tuple[float, ...]:
    """Return an option's value for every expert."""
    return option if isinstance(option, tuple) else (option,) * len(group.experts)


def check_range(name: str, option: PerExpert, low: float, high: float) -> None:
    """Raise `ValueError` unless an option lies between two numbers, for every expert."""
    for value in option if isinstance(option, tuple) else (option,):
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; it is {low:g} to {high:g}")


def in_pieces(function: Callable[..., Array], *arrays: Array) -> Array:
    """Return `function(*arrays)` for an element-wise function, worked out piece by piece on a CPU."""
    first = arrays[0]
    if not is_numpy(first):
        return function(*arrays)
    import numpy as np

    if first.size <= PIECE_NUMBERS:
        return np.asarray(function(*arrays)).reshape(first.shape)
    flat = [array.reshape(-1) for array in arrays]
    result = np.empty_like(flat[0])
    for begin in range(0, first.size, PIECE_NUMBERS):
        piece = slice(begin, begin + PIECE_NUMBERS)
        result[piece] = function(*(array[piece] for array in flat))
    return result.reshape(first.shape)


def kth_largest_magnitude(array: Array, count: int, base: Array | None = None) -> float:
    """Return the `count`-th largest magnitude in `array - base`, exactly, without sorting (introselect).

    Takes one array of the same size beside the inputs. 1 <= count <= the number of elements.
    """
    if not is_numpy(array):
        import torch

        magnitudes = (array if base is None else array - base).abs().reshape(-1)
        return float(torch.kthvalue(magnitudes, magnitudes.numel() - count + 1).values)
    import numpy as np

    scratch = np.subtract(array, base).reshape(-1) if base is not None else array.reshape(-1).copy()
    np.abs(scratch, out=scratch)
    scratch.partition(scratch.size - count)
    return float(scratch[scratch.size - count])


def inner_products(arrays: Sequence[Array], base: Array | None = None) -> list[list[float]]:
    """Return the matrix of inner products of `array - base`, summed in float64."""
    import numpy as np

    count = len(arrays)
    total = np.zeros((count, count))
    flat = [array.reshape(-1) for array in arrays]
    origin = base.reshape(-1) if base is not None else None
    size = math.prod(arrays[0].shape)
    step = PIECE_NUMBERS if is_numpy(arrays[0]) else max(size, 1)
    for begin in range(0, size, step):
        piece = slice(begin, begin + step)
        wide = [_wide(array[piece], None if origin is None else origin[piece]) for array in flat]
        for i in range(count):
            for j in range(i + 1):
                total[i, j] += float((wide[i] * wide[j]).sum())
    return [[float(total[max(i, j), min(i, j)]) for j in range(count)] for i in range(count)]


def _wide(array: Array, base: Array | None) -> Array:
    xp = namespace(array)
    numbers = xp.astype(array, xp.float64)
    return numbers if base is None else numbers - xp.astype(base, xp.float64)


def weighted_sum(coefficients: Sequence[float], arrays: Sequence[Array]) -> Array:
    """Return the sum of arrays, each times its coefficient, in their own precision and order."""

    def piece(*parts: Array) -> Array:
        total = parts[0] * coefficients[0]
        for coefficient, part in zip(coefficients[1:], parts[1:], strict=True):
            total += part * coefficient
        return total

    return in_pieces(piece, *arrays)


def random_mask(like: Array, density: Array | float, seed: int, tensor: str, expert: str) -> Array:
    """Return which elements are kept: each by itself with probability `density` (a number, or an array like `like`).

    The stream depends on the seed, the tensor's and the expert's name alone: files, threads, the order of experts and
    the device never change it. It is that of a numpy bit generator, which numpy promises not to change.
    """
    import numpy as np

    key = hashlib.sha256(f"{seed}:{expert}:{tensor}".encode()).digest()
    source = np.random.SFC64(int.from_bytes(key[:16], "little"))
    size = math.prod(like.shape)
    kept = np.empty(size, dtype=bool)
    wanted = _on_cpu(density).reshape(-1) if not isinstance(density, float | int) else density
    for begin in range(0, size, PIECE_NUMBERS):
        count = min(PIECE_NUMBERS, size - begin)
        words = source.random_raw(-(-count // 2)).view("<u4")[:count]
        least = wanted if isinstance(wanted, float | int) else wanted[begin : begin + count]
        # 2**32 as a limit keeps every word: density 1 keeps all
        kept[begin : begin + count] = words < np.round(np.multiply(least, 2.0**32))
    mask = kept.reshape(like.shape)
    if is_numpy(like):
        return mask
    import torch

    return torch.from_numpy(mask).to(like.device)


def _on_cpu(array: Array) -> Array:
    return array if is_numpy(array) else array.cpu().numpy()
