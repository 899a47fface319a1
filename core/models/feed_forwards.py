"""A model's feed-forward networks (FFNs) and the moments of their inputs.

An FFN's input is also the input of the router that replaces it in a mixture. Shapes: L = layers, d = model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..text.token_store import TokenBlocks, spread
from .architectures import architecture_of

_READ_BY_THEIR_BLOCKS = ("rwkv",)
"""Families whose blocks read the weights of their FFNs."""


@dataclass(frozen=True)
class FeedForward:
    """The FFN of one layer, with the parent module and attribute through which it can be replaced."""

    name: str
    """Qualified name in the model, such as `model.layers.3.mlp`."""
    parent: nn.Module
    attribute: str

    @property
    def module(self) -> nn.Module:
        return self.parent.get_submodule(self.attribute)


def feed_forwards(model: PreTrainedModel) -> list[FeedForward]:
    """Return a model's FFNs, first layer first; raises `UserError` if its family's FFN modules do not exist."""
    family = architecture_of(model.config.model_type, (name for name, _ in model.named_parameters()))
    require_replaceable(family.name)
    modules = dict(model.named_modules())
    patterns = [pattern.removesuffix(".*") for pattern in family.feed_forward]
    networks = []
    for name in modules:
        parent, _, attribute = name.rpartition(".")
        if any(fnmatchcase(name, pattern) and attribute == pattern.rpartition(".")[2] for pattern in patterns):
            networks.append(FeedForward(name, modules[parent], attribute))
    if not networks:
        raise UserError(
            f"the model has no module {', '.join(patterns)}, the feed-forward networks of family '{family.name}'"
        )
    parents = [network.parent for network in networks]
    if any(isinstance(network.module, nn.Linear) for network in networks) or len(set(parents)) < len(parents):
        raise UserError(
            f"the feed-forward network of a layer is not one module in family '{family.name}', but "
            f"{', '.join(network.name for network in networks if network.parent is parents[0])}"
        )
    return networks


def require_replaceable(model_type: str) -> None:
    """Raise `UserError` for a family whose blocks do more with their FFNs than call them."""
    if model_type in _READ_BY_THEIR_BLOCKS:
        raise UserError(
            f"the feed-forward networks of '{model_type}' cannot be replaced: its blocks read their weights"
        )


def require_plain(network: nn.Module) -> None:
    """Raise `UserError` for an FFN that cannot be an expert: one of several inputs, or itself a mixture of experts."""
    required = [
        parameter.name
        for parameter in signature(network.forward).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]
    if len(required) != 1:
        raise UserError(
            f"the feed-forward network ({type(network).__name__}) takes {', '.join(required)}, and experts get hidden "
            "states only: models of this family cannot be merged into a mixture"
        )
    if any(name.rpartition(".")[2] in ("experts", "router") for name, _ in network.named_modules()):
        raise UserError(
            f"the feed-forward network ({type(network).__name__}) is itself a mixture of experts, and cannot be an expert "
            "of another one; merge models of this family to an average or an ensemble"
        )


@dataclass(frozen=True)
class InputMoments:
    """First and second moments of the FFN inputs, in float64."""

    tokens: int
    """Number of tokens averaged over."""
    mean: Tensor
    """(L, d)."""
    second: Tensor
    """E[x x^T] (L, d, d), or its diagonal (L, d)."""


def observe_inputs(
    model: PreTrainedModel, blocks: Iterable[NDArray[Any]], observe: Callable[[int, Tensor], None]
) -> int:
    """Call `observe(layer, input)` with every FFN input (1, tokens, d) of token arrays; return the number of tokens."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: observe(layer, inputs[0].detach())

    tokens = 0
    with ExitStack() as hooks, torch.inference_mode():
        for layer, network in enumerate(feed_forwards(model)):
            hooks.enter_context(network.module.register_forward_pre_hook(hook(layer)))
        for block in blocks:
            model(input_ids=torch.from_numpy(block[None]).to(model.device), use_cache=False)
            tokens += len(block)
    return tokens


def input_moments(model: PreTrainedModel, blocks: Iterable[NDArray[Any]], *, full: bool = False) -> InputMoments:
    """Return the moments of FFN inputs, with `full` second-moment matrices; raises `UserError` if there is no text."""
    sums: dict[int, Tensor] = {}
    squares: dict[int, Tensor] = {}

    def gather(layer: int, inputs: Tensor) -> None:
        x = inputs.reshape(-1, inputs.shape[-1]).double()
        square = x.T @ x if full else (x**2).sum(dim=0)
        sums[layer] = sums[layer] + x.sum(dim=0) if layer in sums else x.sum(dim=0)
        squares[layer] = squares[layer] + square if layer in squares else square

    tokens = observe_inputs(model, blocks, gather)
    if not tokens:
        raise UserError("no text to measure; add text or lower training.sequence_length")
    mean, second = (
        torch.stack([total for _, total in sorted(totals.items())]).cpu() / tokens for totals in (sums, squares)
    )
    return InputMoments(tokens, mean, second)


def spread_blocks(blocks: TokenBlocks, count: int) -> list[NDArray[Any]]:
    """Return the inputs of up to `count` evenly spaced full blocks."""
    return [block[:-1] for block in spread(blocks, count)] if len(blocks) else []
