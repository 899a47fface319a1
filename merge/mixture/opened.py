"""A finished mixture taken apart again: whose tensors are whose, by its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.lineage import Manifest, read_manifest
from ...core.artefacts.safetensors_io import DTYPES
from ...core.errors import UserError
from ...core.hooks.manager import installed_plugins
from ...core.hooks.mixtures import Architecture, MixtureTarget
from ..engine.reading import Reader
from ..engine.tensor_plan import TensorPlan
from ..planning.assembly import ExpertParts, RouterParts
from ..sources.models import Source, StoredTensor, open_source
from ..sources.tensor_names import layer_names
from .targets import container_target

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FUSED = {"mlp.experts.gate_up_proj": ("gate_proj", "up_proj"), "mlp.experts.down_proj": ("down_proj",)}
_FUSED_ROUTER = "mlp.gate.weight"


@dataclass(frozen=True)
class OpenedMixture:
    """The parts of one mixture folder."""

    source: Source
    manifest: Manifest
    record: Mapping[str, Any]
    """What its manifest says of the mixture."""
    family: Architecture
    target: MixtureTarget
    experts: tuple[ExpertParts, ...]
    shared: Mapping[str, TensorPlan]
    """By the dense model's names."""
    router: RouterParts

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.experts)


def open_mixture(folder: Path) -> OpenedMixture:
    """Open a mixture by its headers and its manifest; its router alone is read.

    Raises `UserError` for a folder that is no mixture of ours.
    """
    manifest = read_manifest(folder)
    record = manifest.config.get("mixture")
    if not record or "experts" not in record:
        raise UserError(f"{folder} is no mixture of experts: its manifest names none")
    family = installed_plugins().architecture_of(record["dense"]["model_type"])
    target = next(one for one in (*family.mixtures, container_target(family)) if one.name == record["target"])
    source = open_source(manifest.name, folder, allow_containers=True)
    parts = _Parts(source, record, target)
    return OpenedMixture(
        source, manifest, record, family, target, parts.experts(), parts.shared(), parts.router()
    )


class _Parts:
    """Sorts the tensors of a mixture."""

    def __init__(self, source: Source, record: Mapping[str, Any], target: MixtureTarget) -> None:
        self.source, self.record, self.target = source, record, target
        self.names: tuple[str, ...] = tuple(record["experts"])
        self.tensors = {name.removeprefix(target.prefix): stored for name, stored in source.tensors.items()}
        self.layers = layer_names(self.tensors)
        # the options may say another layout: what trained on was written anew
        self.fused = any(name.endswith(tuple(_FUSED)) for name in self.tensors)

    def experts(self) -> tuple[ExpertParts, ...]:
        return tuple(
            ExpertParts(
                name,
                {
                    self.layers.name(layer, rest): self._expert_tensor(layer, rest, number)
                    for layer in range(len(self.layers.layers))
                    for rest in self.record["feed_forward"]
                },
            )
            for number, name in enumerate(self.names)
        )

    def _expert_tensor(self, layer: int, rest: str, number: int) -> StoredTensor:
        if not self.fused:
            return self.tensors[self.layers.name(layer, self.target.expert(rest, number))]
        kind = rest.rsplit(".", 2)[-2]
        place, kinds = next((place, kinds) for place, kinds in _FUSED.items() if kind in kinds)
        whole = self.tensors[self.layers.name(layer, place)]
        return slice_of(whole, number * len(kinds) + kinds.index(kind), len(self.names) * len(kinds))

    def _own(self) -> set[str]:
        """Return the names within a layer of everything that is not shared."""
        found = {
            self.target.expert(rest, number)
            for rest in self.record["feed_forward"]
            for number in range(len(self.names))
        }
        found |= {self.target.router, *_FUSED, _FUSED_ROUTER}
        if self.target.router_bias is not None:
            found.add(self.target.router_bias)
        return found | set(self.target.zeros(self.source.config))

    def shared(self) -> dict[str, TensorPlan]:
        own = self._own()
        inside = {
            self.layers.name(layer, rest)
            for layer, rests in enumerate(self.layers.layers)
            for rest in rests
            if rest in own
        }
        return {
            name: TensorPlan(name, stored.dtype, stored.shape, "copy", (stored,), (self.source.name,))
            for name, stored in self.tensors.items()
            if name not in inside
        }

    def router(self) -> RouterParts:
        name = _FUSED_ROUTER if self.fused else self.target.router
        rows = self._read(name)
        assert rows is not None
        bias = self.target.router_bias
        return RouterParts(rows, self._read(bias) if bias is not None else None)

    def _read(self, rest: str) -> NDArray[Any] | None:
        import numpy as np

        names = [self.layers.name(layer, rest) for layer in range(len(self.layers.layers))]
        if names[0] not in self.tensors:
            return None
        with Reader() as reader:
            return np.stack([reader.whole(self.tensors[name]) for name in names])


def slice_of(whole: StoredTensor, number: int, count: int) -> StoredTensor:
    """Return one of `count` equal pieces, end to end, of a tensor (E, rows, ...) as a tensor of its own."""
    entry = whole.entry
    size = entry.num_bytes // count
    begin = entry.begin + number * size
    inner = entry.shape[2:]
    width = DTYPES[entry.dtype][1]
    for axis in inner:
        width *= axis
    piece = replace(
        entry,
        name=f"{entry.name}[{number}]",
        shape=(size // width, *inner),
        begin=begin,
        end=begin + size,
    )
    return StoredTensor(piece, None, None, piece.name)
