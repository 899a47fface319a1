"""Which settings a run with differential privacy excludes."""

from __future__ import annotations

from ...core.config.settings import ExpertConfig, TrainingConfig
from ...core.errors import UserError
from ...core.hooks.training import Trainer


def require_opacus() -> None:
    """Raise `UserError` where Opacus is not installed."""
    from importlib.util import find_spec

    if find_spec("opacus") is None:
        raise UserError(
            "differential privacy needs Opacus, which is not installed: pip install 'expertctl[privacy]'"
        )


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
