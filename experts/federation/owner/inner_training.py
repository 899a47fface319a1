"""Inner training of a shared model: a fixed number of steps per round, starting from the shared weights.

The optimiser's moments, the position in the text and the random state stay with the owner between rounds (DiLoCo,
arXiv:2311.08105, section 2); only weights are exchanged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ....core.artefacts.files import exclusive
from ....core.artefacts.safetensors_io import SINGLE_FILE, Checkpoint, torch_dtype, write_tensors
from ....core.config.settings import TrainingConfig
from ....core.errors import Interrupted, UserError
from ....core.manifests.finishing import finish_artefact
from ....core.models.overlay import overlay_tensors
from ....core.models.stored_names import stored_tensors
from ....core.reporting import SILENT, Reporter
from ....core.text.block_order import BalancedUnion
from ....core.text.token_store import Blocks
from ...runs.trainable import all_parameters
from ...training.checkpointing import restore_latest, save_checkpoint
from ...training.finishing import run_manifest
from ...training.metrics_log import PROGRESS_SECONDS
from ...training.run_inputs import RunInputs
from ...training.starting_point import training_blocks
from ...training.steps.loop import TrainingLoop
from ..protocol.requests import RoundOf
from ..rounds.round_loop import OwnerTask


@dataclass(frozen=True)
class InnerTraining:
    """Inner training of one owner, callable once per round as a `TrainOwner`."""

    state: Path
    """Folder of the owner's checkpoints."""
    model: Path
    """Hugging Face folder with the model's configuration."""
    blocks: Blocks | BalancedUnion
    """The owner's text."""
    config: TrainingConfig
    """Settings for all rounds together; the learning-rate schedule spans the whole `tokens` budget."""
    steps: int
    """Optimiser steps per round (H in the paper)."""
    reporter: Reporter = SILENT
    """Receives records with `step` and `total_steps` of the round and `loss` in nats per token."""
    stopped: Callable[[], bool] = lambda: False
    """Called after every step; training is saved and interrupted once it returns true."""

    def __call__(self, task: OwnerTask) -> int:
        """Train one round and return the number of tokens in the owner's text, the owner's weight in FedAvg.

        Raises the errors of `train`.
        """
        self.train(task)
        return _num_blocks(self.blocks) * self.blocks.block_size

    def train(self, task: OwnerTask) -> float:
        """Train one round and return the loss of its last step, NaN if an earlier call has ended with that step.

        Raises `UserError` if the owner's state is past the round or training diverges, and `Interrupted` after a stop.
        """
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
        loss, saved_at, reported_at = math.nan, time.monotonic(), 0.0
        for report in loop.steps() if loop.step < end else ():
            loss = float(report.loss)
            if not math.isfinite(loss) or not math.isfinite(float(report.gradient_norm)):
                raise UserError(f"training diverged: loss {loss} at step {report.step}")
            if time.monotonic() - reported_at >= PROGRESS_SECONDS:
                reported_at = time.monotonic()
                record = {"step": report.step - begin, "total_steps": self.steps, "loss": loss}
                self.reporter.run_progressed(self.state, record)
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
            for name, tensor in stored_tensors(model, shared.entries).items()
        }
        write_tensors(task.result, stored)
        return loss

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


def _num_blocks(blocks: Blocks | BalancedUnion) -> int:
    """Return the number of blocks of a text, each counted once: a balanced union repeats those of small domains."""
    return sum(map(len, blocks.parts)) if isinstance(blocks, BalancedUnion) else len(blocks)


def train_round(folder: Path, round_: RoundOf, state: Path, reporter: Reporter, stopped: Callable[[], bool]) -> None:
    """Train the run in `folder` for one round and write it as an artefact with all tensors of the model.

    `state` persists between rounds. Raises `Interrupted` after a stop, with the state saved.
    """
    run = RunInputs.of_folder(folder)
    training = InnerTraining(state, run.base, training_blocks(run), run.spec.training, round_.steps, reporter, stopped)
    with exclusive(state.with_name("state.lock"), f"the rounds of '{round_.model}'", patience_s=60):
        loss = training.train(OwnerTask(run.spec.name, round_.number, run.base, folder / SINGLE_FILE))
    metrics = {"loss": loss} if not math.isnan(loss) else {}  # NaN if a kill followed the last step
    tokens = round_.steps * run.spec.training.tokens_per_step
    finish_artefact(folder, run_manifest(run, metrics, trained_tokens=tokens))
