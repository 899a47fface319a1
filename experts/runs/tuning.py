"""Setting up the tuning of a generalist: a mixture's router, a whole mixture, stitches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.artefacts.files import refuse_existing
from ...core.artefacts.layout import Layout, check_name, require_free
from ...core.config.settings import ProjectConfig, TrainingConfig, validate_settings
from ...core.errors import UserError
from ...core.hooks.options import parse_options
from ...core.hooks.training import Trainer
from ...core.manifests.manifest import find_manifest
from ...core.manifests.run import RunSpec, read_run
from ...core.models.loading import check_loadable, max_positions, tokenizer_folder
from ..text.run_text import require_run_text
from .branching import parent_digests, write_run
from .trainable import models_read, require_steps, trainer_for


@dataclass(frozen=True)
class TuningSettings:
    """Trainable parameters, domains and training settings of a tuning."""

    trains: str | None = None
    """Trainable parameters: `router` (the default), `mixture`, another trainer of generalists, or a pattern of names."""
    domains: Sequence[str] = ()
    """Domains to train on, in equal shares."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the trainer."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Training settings that differ from the project's."""

    def checked_training(self) -> TrainingConfig:
        """Return the training settings; raises `UserError` if one is invalid."""
        return validate_settings(TrainingConfig, self.training, "training")


def require_same(folder: Path, base: str | None, settings: TuningSettings) -> None:
    """Raise `UserError` if an unfinished tuning has other settings than requested; None or empty means any."""
    spec = read_run(folder)
    pairs: dict[str, tuple[Any, Any]] = {
        "--from": (base, spec.base),
        "--trains": (settings.trains, spec.trains),
        "--domains": (",".join(settings.domains) or None, ",".join(spec.domains)),
        "--option": (dict(settings.options) or None, dict(spec.options)),
    }
    for key, value in settings.checked_training().model_dump(exclude_unset=True).items():
        pairs[f"training.{key}"] = (value, spec.training.model_dump().get(key))
    for setting, (requested, existing) in pairs.items():
        if requested is not None and requested != existing:
            raise UserError(
                f"the unfinished tuning '{folder.name}' has {setting} {existing}, not {requested}; resume it with "
                f"`expertctl tune {folder.name}`, or start over with --force"
            )


def start_tuning(
    layout: Layout, project: ProjectConfig, name: str, base: str, settings: TuningSettings, *, force: bool = False
) -> None:
    """Set up the run of a generalist in `generalists/NAME`.

    Raises `UserError` if the base is missing, a name is unknown, or the generalist exists.
    """
    trains, domains = settings.trains or "router", tuple(settings.domains)
    training = project.training_of(settings.checked_training())
    check_name(name, "a generalist")
    folder = layout.generalists / name
    require_free(layout, name, folder)
    refuse_existing(folder, force=force, what="generalist")
    start = layout.artefact(base)
    if start == folder:
        raise UserError(f"'{name}' cannot be both the base and the result; choose another name for the result")
    trainer = trainer_for(trains)
    _require_tunable(start, trainer)
    check_loadable(start)
    if not domains:
        raise UserError("no domains to train on; give --domains A,B")
    require_run_text(project, domains, training)
    for domain in training.annealing.domains if training.annealing is not None else ():
        if domain not in domains:  # trainers of generalists may keep parts apart by domain
            raise UserError(
                f"training.annealing: '{domain}' is not among the domains of the tuning; add it to --domains"
            )
    parsed_options = parse_options(trainer.options, settings.options, f"trainer '{trainer.name}'")
    if trainer.require is not None:
        trainer.require(start, parsed_options, domains)
    require_steps(training, tokenizer_folder(start))
    if training.schedule_begin is None:
        training = training.model_copy(update={"schedule_begin": 0.0})
    if training.sequence_length > max_positions(start):
        raise UserError(
            f"training.sequence_length {training.sequence_length} exceeds the {max_positions(start)} positions of "
            f"'{base}'; lower it"
        )
    spec = RunSpec(
        kind="generalist",
        name=name,
        domains=domains,
        training=training,
        trains=trains,
        options=dict(settings.options),
        parents=parent_digests(layout, {"seed": 1.0}, base, models_read(trains, settings.options, training)),
        base=base,
    )
    write_run(layout, folder, spec, force=force)


def _require_tunable(start: Path, trainer: Trainer) -> None:
    """Raise `UserError` if the base is not a full model, or if the trainer does not produce one."""
    manifest = find_manifest(start)
    if manifest is not None and manifest.kind == "expert":
        raise UserError(
            f"'{start.name}' is an expert, and only full models can be tuned; branch a new expert from it: "
            f"`expertctl branch NAME --from {start.name}`"
        )
    if trainer.makes == "generalist":
        return
    if trainer.restore is not None or trainer.makes == "adapter":
        raise UserError(
            f"trainer '{trainer.name}' trains an expert; use it with `expertctl branch NAME --trains {trainer.name}`"
        )
    kind = manifest.merged.kind if manifest is not None and manifest.merged is not None else None
    if kind in ("ensemble", "stitched"):
        raise UserError(
            f"'{start.name}' is of kind {kind} and holds several models, but trainer '{trainer.name}' trains a single "
            "model; give another base with --from"
        )
