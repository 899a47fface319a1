"""Read a merged mixture back into its experts, shared tensors and router, by its manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.artefacts.numeric import DTYPES
from ...core.errors import UserError
from ...core.hooks.mixtures import Architecture, MixtureShape, MixtureTarget, RouterRows
from ...core.manifests.generalist import AveragedExpert, GeneralistConfig, MixtureRecord
from ...core.manifests.manifest import Manifest, read_manifest
from ...core.models.architectures import architecture_of
from ..engine.reading import Reader
from ..engine.tensor_plan import TensorPlan
from ..planning.assembly import FUSED, FUSED_ROUTER, ExpertParts, SharedExpert
from ..sources.models import Source, StoredTensor, open_source
from ..sources.tensor_names import LayerNames, layer_names
from .options import MixtureOptions
from .targets import container_target


@dataclass(frozen=True, eq=False)
class OpenedMixture:
    """A mixture folder. Its manifest is read once; experts, shared tensors and router are located at first use."""

    source: Source
    manifest: Manifest
    merged: GeneralistConfig
    record: MixtureRecord
    family: Architecture
    target: MixtureTarget

    @property
    def names(self) -> tuple[str, ...]:
        return self.merged.experts

    @cached_property
    def options(self) -> MixtureOptions:
        return MixtureOptions(**self.record.options)

    @property
    def shape(self) -> MixtureShape:
        has_biases = self.router.biases is not None
        has_shared_expert = self.record.shared_expert is not None
        return MixtureShape(len(self.names), self.record.top_k, self.options.normalized, has_biases, has_shared_expert)

    @property
    def averaged(self) -> tuple[AveragedExpert, ...]:
        """Experts whose mean forms the shared tensors, removed ones included; none if those are the seed's."""
        if shared_tensors_are_the_seeds(self.record):
            return ()
        return self.record.averaged or tuple(
            AveragedExpert(parent.name, parent.digest, parent.weight, parent.licence)
            for parent in self.manifest.parents
            if parent.kind == "expert"
        )

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors, by their names without the prefix of the model class."""
        return {name.removeprefix(self.target.prefix): stored for name, stored in self.source.tensors.items()}

    @cached_property
    def _layers(self) -> LayerNames:
        return layer_names(self.tensors)

    @cached_property
    def _is_fused(self) -> bool:
        # `options.layout` may differ: tuning rewrites the tensors in another layout
        return any(name.endswith(tuple(FUSED)) for name in self.tensors)

    @cached_property
    def experts(self) -> tuple[ExpertParts, ...]:
        """The feed-forward tensors of each expert, by their names in the dense model."""
        return tuple(
            ExpertParts(
                name,
                {
                    self._layers.name(layer, suffix): self._expert_tensor(layer, suffix, number)
                    for layer in range(len(self._layers.layers))
                    for suffix in self.record.feed_forward
                },
            )
            for number, name in enumerate(self.names)
        )

    def _expert_tensor(self, layer: int, suffix: str, number: int) -> StoredTensor:
        if not self._is_fused:
            return self.tensors[self._layers.name(layer, self.target.expert(suffix, number))]
        kind = suffix.rsplit(".", 2)[-2]
        fused_name, kinds = next((name, kinds) for name, kinds in FUSED.items() if kind in kinds)
        fused = self.tensors[self._layers.name(layer, fused_name)]
        return slice_of(fused, number * len(kinds) + kinds.index(kind), len(self.names) * len(kinds))

    @cached_property
    def shared_expert(self) -> SharedExpert | None:
        """The expert that all tokens pass through, and its gate; None if there is none."""
        expert, name_of, gate = self.record.shared_expert, self.target.shared_expert, self.target.shared_gate
        if expert is None or name_of is None or gate is None:
            return None
        names = [(layer, suffix) for layer in range(len(self._layers.layers)) for suffix in self.record.feed_forward]
        feed_forward = {
            self._layers.name(layer, suffix): self.tensors[self._layers.name(layer, name_of(suffix))]
            for layer, suffix in names
        }
        return SharedExpert(ExpertParts(expert, feed_forward), self._read(gate)[:, 0])

    @cached_property
    def shared(self) -> Mapping[str, TensorPlan]:
        """Tensors outside the feed-forward networks, by their names in the dense model."""
        unshared = {self.target.router, self.target.router_bias, *FUSED, FUSED_ROUTER}
        unshared |= set(self.target.zeros(self.source.config))
        for suffix in self.record.feed_forward:
            unshared |= {self.target.expert(suffix, number) for number in range(len(self.names))}
            if self.target.shared_expert is not None:
                unshared.add(self.target.shared_expert(suffix))
        excluded = {
            self._layers.name(layer, suffix)
            for layer, suffixes in enumerate(self._layers.layers)
            for suffix in suffixes
            if suffix in unshared
        }
        return {
            name: TensorPlan(name, stored.dtype, stored.shape, "copy", (stored,), (self.source.name,))
            for name, stored in self.tensors.items()
            if name not in excluded
        }

    @cached_property
    def router(self) -> RouterRows:
        bias, biases = self.target.router_bias, None
        if bias is not None and self._layers.name(0, bias) in self.tensors:
            biases = self._read(bias)
        return RouterRows(self._read(FUSED_ROUTER if self._is_fused else self.target.router), biases)

    def _read(self, suffix: str) -> NDArray[Any]:
        """Return a tensor of all layers, with the layers as the first axis."""
        names = [self._layers.name(layer, suffix) for layer in range(len(self._layers.layers))]
        with Reader() as reader:
            return np.stack([reader.read(self.tensors[name]) for name in names])


def open_mixture(folder: Path) -> OpenedMixture:
    """Open a mixture; raises `UserError` for a folder that is not a mixture of expertctl."""
    manifest = read_manifest(folder)
    merged = manifest.merged
    if merged is None or merged.mixture is None:
        raise UserError(f"{folder} is not a mixture of experts: its manifest lists no experts")
    record = merged.mixture
    source = open_source(manifest.name, folder, allow_containers=True)
    family = architecture_of(record.dense["model_type"], source.tensors)
    targets = (*family.mixtures, container_target(family))
    target = next(candidate for candidate in targets if candidate.name == record.target)
    return OpenedMixture(source, manifest, merged, record, family, target)


def shared_tensors_are_the_seeds(record: MixtureRecord) -> bool:
    """Return whether a mixture's shared tensors come from the seed rather than from its experts."""
    return record.options.get("shared") == "seed"


def slice_of(fused: StoredTensor, number: int, count: int) -> StoredTensor:
    """Return slice `number` of `count` equal contiguous slices of a fused tensor (E, rows, ...)."""
    entry = fused.entry
    size = entry.num_bytes // count
    begin = entry.begin + number * size
    row_bytes = DTYPES[entry.dtype].num_bytes * math.prod(entry.shape[2:])
    shape = (size // row_bytes, *entry.shape[2:])
    name = f"{entry.name}[{number}]"
    return StoredTensor(replace(entry, name=name, shape=shape, begin=begin, end=begin + size))
