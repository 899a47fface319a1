"""Weighted sum of filtered task vectors, shared by all methods on task vectors.

A task vector is an expert minus the seed. Methods differ in the elements that they keep (`ElementFilter`) and
in whether opposite signs cancel out or are resolved by sign election (`elect`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import PerExpert, TensorGroup
from ..arrays import Array, as_indicator, map_chunks, mask_words, namespace, per_expert_values, words, zero_unkept


@dataclass(frozen=True)
class ElementFilter:
    """Selection and scaling of the elements of one task vector."""

    min_magnitude: float = 0.0
    """Smallest magnitude that is kept."""
    max_magnitude: float = math.inf
    """Largest magnitude that is kept."""
    mask: Array | None = None
    """Boolean mask of the kept elements; None keeps all."""
    scale: Array | float = 1.0
    """Factor applied to the kept elements, a number or an array."""


KEEP_ALL = ElementFilter()
KEEP_NONE = ElementFilter(min_magnitude=math.inf)


def density_filters(
    group: TensorGroup, density: PerExpert, make: Callable[[int, float], ElementFilter]
) -> list[ElementFilter]:
    """Return a filter per expert: `make(expert number, density)` for densities between 0 and 1."""
    filters = []
    for number, value in enumerate(per_expert_values(density, group)):
        if value >= 1 or 0 in group.seed.shape:
            filters.append(KEEP_ALL)
        else:
            filters.append(make(number, value) if value > 0 else KEEP_NONE)
    return filters


def add_task_vectors(
    group: TensorGroup, filters: Sequence[ElementFilter], *, scaling: float, normalize: bool, elect: bool
) -> Any:
    """Return seed + scaling * mix, where mix is the weighted sum of the filtered task vectors.

    With `normalize` mix is divided by the sum of the contributing weights. With `elect` only elements contribute whose
    weighted sign equals the sign of their sum over the experts (0 counts as +): TIES (arXiv:2306.01708, section 4).
    """
    extra = [
        array
        for element_filter in filters
        for array in (element_filter.mask, element_filter.scale)
        if array is not None and not isinstance(array, float | int)
    ]
    total = sum(group.weights)

    def merge_chunk(seed: Array, *inputs: Array) -> Array:
        filter_arrays = iter(inputs[len(group.experts) :])
        vectors = [
            _weight_in_place(_filter_in_place(expert - seed, element_filter, filter_arrays), weight)
            for expert, element_filter, weight in zip(inputs, filters, group.weights, strict=False)
        ]
        if elect:
            mix = _elect_signs(vectors, group.weights, normalize)
        else:
            mix = vectors[0]
            for vector in vectors[1:]:
                mix += vector
            if normalize and abs(total) >= 1e-8:
                mix /= total
        if scaling != 1:
            mix *= scaling
        mix += seed
        return mix

    return map_chunks(merge_chunk, group.seed, *group.experts, *extra)


def _filter_in_place(vector: Array, element_filter: ElementFilter, filter_arrays: Iterator[Array]) -> Array:
    """Zero unkept elements and scale kept ones; `filter_arrays` yields the chunks of mask and scale."""
    if element_filter.min_magnitude > 0:
        zero_unkept(vector, abs(vector) >= element_filter.min_magnitude)
    if element_filter.max_magnitude < math.inf:
        zero_unkept(vector, abs(vector) <= element_filter.max_magnitude)
    if element_filter.mask is not None:
        zero_unkept(vector, next(filter_arrays))
    if not isinstance(element_filter.scale, float | int):
        vector *= next(filter_arrays)
    elif element_filter.scale != 1:
        vector *= element_filter.scale
    return vector


def _weight_in_place(vector: Array, weight: float) -> Array:
    if weight != 1:
        vector *= weight
    return vector


def _elect_signs(vectors: Sequence[Array], weights: Sequence[float], normalize: bool) -> Array:
    """Return the sum of the elements with the sign of the total; `normalize` gives their weighted mean.

    Signs are flipped and elements are masked by their bits, in half the time of products and maxima.
    """
    total = vectors[0] + 0.0
    for vector in vectors[1:]:
        total += vector
    total += 0.0  # turns -0.0, which would elect minus, into 0.0
    signs = words(total)
    signs &= -1 << (8 * signs.itemsize - 1)
    mix, divisor = (namespace(total).zeros_like(total) for _ in range(2))
    for vector, weight in zip(vectors, weights, strict=True):
        bits = words(vector) ^ signs
        agreeing = bits.view(vector.dtype)  # positive where an expert agrees
        kept = mask_words(~(agreeing <= 0), vector)  # also keeps NaN
        bits &= kept
        mix += agreeing
        if normalize:
            kept &= _word_of(weight, vector)
            divisor += kept.view(vector.dtype)
    bits = words(mix)
    bits ^= signs
    if normalize:
        divisor += as_indicator(divisor == 0, mix)
        mix /= divisor
    return mix


def _word_of(number: float, like: Array) -> Array:
    """Return the bits of a number in the dtype of the flat array `like`, as an array of one integer."""
    return words(namespace(like).full_like(like[:1], number))
