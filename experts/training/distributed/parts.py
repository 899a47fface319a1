"""Files with the rows of tensors that a process holds, and how they are read together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ....core.artefacts.safetensors_io import Checkpoint
from ....core.errors import unknown_name

if TYPE_CHECKING:
    from torch import Tensor


def part_name(kind: str, index: int, count: int) -> str:
    """Return the name, without suffix, of a process's file: `weights-00000-of-00002`; `weights` if there is only one."""
    return kind if count == 1 else f"{kind}-{index:05d}-of-{count:05d}"


class JoinedParts:
    """Tensors whose rows are in one or more safetensors files, in the order of the files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._parts: dict[str, list[Checkpoint]] = {}
        for file in files:
            part = Checkpoint([file])
            for name in part:
                self._parts.setdefault(name, []).append(part)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._parts))

    def shapes(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of each tensor, by name."""
        shapes = {}
        for name, parts in self._parts.items():
            entries = [part.entry(name) for part in parts]
            rows = (sum(entry.shape[0] for entry in entries),) if entries[0].shape else ()
            shapes[name] = entries[0].dtype, (*rows, *entries[0].shape[1:])
        return shapes

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        import torch

        first, *others = (part.read(name) for part in self._of(name))
        return torch.cat((first, *others)) if others else first

    def span(self, name: str, begin: int, end: int) -> Tensor:
        """Return the elements `begin` to `end` of one tensor in row-major order, shape (end - begin,)."""
        import torch

        pieces, offset = [], 0
        for part in self._of(name):
            length = prod(part.entry(name).shape)
            first, last = max(begin - offset, 0), min(end - offset, length)
            if first < last:
                pieces.append(part.span(name, first, last))
            offset += length
        return torch.cat(pieces)

    def _of(self, name: str) -> list[Checkpoint]:
        if name not in self._parts:
            raise unknown_name("tensor", name, self._parts, listed_as="the checkpoint has")
        return self._parts[name]
