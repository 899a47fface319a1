"""Setting up a private run: what it must not do, where its noise comes from, and its loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...core.config.settings import DpConfig, ExpertConfig, TrainingConfig
from ...core.errors import UserError
from ...core.hooks.training import TrainablePart, Trainer
from .accounting import mechanism_for, require_opacus
from .noise import NoiseSource, secret_source, seeded_source
from .releases import Releases

if TYPE_CHECKING:
    from pathlib import Path

    from ...core.text.token_store import Blocks
    from .loop import PrivateTrainingLoop


def check_private(expert: ExpertConfig, training: TrainingConfig, trainer: Trainer) -> None:
    """Refuse, before anything is set up, what would tell of private text past the noise, or cannot be computed."""
    if expert.dp is None:
        return
    require_opacus()
    if expert.from_ == "auto":
        raise UserError(
            "`from: auto` weighs the experts by the private text, and its weights stand in the manifest; with "
            "differential privacy start from the seed, or give weights"
        )
    if trainer.uses_text and not trainer.private_text:
        raise UserError(
            f"trainer '{trainer.name}' reads the text before it trains and does not say that it does so privately; "
            "use another, or train without differential privacy"
        )
    if training.compile:
        raise UserError("training.compile does not go with differential privacy; set compile: false")
    if training.precision == "bfloat16":
        raise UserError(
            "with differential privacy gradients are computed in float32, where a clipped norm is what it says; leave "
            "precision at auto"
        )


def noise_source(dp: DpConfig, training: TrainingConfig, state_folder: Path) -> NoiseSource:
    """Return where the noise of a run comes from."""
    return seeded_source(training.seed) if dp.noise == "seeded" else secret_source(state_folder)


def private_loop(
    part: TrainablePart,
    blocks: Blocks,
    training: TrainingConfig,
    dp: DpConfig,
    source: NoiseSource,
    releases: Releases,
) -> PrivateTrainingLoop:
    """Return the loop of a private run with the least noise that its budget allows."""
    from .loop import PrivateTrainingLoop

    mechanism = mechanism_for(dp, training, len(blocks), releases.history)
    in_float32 = training.model_copy(update={"precision": "float32"})
    return PrivateTrainingLoop(part, blocks, in_float32, dp, mechanism, source)
