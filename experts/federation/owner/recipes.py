"""Recipes by the names that people ask for them under."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....core.config.settings import TrainingConfig, checked
from ....core.errors import UserError
from ....core.hooks.manager import installed_plugins
from ....core.hooks.options import parse_options
from ...runs.trainable import trainer_for
from ..protocol.requests import Recipe
from .owner_privacy import checked_privacy

NAMES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "flexolmo": ("flexolmo", {"embedding": "none"}),
    "btm": ("all", {}),
}
"""Name -> (trainer, options). Owners of FlexOlmo experts have no public text, and a row that begins at their own text's
mean would tell of it; so the row begins at random unless the coordinator asks otherwise."""


def recipe_of(
    name: str,
    options: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    privacy: Mapping[str, Any] | None = None,
) -> Recipe:
    """Return a recipe by its name, or by that of a trainer; raises `UserError` for what no owner could carry out."""
    trains, usual = NAMES.get(name, (name, {}))
    trainer = trainer_for(trains, installed_plugins())
    if trainer.makes != "expert":
        raise UserError(
            f"trainer '{trainer.name}' makes no expert; recipes: {', '.join(NAMES)}, or a trainer of experts"
        )
    chosen = {**usual, **(options or {})}
    parse_options(trainer.options, chosen, f"trainer '{trainer.name}'")
    checked(TrainingConfig, dict(training or {}), "the training of a recipe")
    asked = checked_privacy(privacy) if privacy is not None else None
    return Recipe(trains, chosen, dict(training or {}), asked)
