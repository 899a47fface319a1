"""Differentially private training loop: DP-SGD's gradient (arXiv:1607.00133, algorithm 1) with AdamW.

An example is one block. Each step samples every block with the same probability, clips each sampled block's gradient,
sums the gradients, adds noise and divides by the expected number of blocks; AdamW uses the result as its gradient. For
forward passes of several blocks, Opacus computes the per-example gradients. With one block per forward pass the
ordinary gradient is per-example, which works for any layer.
Shapes: B = blocks in a forward pass, S = block size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....core.config.settings import DpConfig, TrainingConfig
from ....core.errors import UserError
from ....core.hooks.steps import Batch
from ....core.hooks.training import TrainablePart
from ....core.manifests.statements import PrivacyStatement
from ....core.text.token_store import Blocks
from ..steps.loop import TrainingLoop, batch_of
from .accounting import Mechanism, new_accountant, privacy_statement
from .layers import ONE_BY_ONE, attach_hooks, quiet_hooks, refuse_stateful, require_separable, take_grad_sample
from .noise import NoiseSource


class PrivateTrainingLoop(TrainingLoop):
    """The training loop with private gradients and privacy accounting.

    Raises `UserError` for layers and losses without per-example gradients.
    """

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
        if self._one_by_one:
            return
        if part.needs_whole_batch:
            raise UserError(
                f"this trainer adds a loss over the whole batch, which cannot be split by example; {ONE_BY_ONE}"
            )
        hooks = attach_hooks(self.module)
        vocabulary = int(getattr(getattr(self.module, "config", None), "vocab_size", 0)) or 2
        require_separable(self.module, hooks, self.parameters, self._full_loss, vocabulary, config.sequence_length)

    def _accumulate(self) -> Tensor:
        """Set the private gradient and return the mean loss of the sampled blocks, 0 if none was sampled."""
        sampled = self._source.sampled_indices(f"draw/{self.step}", len(self._examples), self.mechanism.rate)
        sums = {
            name: torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            for name, parameter in self.parameters.items()
        }
        total = torch.zeros((), device=self.device)
        for begin in range(0, len(sampled), self.config.batch_size):
            indices = sampled[begin : begin + self.config.batch_size]
            total += self._add_clipped(sums, self._load_blocks(indices)) * len(indices)
        expected = self.mechanism.rate * len(self._examples)
        for name, parameter in self.parameters.items():
            parameter.grad = self._add_noise(name, sums[name]) / expected
        self.accountant.step(noise_multiplier=self.mechanism.noise_multiplier, sample_rate=self.mechanism.rate)
        return total / max(len(sampled), 1)

    def _load_blocks(self, indices: Any) -> Batch:
        self.part.begin_batch([0] * len(indices))
        return batch_of([self._examples.row(int(index)) for index in indices], self.device)

    def _add_clipped(self, sums: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Add each block's clipped gradient to the sums and return their mean loss."""
        with quiet_hooks():
            loss: Tensor = self._loss(batch)
            torch.autograd.backward(self._with_auxiliary(loss))
        gradients = self._gradients()
        norms_B = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(gradient, dim=1) for gradient in gradients.values()]), dim=0
        )
        factors_B = (self.mechanism.clip / (norms_B + 1e-6)).clamp(max=1.0)
        for name, gradient in gradients.items():
            sums[name].view(-1).addmv_(gradient.T, factors_B)
        return loss.detach()

    def _gradients(self) -> dict[str, Tensor]:
        """Return the per-example gradients of the last backward pass, (B, parameter size) each, and clear them."""
        gradients = {}
        for name, parameter in self.parameters.items():
            gradient = parameter.grad[None] if self._one_by_one and parameter.grad is not None else None
            parameter.grad = None  # for several blocks this is their unclipped sum
            if not self._one_by_one:
                gradient = take_grad_sample(parameter)
            if gradient is not None:
                gradients[name] = gradient.reshape(len(gradient), -1)
        return gradients

    def _full_loss(self, tokens_BT1: Tensor) -> Tensor:
        self.part.begin_batch([0] * len(tokens_BT1))
        return self._with_auxiliary(self._loss(Batch(tokens_BT1)))

    def _add_noise(self, name: str, total: Tensor) -> Tensor:
        if self.mechanism.noise_multiplier == 0:
            return total
        noise = self._source.normal(f"noise/{self.step}/{name}", total.shape)
        return total + (noise * (self.mechanism.noise_multiplier * self.mechanism.clip)).to(total)

    def _clip(self) -> Tensor:
        """Return the norm of the private gradient, which is not clipped again: clipping is per block."""
        return torch.nn.utils.get_total_norm(
            [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        )

    def statement(self) -> PrivacyStatement:
        """Return the privacy statement of the run so far."""
        return privacy_statement(self.dp, self.mechanism, self.accountant.history, self.config.sequence_length)

    # --- state ---

    def extra_state(self) -> dict[str, Any]:
        return {**super().extra_state(), "privacy": {"history": [list(release) for release in self.accountant.history]}}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the privacy history; raises `UserError` if it does not match this run's mechanism."""
        super().load_extra_state(state)
        history = [(float(sigma), float(rate), int(steps)) for sigma, rate, steps in state["privacy"]["history"]]
        steps = int(state["step"])
        expected = [*self.mechanism.before, (self.mechanism.noise_multiplier, self.mechanism.rate, steps)]
        if history != expected:
            raise UserError(f"its privacy history {history} does not match {steps} steps of this run")
        self.accountant.history = history
