"""Federated averaging: checks of owners' weights, and an outer optimiser step of SGD with Nesterov momentum.

DiLoCo (arXiv:2311.08105, algorithm 1) and FedAvg (arXiv:1602.05629, algorithm 1). theta are the shared weights of a round,
theta_i the weights of owner i after it: Delta = sum_i w_i (theta - theta_i), which the outer optimiser uses as the gradient.
Memory holds one span of one tensor at a time, whatever the number of owners and the size of the tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ....core.artefacts.digests import digest_of_tensors
from ....core.artefacts.numeric import FLOATING
from ....core.artefacts.safetensors_io import Checkpoint, digest_start, tensor_bytes
from ....core.errors import UserError, first_line, unknown_name
from ..judging.acceptance import Refusal, RefusalCode
from ..protocol.tensor_stream import TensorStream

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 22
"""Elements of a tensor that are in memory at a time."""
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


def outer_recipe(name: str) -> OuterRecipe:
    """Return a synchronous recipe by name; raises `UserError` for an unknown name."""
    if name not in OUTER_RECIPES:
        raise unknown_name("synchronous recipe", name, OUTER_RECIPES)
    return OUTER_RECIPES[name]


@dataclass(frozen=True)
class AveragingRules:
    """Bounds on an owner's weights."""

    max_change: float = 1.0
    """Largest change in a round: norm of the difference over all tensors, divided by the norm of the shared weights."""
    max_weight: float = 10.0
    """Cap on an owner's token count, as a multiple of the round's median, since token counts are declared by owners."""


@dataclass(frozen=True)
class ExaminedWeights:
    """Digest and change of weights that passed all checks."""

    digest: str
    change: float
    """Relative change, as in `AveragingRules.max_change`."""


@dataclass(frozen=True)
class Contribution:
    """One owner's weights and its share in the average."""

    owner: str
    file: Path
    digest: str
    """Digest of the tensors when they were examined."""
    share: float
    """Weight in the average; the shares of a round sum to 1."""


def examine_weights(file: Path, shared: Checkpoint, rules: AveragingRules) -> ExaminedWeights | Refusal:
    """Check an owner's weights against the shared weights: names, shapes, dtypes, finite values and relative change."""
    import torch

    try:
        weights = Checkpoint([file])
        refusal = _refusal_of_header(weights, shared)
        if refusal is not None:
            return refusal
        digests: dict[str, str] = {}
        squared_change = squared_norm = 0.0
        for name in shared:
            dtype = shared.entry(name).dtype
            digest = digest_start(dtype, shared.entry(name).shape)
            for begin, end in tensor_spans(shared, name):
                piece, shared_piece = weights.span(name, begin, end), shared.span(name, begin, end)
                digest.update(tensor_bytes(piece))
                if dtype not in FLOATING:
                    if not torch.equal(piece, shared_piece):
                        return Refusal(RefusalCode.FROZEN, f"'{name}' is not a floating-point tensor")
                    continue
                before, after = _upcast(shared_piece), _upcast(piece)
                if not bool(torch.isfinite(after).all()):
                    return Refusal(RefusalCode.NOT_FINITE, f"'{name}'")
                squared_change += float((after - before).square().sum(dtype=torch.float64))
                squared_norm += float(before.square().sum(dtype=torch.float64))
            digests[name] = digest.hexdigest()
    except UserError as error:
        return Refusal(RefusalCode.FILES, first_line(error).replace(str(file), "the file"))
    change = math.sqrt(squared_change / (squared_norm or 1.0))
    if not change <= rules.max_change:
        return Refusal(
            RefusalCode.NORM,
            f"by {change:.3g} times the norm of the shared weights; {rules.max_change:g} is allowed",
        )
    return ExaminedWeights(digest_of_tensors(digests), change)


def _refusal_of_header(weights: Checkpoint, shared: Checkpoint) -> Refusal | None:
    """Check names, shapes and dtypes without reading tensors."""
    for name in [*shared, *weights]:
        if name not in weights or name not in shared:
            holder = "the owner's weights lack" if name not in weights else "the shared model has no"
            return Refusal(RefusalCode.SHAPES, f"{holder} '{name:.100}'")
        entry, shared_entry = weights.entry(name), shared.entry(name)
        if entry.shape != shared_entry.shape:
            return Refusal(
                RefusalCode.SHAPES,
                f"'{name}' is {list(entry.shape)}, the shared tensor {list(shared_entry.shape)}",
            )
        if entry.dtype != shared_entry.dtype:
            return Refusal(RefusalCode.DTYPES, f"'{name}' is {entry.dtype}, the shared tensor {shared_entry.dtype}")
    return None


def owner_shares(weights: Mapping[str, float], recipe: OuterRecipe, rules: AveragingRules) -> dict[str, float]:
    """Return each owner's share in the average, sorted by name and summing to 1.

    Token counts are capped at `rules.max_weight` times their median.
    """
    if not recipe.by_tokens:
        return {owner: 1 / len(weights) for owner in sorted(weights)}
    cap = rules.max_weight * median(weights.values())
    capped = {owner: min(weights[owner], cap) for owner in sorted(weights)}
    total = math.fsum(capped.values())
    return {owner: weight / total for owner, weight in capped.items()}


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
    readers = [_WeightsReader(contribution) for contribution in sorted(contributions, key=lambda item: item.owner)]
    state_shapes = _state_shapes(shared, recipe)
    shapes = {name: (shared.entry(name).dtype, shared.entry(name).shape) for name in shared}
    with TensorStream(weights_file, shapes) as weights, TensorStream(state_file, state_shapes) as outer:
        for name in shared:
            for reader in readers:
                reader.begin(name)
            _average_tensor(name, shared, readers, state, recipe, weights, outer)
            for reader in readers:
                reader.end()
        for reader in readers:
            reader.require_unchanged()
    return digest_of_tensors(weights.digests)


def _average_tensor(
    name: str,
    shared: Checkpoint,
    readers: Sequence[_WeightsReader],
    state: Checkpoint | None,
    recipe: OuterRecipe,
    weights: TensorStream,
    outer: TensorStream,
) -> None:
    """Average one tensor span by span; write the new weights and the outer optimiser's state."""
    for begin, end in tensor_spans(shared, name):
        piece = shared.span(name, begin, end)
        if shared.entry(name).dtype not in FLOATING:
            weights.add(name, piece)
            for reader in readers:
                reader.read(begin, end)
            continue
        master = _state_span(state, MASTER + name, begin, end)
        after, buffer = outer_step(
            _upcast(piece) if master is None else master,
            _mean_difference(piece, readers, begin, end),
            _state_span(state, MOMENTUM + name, begin, end),
            recipe,
        )
        weights.add(name, after.to(piece.dtype))
        for prefix, values in ((MASTER, after), (MOMENTUM, buffer)):
            if prefix + name in outer:
                outer.add(prefix + name, values)


class _WeightsReader:
    """Reads one owner's weights span by span and computes their digest."""

    def __init__(self, contribution: Contribution) -> None:
        self.share = contribution.share
        self._contribution, self._checkpoint = contribution, Checkpoint([contribution.file])
        self._digests: dict[str, str] = {}
        self._name, self._digest = "", hashlib.sha256()

    def begin(self, name: str) -> None:
        """Start reading a tensor."""
        entry = self._checkpoint.entry(name)
        self._name, self._digest = name, digest_start(entry.dtype, entry.shape)

    def read(self, begin: int, end: int) -> Tensor:
        """Return the tensor's elements [begin, end); spans must be read in order."""
        piece = self._checkpoint.span(self._name, begin, end)
        self._digest.update(tensor_bytes(piece))
        return piece

    def end(self) -> None:
        """Record the digest of the tensor after its last span."""
        self._digests[self._name] = self._digest.hexdigest()

    def require_unchanged(self) -> None:
        """Raise `UserError` if the weights differ from those examined."""
        if digest_of_tensors(self._digests) != self._contribution.digest:
            raise UserError(
                f"the weights of '{self._contribution.owner}' ({self._contribution.file}) have changed since they were examined; "
                "remove them and let the owner deliver again"
            )


def _mean_difference(shared: Tensor, readers: Sequence[_WeightsReader], begin: int, end: int) -> Tensor:
    """Return sum_i w_i (theta - theta_i) for one span of a tensor."""
    import torch

    before = _upcast(shared)
    total = torch.zeros_like(before)
    for reader in readers:
        total.add_(before - _upcast(reader.read(begin, end)), alpha=reader.share)
    return total


def tensor_spans(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, int]]:
    """Yield element ranges [begin, end) of at most `PIECE` elements that cover a tensor."""
    count = math.prod(checkpoint.entry(name).shape)
    for begin in range(0, count, PIECE):
        yield begin, min(begin + PIECE, count)


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


def _state_span(state: Checkpoint | None, name: str, begin: int, end: int) -> Tensor | None:
    return state.span(name, begin, end) if state is not None and name in state else None


def _upcast(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype used for averaging: float64 stays, other dtypes become float32."""
    import torch

    return tensor if tensor.dtype == torch.float64 else tensor.float()
