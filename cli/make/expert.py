"""`expertctl expert`: add, remove or replace experts of a generalist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..context import Session, pass_session
from ..group import Group
from ..options import flag, option, path, with_options
from ..summaries import artefact_content, artefact_line

if TYPE_CHECKING:
    from ...core.hooks.text import ValidationText
    from ...core.manifests.manifest import Manifest
    from ...merge.mixture.changing import Change

with_output = with_options(
    option(
        "-m, --model",
        "GENERALIST",
        "Generalist to change. It is not modified; the result is a new generalist.",
        required=True,
    ),
    path("-o, --output", "NAME", "Name of the new generalist in this workspace, or a folder.", required=True),
    flag("--allow-licences", "Continue although licences are incompatible."),
    flag("--force", "Replace existing output."),
    flag("--resume", "Resume an interrupted change."),
)


retrain_option = flag("--retrain", "Stitched models: continue training the stitches with their previous settings.")


@click.group("expert", cls=Group)
def command() -> None:
    """Add, remove or replace experts of a generalist.

    No training is needed. The result has the same tensors as a merge of these experts, unless the generalist was
    trained jointly since; the notes then say which tensors were trained on which experts' text.
    """


@command.command("remove", example="expertctl expert remove news -m campus -o campus-without-news")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@retrain_option
@with_output
@pass_session
def remove(session: Session, /, names: tuple[str, ...], **options: Any) -> None:
    """Remove experts from a generalist."""
    _change(session, remove=names, **options)


@command.command("add", example="expertctl expert add law -m campus -o campus-with-law")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@retrain_option
@with_output
@pass_session
def add(session: Session, /, names: tuple[str, ...], **options: Any) -> None:
    """Add finished experts (names or folders) to a generalist."""
    _change(session, add={folder.name: folder for folder in map(session.artefact, names)}, **options)


@command.command("replace", example="expertctl expert replace law -m campus -o campus-2 --by law-2027")
@click.argument("name", metavar="NAME")
@option("--by", "EXPERT", "Expert to use instead, under the same name.", required=True)
@with_output
@pass_session
def replace(session: Session, /, name: str, by: str, **options: Any) -> None:
    """Replace an expert of a generalist by another one."""
    _change(session, replace={name: session.artefact(by)}, **options)


def _change(
    session: Session,
    *,
    model: str,
    output: Path,
    allow_licences: bool,
    force: bool,
    resume: bool,
    retrain: bool = False,
    remove: tuple[str, ...] = (),
    add: Mapping[str, Path] | None = None,
    replace: Mapping[str, Path] | None = None,
) -> None:
    from ...core.manifests.records import record_as_json
    from ...merge.merging import MergeRun
    from ...merge.mixture.changing import Change
    from ...merge.remaking.expert_changes import change_experts

    folder = session.artefact(model)
    layout = session.layout()
    target = layout.generalist(output) if layout is not None else output
    change = Change(tuple(dict.fromkeys(remove)), add or {}, replace or {})
    start = target
    if retrain:
        if layout is None or target.parent != layout.generalists:
            raise click.UsageError("--retrain needs a generalist of this workspace; give its name with -o")
        _require_stitches(folder)
        start = layout.generalists / f"{target.name}-untrained"

    def validation() -> Sequence[ValidationText]:
        data = session.open().data
        return data.validation(data.trained_domains(change.joining.values()))

    with session.progress() as reporter:
        run = MergeRun(force=force, resume=resume, allow_licences=allow_licences, reporter=reporter)
        manifest = change_experts(
            folder, start, change, layout=layout, run=run, validation=validation if layout is not None else tuple
        )
    if retrain:
        manifest = _retrained(session, target.name, start, change, force)
    session.finish(
        {
            **artefact_content(target, manifest),
            "experts": list(manifest.experts),
            "history": [record_as_json(event) for event in manifest.history],
        },
        artefact_line(target, manifest),
        f"experts: {', '.join(manifest.experts)}",
    )


def _require_stitches(folder: Path) -> None:
    from ...core.errors import UserError
    from ...core.manifests.manifest import read_manifest

    merged = read_manifest(folder).merged
    if merged is None or merged.kind != "stitched":
        raise UserError(f"{folder} is not a stitched model, which --retrain needs; omit --retrain")
    if merged.run is None:
        raise UserError(f"the stitches of {folder} were never trained; omit --retrain, then run `expertctl tune`")


def _retrained(session: Session, name: str, start: Path, change: Change, force: bool) -> Manifest:
    """Train the stitches of a changed model on its current experts' text, with the previous settings."""
    from ...core.manifests.manifest import read_manifest
    from ...experts.runs.tuning import TuningSettings

    merged = read_manifest(start).merged
    assert merged is not None
    assert merged.run is not None, "`_require_stitches` refuses stitches that were never trained"
    spec = merged.run
    workspace = session.open()
    new_experts = [read_manifest(folder) for folder in (*change.add.values(), *change.replace.values())]
    removed_domains = {
        domain
        for name_removed in (*change.remove, *change.replace)
        for domain in workspace.data.trained_domains([workspace.experts / name_removed])
    }
    domains = [domain for domain in spec.domains if domain not in removed_domains]
    domains += [domain for expert in new_experts for domain in expert.domains if domain not in domains]
    training = spec.training.model_dump(mode="json", exclude_none=True)
    settings = TuningSettings(spec.trains, domains, dict(spec.options), training)
    with session.progress(name) as progress:
        return workspace.tune(name, start.name, settings, force=force, reporter=progress)
