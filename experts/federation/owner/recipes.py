"""Named recipes for expert requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....core.config.settings import TrainingConfig, validate_settings
from ....core.errors import UserError
from ....core.hooks.options import parse_options
from ...runs.trainable import models_of_trainer, trainer_for
from ..protocol.requests import Recipe
from .owner import check_privacy

NAMES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "flexolmo": ("flexolmo", {"embedding": "none"}),
    "btm": ("all", {}),
}
"""Name -> (trainer, default options). FlexOlmo owners have no public text, and a router row initialised to the mean of their text
would reveal it; so the row is initialised at random unless the coordinator chooses otherwise."""


def recipe_of(
    name: str,
    options: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    privacy: Mapping[str, Any] | None = None,
) -> Recipe:
    """Return a recipe by its name or its trainer's name; raises `UserError` for invalid options or settings."""
    trains, defaults = NAMES.get(name, (name, {}))
    trainer = trainer_for(trains)
    if trainer.makes == "generalist":
        raise UserError(
            f"trainer '{trainer.name}' does not train experts; choose {', '.join(NAMES)}, or a trainer that does"
        )
    chosen = {**defaults, **(options or {})}
    parse_options(trainer.options, chosen, f"trainer '{trainer.name}'")
    if read := models_of_trainer(trains, chosen):
        raise UserError(
            f"trainer '{trainer.name}' reads {', '.join(read)}, which owners do not have; ask with another one"
        )
    validate_settings(TrainingConfig, dict(training or {}), "the training of a recipe")
    if privacy is not None:
        check_privacy(privacy)
    return Recipe(trains, chosen, dict(training or {}), privacy)
