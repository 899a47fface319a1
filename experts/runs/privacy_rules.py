"""Checks of the settings of a run with differential privacy."""

from __future__ import annotations

from ...core.artefacts.versions import require_privacy_extra
from ...core.config.settings import ExpertConfig, TrainingConfig
from ...core.errors import UserError
from ...core.hooks.training import Trainer


def require_opacus() -> None:
    """Raise `UserError` if Opacus is not installed."""
    require_privacy_extra("opacus", "differential privacy needs Opacus")


def check_private(expert: ExpertConfig, training: TrainingConfig, trainer: Trainer) -> None:
    """Raise `UserError` for settings that leak private text without noise or do not work with DP-SGD."""
    if expert.dp is None:
        return
    require_opacus()
    if expert.from_ == "auto":
        raise UserError(
            "`from: auto` computes weights from the private text and writes them to the manifest; with differential "
            "privacy start from the seed, or give weights"
        )
    if trainer.uses_text and not trainer.private_text:
        raise UserError(
            f"trainer '{trainer.name}' reads the text before training and does not declare that it does so privately; "
            "use another trainer, or train without differential privacy"
        )
    if training.compile:
        raise UserError("training.compile does not work with differential privacy; set compile: false")
    if training.precision == "bfloat16":
        raise UserError("differential privacy requires float32 gradients for exact clipping; set precision: auto")
