"""Selection of trainable parameters: all, the feed-forward networks, or those that match a pattern."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ...core.errors import UserError, closest, unknown_name
from ...core.hooks.architectures import architecture_of
from ...core.hooks.manager import installed_plugins
from ...core.hooks.training import TrainablePart, Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trainer_for(trains: str) -> Trainer:
    """Return a trainer by name, or a trainer of the parameters that match a shell-style pattern.

    Raises `UserError` if `trains` is neither a trainer nor a pattern.
    """
    trainers = installed_plugins().offers(Trainer)
    if trains in trainers:
        return trainers[trains]
    if not any(mark in trains for mark in "*?[.,"):
        raise UserError(
            f"{unknown_name('trainer', trains, trainers, listed_as='installed')}; "
            "or give a pattern of tensor names such as 'model.layers.*.self_attn.*'"
        )
    return Trainer(
        name=trains,
        summary="the tensors that match a pattern",
        prepare=lambda context: matching_parameters(context.model, _patterns(trains)),
    )


def _patterns(trains: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in trains.split(",") if part.strip())


def changeable_tensors(trains: str, names: Iterable[str], model_type: str) -> set[str]:
    """Return the names of the tensors that a trainer or pattern can change.

    Raises `UserError` if `trains` is neither a trainer nor a pattern.
    """
    trainer = trainer_for(trains)
    patterns = architecture_of(model_type).feed_forward if trainer.changes == "feed_forward" else ("*",)
    if trainer.name not in installed_plugins().offers(Trainer):
        patterns = _patterns(trains)
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def all_parameters(model: PreTrainedModel) -> TrainablePart:
    """Make every parameter trainable."""
    return matching_parameters(model, ("*",))


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
