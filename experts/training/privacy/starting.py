"""Construction of a private run's noise source and training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....core.config.settings import DpConfig, TrainingConfig
from ....core.hooks.training import TrainablePart
from .accounting import mechanism_for
from .noise import NoiseSource, secret_source, seeded_source
from .releases import Releases

if TYPE_CHECKING:
    from pathlib import Path

    from ....core.text.token_store import Blocks
    from .loop import PrivateTrainingLoop


def noise_source(dp: DpConfig, training: TrainingConfig, state_folder: Path) -> NoiseSource:
    """Return the noise source of a run."""
    return seeded_source(training.seed) if dp.noise == "seeded" else secret_source(state_folder)


def private_loop(
    part: TrainablePart,
    blocks: Blocks,
    training: TrainingConfig,
    dp: DpConfig,
    source: NoiseSource,
    releases: Releases,
) -> PrivateTrainingLoop:
    """Return the loop of a private run, with the least noise that its budget permits."""
    from .loop import PrivateTrainingLoop

    mechanism = mechanism_for(dp, training, len(blocks), releases.history)
    in_float32 = training.model_copy(update={"precision": "float32"})
    return PrivateTrainingLoop(part, blocks, in_float32, dp, mechanism, source)
