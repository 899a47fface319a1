"""Setting up the training of a whole generalist: a mixture's router, a finished mixture, stitches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.config import ProjectConfig, TrainingConfig
from ..core.errors import UserError
from ..core.files import refuse_existing
from ..core.loading import check_loadable, max_positions
from ..core.options import parse_options
from ..core.plugin_manager import installed_plugins
from ..core.workspace import Layout, check_name, require_free
from .branching import parent_digests, write_run
from .corpora import domain_config
from .runs import RunSpec, read_run
from .trainable import trainer_for


def require_same(
    folder: Path, base: str | None, trains: str | None, domains: Sequence[str], options: Mapping[str, Any]
) -> None:
    """Raise `UserError` where an unfinished tuning is another than the one that is asked for; None and nothing ask nothing."""
    begun = read_run(folder)
    asked: dict[str, tuple[Any, Any]] = {"from": (base, begun.base), "trains": (trains, begun.trains)}
    asked["domains"] = (",".join(domains) or None, ",".join(begun.domains))
    asked["option"] = (dict(options) or None, dict(begun.options))
    for what, (now, then) in asked.items():
        if now is not None and now != then:
            raise UserError(
                f"an unfinished tuning '{folder.name}' is there, with --{what} {then}, not {now}; go on with `expertctl tune "
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
    check_loadable(start)
    if not domains:
        raise UserError("say what text to train on: --domains A,B")
    for domain in domains:
        domain_config(project, domain)
    trainer = trainer_for(trains, installed_plugins())
    parse_options(trainer.options, options, f"trainer '{trainer.name}'")
    if trainer.require is not None:
        trainer.require(start)
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
