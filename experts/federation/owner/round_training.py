"""Training of one round of a shared model: from a run folder to an artefact that can be delivered."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from ....core.artefacts.files import exclusive
from ....core.artefacts.safetensors_io import SINGLE_FILE
from ....core.manifests.finishing import finish_artefact
from ...training.finishing import run_manifest
from ...training.metrics_log import Tell
from ...training.run_inputs import RunInputs
from ...training.starting_point import training_blocks
from ..protocol.requests import RoundOf
from ..rounds.round_loop import OwnerTask
from .inner_training import InnerTraining

TELL_S = 0.5
"""Shortest time between two progress records."""


def train_round(folder: Path, round_: RoundOf, state: Path, tell: Tell, stopped: Callable[[], bool]) -> None:
    """Train the run in `folder` for one round and write it as an artefact with all tensors of the model.

    `state` persists between rounds. Raises `Interrupted` after a stop, with the state saved.
    """
    run = RunInputs.of_folder(folder)
    last_loss, told_at = float("nan"), 0.0

    def on_step(step: int, loss: float) -> None:
        nonlocal last_loss, told_at
        last_loss, now = loss, time.monotonic()
        if now - told_at >= TELL_S:
            told_at = now
            tell({"step": step - round_.number * round_.steps, "total_steps": round_.steps, "loss": loss})

    training = InnerTraining(state, run.base, training_blocks(run), run.spec.training, round_.steps, on_step, stopped)
    with exclusive(state.with_name("state.lock"), f"the rounds of '{round_.model}'", patience_s=60):
        training(OwnerTask(run.spec.name, round_.number, run.base, folder / SINGLE_FILE))
    metrics = {"loss": last_loss} if not math.isnan(last_loss) else {}  # NaN if a kill followed the last step
    tokens = round_.steps * run.spec.training.tokens_per_step
    finish_artefact(folder, run_manifest(run, metrics, trained_tokens=tokens))
