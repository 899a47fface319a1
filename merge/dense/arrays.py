"""Array helpers shared by the dense merge methods: chunking, thresholds, inner products and random masks.

Arrays are numpy on a CPU, which avoids importing torch, and torch on a GPU. Element-wise passes over arrays
larger than the CPU cache are bound by memory bandwidth, so they run in chunks that fit into the cache.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ...core.hooks.merging import PerExpert, TensorGroup

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK_SIZE = 1 << 17
"""Elements per chunk, small enough for the CPU cache."""
ROW_SIZE = 256
"""Elements per float32 partial sum of an inner product."""
Array = Any
"""A numpy array or a torch tensor."""


def is_numpy(array: Array) -> bool:
    """Return whether an array is a numpy array (or scalar) rather than a torch tensor."""
    import numpy as np

    return isinstance(array, np.ndarray | np.generic)  # numpy returns scalars for arrays without axes


def namespace(array: Array) -> Any:
    """Return the array-API namespace of an array."""
    from array_api_compat import array_namespace

    return array_namespace(array)


def per_expert_values(option: PerExpert, group: TensorGroup) -> tuple[float, ...]:
    """Return an option's value for each expert."""
    return option if isinstance(option, tuple) else (option,) * len(group.experts)


def chunks(*arrays: Array, size: int = CHUNK_SIZE) -> Iterator[tuple[Array, ...]]:
    """Yield matching flat chunks of all arrays; on a GPU the whole arrays are one chunk."""
    flat = [array.reshape(-1) for array in arrays]
    total = flat[0].shape[0]
    step = size if is_numpy(flat[0]) else max(total, 1)
    for begin in range(0, total, step):
        yield tuple(array[begin : begin + step] for array in flat)


def map_chunks(function: Callable[..., Array], *arrays: Array) -> Array:
    """Return `function(*arrays)` of an element-wise function, computed chunk by chunk."""
    first = arrays[0]
    if not is_numpy(first) or first.size <= CHUNK_SIZE:
        flat = [array.reshape(-1) for array in arrays]  # at least one axis, which `function` may need
        return function(*flat).reshape(first.shape)
    import numpy as np

    result = np.empty(first.size, first.dtype)
    for target, *parts in chunks(result, *arrays):
        target[:] = function(*parts)
    return result.reshape(first.shape)


def words(floats: Array) -> Array:
    """Return a view of floats as integers of the same width, for operations on their bits."""
    if is_numpy(floats):
        return floats.view(f"i{floats.dtype.itemsize}")
    import torch

    return floats.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[floats.element_size()])


def mask_words(mask: Array, like: Array) -> Array:
    """Return new integers of the width of `like`: all bits are set where the mask is true, none elsewhere.

    Masking bits is ten times faster than multiplying by booleans, which are converted piece by piece.
    """
    if not is_numpy(mask):
        return -mask.to(words(like).dtype)
    import numpy as np

    bits = mask.view(np.int8).astype(f"i{like.dtype.itemsize}")
    return np.negative(bits, out=bits)


def zero_unkept(vector: Array, kept: Array) -> None:
    """Set the elements of a vector to 0 in place where `kept` is false."""
    if is_numpy(vector) and vector.ndim == 0:
        vector *= kept
        return
    bits = words(vector)
    bits &= mask_words(kept, vector)


def as_indicator(mask: Array, like: Array) -> Array:
    """Return a boolean array as 1 and 0 in the dtype of `like`."""
    if not is_numpy(mask):
        return mask.to(like.dtype)
    import numpy as np

    return mask.view(np.int8).astype(like.dtype) if mask.ndim else like.dtype.type(mask)


def histogram(values: Array, bins: int) -> NDArray[np.int64]:
    """Return the counts (bins,) of flat integers from 0 to `bins` - 1, as a numpy array."""
    import numpy as np

    if is_numpy(values):
        return np.bincount(values, minlength=bins)
    import torch

    counts: NDArray[np.int64] = torch.bincount(values.long(), minlength=bins).cpu().numpy()
    return counts


def inner_products(arrays: Sequence[Array], base: Array | None = None) -> list[list[float]]:
    """Return the Gram matrix of the vectors `array - base`, accumulated in float64."""
    import numpy as np

    count = len(arrays)
    total = np.zeros((count, count))
    for parts in chunks(*arrays, *([base] if base is not None else [])):
        vectors = parts if base is None else [part - parts[-1] for part in parts[:-1]]
        for i in range(count):
            for j in range(i + 1):
                total[i, j] += _inner_product(vectors[i], vectors[j])
    return [[float(total[max(i, j), min(i, j)]) for j in range(count)] for i in range(count)]


def _inner_product(left: Array, right: Array) -> float:
    # On numpy, rows of `ROW_SIZE` elements are summed in the input dtype, which bounds the rounding error.
    if not is_numpy(left):
        return float((left.double() * right.double()).sum())
    import numpy as np

    end = left.size - left.size % ROW_SIZE
    rows = np.einsum("ij,ij->i", left[:end].reshape(-1, ROW_SIZE), right[:end].reshape(-1, ROW_SIZE))
    remainder = np.dot(left[end:].astype("f8"), right[end:].astype("f8"))
    return float(rows.sum(dtype="f8")) + float(remainder)


def weighted_sum(coefficients: Sequence[float], arrays: Sequence[Array]) -> Array:
    """Return the linear combination of arrays, summed in the given order and in their dtype."""

    def combine(*parts: Array) -> Array:
        total = parts[0] * coefficients[0]
        for coefficient, part in zip(coefficients[1:], parts[1:], strict=True):
            total += part * coefficient
        return total

    return map_chunks(combine, *arrays)


def random_mask(like: Array, density: Array | float, seed: int, tensor: str, expert: str) -> Array:
    """Return a boolean mask in which each element is true independently with probability `density`.

    `density` is a number or an array of the shape of `like`. The random stream depends only on the seed and
    on the names of tensor and expert, not on files, threads, the order of experts or the device. It comes
    from a numpy bit generator, whose stream numpy guarantees to be stable.
    """
    import numpy as np

    key = hashlib.sha256(f"{seed}:{expert}:{tensor}".encode()).digest()
    generator = np.random.SFC64(int.from_bytes(key[:16], "little"))
    size = math.prod(like.shape)
    kept = np.empty(size, dtype=bool)
    limits = _word_limits(density)
    for begin in range(0, size, CHUNK_SIZE):
        count = min(CHUNK_SIZE, size - begin)
        words = generator.random_raw(-(-count // 2)).view("<u4")[:count]
        limit = limits if limits.ndim == 0 else limits[begin : begin + count]
        np.less_equal(words, limit, out=kept[begin : begin + count])
    mask = kept.reshape(like.shape)
    if is_numpy(like):
        return mask
    import torch

    return torch.from_numpy(mask).to(like.device)


def _word_limits(density: Array | float) -> Any:
    """Return the largest 32-bit random word for which an element is kept, per density."""
    import numpy as np

    if not isinstance(density, float | int) and not is_numpy(density):
        density = density.cpu().numpy()
    words = np.round(np.multiply(density, 2.0**32)) - 1
    return np.clip(words, 0, 2**32 - 1).astype("<u4").reshape(-1 if np.ndim(density) else ())
