"""Run a decoder a few layers at a time, with the layer arguments that its own forward pass computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ...core.artefacts.model_config import with_floats
from ...core.errors import UserError, first_line


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


def require_steps(config: Mapping[str, Any]) -> None:
    """Raise `UserError` unless a model of a `config.json` can run layer by layer; computes shapes, no numbers."""
    with torch.device("meta"), torch.inference_mode():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**with_floats(config))).eval()
        stepwise = Stepwise(model)
        try:
            stepwise.begin(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
            stepwise.advance(len(decoder_layers(model)))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if "meta" in str(error):  # the model looks at numbers, which are not there
                return
            raise UserError(
                f"the layers of {type(model).__name__} cannot run one at a time ({first_line(error)}); models of this family "
                "cannot be stitched"
            ) from None
