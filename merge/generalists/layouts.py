"""The tensors of a whole model in the two layouts of its family: as in published checkpoints, or as in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...core.artefacts.safetensors_io import Checkpoint, dtype_name, torch_dtype
from ...core.errors import UserError
from ...core.models.loading import ExpertTensors
from ...core.models.stored_names import StoredNames, TensorGroup, loaded_names

_MIXTURE_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class _Converted:
    """Tensors that are converted together: their names in the source, and the conversion."""

    group: TensorGroup
    sources: tuple[str, ...]
    targets: tuple[str, ...]

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.sources == self.targets:
            return tensors
        return (self.group.to_stored if self.targets == self.group.stored else self.group.to_memory)(tensors)


class LaidOutTensors:
    """The tensors of a model, one group of converted tensors in memory at a time; a `ModelTensors`."""

    def __init__(self, source: Checkpoint | ExpertTensors, names: StoredNames, *, fused: bool) -> None:
        self._source = source
        present = set(source)
        self._groups: dict[str, _Converted] = {}
        self._last: tuple[_Converted, dict[str, Tensor]] | None = None
        for name in source:
            group = names.group_of(name) or next((group for group in names.groups if name in group.memory), None)
            if group is None or name in self._groups:
                continue
            given = next((kind for kind in (group.memory, group.stored) if present.issuperset(kind)), None)
            if given is not None:
                converted = _Converted(group, given, group.memory if fused else group.stored)
                self._groups |= dict.fromkeys((*converted.sources, *converted.targets), converted)
        self._shapes = dict(self._planned())

    def _planned(self) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        """Yield name, dtype and shape of each tensor, in the order of the source."""
        done: set[tuple[str, ...]] = set()
        for name in self._source:
            converted = self._groups.get(name)
            if converted is None:
                entry = self._source.entry(name)
                yield name, (entry.dtype, entry.shape)
            elif converted.targets not in done:
                done.add(converted.targets)
                tensors = converted.run({source: self._empty(source) for source in converted.sources})
                if len({tensor.dtype for tensor in tensors.values()}) > 1:
                    raise UserError(f"the tensors {', '.join(converted.sources)} differ in dtype; they belong together")
                for target in converted.targets:
                    yield target, (dtype_name(tensors[target].dtype), tuple(tensors[target].shape))

    def _empty(self, name: str) -> Tensor:
        entry = self._source.entry(name)
        return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return safetensors' dtype and the shape of each tensor, by name."""
        return dict(self._shapes)

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        converted = self._groups.get(name)
        if converted is None:
            return self._read(name)
        if self._last is None or self._last[0] is not converted:
            self._last = None  # frees the memory before the next group is read
            tensors = {source: self._read(source) for source in converted.sources}
            self._last = (converted, converted.run(tensors))
        return self._last[1][name]

    def _read(self, name: str) -> Tensor:
        # an adapter's tensors are computed in float32 and rounded once, as `load_model` does
        return self._source.read(name).to(torch_dtype(self._source.entry(name).dtype))


def require_complete(folder: Path, source: Checkpoint | ExpertTensors, names: StoredNames) -> None:
    """Raise `UserError` unless the tensors are all that the `config.json` in a folder requires."""
    loaded = {memory for memory, _ in loaded_names(folder, source).values()}
    missing = sorted(names.in_memory - loaded)
    if missing:
        raise UserError(
            f"{folder} has no tensor '{missing[0]}', which its config.json requires; download or create it again"
        )


def is_mixture(config: dict[str, object], names: StoredNames) -> bool:
    """Return whether a model is a mixture of experts."""
    return any(config.get(key) for key in _MIXTURE_KEYS) or any(".experts." in name for name in names.in_memory)
