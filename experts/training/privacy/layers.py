"""Checks that a model's layers support per-example gradients.

Opacus's per-example gradients are tested on random tokens before any text is read: for each example of a batch, they
must equal the gradient of that example alone. This detects layers, of any class, that mix examples, whose input does
not have one row per example, or whose parameters are used elsewhere.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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

ANOTHER_PART = "train other parameters (--trains)"
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
            raise UserError(_layer_message(name, layer, f"{reason}; {ANOTHER_PART}"))


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
            single_gradients = _single_gradients(parameters, loss, tokens_BT1[row : row + 1])
            for name, expected in single_gradients.items():
                _compare(name, batch_gradients[name], expected, row, scale)


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

    def record(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim():
                outputs.append((name, layer, output.detach()))

        return hook

    handles = [
        layer.register_forward_hook(record(name))
        for name, layer in module.named_modules()
        if not list(layer.children())
    ]
    try:
        loss(tokens_BT1)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _batch_gradients(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], loss: Loss, tokens_BT1: Tensor
) -> dict[str, Tensor | None]:
    """Return the per-example gradients of a batch by Opacus's hooks; raises `UserError` for an unsupported layer."""
    probe = _LayerProbe()
    handles = probe.attach(module)
    try:
        with quiet_hooks():
            torch.autograd.backward(loss(tokens_BT1))
    except UserError:
        raise
    except Exception as error:  # raised by vmap or by the layer's own code
        name, layer = probe.last
        raise _refusal(
            name,
            layer,
            f"Opacus cannot compute per-example gradients ({textwrap.shorten(first_line(error), 100)})",
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    gradients = {name: take_grad_sample(parameter) for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return gradients


class _LayerProbe:
    """Hooks on every trainable layer that check its input and record the last layer that gradients reached."""

    def __init__(self) -> None:
        self.last: tuple[str, nn.Module] = ("", nn.Identity())

    def attach(self, module: nn.Module) -> list[Any]:
        handles = []
        for name, layer in module.named_modules():
            if _has_trainable_parameters(layer):
                handles.append(layer.register_forward_pre_hook(self._check_input(name), with_kwargs=True))
                handles.append(layer.register_full_backward_pre_hook(self._record(name)))
        return handles

    def _check_input(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            rows = [len(value) for value in inputs if isinstance(value, Tensor) and value.dim()]
            has_tensor_keyword = any(isinstance(value, Tensor) for value in keywords.values())
            if len(inputs) != 1 or len(rows) != 1 or has_tensor_keyword:
                raise _refusal(name, layer, "it has more than one input tensor, and Opacus uses only the first")
            if rows != [EXAMPLES]:
                raise _refusal(
                    name,
                    layer,
                    f"its input has {rows[0]} rows for a batch of {EXAMPLES}, so its gradient cannot be split by "
                    "example",
                )

        return hook

    def _record(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, gradients: Any) -> None:
            self.last = (name, layer)

        return hook


def _single_gradients(
    parameters: Mapping[str, nn.Parameter], loss: Loss, tokens_1T1: Tensor
) -> dict[str, Tensor | None]:
    """Return the ordinary gradients of one example."""
    with quiet_hooks():
        torch.autograd.backward(loss(tokens_1T1))
    gradients = {}
    for name, parameter in parameters.items():
        gradients[name] = parameter.grad
        parameter.grad = None
        take_grad_sample(parameter)
    return gradients


def _compare(name: str, batch: Tensor | None, single: Tensor | None, row: int, scale: float) -> None:
    """Raise `UserError` if row `row` of a batch's per-example gradient differs from the gradient of that example."""
    if single is None:
        return
    expected = single.double()
    actual = torch.zeros_like(expected) if batch is None else batch[row].double()
    tolerance = RELATIVE_ERROR * float(expected.abs().max()) + 1e-4 * scale
    if not float((actual - expected).abs().max()) <= tolerance:
        raise UserError(
            f"parameter '{name}' cannot train with differential privacy: part of its gradient does not pass through "
            f"the layer that owns it; {ANOTHER_PART}, or {ONE_BY_ONE}"
        )


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


def _refusal(name: str, layer: nn.Module, reason: str) -> UserError:
    return UserError(_layer_message(name, layer, f"{reason}; {ANOTHER_PART}, or {ONE_BY_ONE}"))


def _layer_message(name: str, layer: nn.Module, reason: str) -> str:
    return f"layer '{name}' ({type(layer).__name__}) cannot train with differential privacy: {reason}"
