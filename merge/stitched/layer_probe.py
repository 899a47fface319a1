"""Checks without weights whether a decoder can run layer by layer, and finds the forms of its layers' outputs.

A pass layer by layer equals the model's own only if layers are called once each, in order, and hand nothing but hidden
states to each other. Shapes: B = batch, T = tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ...core.artefacts.model_config import with_floats
from ...core.errors import UserError, first_line
from .stepwise import OutputForm, Stepwise, decoder_of, hidden_states_of, split_call


def require_steps(config: Mapping[str, Any]) -> PretrainedConfig:
    """Return the settings of a `config.json` with transformers' names; raises `UserError` unless it can be stitched."""
    settings: PretrainedConfig = AutoConfig.for_model(**with_floats(config))
    probe_layers(settings)
    return settings


def output_forms(models: Iterable[PreTrainedModel]) -> list[tuple[OutputForm, ...]]:
    """Return the forms of each model's layer outputs; raises `UserError` for one that cannot run layer by layer.

    Members of a stitched model mostly have the same configuration, which is probed once.
    """
    forms: dict[str, tuple[OutputForm, ...]] = {}
    keys = []
    for model in models:
        keys.append(model.config.to_json_string())
        if keys[-1] not in forms:
            forms[keys[-1]] = probe_layers(model.config)
    return [forms[key] for key in keys]


def probe_layers(config: PretrainedConfig) -> tuple[OutputForm, ...]:
    """Return the forms of the layers' outputs, found with tensors that have shapes and no numbers.

    Raises `UserError` for a model that cannot run layer by layer.
    """
    with torch.device("meta"):  # no initialisation, which some families compute
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    _, layers = decoder_of(model)
    if type(model)._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")  # the others look at numbers
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.inference_mode():
        _fill_with_fakes(model, mode)
        tokens_BT = torch.zeros(1, 4, dtype=torch.long)
        try:
            calls = _observe(model, tokens_BT)
            _require_plain_calls(model, calls)
            forms = tuple(OutputForm.of(call.output) for call in calls)
            _require_same_arguments(model, Stepwise(model, forms), calls, tokens_BT)
        except (DataDependentOutputException, DynamicOutputShapeException):  # the model looks at numbers
            return (OutputForm(),) * len(layers)
    return forms


@dataclass(frozen=True)
class _Call:
    layer: nn.Module
    states: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def _fill_with_fakes(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace tensors without memory by fakes that are computed on the CPU."""
    for module in model.modules():
        groups: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in groups:
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake


def _observe(model: PreTrainedModel, tokens_BT: Tensor) -> list[_Call]:
    """Return the calls of the layers in the model's own forward pass; raises `UserError` for states of another size."""
    decoder, layers = decoder_of(model)
    calls: list[_Call] = []
    width = model.config.hidden_size

    def check_size(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        size = split_call(args, kwargs)[2].shape[-1]
        if size != width:
            raise _refusal(model, f"hands {size} channels from layer to layer, and its hidden size is {width}")

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        others, named, states = split_call(args, kwargs)
        calls.append(_Call(layer, states, others, named, output))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(check_size, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        decoder(input_ids=tokens_BT, use_cache=False)
    return calls


def _require_plain_calls(model: PreTrainedModel, calls: Sequence[_Call]) -> None:
    _, layers = decoder_of(model)
    if [call.layer for call in calls] != list(layers):
        raise _refusal(model, "does not call its layers once each, in order")
    for before, call in pairwise(calls):
        if call.states is not hidden_states_of(before.output):
            raise _refusal(model, "changes the hidden states between its layers")


def _require_same_arguments(
    model: PreTrainedModel, stepwise: Stepwise, calls: Sequence[_Call], tokens_BT: Tensor
) -> None:
    """Raise `UserError` if layers get other arguments when the layers before them return hidden states only."""
    try:
        stepwise.begin(input_ids=tokens_BT, use_cache=False)
        stepwise.advance(len(calls))  # layers may fill a dictionary that they share
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _refusal(model, f"needs more of its layers than hidden states ({first_line(error)})") from None
    for call, (args, kwargs) in zip(calls, stepwise.calls, strict=True):
        if not _is_alike([call.args, call.kwargs], [args, kwargs]):
            raise _refusal(model, "hands more than hidden states from layer to layer")


def _is_alike(first: Any, second: Any) -> bool:
    """Return whether two arguments have the same structure and shapes."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and first.dtype == second.dtype
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_is_alike(first[key], second[key]) for key in first)
    if isinstance(first, tuple | list) and isinstance(second, tuple | list):
        return len(first) == len(second) and all(map(_is_alike, first, second))
    return type(first) is type(second)


def _refusal(model: PreTrainedModel, reason: str) -> UserError:
    return UserError(f"{type(model).__name__} {reason}; models of this family cannot be stitched")
