"""One shared model from owners who train apart: checked averaging, and an outer step of SGD with Nesterov momentum.

DiLoCo (arXiv:2311.08105, algorithm 1) and FedAvg (arXiv:1602.05629, algorithm 1). theta are the shared weights of a round,
theta_i what owner i made of them: Delta = sum_i w_i (theta - theta_i), and the outer optimiser takes Delta for a gradient.
A piece of one tensor is in memory at a time, whatever the number of owners and the size of the tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ....core.artefacts.lineage import digest_of_tensors
from ....core.artefacts.numeric import FLOATING
from ....core.artefacts.safetensors_io import Checkpoint, digest_start, tensor_bytes
from ....core.errors import UserError, first_line, unknown_name
from ..judging.acceptance import Refusal, RefusalCode
from ..protocol.tensor_stream import TensorStream

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 22
"""Numbers of a tensor that are in memory at a time."""
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
            kind = shared.entry(name).dtype
            state = digest_start(kind, shared.entry(name).shape)
            for begin, end in spans_of(shared, name):
                piece, before = own.span(name, begin, end), shared.span(name, begin, end)
                state.update(tensor_bytes(piece))
                if kind not in FLOATING:
                    if not torch.equal(piece, before):
                        return Refusal(RefusalCode.FROZEN, f"'{name}' is no floating-point tensor")
                    continue
                start, after = _wide(before), _wide(piece)
                if not bool(torch.isfinite(after).all()):
                    return Refusal(RefusalCode.NOT_FINITE, f"'{name}'")
                moved += float((after - start).square().sum(dtype=torch.float64))
                length += float(start.square().sum(dtype=torch.float64))
            digests[name] = state.hexdigest()
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
    sources = [
        _Source(one, Checkpoint([one.file])) for one in sorted(contributions, key=lambda one: one.owner)
    ]
    kept = _state_shapes(shared, recipe)
    shapes = {name: (shared.entry(name).dtype, shared.entry(name).shape) for name in shared}
    with TensorStream(weights_file, shapes) as weights, TensorStream(state_file, kept) as outer:
        for name in shared:
            for source in sources:
                source.begin(name)
            _average_tensor(name, shared, sources, state, recipe, weights, outer)
            for source in sources:
                source.end()
        for source in sources:
            source.require_as_examined()
    return digest_of_tensors(weights.digests)


def _average_tensor(
    name: str,
    shared: Checkpoint,
    sources: Sequence[_Source],
    state: Checkpoint | None,
    recipe: OuterRecipe,
    weights: TensorStream,
    outer: TensorStream,
) -> None:
    """Write one tensor of the shared weights after a round, and of the outer optimiser's state, piece by piece."""
    for begin, end in spans_of(shared, name):
        sent = shared.span(name, begin, end)
        if shared.entry(name).dtype not in FLOATING:
            weights.add(name, sent)
            for source in sources:
                source.read(begin, end)
            continue
        before = _kept(state, MASTER + name, begin, end)
        after, buffer = outer_step(
            _wide(sent) if before is None else before,
            _mean_difference(sent, sources, begin, end),
            _kept(state, MOMENTUM + name, begin, end),
            recipe,
        )
        weights.add(name, after.to(sent.dtype))
        for prefix, piece in ((MASTER, after), (MOMENTUM, buffer)):
            if prefix + name in outer:
                outer.add(prefix + name, piece)


class _Source:
    """One owner's weights as they are read, piece by piece and digested on the way."""

    def __init__(self, one: Contribution, checkpoint: Checkpoint) -> None:
        self.share = one.share
        self._one, self._checkpoint = one, checkpoint
        self._digests: dict[str, str] = {}
        self._name, self._state = "", hashlib.sha256()

    def begin(self, name: str) -> None:
        """Go on with another tensor."""
        entry = self._checkpoint.entry(name)
        self._name, self._state = name, digest_start(entry.dtype, entry.shape)

    def read(self, begin: int, end: int) -> Tensor:
        """Return the next numbers of the tensor."""
        piece = self._checkpoint.span(self._name, begin, end)
        self._state.update(tensor_bytes(piece))
        return piece

    def end(self) -> None:
        """Note the digest of the tensor, all of which was read."""
        self._digests[self._name] = self._state.hexdigest()

    def require_as_examined(self) -> None:
        """Raise `UserError` where what was read is not what was examined."""
        if digest_of_tensors(self._digests) != self._one.digest:
            raise UserError(
                f"what '{self._one.owner}' delivered ({self._one.file}) was changed since it was examined; remove it and let the "
                "owner deliver again"
            )


def _mean_difference(sent: Tensor, sources: Sequence[_Source], begin: int, end: int) -> Tensor:
    """Return sum_i w_i (theta - theta_i) of a piece of one tensor."""
    import torch

    start = _wide(sent)
    total = torch.zeros_like(start)
    for source in sources:
        total.add_(start - _wide(source.read(begin, end)), alpha=source.share)
    return total


def spans_of(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, int]]:
    """Yield where the pieces of a tensor begin and end, in numbers."""
    count = math.prod(checkpoint.entry(name).shape)
    for begin in range(0, count, PIECE):
        yield begin, min(begin + PIECE, count)


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


def _kept(state: Checkpoint | None, name: str, begin: int, end: int) -> Tensor | None:
    return state.span(name, begin, end) if state is not None and name in state else None


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the numbers that are averaged: float64 stays, all else becomes float32."""
    import torch

    return tensor if tensor.dtype == torch.float64 else tensor.float()
