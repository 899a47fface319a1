"""Differentially private training: DP-SGD's gradient (arXiv:1607.00133, algorithm 1) in the ordinary loop.

An example is one block. Each step draws every block with the same probability, cuts each drawn block's gradient to a norm,
adds them up, adds noise, and divides by the expected number of blocks; AdamW then uses that in the place of a gradient.
Where a forward pass is of several blocks, Opacus tells their gradients apart; of one block the gradient is what it is, and any
layer will do.
Shapes: B = blocks in a forward pass, S = block size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ....core.config.settings import DpConfig, TrainingConfig
from ....core.errors import UserError
from ....core.hooks.training import TrainablePart
from ....core.text.token_store import Blocks
from ..loop import TrainingLoop
from .accounting import Mechanism, new_accountant, privacy_statement
from .layers import (
    ONE_BY_ONE,
    attach_hooks,
    quiet_hooks,
    refuse_stateful,
    require_separable,
    take_grad_sample,
)
from .noise import NoiseSource

if TYPE_CHECKING:
    from torch import Tensor


class PrivateTrainingLoop(TrainingLoop):
    """The training loop with private gradients, and an account of what they cost."""

    def __init__(
        self,
        part: TrainablePart,
        blocks: Blocks,
        config: TrainingConfig,
        dp: DpConfig,
        mechanism: Mechanism,
        source: NoiseSource,
    ) -> None:
        super().__init__(part, blocks, config)
        self.dp, self.mechanism = dp, mechanism
        self._source, self._examples = source, blocks
        self.accountant = new_accountant(dp.accountant)
        self.accountant.history = list(mechanism.before)
        refuse_stateful(self.module)
        self._one_by_one = config.batch_size == 1
        if not self._one_by_one:
            self._tell_apart()

    def _tell_apart(self) -> None:
        """Have gradients of several blocks told apart; raises `UserError` for what cannot be."""
        if self.part.auxiliary_loss is not None and not self.part.auxiliary_per_example:
            raise UserError(
                f"this trainer adds a loss over the whole batch, which cannot be told apart by example; {ONE_BY_ONE}"
            )
        hooks = attach_hooks(self.module)
        vocabulary = int(getattr(getattr(self.module, "config", None), "vocab_size", 0)) or 2
        require_separable(
            self.module, hooks, self.parameters, self._whole_loss, vocabulary, self.config.sequence_length
        )

    def _accumulate(self) -> Tensor:
        """Put the private gradient in place and return the mean loss of what was drawn, 0 where nothing was."""
        drawn = self._source.drawn(f"draw/{self.step}", len(self._examples), self.mechanism.rate)
        sums = {
            name: torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            for name, parameter in self.parameters.items()
        }
        total = torch.zeros((), device=self.device)
        for begin in range(0, len(drawn), self.config.batch_size):
            chosen = drawn[begin : begin + self.config.batch_size]
            total += self._add_clipped(sums, self._blocks_of(chosen)) * len(chosen)
        expected = self.mechanism.rate * len(self._examples)
        for name, parameter in self.parameters.items():
            parameter.grad = self._noised(name, sums[name]) / expected
        self.accountant.step(
            noise_multiplier=self.mechanism.noise_multiplier, sample_rate=self.mechanism.rate
        )
        return total / max(len(drawn), 1)

    def _blocks_of(self, chosen: Any) -> Tensor:
        """Return blocks as tokens (B, S + 1)."""
        import numpy as np

        if self.part.tell_domains is not None:
            self.part.tell_domains([0] * len(chosen))
        rows = [self._examples.block(int(index)) for index in chosen]
        return torch.from_numpy(np.stack(rows)).to(self.device, non_blocking=True)

    def _add_clipped(self, sums: Mapping[str, Tensor], tokens_BT1: Tensor) -> Tensor:
        """Add each block's clipped gradient to the sums and return their mean loss."""
        with quiet_hooks():
            loss: Tensor = self._loss(tokens_BT1)
            torch.autograd.backward(self._with_auxiliary(loss))
        gradients = self._gradients()
        norms_B = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(one, dim=1) for one in gradients.values()]), dim=0
        )
        factors_B = (self.mechanism.clip / (norms_B + 1e-6)).clamp(max=1.0)
        for name, gradient in gradients.items():
            sums[name].view(-1).addmv_(gradient.T, factors_B)
        return loss.detach()

    def _gradients(self) -> dict[str, Tensor]:
        """Return what the last backward pass left, by block: (B, numbers)."""
        gradients = {}
        for name, parameter in self.parameters.items():
            found = parameter.grad[None] if self._one_by_one and parameter.grad is not None else None
            parameter.grad = None  # of several blocks the sum, which nobody may use
            if not self._one_by_one:
                found = take_grad_sample(parameter)
            if found is not None:
                gradients[name] = found.reshape(len(found), -1)
        return gradients

    def _with_auxiliary(self, loss: Tensor) -> Tensor:
        further = self.part.auxiliary_loss
        return loss + further() if further is not None else loss

    def _whole_loss(self, tokens_BT1: Tensor) -> Tensor:
        if self.part.tell_domains is not None:
            self.part.tell_domains([0] * len(tokens_BT1))
        return self._with_auxiliary(self._loss(tokens_BT1))

    def _noised(self, name: str, total: Tensor) -> Tensor:
        """Return a sum of clipped gradients with the step's noise."""
        if self.mechanism.noise_multiplier == 0:
            return total
        noise = self._source.normal(f"noise/{self.step}/{name}", total.shape)
        return total + (noise * (self.mechanism.noise_multiplier * self.mechanism.clip)).to(total)

    def _clip(self) -> Tensor:
        """Return the norm of the private gradient, which was clipped where it matters: block by block."""
        return torch.nn.utils.get_total_norm(
            [one.grad for one in self.parameters.values() if one.grad is not None]
        )

    def statement(self) -> dict[str, Any]:
        """Return what the run has cost so far, for the manifest."""
        return privacy_statement(
            self.dp, self.mechanism, self.accountant.history, self.config.sequence_length
        )

    # --- state ---

    def further_state(self) -> dict[str, Any]:
        return {"privacy": {"history": [list(release) for release in self.accountant.history]}}

    def load_further_state(self, state: Mapping[str, Any]) -> None:
        """Take over what was spent; raises `UserError` where it was spent otherwise than this run would."""
        history = [
            (float(sigma), float(rate), int(steps)) for sigma, rate, steps in state["privacy"]["history"]
        ]
        steps = int(state["step"])
        own = (self.mechanism.noise_multiplier, self.mechanism.rate, steps)
        if history != [*self.mechanism.before, own]:
            raise UserError(
                f"its account of privacy, {history}, is not the one that {steps} steps of this run leave"
            )
        self.accountant.history = history
