"""Selection of trainable parameters: all, the feed-forward networks, or those that match a pattern."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ...core.errors import UserError, closest, unknown_name
from ...core.hooks.architectures import architecture_of
from ...core.hooks.manager import PluginManager, installed_plugins
from ...core.hooks.training import TrainablePart, Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trainer_for(trains: str, plugins: PluginManager) -> Trainer:
    """Return a trainer by name, or a trainer of the parameters that match a shell-style pattern.

    Raises `UserError` if `trains` is neither a trainer nor a pattern.
    """
    trainers = plugins.offers(Trainer)
    if trains in trainers:
        return trainers[trains]
    if not any(mark in trains for mark in "*?[.,"):
        raise UserError(
            f"{unknown_name('trainer', trains, trainers, listed_as='installed')}; "
            "or give a pattern of tensor names such as 'model.layers.*.self_attn.*'"
        )
    patterns = tuple(part.strip() for part in trains.split(",") if part.strip())
    return Trainer(
        name=trains,
        summary="the tensors that match a pattern",
        prepare=lambda context: matching_parameters(context.model, patterns),
    )


def changeable_tensors(trains: str, names: Iterable[str], model_type: str) -> set[str]:
    """Return the names of the tensors that a trainer or pattern can change.

    Raises `UserError` if `trains` is neither a trainer nor a pattern.
    """
    plugins = installed_plugins()
    trainer = trainer_for(trains, plugins)
    if trainer.name not in plugins.offers(Trainer):
        patterns: tuple[str, ...] = tuple(part.strip() for part in trains.split(",") if part.strip())
    elif trainer.changes == "feed_forward":
        patterns = architecture_of(model_type).feed_forward
    else:
        patterns = ("*",)
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def all_parameters(model: PreTrainedModel) -> TrainablePart:
    """Make every parameter trainable."""
    return matching_parameters(model, ("*",))


def feed_forward_parameters(model: PreTrainedModel) -> TrainablePart:
    """Make only the feed-forward networks trainable; raises `UserError` for an unknown model family."""
    family = architecture_of(model.config.model_type)
    return matching_parameters(model, family.feed_forward)


def matching_parameters(model: PreTrainedModel, patterns: Iterable[str]) -> TrainablePart:
    """Freeze all parameters but those whose names match one of the patterns.

    Raises `UserError` if no parameter matches.
    """
    patterns = tuple(patterns)
    trainable = {}
    names = []
    for name, parameter in model.named_parameters():
        names.append(name)
        is_trainable = any(fnmatchcase(name, pattern) for pattern in patterns)
        parameter.requires_grad_(is_trainable)
        if is_trainable:
            trainable[name] = parameter
    if not trainable:
        guess = closest(patterns[0], names) or names[0]
        raise UserError(
            f"no tensor matches '{', '.join(patterns)}'; the model has {len(names)} tensors, such as '{guess}'"
        )
    return TrainablePart(model, trainable)
