"""Read a merged mixture back into its experts, shared tensors and router, by its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.numeric import DTYPES
from ...core.errors import UserError
from ...core.hooks.architectures import architecture_of
from ...core.hooks.mixtures import Architecture, MixtureTarget, RouterRows
from ...core.manifests.generalist import GeneralistConfig, MixtureRecord
from ...core.manifests.manifest import Manifest, read_manifest
from ..engine.reading import Reader
from ..engine.tensor_plan import TensorPlan
from ..planning.assembly import ExpertParts
from ..sources.models import Source, StoredTensor, open_source
from ..sources.tensor_names import layer_names
from .targets import container_target

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FUSED = {"mlp.experts.gate_up_proj": ("gate_proj", "up_proj"), "mlp.experts.down_proj": ("down_proj",)}
_FUSED_ROUTER = "mlp.gate.weight"


@dataclass(frozen=True)
class OpenedMixture:
    """Experts, shared tensors and router of a mixture folder."""

    source: Source
    manifest: Manifest
    merged: GeneralistConfig
    record: MixtureRecord
    family: Architecture
    target: MixtureTarget
    experts: tuple[ExpertParts, ...]
    shared: Mapping[str, TensorPlan]
    """Tensors outside the feed-forward networks, by their names in the dense model."""
    router: RouterRows

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.experts)


def open_mixture(folder: Path) -> OpenedMixture:
    """Open a mixture; reads its manifest, the tensor headers and the router.

    Raises `UserError` for a folder that is not a mixture of expertctl.
    """
    manifest = read_manifest(folder)
    merged = manifest.merged
    if merged is None or merged.mixture is None:
        raise UserError(f"{folder} is not a mixture of experts: its manifest lists no experts")
    record = merged.mixture
    family = architecture_of(record.dense["model_type"])
    target = next(
        candidate for candidate in (*family.mixtures, container_target(family)) if candidate.name == record.target
    )
    source = open_source(manifest.name, folder, allow_containers=True)
    tensors = _MixtureTensors(source, merged.experts, record, target)
    return OpenedMixture(
        source, manifest, merged, record, family, target, tensors.experts(), tensors.shared(), tensors.router()
    )


class _MixtureTensors:
    """Maps the tensors of a mixture to experts, shared tensors and router."""

    def __init__(self, source: Source, names: tuple[str, ...], record: MixtureRecord, target: MixtureTarget) -> None:
        self.source, self.names, self.record, self.target = source, names, record, target
        self.tensors = {name.removeprefix(target.prefix): stored for name, stored in source.tensors.items()}
        self.layers = layer_names(self.tensors)
        # `options.layout` may differ: tuning rewrites the tensors in another layout
        self.fused = any(name.endswith(tuple(_FUSED)) for name in self.tensors)

    def experts(self) -> tuple[ExpertParts, ...]:
        return tuple(
            ExpertParts(
                name,
                {
                    self.layers.name(layer, suffix): self._expert_tensor(layer, suffix, number)
                    for layer in range(len(self.layers.layers))
                    for suffix in self.record.feed_forward
                },
            )
            for number, name in enumerate(self.names)
        )

    def _expert_tensor(self, layer: int, suffix: str, number: int) -> StoredTensor:
        if not self.fused:
            return self.tensors[self.layers.name(layer, self.target.expert(suffix, number))]
        kind = suffix.rsplit(".", 2)[-2]
        fused_name, kinds = next((name, kinds) for name, kinds in _FUSED.items() if kind in kinds)
        fused = self.tensors[self.layers.name(layer, fused_name)]
        return slice_of(fused, number * len(kinds) + kinds.index(kind), len(self.names) * len(kinds))

    def _unshared_names(self) -> set[str]:
        """Return the names, within a layer, of all tensors that are not shared."""
        names = {
            self.target.expert(suffix, number)
            for suffix in self.record.feed_forward
            for number in range(len(self.names))
        }
        names |= {self.target.router, *_FUSED, _FUSED_ROUTER}
        if self.target.router_bias is not None:
            names.add(self.target.router_bias)
        return names | set(self.target.zeros(self.source.config))

    def shared(self) -> dict[str, TensorPlan]:
        unshared = self._unshared_names()
        excluded = {
            self.layers.name(layer, suffix)
            for layer, suffixes in enumerate(self.layers.layers)
            for suffix in suffixes
            if suffix in unshared
        }
        return {
            name: TensorPlan(name, stored.dtype, stored.shape, "copy", (stored,), (self.source.name,))
            for name, stored in self.tensors.items()
            if name not in excluded
        }

    def router(self) -> RouterRows:
        name = _FUSED_ROUTER if self.fused else self.target.router
        rows = self._read(name)
        assert rows is not None
        bias = self.target.router_bias
        return RouterRows(rows, self._read(bias) if bias is not None else None)

    def _read(self, suffix: str) -> NDArray[Any] | None:
        import numpy as np

        names = [self.layers.name(layer, suffix) for layer in range(len(self.layers.layers))]
        if names[0] not in self.tensors:
            return None
        with Reader() as reader:
            return np.stack([reader.read(self.tensors[name]) for name in names])


def slice_of(fused: StoredTensor, number: int, count: int) -> StoredTensor:
    """Return slice `number` of `count` equal contiguous slices of a fused tensor (E, rows, ...)."""
    entry = fused.entry
    size = entry.num_bytes // count
    begin = entry.begin + number * size
    inner = entry.shape[2:]
    width = DTYPES[entry.dtype].num_bytes
    for axis in inner:
        width *= axis
    tensor_slice = replace(
        entry, name=f"{entry.name}[{number}]", shape=(size // width, *inner), begin=begin, end=begin + size
    )
    return StoredTensor(tensor_slice, None, None, tensor_slice.name)
