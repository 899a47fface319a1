"""Which layers can train privately: those whose gradient can be told apart by example.

What Opacus computes is tried on random tokens before any text is read: the gradients that it finds for each of a few
examples in one batch must be those of the example alone. So a layer in which examples meet, that is not given a row for
each example, or whose parameters something else uses, is refused by name, whatever class it is of.
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
"""Of float32 gradients, against the same in another order of summation."""

ANOTHER_PART = "train another part of the model (--trains)"
ONE_BY_ONE = (
    "one block at a time (training.batch_size: 1 and a larger accumulation), which any layer can take"
)

Loss = Callable[[Tensor], Tensor]


def refuse_stateful(module: nn.Module) -> None:
    """Raise `UserError` naming a layer that takes more from the text than a gradient: statistics, which get no noise."""
    for name, layer in module.named_modules():
        why = None
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            why = "batch normalisation, in which examples meet, keeps statistics of the text"
        elif _trains(layer) and list(layer.buffers(recurse=False)):
            why = "it keeps buffers, which are no gradients and get no noise"
        if why is not None:
            raise UserError(_of_layer(name, layer, f"{why}; {ANOTHER_PART}"))


def attach_hooks(module: nn.Module) -> GradSampleHooks:
    """Make backward passes leave each parameter's gradient per example in `grad_sample`, (B, *shape)."""
    from opacus.grad_sample import GradSampleHooks

    try:
        with quiet_hooks():
            return GradSampleHooks(module, batch_first=True, loss_reduction="mean", strict=True)
    except NotImplementedError as error:
        raise UserError(f"this part cannot train with differential privacy: {first_line(error)}") from None


def require_separable(
    module: nn.Module,
    hooks: GradSampleHooks,
    parameters: Mapping[str, nn.Parameter],
    loss: Loss,
    vocabulary: int,
    block_size: int,
) -> None:
    """Raise `UserError` naming a layer whose gradients, as the hooks find them, are not those of each example alone.

    `loss` maps tokens (B, S + 1) to a mean over examples, shape (). Leaves no gradient behind.
    """
    source = torch.Generator().manual_seed(0)
    shape = (EXAMPLES, min(block_size, PROBE_TOKENS) + 1)
    tokens_BT1 = torch.randint(vocabulary, shape, generator=source).to(next(iter(parameters.values())).device)
    with _without_chance(module):
        hooks.disable_hooks()
        _require_apart(module, loss, tokens_BT1)
        hooks.enable_hooks()
        together = _gradients_together(module, parameters, loss, tokens_BT1)
        scale = max(float(one.abs().max()) for one in together.values() if one is not None) or 1.0
        for row in range(EXAMPLES):
            alone = _gradients_alone(parameters, loss, tokens_BT1[row : row + 1])
            for name, expected in alone.items():
                _compare(name, module, together[name], expected, row, scale)


def _require_apart(module: nn.Module, loss: Loss, tokens_BT1: Tensor) -> None:
    """Raise `UserError` naming the first layer in which the examples of a batch meet."""
    together = _results(module, loss, tokens_BT1)
    for row in range(len(tokens_BT1)):
        alone = _results(module, loss, tokens_BT1[row : row + 1])
        for (name, layer, batch), (_, _, single) in zip(together, alone, strict=False):
            if len(batch) != len(tokens_BT1) or len(single) != 1 or batch[0].shape != single[0].shape:
                continue  # positions, for example, which are the same for every example
            if not torch.allclose(batch[row].float(), single[0].float(), rtol=RELATIVE_ERROR, atol=1e-4):
                raise _refusal(name, layer, "its result for one example depends on the others in the batch")


def _results(module: nn.Module, loss: Loss, tokens_BT1: Tensor) -> list[tuple[str, nn.Module, Tensor]]:
    """Return what each layer without layers of its own gave, in the order in which they were called."""
    found: list[tuple[str, nn.Module, Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, given: Any, result: Any) -> None:
            if isinstance(result, Tensor) and result.dim():
                found.append((name, layer, result.detach()))

        return hook

    handles = [
        layer.register_forward_hook(note(name))
        for name, layer in module.named_modules()
        if not list(layer.children())
    ]
    try:
        loss(tokens_BT1)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _gradients_together(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], loss: Loss, tokens_BT1: Tensor
) -> dict[str, Tensor | None]:
    """Return what the hooks find for a batch; raises `UserError` naming a layer that they cannot work on."""
    at = _Whereabouts()
    handles = at.watch(module)
    try:
        with quiet_hooks():
            torch.autograd.backward(loss(tokens_BT1))
    except UserError:
        raise
    except Exception as error:  # whatever vmap or a layer's own code says
        name, layer = at.last
        raise _refusal(
            name,
            layer,
            f"Opacus finds no gradient per example ({textwrap.shorten(first_line(error), 100)})",
        ) from None
    finally:
        for handle in handles:
            handle.remove()
    found = {name: take_grad_sample(parameter) for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return found


class _Whereabouts:
    """Looks at every layer that trains: what it is given, and which was the last that gradients reached."""

    def __init__(self) -> None:
        self.last: tuple[str, nn.Module] = ("", nn.Identity())

    def watch(self, module: nn.Module) -> list[Any]:
        handles = []
        for name, layer in module.named_modules():
            if _trains(layer):
                handles.append(layer.register_forward_pre_hook(self._check(name), with_kwargs=True))
                handles.append(layer.register_full_backward_pre_hook(self._note(name)))
        return handles

    def _check(self, name: str) -> Callable[..., None]:
        def check(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            rows = [len(one) for one in given if isinstance(one, Tensor) and one.dim()]
            if len(given) != 1 or len(rows) != 1 or any(isinstance(one, Tensor) for one in named.values()):
                raise _refusal(
                    name, layer, "it is given more than one tensor, of which Opacus sees the first"
                )
            if rows != [EXAMPLES]:
                raise _refusal(
                    name,
                    layer,
                    f"for a batch of {EXAMPLES} it is given {rows[0]} rows, so that its gradient cannot be told apart "
                    "by example",
                )

        return check

    def _note(self, name: str) -> Callable[..., None]:
        def note(layer: nn.Module, gradients: Any) -> None:
            self.last = (name, layer)

        return note


def _gradients_alone(
    parameters: Mapping[str, nn.Parameter], loss: Loss, tokens_1T1: Tensor
) -> dict[str, Tensor | None]:
    """Return the ordinary gradients of one example."""
    with quiet_hooks():
        torch.autograd.backward(loss(tokens_1T1))
    found = {}
    for name, parameter in parameters.items():
        found[name] = parameter.grad
        parameter.grad = None
        take_grad_sample(parameter)
    return found


def _compare(
    name: str, module: nn.Module, together: Tensor | None, expected: Tensor | None, row: int, scale: float
) -> None:
    if expected is None:
        return
    wanted = expected.double()
    found = torch.zeros_like(wanted) if together is None else together[row].double()
    tolerance = RELATIVE_ERROR * float(wanted.abs().max()) + 1e-4 * scale
    if not float((found - wanted).abs().max()) <= tolerance:
        raise UserError(
            f"parameter '{name}' cannot train with differential privacy: its gradient does not all pass through "
            f"the layer that holds it; {ANOTHER_PART}, or {ONE_BY_ONE}"
        )


def take_grad_sample(parameter: nn.Parameter) -> Tensor | None:
    """Return a parameter's gradient per example, (B, *shape), and forget it; None where no example moved it."""
    found: Tensor | list[Tensor] | None = parameter.grad_sample  # type: ignore[attr-defined]  # Opacus adds it
    parameter.grad_sample = None  # type: ignore[attr-defined]  # as above
    if isinstance(found, list):  # a layer that the forward pass went through several times
        return torch.stack(found).sum(dim=0)
    return found


@contextmanager
def quiet_hooks() -> Iterator[None]:
    """Keep torch from warning that the first layer to train has no input that needs a gradient: it needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


@contextmanager
def _without_chance(module: nn.Module) -> Iterator[None]:
    """Switch dropout off, wherever it is: layers without parameters that train are told that nothing trains."""
    still = [layer for layer in module.modules() if layer.training and not _trains(layer)]
    for layer in still:
        layer.training = False
    try:
        yield
    finally:
        for layer in still:
            layer.training = True


def _trains(layer: nn.Module) -> bool:
    """Tell whether a layer has parameters of its own that train."""
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def _refusal(name: str, layer: nn.Module, why: str) -> UserError:
    return UserError(_of_layer(name, layer, f"{why}; {ANOTHER_PART}, or {ONE_BY_ONE}"))


def _of_layer(name: str, layer: nn.Module, why: str) -> str:
    return f"layer '{name}' ({type(layer).__name__}) cannot train with differential privacy: {why}"
