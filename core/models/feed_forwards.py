"""A model's feed-forward networks (FFNs) and the moments of their inputs.

An FFN's input is also the input of the router that replaces it in a mixture. Shapes: L = layers, d = model width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..hooks.architectures import architecture_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FeedForward:
    """The FFN of one layer, with the parent module and attribute through which it can be replaced."""

    name: str
    """Qualified name in the model, such as `model.layers.3.mlp`."""
    parent: nn.Module
    attribute: str

    @property
    def module(self) -> nn.Module:
        module: nn.Module = getattr(self.parent, self.attribute)
        return module


def feed_forwards(model: PreTrainedModel) -> list[FeedForward]:
    """Return a model's FFNs, first layer first; raises `UserError` if its family's FFN modules do not exist."""
    family = architecture_of(model.config.model_type)
    modules = dict(model.named_modules())
    patterns = [pattern.removesuffix(".*") for pattern in family.feed_forward]
    networks = []
    for name in modules:
        if any(fnmatchcase(name, pattern) and name.count(".") == pattern.count(".") for pattern in patterns):
            parent, _, attribute = name.rpartition(".")
            networks.append(FeedForward(name, modules[parent], attribute))
    if not networks:
        raise UserError(
            f"the model has no module {', '.join(patterns)}, the feed-forward networks of family '{family.name}'"
        )
    return networks


@dataclass(frozen=True)
class InputMoments:
    """First and second moments of the FFN inputs, in float64."""

    tokens: int
    """Number of tokens averaged over."""
    mean: Tensor
    """(L, d)."""
    second: Tensor
    """E[x x^T] (L, d, d), or its diagonal (L, d)."""


def input_moments(model: PreTrainedModel, blocks: Iterable[NDArray[Any]], *, full: bool = False) -> InputMoments:
    """Return the moments of all FFN inputs over token arrays (tokens,); raises `UserError` if there are none.

    With `full` the second moments are matrices, otherwise their diagonals.
    """
    import torch

    networks = feed_forwards(model)
    sums: list[Any] = [None] * len(networks)
    squares: list[Any] = [None] * len(networks)
    tokens = 0

    def hook(layer: int) -> Any:
        def gather(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
            square = x.T @ x if full else (x**2).sum(dim=0)
            sums[layer] = x.sum(dim=0) if sums[layer] is None else sums[layer] + x.sum(dim=0)
            squares[layer] = square if squares[layer] is None else squares[layer] + square

        return gather

    handles = [network.module.register_forward_pre_hook(hook(layer)) for layer, network in enumerate(networks)]
    try:
        with torch.inference_mode():
            for block in blocks:
                model(input_ids=torch.from_numpy(block[None]).to(model.device), use_cache=False)
                tokens += len(block)
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise UserError("no text to measure; add text or lower training.sequence_length")
    return InputMoments(tokens, torch.stack(sums).cpu() / tokens, torch.stack(squares).cpu() / tokens)


def spread_blocks(blocks: Any, count: int) -> list[NDArray[Any]]:
    """Return up to `count` evenly spaced blocks, since adjacent blocks are from the same document."""
    available = len(blocks)
    num_selected = min(count, available)
    return [blocks.block(index * available // num_selected)[:-1] for index in range(num_selected)]
