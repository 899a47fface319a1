"""What a run trains: all parameters, the feed-forward networks, or those that match a pattern; by which objective and
optimiser."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.config.settings import TrainingConfig
from ...core.errors import UserError, closest, unknown_name
from ...core.hooks.manager import installed_plugins
from ...core.hooks.options import parse_options
from ...core.hooks.steps import Objective, Optimiser
from ...core.hooks.training import TrainablePart, Trainer
from ...core.models.architectures import architecture_of
from ...core.models.stored_names import StoredNames

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
        prepare=lambda context: _matching_files(context.model, _patterns(trains)),
        reads_weights=False,
    )


def _patterns(trains: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in trains.split(",") if part.strip())


def makes_adapter(trains: str) -> bool:
    """Return whether a run of a trainer makes an adapter of the seed instead of new tensors."""
    return trainer_for(trains).makes == "adapter"


def changeable_tensors(trains: str, names: Iterable[str], model_type: str) -> set[str]:
    """Return the names of the tensors that a trainer or pattern can change; none for a trainer of adapters.

    Raises `UserError` if `trains` is neither a trainer nor a pattern.
    """
    trainer, tensors = trainer_for(trains), tuple(names)
    if trainer.makes == "adapter":
        return set()
    patterns = architecture_of(model_type, tensors).feed_forward if trainer.changes == "feed_forward" else ("*",)
    if trainer.name not in installed_plugins().offers(Trainer):
        patterns = _patterns(trains)
    return {name for name in tensors if _matches(name, patterns)}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def all_parameters(model: PreTrainedModel) -> TrainablePart:
    """Make every parameter trainable."""
    return matching_parameters(model, ("*",))


def matching_parameters(model: PreTrainedModel, patterns: Iterable[str]) -> TrainablePart:
    """Freeze all parameters but those whose names in memory match one of the patterns.

    Raises `UserError` if no parameter matches.
    """
    patterns = tuple(patterns)
    names = [name for name, _ in model.named_parameters()]
    trained = {name for name in names if _matches(name, patterns)}
    if not trained:
        raise _no_match(patterns, names)
    return _train_only(model, trained)


def _matching_files(model: PreTrainedModel, patterns: Sequence[str]) -> TrainablePart:
    """Freeze all parameters but those whose names, in memory or in files, match one of the patterns."""
    stored = StoredNames(model)
    names = {name: stored.of(name) for name, _ in model.named_parameters()}
    trained = {
        name
        for name, file_names in names.items()
        if _matches(name, patterns) or all(_matches(file_name, patterns) for file_name in file_names)
    }
    if not trained:
        raise _no_match(patterns, list(names))
    return _train_only(model, trained)


def feed_forward_parameters(model: PreTrainedModel) -> TrainablePart:
    """Freeze all parameters outside the feed-forward networks; raises `UserError` if those are not known.

    Names in files count, because the networks of delivered experts are recognised by them.
    """
    stored = StoredNames(model)
    names = {name: stored.of(name) for name, _ in model.named_parameters()}
    tensors = [file_name for file_names in names.values() for file_name in file_names]
    patterns = architecture_of(model.config.model_type, tensors).feed_forward
    trained = {
        name for name, file_names in names.items() if all(_matches(file_name, patterns) for file_name in file_names)
    }
    if not trained:
        raise _no_match(patterns, list(names))
    return _train_only(model, trained)


def _train_only(model: PreTrainedModel, names: Collection[str]) -> TrainablePart:
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    return TrainablePart(model, {name: parameter for name, parameter in parameters.items() if name in names})


def require_changeable(trains: str, names: Sequence[str], model_type: str) -> None:
    """Raise `UserError` if a trainer or a pattern can change none of a model's tensors."""
    if trains not in installed_plugins().offers(Trainer):
        trainer_for(trains)
        for pattern in _patterns(trains):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise _no_match((pattern,), names)
        return
    if changeable_tensors(trains, names, model_type) or makes_adapter(trains):
        return
    layer = next((name for name in names if ".0." in name), names[0])
    raise UserError(
        f"trainer '{trains}' changes the feed-forward networks, and those of '{model_type}' are not known; train all "
        f"tensors, or the ones that a pattern matches (such as '{re.sub(r'[.]0[.]', '.*.', layer, count=1)}')"
    )


def require_whole_parameters(trains: str, model: Path, names: Collection[str]) -> None:
    """Raise `UserError` if a pattern matches only some of the tensors that are one parameter in memory.

    `names` are the tensors in the files of the model.
    """
    if trains in installed_plugins().offers(Trainer):
        return
    patterns = _patterns(trains)
    for group in StoredNames.of_folder(model).groups:
        stored = [name for name in group.stored if name in names]
        matched = [name for name in stored if _matches(name, patterns)]
        if matched and len(matched) < len(stored):
            other = next(name for name in stored if name not in matched)
            raise UserError(
                f"'{trains}' matches tensor '{matched[0]}', but not '{other}', and both are trained as one parameter "
                f"('{group.memory[0]}'); use a pattern that matches all of them or none"
            )


def _no_match(patterns: Sequence[str], names: Sequence[str]) -> UserError:
    guess = closest(patterns[0], names) or names[0]
    return UserError(
        f"no tensor matches '{', '.join(patterns)}'; the model has {len(names)} tensors, such as '{guess}'"
    )


# --- objective and optimiser ---


def chosen_objective(training: TrainingConfig) -> tuple[Objective, Any]:
    """Return the objective of settings and its options; raises `UserError` for an unknown one or wrong options."""
    objective = installed_plugins().offer(Objective, training.objective)
    options = parse_options(objective.options, training.objective_options, f"objective '{objective.name}'")
    return objective, options


def models_of_objective(training: TrainingConfig) -> tuple[str, ...]:
    """Return the names of the models that an objective learns from."""
    objective, options = chosen_objective(training)
    return objective.models(options) if objective.models is not None else ()


def models_of_trainer(trains: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the other models that a trainer reads; raises `UserError` for wrong options."""
    trainer = trainer_for(trains)
    if trainer.models is None:
        return ()
    return trainer.models(parse_options(trainer.options, options, f"trainer '{trainer.name}'"))


def models_read(trains: str, options: Mapping[str, Any], training: TrainingConfig) -> tuple[str, ...]:
    """Return the names of the other models that a run reads: those of its objective, and of its trainer."""
    return tuple(dict.fromkeys((*models_of_objective(training), *models_of_trainer(trains, options))))


def require_steps(training: TrainingConfig, tokenizer_folder: Path) -> None:
    """Raise `UserError` for an objective or an optimiser that cannot be used."""
    objective, options = chosen_objective(training)
    if objective.require is not None:
        objective.require(tokenizer_folder, options)
    chosen_optimiser(training)


def chosen_optimiser(training: TrainingConfig) -> tuple[Optimiser, Any]:
    """Return the optimiser of settings and its options; raises `UserError` where it cannot be used."""
    optimiser = installed_plugins().offer(Optimiser, training.optimiser)
    options = parse_options(optimiser.options, training.optimiser_options, f"optimiser '{optimiser.name}'")
    if optimiser.require is not None:
        optimiser.require()
    return optimiser, options
