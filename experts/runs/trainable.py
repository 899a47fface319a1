"""Selection of trainable parameters: all, the feed-forward networks, or those that match a pattern."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
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
    trainer, tensors = trainer_for(trains), tuple(names)
    patterns = architecture_of(model_type, tensors).feed_forward if trainer.changes == "feed_forward" else ("*",)
    if trainer.name not in installed_plugins().offers(Trainer):
        patterns = _patterns(trains)
    return {name for name in tensors if any(fnmatchcase(name, pattern) for pattern in patterns)}


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
        raise _no_match(patterns, names)
    return TrainablePart(model, trainable)


def require_changeable(trains: str, names: Sequence[str], model_type: str) -> None:
    """Raise `UserError` if a trainer or pattern can change none of a model's tensors."""
    if changeable_tensors(trains, names, model_type):
        return
    if trains not in installed_plugins().offers(Trainer):
        raise _no_match(_patterns(trains), names)
    layer = next((name for name in names if ".0." in name), names[0])
    raise UserError(
        f"trainer '{trains}' changes the feed-forward networks, and those of '{model_type}' are not known; train all "
        f"tensors, or the ones that a pattern matches (such as '{re.sub(r'[.]0[.]', '.*.', layer, count=1)}')"
    )


def _no_match(patterns: Sequence[str], names: Sequence[str]) -> UserError:
    guess = closest(patterns[0], names) or names[0]
    return UserError(
        f"no tensor matches '{', '.join(patterns)}'; the model has {len(names)} tensors, such as '{guess}'"
    )
