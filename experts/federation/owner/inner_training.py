"""An owner's side of a shared model: a few steps of the project's training loop in every round, from the shared weights.

The optimiser's moments, the place in the text and the random numbers stay with the owner from round to round (DiLoCo,
arXiv:2311.08105, section 2); only weights travel.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ....core.artefacts.safetensors_io import Checkpoint, torch_dtype, write_tensors
from ....core.config.settings import TrainingConfig
from ....core.errors import Interrupted, UserError
from ....core.models.loading import checkpoint_tensors, overlay_tensors
from ....core.text.token_store import BalancedUnion, Blocks, SharedUnion
from ...runs.trainable import all_parameters
from ...training.checkpointing import restore_latest, save_checkpoint
from ...training.loop import TrainingLoop
from ..rounds.round_loop import OwnerTask


@dataclass(frozen=True)
class InnerTraining:
    """Trains one owner in every round: a `TrainOwner`."""

    state: Path
    """Folder of the owner's own checkpoints."""
    model: Path
    """Hugging Face folder of the model, for its configuration."""
    blocks: Blocks | BalancedUnion | SharedUnion
    """The owner's text."""
    config: TrainingConfig
    """Of all rounds together: `tokens` is the budget over which the learning rate follows its schedule."""
    steps: int
    """Optimiser steps in a round (H in the paper)."""
    told: Callable[[int, float], None] = lambda step, loss: None
    """Hears the number and the loss, in nats per token, of every step."""
    stopped: Callable[[], bool] = lambda: False
    """Asked after every step; once it says yes, the state is saved and the training ends there."""

    def __call__(self, task: OwnerTask) -> int:
        """Train one round and return the tokens of the owner's text, by which FedAvg counts owners.

        Raises `UserError` where the owner is further than the round, or training diverges, and `Interrupted` after a stop.
        """
        import math

        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(self.config.seed)
        config = AutoConfig.from_pretrained(self.model, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        folder = task.shared.is_dir()
        shared = Checkpoint.of_folder(task.shared) if folder else Checkpoint([task.shared])
        overlay_tensors(model, shared)
        loop = TrainingLoop(all_parameters(model, None), self.blocks, self.config)
        begin, end = task.round * self.steps, (task.round + 1) * self.steps
        if end > self.config.steps:
            raise UserError(
                f"round {task.round} goes beyond the {self.config.steps} steps that training.tokens pays for"
            )
        self._go_on(loop, begin, end, shared)
        saved_at = time.monotonic()
        for report in loop.steps() if loop.step < end else ():
            loss = float(report.loss)
            if not math.isfinite(loss) or not math.isfinite(float(report.gradient_norm)):
                raise UserError(f"training diverged: loss {loss} at step {report.step}")
            self.told(report.step, loss)
            if report.step == end:
                save_checkpoint(loop, self.state)
                break
            if self.stopped():
                save_checkpoint(loop, self.state)
                raise Interrupted(f"stopped at step {report.step} of {end}; the same command goes on")
            if time.monotonic() - saved_at >= self.config.checkpoint_seconds:
                save_checkpoint(loop, self.state)
                saved_at = time.monotonic()
        stored = {
            name: tensor.to("cpu", torch_dtype(shared.entry(name).dtype))
            for name, tensor in checkpoint_tensors(model).items()
        }
        write_tensors(task.result, stored)
        return len(self.blocks) * self.config.sequence_length

    def _go_on(self, loop: TrainingLoop, begin: int, end: int, shared: Checkpoint) -> None:
        """Put the owner's own state into the loop: in the middle of the round, at its end, or at its beginning."""
        found = restore_latest(loop, self.state)
        if found > end:
            raise UserError(
                f"{self.state} is at step {found}, beyond this round's {end}; it belongs to other rounds"
            )
        if found <= begin:  # of the rounds before: the shared weights take the place of the owner's
            overlay_tensors(loop.part.module, shared)
            loop.step = begin  # an owner who missed a round trains on at the others' learning rate
