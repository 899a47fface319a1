"""The largest magnitudes of an array: their threshold, exactly and without sorting, and masks of their elements."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .arrays import Array, chunks, is_numpy

SAMPLE_SIZE = 1 << 15
"""Elements that bracket a threshold."""
_DIGIT_BITS = 16


def kth_largest_magnitude(array: Array, count: int, base: Array | None = None) -> float:
    """Return the exact `count`-th largest magnitude of `array - base`; see `largest_magnitudes`."""
    return largest_magnitudes(array, count, base).smallest


@dataclass(frozen=True)
class LargestMagnitudes:
    """The `count` largest magnitudes of an array."""

    smallest: float
    """The `count`-th largest magnitude."""
    beyond: int
    """Number of further elements with that magnitude; 0 if it is 0."""


def largest_magnitudes(array: Array, count: int, base: Array | None = None) -> LargestMagnitudes:
    """Return the threshold of the `count` largest magnitudes of `array - base`.

    `count` is in the range 1 to the number of elements. A sample brackets the threshold of a large array, so that only the
    few elements inside the bracket are selected from.
    """
    if not is_numpy(array):
        import torch

        magnitudes = (array if base is None else array - base).abs().reshape(-1)
        smallest = float(torch.kthvalue(magnitudes, magnitudes.numel() - count + 1).values)
        return LargestMagnitudes(smallest, int((magnitudes >= smallest).sum()) - count if smallest else 0)
    bracket = _bracket(array, count, base) if array.size > 4 * SAMPLE_SIZE else (0.0, math.inf)
    above, inside = _elements_between(bracket, array, base)
    if not above < count <= above + inside.size:  # a sample that is unlike the array
        above, inside = _elements_between((0.0, math.inf), array, base)
    return _select(inside, count - above)


def _bracket(array: Array, count: int, base: Array | None) -> tuple[float, float]:
    """Return magnitudes between which the `count`-th largest is, for all but one in thousands of random samples."""
    stride = array.size // SAMPLE_SIZE | 1  # odd: it meets all columns of a matrix
    flat = array.reshape(-1)[::stride]
    sample = abs(flat if base is None else flat - base.reshape(-1)[::stride])
    sample.sort()
    share = 1 - count / array.size
    margin = 4 * math.sqrt(share * (1 - share) * sample.size) + 1
    low, high = math.floor(share * sample.size - margin), math.ceil(share * sample.size + margin)
    return float(sample[low]) if low >= 0 else 0.0, float(sample[high]) if high < sample.size else math.inf


def _elements_between(bracket: tuple[float, float], array: Array, base: Array | None) -> tuple[int, Array]:
    """Return the number of magnitudes of `array - base` above a bracket, and the magnitudes inside."""
    import numpy as np

    low, high = bracket
    above, inside = 0, []
    for parts in chunks(array) if base is None else chunks(array, base):
        magnitudes = abs(parts[0] if base is None else parts[0] - parts[1])
        if bracket != (0.0, math.inf):
            is_inside = magnitudes <= high
            above += magnitudes.size - int(np.count_nonzero(is_inside))  # NaN is above, as in a sorted array
            is_inside &= magnitudes >= low
            magnitudes = magnitudes[is_inside]
        inside.append(magnitudes)
    return above, np.concatenate(inside)


def _select(magnitudes: Array, count: int) -> LargestMagnitudes:
    """Return the threshold of the `count` largest of flat magnitudes, digit by digit of their bits (radix selection).

    The bits of floats without a sign are in the order of the floats. `numpy.partition` takes ten times as long where many
    elements are equal, as they are in differences of bfloat16 models.
    """
    import numpy as np

    double = magnitudes.dtype.itemsize == 8
    bits, left = magnitudes.view("<i8" if double else "<i4"), 63 if double else 31
    while left:
        digit_bits = min(_DIGIT_BITS, left)
        left -= digit_bits
        digits = bits >> left & ((1 << digit_bits) - 1)
        from_top = np.bincount(digits, minlength=1 << digit_bits)[::-1].cumsum()
        place = int(np.searchsorted(from_top, count))
        count -= int(from_top[place - 1]) if place else 0
        bits = bits[digits == (1 << digit_bits) - 1 - place]
    smallest = float(bits[:1].view(magnitudes.dtype)[0])
    return LargestMagnitudes(smallest, bits.size - count if smallest else 0)


def magnitude_bits(array: Array, base: Array, *, double: bool = False) -> Array:
    """Return the magnitudes of `array - base` as flat integers in the same order, by the bits of the floats.

    Magnitudes are float32, or float64 with `double`; the integers are int32 or int64.
    """
    vector = array - base
    if is_numpy(vector):
        import numpy as np

        flat = np.abs(vector).reshape(-1).astype("<f8" if double else "<f4", copy=False)
        return flat.view("<i8" if double else "<i4")
    import torch

    flat = vector.abs().reshape(-1).to(torch.float64 if double else torch.float32)
    return flat.view(torch.int64 if double else torch.int32)


def largest_mask(bits: Array, smallest: int, quota: int | None) -> Array:
    """Return the flat mask of the bits above `smallest`, and of the first `quota` elements that equal it (None: all)."""
    if quota is None:
        return bits >= smallest
    mask = bits > smallest
    equal = (bits == smallest).nonzero()
    places = equal[0] if is_numpy(bits) else equal[:, 0]
    mask[places[:quota]] = True
    return mask


def first_largest_mask(array: Array, count: int, base: Array, smallest: float) -> Array:
    """Return the mask of the `count` largest magnitudes of `array - base`; of equal ones, the first are taken.

    `smallest` is the `count`-th largest magnitude.
    """
    magnitudes = abs(array - base).reshape(-1)
    mask = magnitudes > smallest
    equal = (magnitudes == smallest).nonzero()
    places = equal[0] if is_numpy(magnitudes) else equal[:, 0]
    mask[places[: count - int(mask.sum())]] = True
    return mask.reshape(array.shape)
