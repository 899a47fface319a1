"""Models whose tensors stay in their files until a process reads the rows that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..artefacts.safetensors_io import Checkpoint, checkpoint_files
from .loading import has_own_class, load_empty
from .stored_names import StoredNames, TensorGroup, loaded_names

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class TensorSource(Protocol):
    """Tensors that can be read whole or in part, such as a `Checkpoint`."""

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        ...

    def span(self, name: str, begin: int, end: int) -> Tensor:
        """Return the elements `begin` to `end` of one tensor in row-major order, shape (end - begin,)."""
        ...


class Outline:
    """A model without weights, whose tensors are read by their names and in their layout in memory.

    Tensors that transformers converts together, such as the experts of a layer, are read whole and converted one group
    after the other.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        files: TensorSource,
        stored: Mapping[str, str],
        groups: Mapping[str, TensorGroup],
        dtypes: Mapping[str, str],
    ) -> None:
        self.model = model
        """All tensors are on torch's meta device, but for non-persistent buffers."""
        self.dtypes = dtypes
        """safetensors' names of the dtypes in files, of tensors for which one is known."""
        self._files, self._stored, self._groups = files, stored, groups
        self._converted: tuple[TensorGroup, dict[str, Tensor]] | None = None

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._files.read(self._stored[name]) if name in self._stored else self._convert(name)

    def span(self, name: str, begin: int, end: int) -> Tensor:
        """Return the elements `begin` to `end` of one tensor in row-major order, shape (end - begin,)."""
        if name in self._stored:
            return self._files.span(self._stored[name], begin, end)
        return self._convert(name).flatten()[begin:end]

    def _convert(self, name: str) -> Tensor:
        group = self._groups[name]
        if self._converted is None or self._converted[0] is not group:
            self._converted = None  # one group in memory at a time
            self._converted = group, group.to_memory({stored: self._files.read(stored) for stored in group.stored})
        return self._converted[1][name]


def outline_of(
    folder: Path, replaced: TensorSource | None = None, names: frozenset[str] = frozenset()
) -> Outline | None:
    """Return the model of a checkpoint folder in float32 without its weights; None if it can only be loaded whole.

    The latter holds for expertctl's own classes, and for files with other tensors than the model has, such as both of two
    tied ones. `replaced` has other values for the tensors `names` of the files.
    """
    if has_own_class(folder):
        return None
    model, files = load_empty(folder), Checkpoint(checkpoint_files(folder))
    stored = {memory: name for name, (memory, is_whole) in loaded_names(folder, files).items() if is_whole}
    in_memory = StoredNames(model)
    groups = {name: group for group in in_memory.groups for name in group.memory if name not in stored}
    used = {*stored.values(), *(name for group in groups.values() for name in group.stored)}
    if used != set(files) or in_memory.in_memory != stored.keys() | groups.keys():
        return None
    dtypes = {memory: files.entry(name).dtype for memory, name in stored.items() if name not in names}
    source = files if replaced is None else _Replaced(files, replaced, names)
    return Outline(model, source, stored, groups, dtypes)


class _Replaced:
    """A checkpoint of which some tensors are read from elsewhere."""

    def __init__(self, files: TensorSource, other: TensorSource, names: frozenset[str]) -> None:
        self._files, self._other, self._names = files, other, names

    def read(self, name: str) -> Tensor:
        return (self._other if name in self._names else self._files).read(name)

    def span(self, name: str, begin: int, end: int) -> Tensor:
        return (self._other if name in self._names else self._files).span(name, begin, end)
