"""The training loop: optimiser steps on the trainable parameters, and the state for checkpoints."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...core.config.settings import TrainingConfig
from ...core.errors import UserError
from ...core.hooks.training import TrainablePart
from ...core.manifests.statements import PrivacyStatement
from ...core.text.token_store import BalancedUnion, Blocks, Position, domain_at, draw
from .schedule import learning_rate, progress_at


@dataclass(frozen=True)
class StepReport:
    """Result of one optimiser step."""

    step: int
    """Number of steps done, including this one."""
    loss: Tensor
    """Mean cross-entropy in nats per token, shape (); stays on its device, so that steps need no synchronisation."""
    gradient_norm: Tensor
    """Norm of the gradient before clipping, shape ()."""
    learning_rate: float


class TrainingLoop:
    """Trainable parameters, their optimiser and the data position: everything that a checkpoint stores."""

    def __init__(self, part: TrainablePart, blocks: Blocks | BalancedUnion, config: TrainingConfig) -> None:
        if len(blocks) == 0:
            raise UserError(
                f"the text is shorter than one block of {config.sequence_length} tokens; add text or lower "
                "training.sequence_length"
            )
        self.config, self.blocks, self.part = config, blocks, part
        self.device = resolve_device(config.device)
        self.step = 0
        self.position = Position()
        self.parameters = dict(part.parameters)
        self.module: nn.Module = part.module.to(self.device).train()
        frozen = [name for name, parameter in self.parameters.items() if not parameter.requires_grad]
        assert not frozen, f"the trainer froze a parameter that it declares trainable: {frozen[0]}"
        self._loss: Any = functools.partial(next_token_loss, self.module)
        if config.compile:
            self._loss = torch.compile(self._loss)  # including the loss, which fuses with the logits
        self.optimiser = make_optimiser(self.parameters, config)
        self._autocast = autocast(config, self.device)

    def steps(self) -> Iterator[StepReport]:
        """Train to the end of the budget; yields after each optimiser step."""
        while self.step < self.config.steps:
            self.part.begin_step(self.step)
            rate = learning_rate(self.config, progress_at(self.config, self.step))
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            loss = self._accumulate()
            norm = self._clip()
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.step += 1
            yield StepReport(self.step, loss, norm, rate)

    def _accumulate(self) -> Tensor:
        """Run the forward and backward passes of one step and return the mean loss, without auxiliary losses."""
        total = torch.zeros((), device=self.device)
        for _ in range(self.config.accumulation):
            with self._autocast():
                loss = self._loss(self._batch())
                objective = self._with_auxiliary(loss)
            torch.autograd.backward(objective / self.config.accumulation)
            total += loss.detach() / self.config.accumulation
        return total

    def _with_auxiliary(self, loss: Tensor) -> Tensor:
        auxiliary = self.part.auxiliary_loss()
        return loss if auxiliary is None else loss + auxiliary

    def _batch(self) -> Tensor:
        """Return the next batch of tokens (B, S + 1) and advance the position."""
        rows, domains = [], []
        for _ in range(self.config.batch_size):
            domains.append(domain_at(self.blocks, self.position))
            rows.append(draw(self.blocks, self.position, self.config.seed))
            self.position = self.position.advanced(1, len(self.blocks))
        self.part.begin_batch(domains)
        return torch.from_numpy(np.stack(rows)).to(self.device, non_blocking=True)

    def _clip(self) -> Tensor:
        limit = self.config.clip if self.config.clip is not None else float("inf")
        return torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit)

    # --- state ---

    def weights(self) -> dict[str, Tensor]:
        """Return the trained parameters by name."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def optimiser_state(self) -> dict[str, Tensor]:
        """Return AdamW's moments and step counts as `parameter name/field`."""
        state = self.optimiser.state
        return {
            f"{name}/{field}": value
            for name, parameter in self.parameters.items()
            for field, value in state.get(parameter, {}).items()
        }

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def statement(self) -> PrivacyStatement | None:
        """Return the privacy statement of a private run, otherwise None."""
        return None

    def extra_state(self) -> dict[str, Any]:
        """Return additional checkpoint state, as JSON."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the additional state from a checkpoint's full state."""

    def load_optimiser_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the optimiser state of every parameter in `tensors`; other parameters start without state."""
        fields: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, field = key.rpartition("/")
            fields.setdefault(name, {})[field] = value
        for name, parameter in self.parameters.items():
            if name in fields:
                self.optimiser.state[parameter] = {
                    field: value.to(parameter.device, copy=True) for field, value in fields[name].items()
                }


def next_token_loss(forward: Any, tokens_BT1: Tensor) -> Tensor:
    """Return the mean cross-entropy of all tokens but the first, in nats per token, shape ()."""
    logits_BTV = forward(input_ids=tokens_BT1[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), tokens_BT1[:, 1:].flatten())


def make_optimiser(parameters: Mapping[str, nn.Parameter], config: TrainingConfig) -> Optimizer:
    """Return a fused AdamW; weight decay applies to matrices, not to norms and biases."""
    matrices = [parameter for parameter in parameters.values() if parameter.dim() >= 2]
    vectors = [parameter for parameter in parameters.values() if parameter.dim() < 2]
    groups = [
        {"params": members, "weight_decay": decay}
        for members, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if members
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)


def resolve_device(setting: str) -> Any:
    """Return the torch device for a setting; `auto` selects a GPU if there is one.

    Raises `UserError` for an unknown device, and for a GPU where torch finds none.
    """
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(setting)
    except RuntimeError:
        raise UserError(f"unknown device '{setting}'; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device '{setting}' is not available: torch finds no GPU; use device: auto or cpu")
    return device


def autocast(config: TrainingConfig, device: Any) -> Any:
    """Return a factory of the autocast context for the precision setting on a device."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported()
    if config.precision == "bfloat16" or (config.precision == "auto" and native):
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext
