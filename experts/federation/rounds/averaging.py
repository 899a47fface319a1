"""Federated averaging: owners' shares, and an outer optimiser step of SGD with Nesterov momentum.

DiLoCo (arXiv:2311.08105, algorithm 1) and FedAvg (arXiv:1602.05629, algorithm 1). theta are the shared weights of a round,
theta_i the weights of owner i after it: Delta = sum_i w_i (theta - theta_i), which the outer optimiser uses as the gradient.
A late delivery counts with the change from the weights that it started from (as in asynchronous DiLoCo, arXiv:2401.09135, section 3).
Memory holds one span of one tensor at a time, whatever the number of owners and the size of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ....core.artefacts.digests import digest_of_tensors
from ....core.artefacts.numeric import FLOATING
from ....core.artefacts.safetensors_io import Checkpoint, digest_start, new_file, tensor_bytes
from ....core.errors import UserError, unknown_name
from ..judging.delivered_tensors import upcast
from ..judging.round_weights import AveragingRules, Delivery

if TYPE_CHECKING:
    from torch import Tensor

MOMENTUM, MASTER = "momentum/", "master/"
"""Prefixes of tensor names in the outer optimiser's state."""


@dataclass(frozen=True)
class OuterRecipe:
    """Outer optimiser of a synchronous recipe."""

    name: str
    learning_rate: float
    momentum: float
    by_tokens: bool
    """Whether owners are weighted by their token counts (n_k in the paper) or equally."""


OUTER_RECIPES = {
    "diloco": OuterRecipe("diloco", learning_rate=0.7, momentum=0.9, by_tokens=False),
    "fedavg": OuterRecipe("fedavg", learning_rate=1.0, momentum=0.0, by_tokens=True),
}


def outer_recipe(name: str, rules: AveragingRules | None = None) -> OuterRecipe:
    """Return a synchronous recipe with the settings that `rules` changes; raises `UserError` for an unknown name."""
    if name not in OUTER_RECIPES:
        raise unknown_name("synchronous recipe", name, OUTER_RECIPES)
    recipe = OUTER_RECIPES[name]
    if rules is not None and rules.learning_rate is not None:
        recipe = replace(recipe, learning_rate=rules.learning_rate)
    if rules is not None and rules.momentum is not None:
        recipe = replace(recipe, momentum=rules.momentum)
    return recipe


@dataclass(frozen=True)
class Contribution:
    """One owner's weights and its share in the average."""

    owner: str
    file: Path
    digest: str
    """Digest of the tensors when they were examined."""
    share: float
    """Weight in the average; the shares of a round sum to 1, or less if some deliveries are late."""
    start: Path | None = None
    """Weights that a late delivery started from; None: the shared weights of the round."""


def owner_shares(deliveries: Mapping[str, Delivery], recipe: OuterRecipe, rules: AveragingRules) -> dict[str, float]:
    """Return each owner's share in the average, sorted by name.

    Token counts are capped at `rules.max_weight` times their median. The shares sum to 1 before those of late deliveries are
    multiplied with `rules.late_discount` for each round of lateness; what these lose, the shared weights keep.
    """
    owners = sorted(deliveries)
    cap = rules.max_weight * median(delivery.weight for delivery in deliveries.values())
    weights = [min(deliveries[owner].weight, cap) if recipe.by_tokens else 1.0 for owner in owners]
    total = math.fsum(weights)
    return {
        owner: weight / total * rules.late_discount ** deliveries[owner].late
        for owner, weight in zip(owners, weights, strict=True)
    }


def outer_step(
    weights: Tensor, difference: Tensor, momentum: Tensor | None, recipe: OuterRecipe
) -> tuple[Tensor, Tensor]:
    """Return (weights, momentum) after one step of SGD with Nesterov momentum, with `difference` as the gradient.

    Equals torch.optim.SGD(nesterov=True). All tensors have the same shape and dtype.
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
    """Write the shared weights after a round and the outer optimiser's state; return the weights' digest.

    Weights keep the dtypes of `shared`. Momentum is float32 (float64 for float64 weights), and so is a master copy of weights
    with fewer bits, which would otherwise lose small steps. `state` is the previous round's state file, None in the first round.
    The same contributions give the same bytes. Raises `UserError` if weights have changed since they were examined.
    """
    import torch

    contributions = sorted(contributions, key=lambda contribution: contribution.owner)
    files = [Checkpoint([contribution.file]) for contribution in contributions]
    starts = [Checkpoint([given.start]) if given.start is not None else None for given in contributions]
    digests: list[dict[str, str]] = [{} for _ in contributions]
    with (
        new_file(weights_file, shared.shapes()) as weights,
        new_file(state_file, _state_shapes(shared, recipe)) as outer,
    ):
        for name, (dtype, shape) in shared.shapes().items():
            hashes = [digest_start(dtype, shape) for _ in contributions]
            for begin, end in shared.spans(name):
                piece = shared.span(name, begin, end)
                before = upcast(piece)
                difference = torch.zeros_like(before)
                for contribution, file, start, digest in zip(contributions, files, starts, hashes, strict=True):
                    owner_piece = file.span(name, begin, end)
                    digest.update(tensor_bytes(owner_piece))
                    origin = before if start is None else upcast(start.span(name, begin, end))
                    difference.add_(origin - upcast(owner_piece), alpha=contribution.share)
                if dtype not in FLOATING:
                    weights.add(name, piece)
                    continue
                master, momentum = (
                    state.span(prefix + name, begin, end) if state is not None and prefix + name in state else None
                    for prefix in (MASTER, MOMENTUM)
                )
                after, buffer = outer_step(before if master is None else master, difference, momentum, recipe)
                weights.add(name, after.to(piece.dtype))
                for prefix, values in ((MASTER, after), (MOMENTUM, buffer)):
                    if prefix + name in outer:
                        outer.add(prefix + name, values)
            for tensors, digest in zip(digests, hashes, strict=True):
                tensors[name] = digest.hexdigest()
        for contribution, tensors in zip(contributions, digests, strict=True):
            if digest_of_tensors(tensors) != contribution.digest:
                raise UserError(
                    f"the weights of '{contribution.owner}' ({contribution.file}) have changed since they were examined; "
                    "remove them and let the owner deliver again"
                )
    return digest_of_tensors(weights.digests())


def _state_shapes(shared: Checkpoint, recipe: OuterRecipe) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of the outer optimiser's state tensors by name, in the order of writing."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in shared:
        entry = shared.entry(name)
        if entry.dtype not in FLOATING:
            continue
        dtype = "F64" if entry.dtype == "F64" else "F32"
        if entry.dtype not in ("F32", "F64"):
            shapes[MASTER + name] = (dtype, entry.shape)
        if recipe.momentum:
            shapes[MOMENTUM + name] = (dtype, entry.shape)
    return shapes
