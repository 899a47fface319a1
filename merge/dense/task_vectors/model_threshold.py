"""Exact magnitude thresholds of whole task vectors, found while all tensors are streamed.

Nonnegative floats are ordered like the integers with the same bits. The search therefore finds the k-th largest magnitude
digit by digit: each pass counts the next 16 bits of the magnitudes that agree with the digits found so far. float32
takes two passes, float64 four. If not all elements of the smallest kept magnitude are kept, one more pass counts them in
each tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ....core.hooks.merging import KeptElements, TensorGroup
from ..arrays import chunks, histogram
from ..largest import largest_mask, magnitude_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DIGIT_BITS = 16
_COUNTED_AT_ONCE = 1 << 20
"""Many more elements than a histogram has bins."""


@dataclass(frozen=True)
class Threshold:
    """The search for the smallest kept magnitude of one task vector."""

    density: float
    """Fraction of the elements to keep, between 0 and 1."""
    count: int = 0
    """Number of elements to keep; 0 before the first pass."""
    size: int = 0
    """Number of all elements."""
    prefix: int = 0
    """The digits found so far, highest first; in the end, the bits of the threshold."""
    rank: int = 0
    """How many of the elements with this prefix are kept."""
    equal: int = 0
    """Number of elements with this prefix."""

    def next_digit(self, counts: NDArray[Any], bits: int, size: int) -> Threshold:
        """Return the threshold with one more digit of `bits` bits, of which `counts` is the histogram.

        Elements of unchanged tensors are not counted in it, and are 0. `size` is the number of all elements.
        """
        import numpy as np

        count, rank, total = self.count, self.rank, self.equal
        if not count:
            count = rank = max(1, int(self.density * size))
            total = size
        counts = counts.copy()
        counts[0] += total - counts.sum()
        from_above = np.cumsum(counts[::-1])
        place = int(np.searchsorted(from_above, rank))
        digit = len(counts) - 1 - place
        above = int(from_above[place - 1]) if place else 0
        return replace(
            self,
            count=count,
            size=size,
            prefix=(self.prefix << bits) | digit,
            rank=rank - above,
            equal=int(counts[digit]),
        )


@dataclass(frozen=True)
class ModelThresholds:
    """State of the search, and with `is_complete` its result."""

    thresholds: Mapping[str, Threshold]
    """By expert, of those that keep a part of their elements."""
    is_double: bool = False
    """Whether magnitudes are compared as float64, which tensors stored as float64 need."""
    found_bits: int = 0
    counts_equal: bool = False
    """Whether elements at the threshold are to be counted in each tensor."""
    quotas: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Tensor -> expert -> how many elements at the threshold are kept in this tensor, with `counts_equal`."""
    has_quotas: bool = False

    @property
    def _bits(self) -> int:
        return 63 if self.is_double else 31

    @property
    def _digit_bits(self) -> int:
        return min(_DIGIT_BITS, self._bits - self.found_bits)

    @property
    def _has_thresholds(self) -> bool:
        return self.found_bits == self._bits

    @property
    def is_complete(self) -> bool:
        return not self.thresholds or (self._has_thresholds and (self.has_quotas or not self.counts_equal))

    def mask(self, group: TensorGroup, expert: int) -> Any:
        """Return the mask of the elements of one tensor that an expert, by its number in the group, keeps."""
        name = group.expert_names[expert]
        bits = magnitude_bits(group.experts[expert], group.seed, double=self.is_double)
        quota = self.quotas.get(group.name, {}).get(name, 0) if self.has_quotas else None
        return largest_mask(bits, self.thresholds[name].prefix, quota).reshape(group.seed.shape)

    def kept(self) -> dict[str, KeptElements]:
        """Return how many nonzero elements each expert keeps."""
        kept = {}
        for name, threshold in self.thresholds.items():
            beyond = 0 if self.counts_equal or not threshold.prefix else threshold.equal - threshold.rank
            kept[name] = KeptElements(threshold.count + beyond, threshold.count, threshold.size)
        return kept

    def measure(self, group: TensorGroup) -> dict[str, NDArray[Any]]:
        """Return the counts of one tensor that the search needs next."""
        counts: dict[str, NDArray[Any]] = {}
        for name, expert in zip(group.expert_names, group.experts, strict=True):
            if name not in self.thresholds:
                continue
            for seed_part, expert_part in chunks(group.seed, expert, size=_COUNTED_AT_ONCE):
                bits = magnitude_bits(expert_part, seed_part, double=self.is_double)
                key, counted = self._count(group.name, name, bits)
                counts[key] = counts[key] + counted if key in counts else counted
        return counts

    def _count(self, tensor: str, expert: str, bits: Any) -> tuple[str, NDArray[Any]]:
        import numpy as np

        prefix = self.thresholds[expert].prefix
        if self._has_thresholds:
            return _quota_key(tensor, expert), np.array(int((bits == prefix).sum()))
        if self.found_bits:
            bits = bits[bits >> (self._bits - self.found_bits) == prefix]
        digits = bits >> (self._bits - self.found_bits - self._digit_bits) & ((1 << self._digit_bits) - 1)
        return expert, histogram(digits, 1 << self._digit_bits)

    def advance(self, sums: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]) -> ModelThresholds:
        """Return the next state, from the sums of what `measure` returned and the number of elements of each expert."""
        if self._has_thresholds:
            return replace(self, quotas=self._share_out(sums), has_quotas=True)
        thresholds = {
            name: threshold.next_digit(sums[name], self._digit_bits, sizes[name])
            for name, threshold in self.thresholds.items()
        }
        refined = replace(self, thresholds=thresholds, found_bits=self.found_bits + self._digit_bits)
        # without elements beyond the wanted number, or with a threshold of 0, all equal ones can be kept
        exact = all(threshold.rank == threshold.equal or not threshold.prefix for threshold in thresholds.values())
        return replace(refined, counts_equal=False) if refined._has_thresholds and exact else refined

    def _share_out(self, sums: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, int]]:
        """Return the quotas: tensors in the order of their names keep all equal elements, as long as there are some."""
        left = {name: threshold.rank for name, threshold in self.thresholds.items()}
        quotas: dict[str, dict[str, int]] = {}
        for tensor, expert in sorted(map(_split_key, sums)):
            quota = min(int(sums[_quota_key(tensor, expert)]), left[expert])
            left[expert] -= quota
            quotas.setdefault(tensor, {})[expert] = quota
        return quotas


def _quota_key(tensor: str, expert: str) -> str:
    return f"{tensor}\n{expert}"


def _split_key(key: str) -> tuple[str, str]:
    tensor, _, expert = key.partition("\n")
    return tensor, expert
