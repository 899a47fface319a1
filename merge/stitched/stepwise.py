"""A decoder run a few layers at a time, by its own code: whatever its family hands to its layers is handed on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...core.errors import UserError


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return a causal model's layers, first one first; raises `UserError` for a family that has no such list."""
    count = model.config.num_hidden_layers
    for module in model.base_model.children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(
        f"{type(model).__name__} has no list of {count} decoder layers; models of such a family cannot be stitched"
    )


def first_of(output: Any) -> Tensor:
    """Return a layer's hidden states, which some families give with more."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


class Stepwise:
    """One forward pass of a model, as far as it has come."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._layers = model, decoder_layers(model)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._done = 0
        self.states: Tensor

    def begin(self, **inputs: Any) -> None:
        """Embed tokens and find out what each layer is called with; no layer runs.

        The model's own code does that: its layers only take notes meanwhile.
        """

        def note(*args: Any, **kwargs: Any) -> Tensor:
            states: Tensor = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            if not self._calls:
                self.states = states
            self._calls.append((args[1:], kwargs))
            return states

        for layer in self._layers:
            layer.forward = note
        try:
            self._model.base_model(**inputs)
        finally:
            for layer in self._layers:
                del layer.forward

    def advance(self, until: int) -> Tensor:
        """Run layers up to number `until`, not included, and return the states after them, (B, T, width)."""
        for number in range(self._done, until):
            args, kwargs = self._calls[number]
            self.states = first_of(self._layers[number](self.states, *args, **kwargs))
        self._done = until
        return self.states
