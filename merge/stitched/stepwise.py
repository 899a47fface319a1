"""Run a decoder a few layers at a time, with the layer arguments that its own forward pass computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...core.errors import UserError


@dataclass(frozen=True)
class OutputForm:
    """Form of a decoder layer's output."""

    container: type | None = None
    """`tuple` or `list`; None: the hidden states themselves."""
    num_others: int = 0
    """Number of values after the hidden states, such as attention weights."""

    @classmethod
    def of(cls, output: Any) -> OutputForm:
        return cls(type(output), len(output) - 1) if isinstance(output, tuple | list) else cls()

    def fill(self, states: Tensor) -> Any:
        """Return an output of this form with hidden states, and None in place of the other values."""
        return states if self.container is None else self.container([states, *[None] * self.num_others])


def decoder_of(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.ModuleList]:
    """Return the decoder of a causal model and its layers; raises `UserError` if the family has no list of layers."""
    count = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for child in module.children():
                if isinstance(child, nn.ModuleList) and len(child) == count:
                    return module, child
    raise UserError(
        f"{type(model).__name__} has no list of {count} decoder layers; models of this family cannot be stitched"
    )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a causal model; raises `UserError` if the family has no list of layers."""
    return decoder_of(model)[1]


def hidden_states_of(output: Any) -> Tensor:
    """Return the hidden states of a layer output, which is a tensor, or a tuple or list that starts with them."""
    states: Tensor = output[0] if isinstance(output, tuple | list) else output
    return states


class Stepwise:
    """A forward pass of a model that can be advanced layer by layer.

    `forms` are those of the layers' outputs; not given: tensors.
    """

    def __init__(self, model: PreTrainedModel, forms: Sequence[OutputForm] | None = None) -> None:
        self._decoder, self._layers = decoder_of(model)
        self._forms = forms if forms is not None else [OutputForm()] * len(self._layers)
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        """Arguments of each layer except the hidden states."""
        self._next_layer = 0
        self.states: Tensor

    def begin(self, **inputs: Any) -> None:
        """Embed tokens and record each layer's arguments, by the model's own forward pass over recording layers."""

        def record(*args: Any, **kwargs: Any) -> Any:
            args, kwargs, states = split_call(args, kwargs)
            if not self.calls:
                self.states = states
            self.calls.append((args, kwargs))
            return self._forms[len(self.calls) - 1].fill(states)

        for layer in self._layers:
            layer.forward = record
        try:
            self._decoder(**inputs)
        finally:
            for layer in self._layers:
                del layer.forward

    def advance(self, until: int) -> Tensor:
        """Run the layers before layer `until` and return the hidden states after them, (B, T, width)."""
        for number in range(self._next_layer, until):
            args, kwargs = self.calls[number]
            self.states = hidden_states_of(self._layers[number](self.states, *args, **kwargs))
        self._next_layer = until
        return self.states


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Return the arguments of a layer without the hidden states, and the hidden states."""
    if "hidden_states" in kwargs:
        return args, {name: value for name, value in kwargs.items() if name != "hidden_states"}, kwargs["hidden_states"]
    return args[1:], kwargs, args[0]
