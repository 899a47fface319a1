"""The built-in optimisers: AdamW with states in 32 or 8 bits, SGD, and Muon for hidden matrices.

Weight decay applies to matrices, not to norms and biases.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError
from ...core.hooks.hookspecs import hookimpl
from ...core.hooks.option_checks import check_at_least, check_range
from ...core.hooks.steps import Optimiser

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from ...core.config.settings import TrainingConfig

Parameters = Mapping[str, "nn.Parameter"]
BLOCK = 256
"""Numbers that share a scale in 8-bit states."""
SMALLEST_IN_8_BITS = 4096
"""Tensors with fewer numbers keep their state in 32 bits."""
EMBEDDINGS = ("embed", "wte", "wpe", "lm_head", "output_head")
"""Parts of names of embeddings and output layers, which Muon is not for."""


@dataclass(frozen=True)
class SgdOptions:
    """Options of SGD."""

    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_range("momentum", self.momentum, 0, 1)


@dataclass(frozen=True)
class MuonOptions:
    """Options of Muon; the learning rate is AdamW's, since updates are scaled to the same size."""

    momentum: float = 0.95
    steps: int = 5
    """Newton-Schulz iterations."""

    def __post_init__(self) -> None:
        check_range("momentum", self.momentum, 0, 1)
        check_at_least("steps", self.steps, 1)


@hookimpl
def optimisers() -> list[Optimiser]:
    """Return the built-in optimisers."""
    return [
        Optimiser("adamw", "AdamW", make_adamw, lambda parameters: 8 * _count(parameters)),
        Optimiser(
            "adamw_8bit",
            "AdamW with its moments in 8 bits (bitsandbytes)",
            make_adamw_8bit,
            _bytes_in_8_bits,
            is_elementwise=False,  # scales belong to blocks of a whole tensor
            require=require_bitsandbytes,
        ),
        Optimiser(
            "muon",
            "Muon for hidden matrices, AdamW for the rest",
            make_muon,
            lambda parameters: 4 * _count(_hidden(parameters)) + 8 * (_count(parameters) - _count(_hidden(parameters))),
            MuonOptions,
            is_elementwise=False,
        ),
        Optimiser("sgd", "SGD with momentum", make_sgd, lambda parameters: 4 * _count(parameters), SgdOptions),
    ]


def make_adamw(parameters: Parameters, config: TrainingConfig, options: Any) -> Optimizer:
    """Return torch's fused AdamW."""
    import torch

    groups = decay_groups(parameters, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)


def make_adamw_8bit(parameters: Parameters, config: TrainingConfig, options: Any) -> Optimizer:
    """Return bitsandbytes' AdamW with block-wise 8-bit moments (arXiv:2110.02861)."""
    from bitsandbytes.optim.adamw import AdamW8bit

    groups = decay_groups(parameters, config.weight_decay)
    make: Callable[..., Optimizer] = AdamW8bit  # not annotated
    return make(
        groups,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        min_8bit_size=SMALLEST_IN_8_BITS,
    )


def require_bitsandbytes() -> None:
    """Raise `UserError` unless bitsandbytes can be imported."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels for models, which are not used here
    try:
        import bitsandbytes  # noqa: F401  # whether it loads its binary, too
    except Exception as error:  # a missing library of the system is a RuntimeError or OSError
        raise UserError(
            f'optimiser adamw_8bit needs bitsandbytes ({error}); install it with: pip install "expertctl[bitsandbytes]"'
        ) from None


def make_sgd(parameters: Parameters, config: TrainingConfig, options: SgdOptions) -> Optimizer:
    """Return torch's fused SGD."""
    import torch

    return torch.optim.SGD(
        decay_groups(parameters, config.weight_decay),
        lr=config.learning_rate,
        momentum=options.momentum,
        nesterov=options.nesterov,
        fused=True,
    )


def make_muon(parameters: Parameters, config: TrainingConfig, options: MuonOptions) -> Optimizer:
    """Return torch's Muon for matrices between the embedding and the output layer, with AdamW for all others."""
    import torch

    hidden = _hidden(parameters)
    others = {name: parameter for name, parameter in parameters.items() if name not in hidden}
    members: list[Optimizer] = []
    if hidden:
        members.append(
            torch.optim.Muon(
                hidden.values(),
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                momentum=options.momentum,
                ns_steps=options.steps,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if others:
        members.append(make_adamw(others, config, None))
    return members[0] if len(members) == 1 else joint(members)


def _hidden(parameters: Parameters) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.dim() == 2 and not any(part in name for part in EMBEDDINGS)
    }


def decay_groups(parameters: Parameters, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameters in groups, with weight decay for matrices only."""
    matrices = [parameter for parameter in parameters.values() if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.dim() < 2]
    return [
        {"params": members, "weight_decay": decay}
        for members, decay in ((matrices, weight_decay), (vectors, 0.0))
        if members
    ]


def joint(members: list[Optimizer]) -> Optimizer:
    """Return several optimisers of different parameters as one."""
    from torch.optim import Optimizer

    class Joint(Optimizer):
        """Optimisers that step together."""

        def __init__(self) -> None:
            super().__init__([group for member in members for group in member.param_groups], {})
            self.param_groups = [group for member in members for group in member.param_groups]
            self.state = _JointState(members)  # type: ignore[assignment]  # read and written as torch's own

        def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is ever given
            for member in members:
                member.step()

    return Joint()


class _JointState(Mapping["nn.Parameter", dict[str, Any]]):
    """The state of several optimisers by parameter."""

    def __init__(self, members: list[Optimizer]) -> None:
        self._state_of = {
            parameter: member.state
            for member in members
            for group in member.param_groups
            for parameter in group["params"]
        }

    def __getitem__(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self._state_of[parameter][parameter]
        return state

    def __iter__(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter, state in self._state_of.items() if parameter in state)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _count(parameters: Parameters) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


def _bytes_in_8_bits(parameters: Parameters) -> int:
    sizes = [parameter.numel() for parameter in parameters.values()]
    return sum(2 * size + 8 * -(-size // BLOCK) if size >= SMALLEST_IN_8_BITS else 8 * size for size in sizes)
