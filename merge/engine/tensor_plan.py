"""The plan of one output tensor, made and checked before any tensor is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ...core.artefacts.numeric import DTYPES
from ..sources.models import StoredTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

Action = Literal["merge", "copy", "require_equal", "stack", "computed"]


@dataclass(frozen=True)
class TensorPlan:
    """The plan of one output tensor."""

    name: str
    dtype: str
    """Dtype in the output."""
    shape: tuple[int, ...]
    action: Action
    """How the tensor is made:

    - `merge`: by the merge method
    - `copy`: copy of the first expert's tensor, which all experts share
    - `require_equal`: copy of a tensor that must be equal in all experts (integers, frozen tensors)
    - `stack`: concatenation of all experts' tensors along the first axis
    - `computed`: taken from `values`, not from a file
    """
    experts: tuple[StoredTensor, ...]
    expert_names: tuple[str, ...]
    weights: tuple[float, ...] = ()
    seed: StoredTensor | None = None
    seed_name: str | None = None
    options: Any = None
    statistics: tuple[StoredTensor | None, ...] = ()
    """Per expert, the statistics of `expertctl stats` if the method needs them."""
    is_vocabulary: bool = False
    """Whether the first axis is the vocabulary and differs between the models."""
    values: NDArray[Any] | None = field(default=None, compare=False, repr=False)

    @property
    def num_numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return DTYPES[self.dtype].num_bytes * self.num_numbers

    @cached_property
    def inputs(self) -> tuple[StoredTensor, ...]:
        """The stored tensors to read, without duplicates."""
        taken = self.experts[:1] if self.action == "copy" else self.experts
        tensors = (*taken, self.seed) if self.seed is not None and self.action == "merge" else taken
        return tuple(dict.fromkeys(tensors))

    @property
    def bytes_to_read(self) -> int:
        return sum({stored.entry: stored.entry.num_bytes for stored in self.inputs}.values())
