"""Run a decoder a few layers at a time, with the layer arguments that its own forward pass computes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...core.errors import UserError


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a causal model; raises `UserError` if the family has no list of layers."""
    count = model.config.num_hidden_layers
    for module in model.base_model.children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(
        f"{type(model).__name__} has no list of {count} decoder layers; models of this family cannot be stitched"
    )


def hidden_states_of(output: Any) -> Tensor:
    """Return the hidden states of a layer output, which is a tensor or a tuple that starts with them."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


class Stepwise:
    """A forward pass of a model that can be advanced layer by layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._layers = model, decoder_layers(model)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._next_layer = 0
        self.states: Tensor

    def begin(self, **inputs: Any) -> None:
        """Embed tokens and record each layer's arguments, by the model's own forward pass over recording layers."""

        def record(*args: Any, **kwargs: Any) -> Tensor:
            states: Tensor = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
            if not self._calls:
                self.states = states
            self._calls.append((args[1:], kwargs))
            return states

        for layer in self._layers:
            layer.forward = record
        try:
            self._model.base_model(**inputs)
        finally:
            for layer in self._layers:
                del layer.forward

    def advance(self, until: int) -> Tensor:
        """Run the layers before layer `until` and return the hidden states after them, (B, T, width)."""
        for number in range(self._next_layer, until):
            args, kwargs = self._calls[number]
            self.states = hidden_states_of(self._layers[number](self.states, *args, **kwargs))
        self._next_layer = until
        return self.states
