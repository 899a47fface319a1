"""Distribution of the output tensors over safetensors files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...core.artefacts.numeric import DTYPES
from ...core.artefacts.safetensors_io import SINGLE_FILE, header_of_file
from .tensor_plan import TensorPlan

DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class ShardPlan:
    """One output file."""

    file: str
    tensors: tuple[TensorPlan, ...]

    @cached_property
    def layout(self) -> tuple[bytes, dict[str, tuple[int, int]]]:
        """The header bytes, and the (begin, end) offsets of each tensor in the file."""
        return header_of_file({tensor.name: (tensor.dtype, tensor.shape) for tensor in self.tensors})

    @property
    def num_bytes(self) -> int:
        return len(self.layout[0]) + sum(tensor.num_bytes for tensor in self.tensors)


def plan_shards(tensors: Sequence[TensorPlan], shard_bytes: int = DEFAULT_SHARD_BYTES) -> list[ShardPlan]:
    """Return the output files, named as in transformers.

    A file is larger than `shard_bytes` only if a single tensor is. Within a file, wider dtypes come first, so that all
    tensors are aligned.
    """
    groups: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    ordered = [tuple(sorted(group, key=lambda planned: -DTYPES[planned.dtype].num_bytes)) for group in groups]
    if len(ordered) == 1:
        return [ShardPlan(SINGLE_FILE, ordered[0])]
    return [
        ShardPlan(f"model-{number:05}-of-{len(ordered):05}.safetensors", group)
        for number, group in enumerate(ordered, start=1)
    ]


def index_of(shards: Sequence[ShardPlan]) -> dict[str, Any]:
    """Return the content of the index file of several shards."""
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    return {
        "metadata": {
            "total_parameters": sum(planned.num_numbers for planned in tensors),
            "total_size": sum(planned.num_bytes for planned in tensors),
        },
        "weight_map": {planned.name: shard.file for shard in shards for planned in shard.tensors},
    }
