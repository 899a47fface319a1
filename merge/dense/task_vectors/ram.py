"""RAM: average the elements that several experts changed, keep those that only one expert changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....core.hooks.merging import TensorGroup
from ....core.hooks.option_checks import check_at_least
from ..arrays import Array, as_indicator, chunks, map_chunks, namespace


@dataclass(frozen=True)
class RamOptions:
    """Options of RAM."""

    epsilon: float = 1e-5
    """An element of a task vector is changed if its magnitude is larger."""

    def __post_init__(self) -> None:
        check_at_least("epsilon", self.epsilon, 0)


@dataclass(frozen=True)
class RamPlusOptions(RamOptions):
    """Options of RAM+."""

    r: float = 0.1
    """Strength of the amplification of elements that only one expert changed."""
    alpha: float = 0.2
    """Upper bound of the ratio of shared to unique elements in the amplification."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("r", self.r, 0)
        check_at_least("alpha", self.alpha, 0)


def ram(group: TensorGroup, options: RamOptions) -> Any:
    """Return the seed plus, for each element, the mean over the experts that changed it (arXiv:2601.13572)."""
    return _add_changes(group, options.epsilon, [1.0] * len(group.experts))


def ram_plus(group: TensorGroup, options: RamPlusOptions) -> Any:
    """Return RAM's result with amplified unique elements: those that only one expert changed (arXiv:2601.13572).

    The factor of an expert is 1 + r * min(shared / unique, alpha), with its numbers of shared and unique elements in
    this tensor; the paper counts them in the whole model.
    """
    factors = [
        1 + options.r * min(shared / max(unique, 1), options.alpha)
        for shared, unique in _count_changes(group, options.epsilon)
    ]
    return _add_changes(group, options.epsilon, factors)


def _add_changes(group: TensorGroup, epsilon: float, factors: list[float]) -> Any:
    """Return seed + task vectors: shared elements averaged, unique elements of expert i multiplied by `factors[i]`."""

    def merge_chunk(seed: Array, *experts: Array) -> Array:
        xp = namespace(seed)
        changed = [abs(expert - seed) > epsilon for expert in experts]
        count = _total(changed, seed)
        mix = xp.zeros_like(seed)
        for expert, is_changed, factor in zip(experts, changed, factors, strict=True):
            vector = (expert - seed) * is_changed
            mix += vector if factor == 1 else xp.where(count == 1, vector * factor, vector)
        mix /= xp.maximum(count, xp.ones_like(count))
        mix += seed
        return mix

    return map_chunks(merge_chunk, group.seed, *group.experts)


def _count_changes(group: TensorGroup, epsilon: float) -> list[tuple[int, int]]:
    """Return for each expert the numbers of changed elements that other experts changed too, and that none did."""
    counts = [(0, 0)] * len(group.experts)
    for seed, *experts in chunks(group.seed, *group.experts):
        changed = [abs(expert - seed) > epsilon for expert in experts]
        is_shared = _total(changed, seed) > 1
        for number, is_changed in enumerate(changed):
            total, shared = int(is_changed.sum()), int((is_changed & is_shared).sum())
            counts[number] = (counts[number][0] + shared, counts[number][1] + total - shared)
    return counts


def _total(masks: list[Array], like: Array) -> Array:
    """Return the number of true masks for each element, in the dtype of `like`."""
    total = as_indicator(masks[0], like)
    for mask in masks[1:]:
        total = total + as_indicator(mask, like)
    return total
