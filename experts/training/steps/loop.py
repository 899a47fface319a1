"""The training loop: optimiser steps on the trainable parameters, and the state for checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ....core.artefacts.safetensors_io import Checkpoint, torch_dtype
from ....core.config.settings import TrainingConfig
from ....core.errors import UserError
from ....core.hooks.training import TrainablePart
from ....core.manifests.statements import PrivacyStatement
from ....core.text.token_store import BalancedUnion, Blocks, Position, domain_at, draw
from ..distributed.ranks import ALONE, Ranks, Strategy
from ..distributed.replicas import laid_out, require_divisible
from .guards import Guards, is_finite
from .loss import WHOLE_LOGITS_BYTES, chunked_loss, next_token_loss, require_separable_documents, separate_loss
from .precision import autocast, resolve_device, store_weights, uses_bfloat16
from .recomputation import recompute_activations
from .schedule import learning_rate, progress_at


@dataclass(frozen=True)
class StepReport:
    """Result of one optimiser step."""

    step: int
    """Number of steps done, including this one."""
    loss: Tensor
    """Mean cross-entropy in nats per token, shape ()."""
    gradient_norm: Tensor
    """Norm of the gradient before clipping, shape ()."""
    learning_rate: float
    skipped: bool = False
    """Whether the weights were left as they are because the loss or the gradient is not finite."""


class TrainingLoop:
    """Trainable parameters, their optimiser and the data position: everything that a checkpoint stores."""

    def __init__(
        self,
        part: TrainablePart,
        blocks: Blocks | BalancedUnion,
        config: TrainingConfig,
        ranks: Ranks = ALONE,
        strategy: Strategy = "ddp",
        *,
        separator: int | None = None,
    ) -> None:
        """Lay the model out over the processes of a run; `separator` is the token between documents.

        Raises `UserError` for text and settings that they cannot train on.
        """
        if len(blocks) == 0:
            raise UserError(
                f"the text is shorter than one block of {config.sequence_length} tokens; add text or lower "
                "training.sequence_length"
            )
        self.config, self.blocks, self.part = config, blocks, part
        self.device = resolve_device(config.device)
        if ranks.world > 1 and self.device.index is not None:
            raise UserError(
                f"training.device is {config.device}, one GPU for {ranks.world} processes; set it to auto or cuda"
            )
        self.step = 0
        self.position = Position()
        frozen = [name for name, parameter in part.parameters.items() if not parameter.requires_grad]
        assert not frozen, f"the trainer froze a parameter that it declares trainable: {frozen[0]}"
        require_divisible(config.batch_size, ranks)
        self.ranks = ranks
        store_weights(part, config, self.device)
        if config.activation_checkpointing:
            recompute_activations(part.module)
        self.replica = laid_out(part, self.device, ranks, strategy, bfloat16=uses_bfloat16(config, self.device))
        self.module, self.parameters = self.replica.module, self.replica.parameters
        self._loss: Any = functools.partial(self._loss_function(separator), self.replica.forward)
        if config.compile:
            self._loss = torch.compile(self._loss)  # including the loss, which fuses with the logits
        self.optimiser = make_optimiser(self.parameters, config)
        self.guards = Guards(config)
        self._autocast = autocast(config, self.device)

    @property
    def rows_at_a_time(self) -> int:
        """Blocks of a batch whose logits can be in memory together, where they are not computed in pieces."""
        return min(self.config.batch_size, max(WHOLE_LOGITS_BYTES // max(self._logits_bytes, 1), 1))

    @property
    def _logits_bytes(self) -> int:
        """Bytes of a block's logits in float32; 0 if the module does not tell its vocabulary."""
        return 4 * self.config.sequence_length * int(getattr(getattr(self.module, "config", None), "vocab_size", 0))

    def _loss_function(self, separator: int | None) -> Callable[..., Tensor]:
        """Return the loss by the settings `chunked_loss` and `separate_documents`, as a function of forward and tokens."""
        config, forward = self.config, self.replica.forward
        loss: Callable[..., Tensor] = next_token_loss
        is_large = config.batch_size // self.ranks.world * self._logits_bytes > WHOLE_LOGITS_BYTES
        if config.chunked_loss or (config.chunked_loss is None and is_large):
            self.part.begin_batch([0])
            chunked = chunked_loss(self.module, forward, self.device)
            if chunked is None and config.chunked_loss:
                raise UserError(
                    "training.chunked_loss: this model changes the logits of its last layer, or hides that layer; set it to false"
                )
            loss = chunked or loss
        if config.separate_documents:
            assert separator is not None, "whoever reads the text knows its separator"
            self.part.begin_batch([0])
            require_separable_documents(self.module, forward, separator, self.device)
            loss = separate_loss(loss, separator)
        return loss

    def steps(self) -> Iterator[StepReport]:
        """Train to the end of the budget; yields after each optimiser step."""
        while self.step < self.config.steps:
            self.part.begin_step(self.step)
            rate = learning_rate(self.config, progress_at(self.config, self.step))
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            loss = self.replica.mean(self._accumulate())
            norm = self._clip()
            skipped = not is_finite(loss, norm)
            if not skipped:
                self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.step += 1
            yield StepReport(self.step, loss, norm, rate, skipped)

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
        return {"guards": self.guards.state()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the additional state from a checkpoint's full state."""
        self.guards.load(state.get("guards", {}))

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
