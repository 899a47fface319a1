"""Overwriting tensors of a model in memory with stored ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..artefacts.safetensors_io import Checkpoint
from ..errors import UserError
from .adapters.lora import AdaptedTensors
from .stored_names import StoredNames, TensorGroup

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Overlay:
    """Overwrites tensors of a model one by one, by their stored names or those in memory.

    Tensors of a group are kept until the group is complete. `finish` writes incomplete groups, whose other tensors stay
    as they are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        self._names = StoredNames(model)
        self._waiting: dict[tuple[str, ...], dict[str, Tensor]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Overwrite one tensor; raises `UserError` for a tensor that the model does not have."""
        group = self._names.group_of(name)
        if group is None and name not in self._tensors:
            raise UserError(f"the model has no tensor '{name}': the expert belongs to another architecture")
        if group is None:
            self._write({name: tensor})
            return
        waiting = self._waiting.setdefault(group.stored, {})
        waiting[name] = tensor
        if len(waiting) == len(group.stored):
            self._write(group.to_memory(self._waiting.pop(group.stored)))

    def finish(self) -> None:
        """Write the groups of which only some tensors were added."""
        for stored in list(self._waiting):
            group = self._names.group_of(stored[0])
            assert group is not None
            self._write(self._completed(group, self._waiting.pop(stored)))

    def _completed(self, group: TensorGroup, added: Mapping[str, Tensor]) -> dict[str, Tensor]:
        present = group.to_stored({name: self._tensors[name].detach() for name in group.memory})
        return group.to_memory(
            {name: added[name].to(tensor) if name in added else tensor for name, tensor in present.items()}
        )

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        import torch

        with torch.no_grad():
            for name, tensor in tensors.items():
                self._tensors[name].copy_(tensor)


def overlay_tensors(model: PreTrainedModel, tensors: Checkpoint | AdaptedTensors | Mapping[str, Tensor]) -> None:
    """Overwrite a model's tensors by name; raises `UserError` for a tensor that the model does not have."""
    _add_all(Overlay(model), tensors)


def tensors_in_memory(model: PreTrainedModel, tensors: Checkpoint) -> dict[str, Tensor]:
    """Return the tensors that `overlay_tensors` would overwrite, by their names in memory; the model stays unchanged."""
    collected = _Collected(model)
    _add_all(collected, tensors)
    return collected.tensors


class _Collected(Overlay):
    """Collects tensors instead of writing them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.tensors: dict[str, Tensor] = {}

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors |= tensors


def _add_all(overlay: Overlay, tensors: Checkpoint | AdaptedTensors | Mapping[str, Tensor]) -> None:
    for name in tensors:
        overlay.add(name, tensors[name] if isinstance(tensors, Mapping) else tensors.read(name))
    overlay.finish()
