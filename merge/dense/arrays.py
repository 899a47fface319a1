"""What dense methods share: the array library of their inputs, work in pieces, thresholds, inner products, random masks.

numpy on a CPU, so that torch, whose import costs seconds, is not needed there; torch on a GPU. Passes over arrays that
do not fit into a core's cache wait for memory, so element-wise work goes through them in pieces that do.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...core.hooks.merging import PerExpert, TensorGroup

PIECE_NUMBERS = 1 << 17
ROW_NUMBERS = 256
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


def pieces(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Yield the same piece of every array, flat: of a size that stays in a core's cache, or whole on a GPU."""
    flat = [array.reshape(-1) for array in arrays]
    size = flat[0].shape[0]
    step = PIECE_NUMBERS if is_numpy(flat[0]) else max(size, 1)
    for begin in range(0, size, step):
        yield tuple(array[begin : begin + step] for array in flat)


def in_pieces(function: Callable[..., Array], *arrays: Array) -> Array:
    """Return `function(*arrays)` for an element-wise function, worked out piece by piece."""
    first = arrays[0]
    size = math.prod(first.shape)
    if not is_numpy(first) or size <= PIECE_NUMBERS:
        flat = [array.reshape(-1) for array in arrays]  # so that they are arrays even of a single number
        return function(*flat).reshape(first.shape)
    import numpy as np

    result = np.empty(size, first.dtype)
    begin = 0
    for parts in pieces(*arrays):
        end = begin + parts[0].size
        result[begin:end] = function(*parts)
        begin = end
    return result.reshape(first.shape)


def erase(vector: Array, kept: Array) -> None:
    """Set the elements of a vector to 0, in place, where `kept` is false.

    Multiplying by a truth value converts it piece by piece, which takes ten times as long as masking bits does.
    """
    if not is_numpy(vector) or vector.dtype.itemsize != 4 or vector.ndim == 0:
        vector *= kept
        return
    import numpy as np

    bits = kept.view(np.int8).astype(np.int32)
    np.negative(bits, out=bits)  # 1 becomes all ones
    whole = vector.view(np.int32)
    np.bitwise_and(whole, bits, out=whole)


def as_numbers(truth: Array, like: Array) -> Array:
    """Return 1 where true and 0 elsewhere, in the dtype of `like`."""
    if not is_numpy(truth):
        return truth.to(like.dtype)
    import numpy as np

    return truth.view(np.int8).astype(like.dtype) if truth.ndim else like.dtype.type(truth)


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
    """Return the matrix of inner products of `array - base`: short rows in their own precision, their sums in float64."""
    import numpy as np

    count = len(arrays)
    total = np.zeros((count, count))
    for parts in pieces(*arrays, *([base] if base is not None else [])):
        vectors = parts if base is None else [part - parts[-1] for part in parts[:-1]]
        for i in range(count):
            for j in range(i + 1):
                total[i, j] += _inner_product(vectors[i], vectors[j])
    return [[float(total[max(i, j), min(i, j)]) for j in range(count)] for i in range(count)]


def _inner_product(one: Array, other: Array) -> float:
    """Return the inner product of two vectors; rows of 256 keep float32's rounding below that of the result."""
    if not is_numpy(one):
        return float((one.double() * other.double()).sum())
    import numpy as np

    whole = one.size - one.size % ROW_NUMBERS
    rows = np.einsum("ij,ij->i", one[:whole].reshape(-1, ROW_NUMBERS), other[:whole].reshape(-1, ROW_NUMBERS))
    rest = np.dot(one[whole:].astype("f8"), other[whole:].astype("f8"))
    return float(rows.sum(dtype="f8")) + float(rest)


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
    limits = _as_words(density)
    for begin in range(0, size, PIECE_NUMBERS):
        count = min(PIECE_NUMBERS, size - begin)
        words = source.random_raw(-(-count // 2)).view("<u4")[:count]
        limit = limits if limits.ndim == 0 else limits[begin : begin + count]
        np.less_equal(words, limit, out=kept[begin : begin + count])
    mask = kept.reshape(like.shape)
    if is_numpy(like):
        return mask
    import torch

    return torch.from_numpy(mask).to(like.device)


def _as_words(density: Array | float) -> Any:
    """Return the largest 32-bit word that keeps an element, for one density or for each."""
    import numpy as np

    if not isinstance(density, float | int) and not is_numpy(density):
        density = density.cpu().numpy()
    words = np.round(np.multiply(density, 2.0**32)) - 1
    return np.clip(words, 0, 2**32 - 1).astype("<u4").reshape(-1 if np.ndim(density) else ())
