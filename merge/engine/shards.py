"""The files that a merge's tensors go into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...core.artefacts.safetensors_io import DTYPES, SINGLE_FILE, header_of_file
from .tensor_plan import TensorPlan

DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class ShardPlan:
    """One file of the output."""

    file: str
    tensors: tuple[TensorPlan, ...]

    @cached_property
    def layout(self) -> tuple[bytes, dict[str, tuple[int, int]]]:
        """The bytes before the first tensor, and where in the file each tensor begins and ends."""
        return header_of_file({one.name: (one.dtype, one.shape) for one in self.tensors})

    @property
    def num_bytes(self) -> int:
        return len(self.layout[0]) + sum(one.num_bytes for one in self.tensors)


def plan_shards(tensors: Sequence[TensorPlan], shard_bytes: int = DEFAULT_SHARD_BYTES) -> list[ShardPlan]:
    """Return the files that the tensors go into, named as transformers does; none is larger than `shard_bytes`
    unless a single tensor is.

    Within a file wider numbers come first, so that every tensor is aligned whatever dtypes are mixed.
    """
    groups: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    ordered = [tuple(sorted(group, key=lambda one: -DTYPES[one.dtype][1])) for group in groups]
    if len(ordered) == 1:
        return [ShardPlan(SINGLE_FILE, ordered[0])]
    return [
        ShardPlan(f"model-{number:05}-of-{len(ordered):05}.safetensors", group)
        for number, group in enumerate(ordered, start=1)
    ]


def index_of(shards: Sequence[ShardPlan]) -> dict[str, Any]:
    """Return the content of the index file that goes with several shards."""
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    return {
        "metadata": {
            "total_parameters": sum(one.num_numbers for one in tensors),
            "total_size": sum(one.num_bytes for one in tensors),
        },
        "weight_map": {one.name: shard.file for shard in shards for one in shard.tensors},
    }
