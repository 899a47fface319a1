"""Inner training of a shared model: a fixed number of steps per round, starting from the shared weights.

The optimiser's moments, the position in the text and the random state stay with the owner between rounds (DiLoCo,
arXiv:2311.08105, section 2); only weights are exchanged.
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
    """Inner training of one owner, callable once per round as a `TrainOwner`."""

    state: Path
    """Folder of the owner's checkpoints."""
    model: Path
    """Hugging Face folder with the model's configuration."""
    blocks: Blocks | BalancedUnion | SharedUnion
    """The owner's text."""
    config: TrainingConfig
    """Settings for all rounds together; the learning-rate schedule spans the whole `tokens` budget."""
    steps: int
    """Optimiser steps per round (H in the paper)."""
    on_step: Callable[[int, float], None] = lambda step, loss: None
    """Called after every step with its number and its loss in nats per token."""
    stopped: Callable[[], bool] = lambda: False
    """Called after every step; training is saved and interrupted once it returns true."""

    def __call__(self, task: OwnerTask) -> int:
        """Train one round and return the number of tokens in the owner's text, the owner's weight in FedAvg.

        Raises `UserError` if the owner's state is past the round or training diverges, and `Interrupted` after a stop.
        """
        import math

        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(self.config.seed)
        config = AutoConfig.from_pretrained(self.model, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        is_folder = task.shared.is_dir()
        shared = Checkpoint.of_folder(task.shared) if is_folder else Checkpoint([task.shared])
        overlay_tensors(model, shared)
        loop = TrainingLoop(all_parameters(model), self.blocks, self.config)
        begin, end = task.round * self.steps, (task.round + 1) * self.steps
        if end > self.config.steps:
            raise UserError(f"round {task.round} exceeds the {self.config.steps} steps that training.tokens allows")
        self._restore(loop, begin, end, shared)
        saved_at = time.monotonic()
        for report in loop.steps() if loop.step < end else ():
            loss = float(report.loss)
            if not math.isfinite(loss) or not math.isfinite(float(report.gradient_norm)):
                raise UserError(f"training diverged: loss {loss} at step {report.step}")
            self.on_step(report.step, loss)
            if report.step == end:
                save_checkpoint(loop, self.state)
                break
            if self.stopped():
                save_checkpoint(loop, self.state)
                raise Interrupted(f"stopped at step {report.step} of {end}; the same command resumes")
            if time.monotonic() - saved_at >= self.config.checkpoint_seconds:
                save_checkpoint(loop, self.state)
                saved_at = time.monotonic()
        stored = {
            name: tensor.to("cpu", torch_dtype(shared.entry(name).dtype))
            for name, tensor in checkpoint_tensors(model).items()
        }
        write_tensors(task.result, stored)
        return len(self.blocks) * self.config.sequence_length

    def _restore(self, loop: TrainingLoop, begin: int, end: int, shared: Checkpoint) -> None:
        """Restore the owner's latest checkpoint; at the start of a round, load the shared weights over it."""
        step = restore_latest(loop, self.state)
        if step > end:
            raise UserError(
                f"{self.state} is at step {step}, past this round's end at {end}; it belongs to other rounds"
            )
        if step <= begin:  # the checkpoint is from an earlier round
            overlay_tensors(loop.part.module, shared)
            loop.step = begin  # an owner who missed a round follows the others' learning-rate schedule
