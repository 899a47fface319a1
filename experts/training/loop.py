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

from ...core.artefacts.safetensors_io import Checkpoint, torch_dtype
from ...core.config.settings import TrainingConfig
from ...core.errors import UserError
from ...core.hooks.training import TrainablePart
from ...core.manifests.statements import PrivacyStatement
from ...core.text.token_store import BalancedUnion, Blocks, Position, domain_at, draw
from .distributed.ranks import ALONE, Ranks, Strategy
from .distributed.replicas import laid_out, require_divisible
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

    def __init__(
        self,
        part: TrainablePart,
        blocks: Blocks | BalancedUnion,
        config: TrainingConfig,
        ranks: Ranks = ALONE,
        strategy: Strategy = "ddp",
    ) -> None:
        """Lay the model out over the processes of a run; raises `UserError` for text and settings that they cannot train on."""
        if len(blocks) == 0:
            raise UserError(
                f"the text is shorter than one block of {config.sequence_length} tokens; add text or lower "
                "training.sequence_length"
            )
        self.config, self.blocks, self.part = config, blocks, part
        self.device = resolve_device(config.device)
        self.step = 0
        self.position = Position()
        frozen = [name for name, parameter in part.parameters.items() if not parameter.requires_grad]
        assert not frozen, f"the trainer froze a parameter that it declares trainable: {frozen[0]}"
        require_divisible(config.batch_size, ranks)
        self.ranks = ranks
        self.replica = laid_out(part, self.device, ranks, strategy, bfloat16=uses_bfloat16(config, self.device))
        self.module, self.parameters = self.replica.module, self.replica.parameters
        self._loss: Any = functools.partial(next_token_loss, self.replica.forward)
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
            loss = self.replica.mean(self._accumulate())
            norm = self._clip()
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.step += 1
            yield StepReport(self.step, loss, norm, rate)

    def _accumulate(self) -> Tensor:
        """Run the forward and backward passes of one step and return the mean loss, without auxiliary losses."""
        total = torch.zeros((), device=self.device)
        for number in range(self.config.accumulation):
            with self.replica.accumulating(is_last=number + 1 == self.config.accumulation):
                with self._autocast():
                    loss = self._loss(self._batch())
                    objective = self._with_auxiliary(loss)
                torch.autograd.backward(objective / self.config.accumulation)
            total += loss.detach() / self.config.accumulation
        self.replica.finish_gradients()
        return total

    def _with_auxiliary(self, loss: Tensor) -> Tensor:
        auxiliary = self.part.auxiliary_loss()
        return loss if auxiliary is None else loss + auxiliary

    def _batch(self) -> Tensor:
        """Return this process's rows (B, S + 1) of the next batch of all processes, and advance the position."""
        rows, domains = [], []
        for number in range(self.config.batch_size):
            if number % self.ranks.world == self.ranks.rank:
                domains.append(domain_at(self.blocks, self.position))
                rows.append(draw(self.blocks, self.position, self.config.seed))
            self.position = self.position.advanced(1, len(self.blocks))
        self.part.begin_batch(domains)
        return torch.from_numpy(np.stack(rows)).to(self.device, non_blocking=True)

    def _clip(self) -> Tensor:
        return self.replica.clip(self.config.clip if self.config.clip is not None else float("inf"))

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

    @torch.no_grad()
    def load_weights(self, stored: Checkpoint) -> None:
        """Load the trained parameters; raises `UserError` if one is missing."""
        for name, parameter in self.parameters.items():
            self.replica.load(parameter, stored, name)

    def statement(self) -> PrivacyStatement | None:
        """Return the privacy statement of a private run, otherwise None."""
        return None

    def extra_state(self) -> dict[str, Any]:
        """Return additional checkpoint state, as JSON."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the additional state from a checkpoint's full state."""

    @torch.no_grad()
    def load_optimiser_state(self, stored: Checkpoint) -> None:
        """Load the optimiser state of every parameter in a file; other parameters start without state."""
        for key in stored:
            name, _, field = key.rpartition("/")
            if name in self.parameters:
                parameter, entry = self.parameters[name], stored.entry(key)
                target = self.replica.like(parameter, entry.shape, torch_dtype(entry.dtype))
                self.replica.load(target, stored, key)
                self.optimiser.state[parameter][field] = target


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


def uses_bfloat16(config: TrainingConfig, device: Any) -> bool:
    """Return whether the precision setting amounts to bfloat16 on a device."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return config.precision == "bfloat16" or (config.precision == "auto" and native)


def autocast(config: TrainingConfig, device: Any) -> Any:
    """Return a factory of the autocast context for the precision setting on a device."""
    if uses_bfloat16(config, device):
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext
