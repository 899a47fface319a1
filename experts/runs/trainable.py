"""Which parameters of a model train: everything, a family's feed-forwards, or what a pattern names."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ...core.errors import UserError, closest
from ...core.hooks.manager import PluginManager, installed_plugins
from ...core.hooks.training import TrainablePart, Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trainer_for(trains: str, plugins: PluginManager) -> Trainer:
    """Return the trainer of that name, or one that trains what the shell-style pattern matches.

    Raises `UserError` for a word that is neither.
    """
    trainers = plugins.trainers()
    if trains in trainers:
        return trainers[trains]
    if not any(mark in trains for mark in "*?[.,"):
        guess = closest(trains, trainers)
        hint = f" (did you mean '{guess}'?)" if guess else ""
        raise UserError(
            f"no trainer '{trains}'{hint}; installed: {', '.join(sorted(trainers))}; "
            "or give a pattern of tensor names such as 'model.layers.*.self_attn.*'"
        )
    patterns = tuple(part.strip() for part in trains.split(",") if part.strip())
    return Trainer(
        name=trains,
        summary="the tensors that a pattern matches",
        prepare=lambda model, options: matching_parameters(model, patterns),
    )


def changeable(trains: str, names: Iterable[str], model_type: str) -> set[str]:
    """Return which of a model's tensors a trainer, or a pattern, can change; raises `UserError` for neither."""
    plugins = installed_plugins()
    trainer = trainer_for(trains, plugins)
    if trainer.name not in plugins.trainers():
        patterns: tuple[str, ...] = tuple(part.strip() for part in trains.split(",") if part.strip())
    elif trainer.changes == "feed_forward":
        patterns = plugins.architecture_of(model_type).feed_forward
    else:
        patterns = ("*",)
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def all_parameters(model: PreTrainedModel, options: Any) -> TrainablePart:
    """Train every parameter."""
    return matching_parameters(model, ("*",))


def feed_forward_parameters(model: PreTrainedModel, options: Any) -> TrainablePart:
    """Train the feed-forwards only, wherever the model's family keeps them; raises `UserError` if unknown."""
    family = installed_plugins().architecture_of(model.config.model_type)
    return matching_parameters(model, family.feed_forward)


def matching_parameters(model: PreTrainedModel, patterns: Iterable[str]) -> TrainablePart:
    """Freeze all but the parameters whose names match one of the patterns.

    Raises `UserError` when none does.
    """
    wanted = tuple(patterns)
    chosen = {}
    names = []
    for name, parameter in model.named_parameters():
        names.append(name)
        moves = any(fnmatchcase(name, pattern) for pattern in wanted)
        parameter.requires_grad_(moves)
        if moves:
            chosen[name] = parameter
    if not chosen:
        guess = closest(wanted[0], names) or names[0]
        raise UserError(
            f"no tensor matches '{', '.join(wanted)}'; the model has {len(names)}, such as '{guess}'"
        )
    return TrainablePart(model, chosen)
