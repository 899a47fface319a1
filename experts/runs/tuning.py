"""Setting up the training of a whole generalist: a mixture's router, a finished mixture, stitches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...core.artefacts.files import refuse_existing
from ...core.artefacts.layout import Layout, check_name, require_free
from ...core.artefacts.lineage import manifest_path, read_manifest
from ...core.config.settings import ProjectConfig, TrainingConfig
from ...core.errors import UserError
from ...core.hooks.manager import installed_plugins
from ...core.hooks.options import parse_options
from ...core.hooks.training import Trainer
from ...core.models.loading import check_loadable, max_positions
from ..text.corpora import domain_config
from .branching import parent_digests, write_run
from .specification import RunSpec, read_run
from .trainable import trainer_for


def require_same(
    folder: Path,
    base: str | None,
    trains: str | None,
    domains: Sequence[str],
    options: Mapping[str, Any],
    training: TrainingConfig,
) -> None:
    """Raise `UserError` where an unfinished tuning is another than the one that is asked for; None and nothing ask nothing."""
    begun = read_run(folder)
    asked: dict[str, tuple[Any, Any]] = {"--from": (base, begun.base), "--trains": (trains, begun.trains)}
    asked["--domains"] = (",".join(domains) or None, ",".join(begun.domains))
    asked["--option"] = (dict(options) or None, dict(begun.options))
    for key, value in training.model_dump(exclude_unset=True).items():
        asked[f"training.{key}"] = (value, begun.training.model_dump().get(key))
    for what, (now, then) in asked.items():
        if now is not None and now != then:
            raise UserError(
                f"an unfinished tuning '{folder.name}' is there, with {what} {then}, not {now}; go on with `expertctl tune "
                f"{folder.name}`, or begin again with --force"
            )


def start_tuning(
    layout: Layout,
    project: ProjectConfig,
    name: str,
    *,
    base: str,
    trains: str,
    domains: Sequence[str],
    options: Mapping[str, Any],
    training: TrainingConfig,
    force: bool = False,
) -> Path:
    """Set up the run of a generalist in `generalists/NAME` and return its folder.

    Raises `UserError` when the base is missing, a name is unknown, or the generalist exists.
    """
    check_name(name, "a generalist")
    folder = layout.generalists / name
    require_free(layout, name, folder)
    refuse_existing(folder, force=force, what="generalist")
    start = layout.artefact(base)
    if start == folder:
        raise UserError(f"'{name}' cannot be trained into itself; choose another name for what comes of it")
    trainer = trainer_for(trains, installed_plugins())
    _require_tunable(start, trainer)
    check_loadable(start)
    if not domains:
        raise UserError("say what text to train on: --domains A,B")
    for domain in domains:
        domain_config(project, domain)
    chosen = parse_options(trainer.options, options, f"trainer '{trainer.name}'")
    if trainer.require is not None:
        trainer.require(start, chosen, domains)
    settings = project.training_of(training)
    if settings.schedule_begin is None:
        settings = settings.model_copy(update={"schedule_begin": 0.0})
    if settings.sequence_length > max_positions(start):
        raise UserError(
            f"training.sequence_length is {settings.sequence_length}, and '{base}' looks at {max_positions(start)} "
            "tokens at most; lower it"
        )
    spec = RunSpec(
        kind="generalist",
        name=name,
        domains=tuple(domains),
        training=settings,
        trains=trains,
        options=dict(options),
        parents=parent_digests(layout, {"seed": 1.0}, base),
        base=base,
    )
    write_run(layout, folder, spec, force=force)
    return folder


def _require_tunable(start: Path, trainer: Trainer) -> None:
    """Raise `UserError` for what is no whole model, and for a trainer whose outcome is none."""
    manifest = read_manifest(start) if manifest_path(start) is not None else None
    if manifest is not None and manifest.kind == "expert":
        raise UserError(
            f"'{start.name}' is an expert, and whole models are tuned; branch a new one from it: `expertctl branch NAME "
            f"--from {start.name}`"
        )
    if trainer.makes == "generalist":
        return
    if trainer.restore is not None:
        raise UserError(
            f"trainer '{trainer.name}' trains an expert; use it with `expertctl branch NAME --trains {trainer.name}`"
        )
    kind = manifest.config.get("kind") if manifest is not None else None
    if kind in ("ensemble", "stitched"):
        raise UserError(
            f"'{start.name}' is of kind {kind} and holds several models, and trainer '{trainer.name}' trains one; name another with --from"
        )
