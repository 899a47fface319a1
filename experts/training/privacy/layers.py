"""Checks that a model's layers support per-example gradients.

Opacus's per-example gradients are tested on random tokens before any text is read: for each example of a batch, they
must equal the gradient of that example alone. This detects layers, of any class, that mix examples, whose input does
not have one row per example, or whose parameters are used elsewhere.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ....core.errors import UserError, first_line

if TYPE_CHECKING:
    from opacus.grad_sample import GradSampleHooks

EXAMPLES = 3
PROBE_TOKENS = 16
RELATIVE_ERROR = 1e-2
"""Tolerance for float32 gradients summed in different orders."""

OTHER_PARAMETERS = "train other parameters (--trains)"
ONE_BY_ONE = "train one block at a time (training.batch_size: 1 and a larger accumulation), which works for any layer"

Loss = Callable[[Tensor], Tensor]


def refuse_stateful(module: nn.Module) -> None:
    """Raise `UserError` for a layer with statistics of the text, which receive no noise."""
    for name, layer in module.named_modules():
        reason = None
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            reason = "batch normalisation mixes examples and keeps statistics of the text"
        elif _has_trainable_parameters(layer) and list(layer.buffers(recurse=False)):
            reason = "it has buffers, which can store the text and receive no noise"
        if reason is not None:
            raise _refusal(name, layer, reason, OTHER_PARAMETERS)


def attach_hooks(module: nn.Module) -> GradSampleHooks:
    """Attach Opacus's hooks, which store per-example gradients in `parameter.grad_sample`, (B, *shape)."""
    from opacus.grad_sample import GradSampleHooks

    try:
        with quiet_hooks():
            return GradSampleHooks(module, batch_first=True, loss_reduction="mean", strict=True)
    except NotImplementedError as error:
        raise UserError(f"these parameters cannot train with differential privacy: {first_line(error)}") from None


def require_separable(
    module: nn.Module,
    hooks: GradSampleHooks,
    parameters: Mapping[str, nn.Parameter],
    loss: Loss,
    vocabulary: int,
    block_size: int,
) -> None:
    """Raise `UserError` for a layer whose per-example gradients in a batch differ from those of each example alone.

    `loss` maps tokens (B, S + 1) to a mean over examples, shape (). No gradients are left behind.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (EXAMPLES, min(block_size, PROBE_TOKENS) + 1)
    tokens_BT1 = torch.randint(vocabulary, shape, generator=generator).to(next(iter(parameters.values())).device)
    with _without_dropout(module):
        hooks.disable_hooks()
        _require_independent_examples(module, loss, tokens_BT1)
        hooks.enable_hooks()
        batch_gradients = _batch_gradients(module, parameters, loss, tokens_BT1)
        scale = max(float(gradient.abs().max()) for gradient in batch_gradients.values() if gradient is not None) or 1.0
        for row in range(EXAMPLES):
            with quiet_hooks():
                torch.autograd.backward(loss(tokens_BT1[row : row + 1]))
            for name, parameter in parameters.items():
                expected, _ = _take_gradients(parameter)
                if expected is not None:
                    _require_equal(name, batch_gradients[name], expected, row, scale)


def _require_independent_examples(module: nn.Module, loss: Loss, tokens_BT1: Tensor) -> None:
    """Raise `UserError` for the first layer whose output for one example depends on the other examples."""
    batch_outputs = _layer_outputs(module, loss, tokens_BT1)
    for row in range(len(tokens_BT1)):
        single_outputs = _layer_outputs(module, loss, tokens_BT1[row : row + 1])
        for (name, layer, batch), (_, _, single) in zip(batch_outputs, single_outputs, strict=False):
            if len(batch) != len(tokens_BT1) or len(single) != 1 or batch[0].shape != single[0].shape:
                continue  # no example dimension, such as position embeddings
            if not torch.allclose(batch[row].float(), single[0].float(), rtol=RELATIVE_ERROR, atol=1e-4):
                raise _refusal(name, layer, "its output for one example depends on the other examples in the batch")


def _layer_outputs(module: nn.Module, loss: Loss, tokens_BT1: Tensor) -> list[tuple[str, nn.Module, Tensor]]:
    """Return (name, layer, output) of each leaf layer, in the order of their calls."""
    outputs: list[tuple[str, nn.Module, Tensor]] = []

    def record(name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim():
            outputs.append((name, layer, output.detach()))

    with ExitStack() as hooks:
        for name, layer in module.named_modules():
            if not list(layer.children()):
                hooks.enter_context(layer.register_forward_hook(partial(record, name)))
        loss(tokens_BT1)
    return outputs


def _batch_gradients(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], loss: Loss, tokens_BT1: Tensor
) -> dict[str, Tensor | None]:
    """Return the per-example gradients of a batch by Opacus's hooks; raises `UserError` for an unsupported layer."""
    reached: tuple[str, nn.Module] = ("", nn.Identity())  # the last layer that gradients reached

    def record(name: str, layer: nn.Module, gradients: Any) -> None:
        nonlocal reached
        reached = (name, layer)

    try:
        with quiet_hooks(), ExitStack() as hooks:
            for name, layer in module.named_modules():
                if _has_trainable_parameters(layer):
                    hooks.enter_context(layer.register_forward_pre_hook(partial(_check_input, name), with_kwargs=True))
                    hooks.enter_context(layer.register_full_backward_pre_hook(partial(record, name)))
            torch.autograd.backward(loss(tokens_BT1))
    except UserError:
        raise
    except Exception as error:  # raised by vmap or by the layer's own code
        reason = f"Opacus cannot compute per-example gradients ({textwrap.shorten(first_line(error), 100)})"
        raise _refusal(*reached, reason) from None
    return {name: _take_gradients(parameter)[1] for name, parameter in parameters.items()}


def _check_input(name: str, layer: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Raise `UserError` unless a layer has one input tensor with a row per example."""
    rows = [len(value) for value in inputs if isinstance(value, Tensor) and value.dim()]
    if len(inputs) != 1 or len(rows) != 1 or any(isinstance(value, Tensor) for value in keywords.values()):
        raise _refusal(name, layer, "it has more than one input tensor, and Opacus uses only the first")
    if rows != [EXAMPLES]:
        reason = f"its input has {rows[0]} rows for a batch of {EXAMPLES}, so its gradient cannot be split by example"
        raise _refusal(name, layer, reason)


def _require_equal(name: str, batch: Tensor | None, single: Tensor, row: int, scale: float) -> None:
    """Raise `UserError` if row `row` of a batch's per-example gradient differs from the gradient of that example."""
    expected = single.double()
    actual = torch.zeros_like(expected) if batch is None else batch[row].double()
    tolerance = RELATIVE_ERROR * float(expected.abs().max()) + 1e-4 * scale
    if not float((actual - expected).abs().max()) <= tolerance:
        raise UserError(
            f"parameter '{name}' cannot train with differential privacy: part of its gradient does not pass through "
            f"the layer that owns it; {OTHER_PARAMETERS}, or {ONE_BY_ONE}"
        )


def _take_gradients(parameter: nn.Parameter) -> tuple[Tensor | None, Tensor | None]:
    """Return a parameter's ordinary and per-example gradient, and clear both."""
    gradient, parameter.grad = parameter.grad, None
    return gradient, take_grad_sample(parameter)


def take_grad_sample(parameter: nn.Parameter) -> Tensor | None:
    """Return a parameter's per-example gradient, (B, *shape), and clear it; None if there is no gradient."""
    gradient: Tensor | list[Tensor] | None = parameter.grad_sample  # type: ignore[attr-defined]  # added by Opacus
    parameter.grad_sample = None  # type: ignore[attr-defined]  # as above
    if isinstance(gradient, list):  # one entry for each call of the layer in the forward pass
        return torch.stack(gradient).sum(dim=0)
    return gradient


@contextmanager
def quiet_hooks() -> Iterator[None]:
    """Suppress torch's warning that the input of the first trainable layer needs no gradient, which is expected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """Disable dropout: layers without trainable parameters of their own are put into evaluation mode."""
    layers = [layer for layer in module.modules() if layer.training and not _has_trainable_parameters(layer)]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


def _has_trainable_parameters(layer: nn.Module) -> bool:
    """Return whether a layer, without its children, has trainable parameters."""
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def _refusal(
    name: str, layer: nn.Module, reason: str, remedy: str = f"{OTHER_PARAMETERS}, or {ONE_BY_ONE}"
) -> UserError:
    kind = type(layer).__name__
    return UserError(f"layer '{name}' ({kind}) cannot train with differential privacy: {reason}; {remedy}")
