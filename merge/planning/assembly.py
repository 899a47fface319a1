"""Planning of a mixture of experts: which tensor of the mixture comes from which tensor of which expert.

The tensors of experts are copied byte by byte, so every one can be traced to its source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from ...core.errors import UserError
from ...core.hooks.mixtures import Architecture, MixtureShape, MixtureTarget, RouterRows
from ...core.hooks.text import ValidationText
from ...core.manifests.generalist import MixtureRecord
from ...core.reporting import SILENT, Reporter
from ..engine.tensor_plan import TensorPlan
from ..recipes.recipe import WEIGHT, Recipe
from ..sources.models import Source, StoredTensor
from ..sources.tensor_names import layer_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

_Placed = dict[str, list[tuple[str, StoredTensor]]]
"""Tensor name within a layer -> (expert name, stored tensor) of every tensor to stack."""
FUSED = {"mlp.experts.gate_up_proj": ("gate_proj", "up_proj"), "mlp.experts.down_proj": ("down_proj",)}
"""Fused expert tensors of transformers -> the FFN tensors that each one stacks."""
FUSED_ROUTER = "mlp.gate.weight"
ROUTER_FOLDER = "router"
"""Folder of a mixture with the statistics of its router, `EXPERT.safetensors`."""
_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True)
class AssemblyInputs:
    """Implements `AssemblyInputs` of the plugin interface for mixtures."""

    recipe: Recipe
    sources: Mapping[str, Source]
    dense: Callable[[Recipe], Sequence[TensorPlan]]
    """`dense(recipe)` plans the weighted mean of the models, tensor by tensor, with the merged vocabulary."""
    validation: Callable[[], Sequence[ValidationText]] | None = None
    reporter: Reporter = SILENT
    router_statistics: Mapping[str, Mapping[str, NDArray[Any]]] = field(default_factory=dict)
    """Statistics of experts of an earlier mixture, by expert and name, if its router start stored some."""

    @property
    def expert_options(self) -> dict[str, dict[str, Any]]:
        return {
            source.model: {key: value for key, value in source.parameters.items() if key != WEIGHT}
            for output_slice in self.recipe.slices
            for source in output_slice.sources
        }

    @property
    def leading(self) -> Source:
        return self.sources[self.recipe.leading]


@dataclass(frozen=True)
class ExpertParts:
    """FFN tensors of one expert."""

    name: str
    feed_forward: Mapping[str, StoredTensor]
    """Tensors by their names in the dense model."""


@dataclass(frozen=True)
class SharedExpert:
    """An expert that all tokens pass through, and its gate."""

    parts: ExpertParts
    gate: NDArray[Any]
    """(L, d): the row of each layer."""


@dataclass(frozen=True)
class Assembly:
    """Implements `Assembly` of the plugin interface for mixtures."""

    tensors: tuple[TensorPlan, ...]
    config: Mapping[str, Any]
    experts: tuple[str, ...]
    record: MixtureRecord
    notes: tuple[str, ...] = ()
    is_fitted: bool = True
    router_statistics: Mapping[str, Mapping[str, NDArray[Any]]] = field(default_factory=dict, compare=False, repr=False)
    """Statistics that the router was computed from, by expert and name, which are stored with the mixture."""


def plan_assembly(
    dense: Mapping[str, Any],
    family: Architecture,
    target: MixtureTarget,
    shape: MixtureShape,
    shared: Mapping[str, TensorPlan],
    experts: Sequence[ExpertParts],
    router: RouterRows,
    *,
    shared_expert: SharedExpert | None = None,
    dtype: str | None = None,
    layout: Literal["per_expert", "fused"] = "per_expert",
) -> tuple[tuple[TensorPlan, ...], dict[str, Any]]:
    """Return the tensor plans of a mixture, in an order independent of their sources, and its config.

    `shared` holds all tensors except the FFNs, by their names in the dense model. Raises `UserError` if the experts'
    tensors differ in name or shape.
    """
    first = experts[0]
    for expert in (*experts[1:], *([shared_expert.parts] if shared_expert is not None else ())):
        _check_same_tensors(first, expert)
    names = layer_names([*shared, *first.feed_forward])
    config = target.config(dense, shape)
    assert len(names.layers) == router.rows.shape[0], "one router row per layer"
    stored_dtype = dtype or next(iter(first.feed_forward.values())).dtype

    def copies(tensors: Iterable[str]) -> list[TensorPlan]:
        return [replace(shared[name], name=target.prefix + name) for name in tensors if name in shared]

    plans = copies(sorted(names.before))
    for layer, suffixes in enumerate(names.layers):
        full_names = {suffix: names.name(layer, suffix) for suffix in sorted(suffixes, key=_natural_key)}
        plans += copies(full_names.values())
        feed_forward_names = {suffix: name for suffix, name in full_names.items() if name in first.feed_forward}
        expert_tensors = (
            _fused(feed_forward_names, experts)
            if layout == "fused"
            else _per_expert(feed_forward_names, experts, target)
        )
        if shared_expert is not None and target.shared_expert is not None:
            parts = shared_expert.parts
            for suffix, name in feed_forward_names.items():
                expert_tensors[target.shared_expert(suffix)] = [(parts.name, parts.feed_forward[name])]
        prefix = f"{target.prefix}{names.name(layer, '')}"
        for suffix, stored in expert_tensors.items():
            plans.append(_plan_tensor(prefix + suffix, stored, len(experts), stored_dtype))
        for suffix, values in _router_tensors(router, shared_expert, layer, target, layout, config).items():
            plans.append(TensorPlan(prefix + suffix, stored_dtype, values.shape, "computed", (), (), values=values))
    return (*plans, *copies(sorted(names.after))), config


def split_feed_forward(names: Iterable[str], family: Architecture) -> tuple[list[str], list[str]]:
    """Return (names of FFN tensors, all other names)."""
    feed_forward: list[str] = []
    others: list[str] = []
    for name in names:
        is_feed_forward = any(fnmatchcase(name, pattern) for pattern in family.feed_forward)
        (feed_forward if is_feed_forward else others).append(name)
    return feed_forward, others


def _per_expert(
    feed_forward_names: Mapping[str, str], experts: Sequence[ExpertParts], target: MixtureTarget
) -> _Placed:
    return {
        target.expert(suffix, number): [(expert.name, expert.feed_forward[name])]
        for number, expert in enumerate(experts)
        for suffix, name in feed_forward_names.items()
    }


def _fused(feed_forward_names: Mapping[str, str], experts: Sequence[ExpertParts]) -> _Placed:
    """Return one layer's fused expert tensors as in transformers; gate rows precede up rows."""
    by_kind = {suffix.rsplit(".", 2)[-2]: name for suffix, name in feed_forward_names.items()}
    if set(by_kind) != {"gate_proj", "up_proj", "down_proj"} or not all(
        suffix.endswith(".weight") for suffix in feed_forward_names
    ):
        raise UserError(
            f"layout 'fused' needs feed-forwards with gate_proj, up_proj and down_proj, but these have "
            f"{', '.join(feed_forward_names)}; use layout: per_expert"
        )
    return {
        fused_name: [(expert.name, expert.feed_forward[by_kind[kind]]) for expert in experts for kind in kinds]
        for fused_name, kinds in FUSED.items()
    }


def _plan_tensor(name: str, parts: Sequence[tuple[str, StoredTensor]], count: int, dtype: str) -> TensorPlan:
    shape = parts[0][1].shape
    if len(parts) > 1:
        shape = (count, sum(stored.shape[0] for _, stored in parts) // count, *shape[1:])
    return TensorPlan(
        name=name,
        dtype=dtype,
        shape=shape,
        action="stack" if len(parts) > 1 else "copy",
        experts=tuple(stored for _, stored in parts),
        expert_names=tuple(owner for owner, _ in parts),
    )


def _router_tensors(
    router: RouterRows,
    shared_expert: SharedExpert | None,
    layer: int,
    target: MixtureTarget,
    layout: str,
    config: Mapping[str, Any],
) -> dict[str, NDArray[Any]]:
    import numpy as np

    tensors = {FUSED_ROUTER if layout == "fused" else target.router: router.rows[layer]}
    if target.router_bias is not None and config.get("router_bias") and router.biases is not None:
        tensors[target.router_bias] = router.biases[layer]
    if shared_expert is not None and target.shared_gate is not None:
        return {**tensors, target.shared_gate: shared_expert.gate[layer][None]}
    return tensors | {zero: np.zeros(shape, np.float32) for zero, shape in target.zeros(config).items()}


def _check_same_tensors(first: ExpertParts, other: ExpertParts) -> None:
    for name in sorted(first.feed_forward.keys() ^ other.feed_forward.keys(), key=_natural_key):
        present, absent = (first, other) if name in first.feed_forward else (other, first)
        raise UserError(f"tensor '{name}' is in '{present.name}', but not in '{absent.name}'")
    for name, stored in first.feed_forward.items():
        other_tensor = other.feed_forward[name]
        if stored.shape != other_tensor.shape:
            raise UserError(
                f"tensor '{name}' is {list(stored.shape)} in '{first.name}', but {list(other_tensor.shape)} in '{other.name}'; "
                "all experts of a mixture must have the same size"
            )


def _natural_key(name: str) -> list[Any]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _NUMBER.split(name)]
