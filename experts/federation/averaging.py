"""One shared model from owners who train apart: checked averaging, and an outer step of SGD with Nesterov momentum.

DiLoCo (arXiv:2311.08105, algorithm 1) and FedAvg (arXiv:1602.05629, algorithm 1). theta are the shared weights of a round,
theta_i what owner i made of them: Delta = sum_i w_i (theta - theta_i), and the outer optimiser takes Delta for a gradient.
One tensor is in memory at a time, whatever the number of owners.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ...core.errors import UserError, first_line, unknown_name
from ...core.lineage import digest_of_tensors
from ...core.numeric import FLOATING
from ...core.safetensors_io import Checkpoint, tensor_digest
from .acceptance import Refusal, RefusalCode
from .tensor_stream import TensorStream

if TYPE_CHECKING:
    from torch import Tensor

MOMENTUM, MASTER = "momentum/", "master/"
"""What stands before a tensor's name in the outer optimiser's state."""


@dataclass(frozen=True)
class OuterRecipe:
    """How a round becomes a step of the shared model."""

    name: str
    learning_rate: float
    momentum: float
    by_tokens: bool
    """Whether owners count by the tokens of their text (n_k in the paper), or all the same."""


OUTER_RECIPES = {
    "diloco": OuterRecipe("diloco", learning_rate=0.7, momentum=0.9, by_tokens=False),
    "fedavg": OuterRecipe("fedavg", learning_rate=1.0, momentum=0.0, by_tokens=True),
}


def outer_recipe(name: str) -> OuterRecipe:
    """Return a recipe by its name; raises `UserError` for any other."""
    if name not in OUTER_RECIPES:
        raise unknown_name("synchronous recipe", name, OUTER_RECIPES)
    return OUTER_RECIPES[name]


@dataclass(frozen=True)
class AveragingRules:
    """Bounds that an owner's weights are held to."""

    max_change: float = 1.0
    """Most that the weights may have moved in a round: length of the difference of all tensors together, over the length of
    the shared ones."""
    max_weight: float = 10.0
    """Most that an owner may count, against the median of a round: tokens are what owners say they are."""


@dataclass(frozen=True)
class Examined:
    """Weights that may be averaged."""

    digest: str
    change: float
    """How far they moved, as in `AveragingRules.max_change`."""


@dataclass(frozen=True)
class Contribution:
    """Weights of one owner that are averaged."""

    owner: str
    file: Path
    digest: str
    """Of its tensors when they were examined."""
    share: float


def examine_weights(file: Path, shared: Checkpoint, rules: AveragingRules) -> Examined | Refusal:
    """Hold an owner's weights against the shared ones: names, shapes, dtypes, finite numbers, and how far they moved."""
    import torch

    try:
        own = Checkpoint([file])
        refusal = _refusal_of_header(own, shared)
        if refusal is not None:
            return refusal
        digests: dict[str, str] = {}
        moved = length = 0.0
        for name in shared:
            tensor = own.read(name)
            digests[name] = tensor_digest(tensor)
            before = shared.read(name)
            if shared.entry(name).dtype not in FLOATING:
                if not torch.equal(tensor, before):
                    return Refusal(RefusalCode.FROZEN, f"'{name}' is no floating-point tensor")
                continue
            start, after = _wide(before), _wide(tensor)
            if not bool(torch.isfinite(after).all()):
                return Refusal(RefusalCode.NOT_FINITE, f"'{name}'")
            moved += float((after - start).square().sum(dtype=torch.float64))
            length += float(start.square().sum(dtype=torch.float64))
    except UserError as error:
        return Refusal(RefusalCode.FILES, first_line(error).replace(str(file), "the file"))
    change = math.sqrt(moved / length) if length else math.sqrt(moved)
    if not change <= rules.max_change:
        return Refusal(
            RefusalCode.NORM, f"{change:.3g} of the shared weights' length; {rules.max_change:g} is allowed"
        )
    return Examined(digest_of_tensors(digests), change)


def _refusal_of_header(own: Checkpoint, shared: Checkpoint) -> Refusal | None:
    """Judge names, shapes and dtypes, for which no tensor needs to be read."""
    for name in [*shared, *own]:
        if name not in own or name not in shared:
            whose = "the owner's weights lack" if name not in own else "the shared model has no"
            return Refusal(RefusalCode.SHAPES, f"{whose} '{name:.100}'")
        mine, theirs = own.entry(name), shared.entry(name)
        if mine.shape != theirs.shape:
            return Refusal(
                RefusalCode.SHAPES, f"'{name}' is {list(mine.shape)}, the shared one {list(theirs.shape)}"
            )
        if mine.dtype != theirs.dtype:
            return Refusal(RefusalCode.DTYPES, f"'{name}' is {mine.dtype}, the shared one {theirs.dtype}")
    return None


def shares_of(weights: Mapping[str, float], recipe: OuterRecipe, rules: AveragingRules) -> dict[str, float]:
    """Return how much each owner counts, summing to 1, by sorted name; no weight beyond `rules.max_weight` medians."""
    if not recipe.by_tokens:
        return {owner: 1 / len(weights) for owner in sorted(weights)}
    most = rules.max_weight * median(weights.values())
    capped = {owner: min(weights[owner], most) for owner in sorted(weights)}
    total = math.fsum(capped.values())
    return {owner: weight / total for owner, weight in capped.items()}


def outer_step(
    weights: Tensor, difference: Tensor, momentum: Tensor | None, recipe: OuterRecipe
) -> tuple[Tensor, Tensor]:
    """Return (weights, momentum) after one step of SGD with Nesterov momentum along a tensor of averaged differences.

    The same as torch.optim.SGD(nesterov=True) whose gradient is `difference`; all of one shape and dtype.
    """
    buffer = difference if momentum is None else recipe.momentum * momentum + difference
    step = difference + recipe.momentum * buffer if recipe.momentum else difference
    return weights - recipe.learning_rate * step, buffer


def average_round(
    shared: Checkpoint,
    contributions: Sequence[Contribution],
    state: Checkpoint | None,
    recipe: OuterRecipe,
    weights_file: Path,
    state_file: Path,
) -> str:
    """Write the shared weights after a round, and the outer optimiser's state, and return the weights' digest.

    Weights have the dtypes of `shared`; momentum is float32 (float64 for float64), and so is a master copy of weights of
    fewer bits, which would otherwise lose small steps. `state` is what the round before wrote, None for the first. The same
    contributions give the same bytes. Raises `UserError` where weights are no longer what was examined.
    """
    sources = [(one, Checkpoint([one.file])) for one in sorted(contributions, key=lambda one: one.owner)]
    kept = _state_shapes(shared, recipe)
    found: dict[str, dict[str, str]] = {one.owner: {} for one in contributions}
    shapes = {name: (shared.entry(name).dtype, shared.entry(name).shape) for name in shared}
    with TensorStream(weights_file, shapes) as weights, TensorStream(state_file, kept) as outer:
        for name in shared:
            sent = shared.read(name)
            if shared.entry(name).dtype not in FLOATING:
                weights.add(name, sent)
                for one, source in sources:
                    found[one.owner][name] = tensor_digest(source.read(name))
                continue
            difference = _mean_difference(sent, name, sources, found)
            before = _kept(state, MASTER + name)
            after, buffer = outer_step(
                _wide(sent) if before is None else before,
                difference,
                _kept(state, MOMENTUM + name),
                recipe,
            )
            weights.add(name, after.to(sent.dtype))
            for prefix, tensor in ((MASTER, after), (MOMENTUM, buffer)):
                if prefix + name in kept:
                    outer.add(prefix + name, tensor)
        for one in contributions:
            if digest_of_tensors(found[one.owner]) != one.digest:
                raise UserError(
                    f"what '{one.owner}' delivered ({one.file}) was changed since it was examined; remove it and let the "
                    "owner deliver again"
                )
    return digest_of_tensors(weights.digests)


def _mean_difference(
    sent: Tensor,
    name: str,
    sources: Iterable[tuple[Contribution, Checkpoint]],
    found: Mapping[str, dict[str, str]],
) -> Tensor:
    """Return sum_i w_i (theta - theta_i) of one tensor; notes the digests of what was read in `found`."""
    import torch

    start = _wide(sent)
    total = torch.zeros_like(start)
    for one, source in sources:
        tensor = source.read(name)
        found[one.owner][name] = tensor_digest(tensor)
        total.add_(start - _wide(tensor), alpha=one.share)
    return total


def _state_shapes(shared: Checkpoint, recipe: OuterRecipe) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return what the outer optimiser keeps: dtype and shape by name, in the order in which it is written."""
    kept: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in shared:
        entry = shared.entry(name)
        if entry.dtype not in FLOATING:
            continue
        dtype = "F64" if entry.dtype == "F64" else "F32"
        if entry.dtype not in ("F32", "F64"):
            kept[MASTER + name] = (dtype, entry.shape)
        if recipe.momentum:
            kept[MOMENTUM + name] = (dtype, entry.shape)
    return kept


def _kept(state: Checkpoint | None, name: str) -> Tensor | None:
    return state.read(name) if state is not None and name in state else None


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the numbers that are averaged: float64 stays, all else becomes float32."""
    import torch

    return tensor if tensor.dtype == torch.float64 else tensor.float()
