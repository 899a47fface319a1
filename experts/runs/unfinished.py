"""Unfinished runs and merges of a workspace, with the commands that resume them."""

from __future__ import annotations

from ...core.artefacts.files import unfinished_names, unfinished_sibling
from ...core.artefacts.layout import Layout
from ...core.config.settings import ProjectConfig
from ...core.errors import UserError
from ...core.manifests.run import RUN_FILE, is_finished, read_run
from ...core.remote.download import unfinished_source
from .baselines import DENSE, DENSE_SAME_BATCH

_BASELINES = {DENSE: "dense", DENSE_SAME_BATCH: "dense --same-batch"}


def unfinished(layout: Layout, project: ProjectConfig) -> dict[str, str]:
    """Return name -> resume command for every unfinished run and merge."""
    commands = {layout.seed: _seed_command(layout, project)}
    for folder, command in (
        (layout.experts, "train {name}"),
        (layout.generalists, "tune {name}"),
        (layout.baselines, "baseline {baseline}"),
    ):
        for run in (path.parent for path in folder.glob(f"*/{RUN_FILE}")):
            baseline = _BASELINES.get(run.name, "random-split")
            commands[run] = "expertctl " + command.format(name=run.name, baseline=baseline)
    runs = {
        folder.name: command
        for folder, command in sorted(commands.items())
        if (folder / RUN_FILE).is_file() and not is_finished(folder)
    }
    merges = {name: f"expertctl merge {name} --resume" for name in unfinished_names(layout.generalists)}
    return runs | merges | _pulls(layout)


def _pulls(layout: Layout) -> dict[str, str]:
    """Return the interrupted pulls."""
    folders = [
        layout.seed,
        *(parent / name for parent in (layout.experts, layout.generalists) for name in unfinished_names(parent)),
    ]
    urls = {folder.name: unfinished_source(unfinished_sibling(folder)) for folder in folders}
    return {name: f"expertctl pull {url} {name}" for name, url in urls.items() if url is not None}


def _seed_command(layout: Layout, project: ProjectConfig) -> str:
    """Return the command that resumes an unfinished seed, with its original options."""
    if not (layout.seed / RUN_FILE).is_file():
        return "expertctl seed"
    try:
        preset = read_run(layout.seed).preset
    except UserError:
        return "expertctl seed --force"  # without its settings it cannot be resumed
    if preset is not None and preset != project.seed.preset:
        return f"expertctl seed --preset {preset}"
    return "expertctl seed --scratch" if project.seed.from_ is not None else "expertctl seed"
