"""A model's feed-forwards: where they are, and what they are given on a text.

What a feed-forward is given is what a mixture's router sees in its place. Shapes: L = layers, d = width of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..hooks.manager import installed_plugins

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FeedForward:
    """One layer's feed-forward, and where it can be exchanged for another."""

    name: str
    """Its whole name in the model: `model.layers.3.mlp`."""
    parent: nn.Module
    attribute: str

    @property
    def module(self) -> nn.Module:
        found: nn.Module = getattr(self.parent, self.attribute)
        return found


def feed_forwards(model: PreTrainedModel) -> list[FeedForward]:
    """Return a model's feed-forwards, first layer first; raises `UserError` for a family that is not known."""
    family = installed_plugins().architecture_of(model.config.model_type)
    modules = dict(model.named_modules())
    wanted = [pattern.removesuffix(".*") for pattern in family.feed_forward]
    found = []
    for name in modules:
        if any(fnmatchcase(name, pattern) and name.count(".") == pattern.count(".") for pattern in wanted):
            parent, _, attribute = name.rpartition(".")
            found.append(FeedForward(name, modules[parent], attribute))
    if not found:
        raise UserError(
            f"the model has no module {', '.join(wanted)}, where family '{family.name}' keeps its feed-forwards"
        )
    return found


@dataclass(frozen=True)
class InputMoments:
    """Moments of what the feed-forwards are given, float64."""

    tokens: int
    mean: Tensor
    """(L, d)."""
    second: Tensor
    """E[x x^T] (L, d, d), or its diagonal (L, d)."""


def input_moments(
    model: PreTrainedModel, blocks: Iterable[NDArray[Any]], *, full: bool = False
) -> InputMoments:
    """Return the moments of all feed-forwards' inputs over token arrays (tokens,); raises `UserError` without any.

    With `full` the second moments are matrices, else their diagonals.
    """
    import torch

    parts = feed_forwards(model)
    sums: list[Any] = [None] * len(parts)
    squares: list[Any] = [None] * len(parts)
    tokens = 0

    def hook(layer: int) -> Any:
        def gather(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            square = x.T @ x if full else (x**2).sum(dim=0)
            sums[layer] = x.sum(dim=0) if sums[layer] is None else sums[layer] + x.sum(dim=0)
            squares[layer] = square if squares[layer] is None else squares[layer] + square

        return gather

    handles = [part.module.register_forward_pre_hook(hook(layer)) for layer, part in enumerate(parts)]
    try:
        with torch.inference_mode():
            for block in blocks:
                model(input_ids=torch.from_numpy(block[None]).to(model.device), use_cache=False)
                tokens += len(block)
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise UserError("there is no text to look at; add some, or lower training.sequence_length")
    return InputMoments(tokens, torch.stack(sums).cpu() / tokens, torch.stack(squares).cpu() / tokens)


def spread_blocks(blocks: Any, count: int) -> list[NDArray[Any]]:
    """Return up to `count` blocks, evenly spread over a part, since neighbours are of one document."""
    available = len(blocks)
    taken = min(count, available)
    return [blocks.block(index * available // taken)[:-1] for index in range(taken)]
