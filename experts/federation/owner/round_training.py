"""One round of a shared model at an owner: from the run's folder to weights that can be handed in."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ....core.artefacts.files import exclusive
from ....core.artefacts.safetensors_io import SINGLE_FILE
from ...training.finishing import run_manifest
from ...training.metrics_log import Tell
from ...training.run_inputs import RunInputs
from ...training.starting_point import training_blocks
from ..protocol.requests import RoundOf
from ..rounds.round_loop import OwnerTask
from .inner_training import InnerTraining

TELL_S = 0.5


def train_round(folder: Path, part: RoundOf, state: Path, tell: Tell, stopped: Callable[[], bool]) -> None:
    """Train the run in `folder` for one round and make an artefact of it: all tensors, those of the round's weights by name.

    `state` is kept from round to round. Raises `Interrupted` after a stop, with the state saved.
    """
    run = RunInputs.of_folder(folder)
    last, told_at = float("nan"), 0.0

    def told(step: int, loss: float) -> None:
        nonlocal last, told_at
        last, now = loss, time.monotonic()
        if now - told_at >= TELL_S:
            told_at = now
            tell({"step": step - part.number * part.steps, "total_steps": part.steps, "loss": loss})

    training = InnerTraining(
        state, run.base, training_blocks(run), run.spec.training, part.steps, told, stopped
    )
    with exclusive(state.with_name("state.lock"), f"the rounds of '{part.model}'", patience_s=60):
        training(OwnerTask(run.spec.name, part.number, run.base, folder / SINGLE_FILE))
    metrics = {"loss": last} if last == last else {}  # a kill after the last step leaves none to tell
    tokens = part.steps * run.spec.training.tokens_per_step
    run_manifest(run, metrics, trained_tokens=tokens).write(folder)
