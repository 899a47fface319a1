"""Assembling a mixture: which tensor of the new model is which tensor of which expert.

Nothing is calculated for an expert's part: its bytes are copied, so that every one can be traced to its source.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from ...core.errors import UserError
from ...core.hooks.mixtures import Architecture, MixtureShape, MixtureTarget
from ..engine.tensor_plan import TensorPlan
from ..sources.models import StoredTensor
from ..sources.tensor_names import LayerNames, layer_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

_Placed = dict[str, list[tuple[str, StoredTensor]]]
"""For each tensor within a layer, the parts it is made of and the experts that they come from."""
_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True)
class ExpertParts:
    """What one expert brings."""

    name: str
    feed_forward: Mapping[str, StoredTensor]
    """By the names of the dense model."""


@dataclass(frozen=True)
class RouterParts:
    """What decides between the experts."""

    rows: NDArray[Any]
    """(layers, experts, width), float32."""
    biases: NDArray[Any] | None = None
    """(layers, experts), float32."""


@dataclass(frozen=True)
class Assembly:
    """A mixture, planned."""

    tensors: tuple[TensorPlan, ...]
    config: Mapping[str, Any]
    """Its `config.json`."""
    experts: tuple[str, ...]
    """In the order of the router's rows."""
    record: Mapping[str, Any]
    """What its manifest says of it."""
    notes: tuple[str, ...] = ()


def plan_assembly(
    dense: Mapping[str, Any],
    family: Architecture,
    target: MixtureTarget,
    shape: MixtureShape,
    shared: Mapping[str, TensorPlan],
    experts: Sequence[ExpertParts],
    router: RouterParts,
    *,
    dtype: str | None = None,
    layout: Literal["per_expert", "fused"] = "per_expert",
) -> tuple[tuple[TensorPlan, ...], dict[str, Any]]:
    """Return every tensor of a mixture, in an order that does not depend on where it comes from, and its config.

    `shared` holds all but the feed-forwards, by the dense model's names. Raises `UserError` where experts' tensors
    differ in name or shape.
    """
    first = experts[0]
    for expert in experts[1:]:
        _check_alike(first, expert)
    names = layer_names([*shared, *first.feed_forward])
    config = target.config(dense, shape)
    assert len(names.layers) == router.rows.shape[0], "a router row for each layer"
    kind = dtype or next(iter(first.feed_forward.values())).dtype
    plans = [_renamed(shared[name], target) for name in sorted(names.before)]
    for layer, rests in enumerate(names.layers):
        whole = {rest: names.name(layer, rest) for rest in sorted(rests, key=_natural)}
        plans += [_renamed(shared[name], target) for name in whole.values() if name in shared]
        inner = {rest: name for rest, name in whole.items() if name in first.feed_forward}
        own = _fused(inner, experts) if layout == "fused" else _per_expert(inner, experts, target)
        for rest, stored in own.items():
            plans.append(_planned(_place(target, names, layer, rest), stored, len(experts), kind))
        for rest, values in _router_tensors(router, layer, target, layout, config).items():
            plans.append(
                TensorPlan(
                    name=_place(target, names, layer, rest),
                    dtype=kind,
                    shape=values.shape,
                    action="given",
                    experts=(),
                    expert_names=(),
                    values=values,
                )
            )
    plans += [_renamed(shared[name], target) for name in sorted(names.after)]
    return tuple(plans), config


def split_feed_forward(names: Iterable[str], family: Architecture) -> tuple[list[str], list[str]]:
    """Return (the tensors of feed-forwards, all others)."""
    inside: list[str] = []
    outside: list[str] = []
    for name in names:
        here = any(fnmatchcase(name, pattern) for pattern in family.feed_forward)
        (inside if here else outside).append(name)
    return inside, outside


def _renamed(plan: TensorPlan, target: MixtureTarget) -> TensorPlan:
    return replace(plan, name=target.prefix + plan.name)


def _place(target: MixtureTarget, names: LayerNames, layer: int, rest: str) -> str:
    return target.prefix + names.name(layer, rest)


def _per_expert(inner: Mapping[str, str], experts: Sequence[ExpertParts], target: MixtureTarget) -> _Placed:
    """Return the tensors of one layer's experts by their names within the layer."""
    return {
        target.expert(rest, number): [(expert.name, expert.feed_forward[name])]
        for number, expert in enumerate(experts)
        for rest, name in inner.items()
    }


def _fused(inner: Mapping[str, str], experts: Sequence[ExpertParts]) -> _Placed:
    """Return the two tensors that transformers holds a layer's gated experts in: gate rows before up rows."""
    by_kind = {rest.rsplit(".", 2)[-2]: name for rest, name in inner.items()}
    if set(by_kind) != {"gate_proj", "up_proj", "down_proj"} or not all(
        rest.endswith(".weight") for rest in inner
    ):
        raise UserError(
            f"layout 'fused' is for feed-forwards of gate_proj, up_proj and down_proj; these have "
            f"{', '.join(inner)}; use layout: per_expert"
        )
    return {
        place: [(expert.name, expert.feed_forward[by_kind[kind]]) for expert in experts for kind in kinds]
        for place, kinds in (
            ("mlp.experts.gate_up_proj", ("gate_proj", "up_proj")),
            ("mlp.experts.down_proj", ("down_proj",)),
        )
    }


def _planned(name: str, parts: Sequence[tuple[str, StoredTensor]], count: int, dtype: str) -> TensorPlan:
    """Return the plan of one expert's tensor, or of one that holds `count` experts' end to end."""
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
    router: RouterParts, layer: int, target: MixtureTarget, layout: str, config: Mapping[str, Any]
) -> dict[str, NDArray[Any]]:
    import numpy as np

    name = "mlp.gate.weight" if layout == "fused" else target.router
    found = {name: router.rows[layer]}
    if target.router_bias is not None and config.get("router_bias") and router.biases is not None:
        found[target.router_bias] = router.biases[layer]
    for zero, shape in target.zeros(config).items():
        found[zero] = np.zeros(shape, np.float32)
    return found


def _check_alike(one: ExpertParts, other: ExpertParts) -> None:
    for name in sorted(one.feed_forward.keys() ^ other.feed_forward.keys(), key=_natural):
        there, absent = (one, other) if name in one.feed_forward else (other, one)
        raise UserError(f"tensor '{name}' is in '{there.name}', but not in '{absent.name}'")
    for name, stored in one.feed_forward.items():
        theirs = other.feed_forward[name]
        if stored.shape != theirs.shape:
            raise UserError(
                f"tensor '{name}' is {list(stored.shape)} in '{one.name}', but {list(theirs.shape)} in '{other.name}'; "
                "experts of a mixture are of one size"
            )


def _natural(name: str) -> list[Any]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _NUMBER.split(name)]
