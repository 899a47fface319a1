"""Tensors as checkpoints store them and as models hold them in memory.

For some families, transformers renames, stacks, splits or joins tensors when it loads a checkpoint, and reverts this in
`save_pretrained`: the experts of Mixtral are two tensors per layer in memory, and three per expert in files. expertctl
writes tensors as `save_pretrained` does. Patterns and merges use those names, and training uses those in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..artefacts.safetensors_io import Checkpoint

Tensors = Mapping[str, "Tensor"]
_Members = list[tuple[str, str]]
"""(pattern of the transform, tensor name) of the tensors that a transform takes together."""


@dataclass(frozen=True)
class TensorGroup:
    """Tensors of a model that are converted together."""

    memory: tuple[str, ...]
    stored: tuple[str, ...]
    to_stored: Callable[[Tensors], dict[str, Tensor]]
    """Maps all tensors of the group in memory to the stored ones."""
    to_memory: Callable[[Tensors], dict[str, Tensor]]

    @property
    def is_renamed(self) -> bool:
        """Whether it is a single tensor with the same content under another name."""
        return len(self.memory) == len(self.stored) == 1


class StoredNames:
    """The tensors of a model whose names or layout in `save_pretrained`'s files differ from those in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.in_memory = frozenset(checkpoint_tensors(model))
        self.groups = _groups(model)
        self._by_memory = {name: group for group in self.groups for name in group.memory}
        self._by_stored = {name: group for group in self.groups for name in group.stored}

    @classmethod
    def of_folder(cls, folder: Path) -> StoredNames:
        """Return the names of the model that a `config.json` describes; no tensor is read."""
        return cls(empty_model(folder))

    def of(self, memory_name: str) -> tuple[str, ...]:
        """Return the names of the stored tensors that a tensor in memory is converted to."""
        group = self._by_memory.get(memory_name)
        return group.stored if group is not None else (memory_name,)

    def behind(self, names: Iterable[str]) -> set[str]:
        """Return the tensors in memory that stored tensors are part of."""
        return {
            memory_name
            for name in names
            for memory_name in (self._by_stored[name].memory if name in self._by_stored else (name,))
        }

    def group_of(self, stored_name: str) -> TensorGroup | None:
        """Return the group of a stored tensor; None if it has the same name and layout in memory."""
        return self._by_stored.get(stored_name)

    def missing_in(self, names: Collection[str]) -> list[str]:
        """Return the tensors in memory that a checkpoint with these names, stored or in memory, does not provide."""
        return sorted(
            name
            for name in self.in_memory
            if name not in names and not all(stored in names for stored in self.of(name))
        )

    def to_stored(self, tensors: Tensors, rest: Callable[[TensorGroup], Tensors]) -> dict[str, Tensor]:
        """Convert tensors in memory to stored ones.

        `rest` returns all tensors in memory of a group of which `tensors` has only some.
        """
        converted: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            group = self._by_memory.get(name)
            if group is None:
                converted[name] = tensor
            elif name == next(member for member in group.memory if member in tensors):
                is_complete = all(member in tensors for member in group.memory)
                known = {} if is_complete else rest(group)
                members = {member: tensors[member] if member in tensors else known[member] for member in group.memory}
                converted |= group.to_stored(members)
        return converted

    def read(self, checkpoint: Checkpoint, group: TensorGroup) -> dict[str, Tensor]:
        """Return the tensors in memory of a group from a checkpoint, which may store either kind of names."""
        if all(name in checkpoint for name in group.memory):
            return {name: checkpoint.read(name) for name in group.memory}
        return group.to_memory({name: checkpoint.read(name) for name in group.stored})


def checkpoint_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors that a model's checkpoint stores, by their names in memory and without tied duplicates."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def empty_model(folder: Path) -> PreTrainedModel:
    """Return the model that transformers builds for a folder's `config.json`, without memory for its tensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def stored_tensors(model: PreTrainedModel, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a model's checkpoint as `save_pretrained` writes them.

    `names` are those of the checkpoint that the model belongs to, which may be the names in memory.
    """
    tensors = checkpoint_tensors(model)
    if names is not None and all(name in names for name in tensors):
        return tensors
    return StoredNames(model).to_stored(tensors, lambda group: {})


def loaded_names(folder: Path, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Return the tensor in memory that transformers loads each stored tensor into, and whether it is the whole tensor.

    `names` are those of any checkpoint that transformers can load for the `config.json` in the folder. Empty if
    transformers has no class for it.
    """
    try:
        model = empty_model(folder)
    except Exception:  # configuration classes check their values in many ways; loading the model reports it
        return {}
    return _Conversion(model, checkpoint_tensors(model)).loaded(names)


# --- the conversions of transformers ---


def _groups(model: PreTrainedModel) -> tuple[TensorGroup, ...]:
    """Return the groups of a model; none if transformers cannot revert its own conversion of the family."""
    import torch

    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in checkpoint_tensors(model).items()}
    conversion = _Conversion(model, shapes)
    groups = []
    for group in conversion.groups():
        if group.memory == group.stored:
            continue
        if set(group.stored) & (shapes.keys() - set(group.memory)):
            return ()  # one name has two meanings
        members = {name: shapes[name] for name in group.memory}
        restored = group.to_memory(group.to_stored(members))
        if {name: tensor.shape for name, tensor in restored.items()} != {
            name: tensor.shape for name, tensor in members.items()
        }:
            return ()
        groups.append(group)
    stored = [name for group in groups for name in group.stored]
    return tuple(groups) if len(set(stored)) == len(stored) else ()


class _Conversion:
    """Applies the conversions of a model's family as transformers does when it saves and loads whole models."""

    def __init__(self, model: PreTrainedModel, shapes: Tensors) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._model, self._shapes = model, shapes
        # a prefix is only restored in checkpoints that had one
        self._loading = [
            transform
            for transform in get_model_conversion_mapping(model, add_legacy=False)
            if type(transform).__name__ != "PrefixChange"
        ]
        self._saving = [transform.reverse_transform() for transform in reversed(self._loading)]

    def groups(self) -> Iterator[TensorGroup]:
        if not self._loading:
            return
        converters = [transform for transform in self._saving if hasattr(transform, "operations")]
        taken: dict[str, tuple[Any, _Members]] = {}
        for name in _in_natural_order(self._shapes):
            target, converter, pattern = _convert_name(name, converters)
            taken.setdefault(target, (converter, []))[1].append((pattern, name))
        for target, (converter, members) in taken.items():
            yield self._group(target, converter, members)

    def loaded(self, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
        """Return (tensor in memory, whether it is the whole tensor) for stored names; others are left out."""
        renamings = [transform for transform in self._loading if not hasattr(transform, "operations")]
        converters = [transform for transform in self._loading if hasattr(transform, "operations")]
        loaded = {}
        for name in _in_natural_order(names):
            target, converter, _ = _convert_name(_rename(name, renamings), converters)
            if target not in self._shapes:
                target, converter = self._with_prefix(target), converter
            if target not in self._shapes:
                target, converter = self._with_prefix(name), None
            if target in self._shapes:
                loaded[name] = (target, converter is None)
        return loaded

    def _with_prefix(self, name: str) -> str:
        """Return a name in memory for one without, or with a superfluous, prefix of the decoder."""
        prefix = f"{self._model.base_model_prefix}."
        candidates = (name, prefix + name, name.removeprefix(prefix))
        return next((candidate for candidate in candidates if candidate in self._shapes), name)

    def _group(self, target: str, converter: Any, members: _Members) -> TensorGroup:
        renamings = [transform for transform in self._saving if not hasattr(transform, "operations")]

        def to_stored(tensors: Tensors) -> dict[str, Tensor]:
            values = (
                {target: tensors[members[0][1]]}
                if converter is None
                else self._run(converter, target, members, tensors)
            )
            return {_rename(name, renamings): tensor for name, tensor in values.items()}

        memory = tuple(name for _, name in members)
        stored = tuple(_in_natural_order(to_stored({name: self._shapes[name] for name in memory})))
        return TensorGroup(memory, stored, to_stored, self._loader(stored))

    def _loader(self, stored: Sequence[str]) -> Callable[[Tensors], dict[str, Tensor]]:
        renamings = [transform for transform in self._loading if not hasattr(transform, "operations")]
        converters = [transform for transform in self._loading if hasattr(transform, "operations")]
        taken: dict[str, tuple[Any, _Members]] = {}
        for name in stored:
            target, converter, pattern = _convert_name(_rename(name, renamings), converters)
            taken.setdefault(target, (converter, []))[1].append((pattern, name))

        def to_memory(tensors: Tensors) -> dict[str, Tensor]:
            loaded: dict[str, Tensor] = {}
            for target, (converter, members) in taken.items():
                if converter is None:
                    loaded[target] = tensors[members[0][1]]
                else:
                    loaded |= self._run(converter, target, members, tensors)
            return loaded

        return to_memory

    def _run(self, converter: Any, target: str, members: _Members, tensors: Tensors) -> dict[str, Tensor]:
        transform = deepcopy(converter)
        for pattern, name in members:
            transform.add_tensor(target, name, pattern, tensors[name])
        values = transform.convert(target, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}


def _convert_name(name: str, converters: Sequence[Any]) -> tuple[str, Any, str]:
    """Return (first name after conversion, converter, its pattern); the name itself and None if none applies."""
    for converter in converters:
        renamed, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return renamed, converter, pattern
    return name, None, name


def _rename(name: str, renamings: Sequence[Any]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def _in_natural_order(names: Iterable[str]) -> list[str]:
    """Return names in the order in which transformers converts them: layer 2 before layer 10."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)
