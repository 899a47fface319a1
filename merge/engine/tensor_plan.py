"""How one tensor of a merge comes about, decided and checked before one is read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from ...core.artefacts.safetensors_io import DTYPES
from ..sources.models import StoredTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

Action = Literal["merge", "copy", "agree", "stack", "given"]


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor of the output comes about."""

    name: str
    dtype: str
    """Of the output."""
    shape: tuple[int, ...]
    action: Action
    """`merge` by the method; `copy` the first expert's, which all share; `agree`: what must be the same in all
    (integers, what training froze), copied once all were found equal; `stack`: all experts' end to end; `given`:
    `values`, from no file."""
    experts: tuple[StoredTensor, ...]
    expert_names: tuple[str, ...]
    weights: tuple[float, ...] = ()
    seed: StoredTensor | None = None
    seed_name: str | None = None
    options: Any = None
    statistics: tuple[StoredTensor | None, ...] = ()
    """What `expertctl stats` gathered on it for each expert, where the method asks for it."""
    is_vocabulary: bool = False
    """Its first axis is the vocabulary, which differs between the models."""
    values: NDArray[Any] | None = field(default=None, compare=False, repr=False)

    @property
    def num_numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return DTYPES[self.dtype][1] * self.num_numbers

    @cached_property
    def inputs(self) -> tuple[StoredTensor, ...]:
        """What has to be read for it, each stored tensor once."""
        taken = self.experts[:1] if self.action == "copy" else self.experts
        everything = (*taken, self.seed) if self.seed is not None and self.action == "merge" else taken
        return tuple(dict.fromkeys(everything))

    @property
    def bytes_to_read(self) -> int:
        return sum({one.entry: one.entry.num_bytes for one in self.inputs}.values())
