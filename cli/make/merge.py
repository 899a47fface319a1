"""`expertctl merge`: merge experts into a generalist."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import choice, flag, integer, name_list, option, pairs, path
from ..output import Table
from ..parsing import as_dictionary, byte_count, weights
from ..summaries import artefact_content, origin, show_artefact

if TYPE_CHECKING:
    from expertctl.workspace import Workspace

    from ...core.manifests.manifest import Manifest
    from ...merge.merging import MergeRun
    from ...merge.planning.plan import MergePlan


@cli_command("merge", example="expertctl merge forest --method ensemble --experts code,law --option top_k=1")
@click.argument("name", metavar="NAME", required=False)
@option("--method", "METHOD", "Merge method; `expertctl plugins` lists the methods.")
@name_list(
    "--experts", "Experts to merge: names, or folders of models and LoRA adapters. Default: all finished experts."
)
@option(
    "--weights",
    "WEIGHTS",
    "Weights of the experts: uniform, posterior (domain posterior), or a:0.6,b:0.4. Default: uniform.",
    type=weights,
)
@pairs("--option", "options", "Set an option of the method; repeatable.")
@name_list(
    "--fit-on",
    "Domains whose validation text is used for priors, posterior weights and --search. Default: the experts' own domains.",
)
@path(
    "--config",
    "FILE",
    "Merge according to a mergekit configuration file, into -o DIR; needs no workspace.",
    file=True,
    name="file",
)
@path("-o, --output", "DIR", "Output folder. Default: generalists/NAME.")
@choice(
    "--search",
    ["coordinate", "cma"],
    "Search for the weights that predict validation text best, starting from the posterior weights.",
    is_flag=False,
    flag_value="coordinate",
)
@integer("--trials", "Maximum number of merges that a search evaluates. Default: 40.")
@integer("--layer-groups", "Number of weights per expert in a search, spread over the layers. Default: 1.")
@flag("--plan", "Dry run: check everything, show the plan, and stop.", name="plan_only")
@flag(
    "--gate", "Compare the result with the seed, best expert, average and ensemble; exit with status 3 if it is worse."
)
@flag("--self-contained", "Copy the members of a stitched model into its folder instead of referring to them.")
@flag("--resume", "Resume a killed or interrupted merge.")
@flag("--force", "Replace existing output.")
@option("--dtype", "DTYPE", "Dtype of the output: bfloat16, float16, float32, float64. Default: as the seed.")
@option(
    "--tokenizer",
    "POLICY",
    "Policy for different tokenizers: refuse, base, union, or an expert's name. Default: refuse.",
)
@option("--shard-size", "SIZE", "Maximum size of a file, such as 500MB.", type=byte_count, default="5GB")
@option("--device", "DEVICE", "Device for the computation: cpu, cuda, cuda:1.", default="cpu")
@integer("--threads", "Number of tensors to merge at the same time. Default: one per core, up to 4.")
@flag("--allow-unrelated", "Merge models that do not descend from one another.")
@flag("--allow-licences", "Merge models with incompatible licences.")
@flag("--allow-nonfinite", "Merge models that contain NaN or infinity.")
@pass_session
def command(
    session: Session,
    /,
    name: str | None,
    options: dict[str, Any],
    file: Path | None,
    output: Path | None,
    search: str | None,
    trials: int | None,
    layer_groups: int | None,
    plan_only: bool,
    gate: bool,
    self_contained: bool,
    resume: bool,
    force: bool,
    shard_size: int,
    device: str,
    threads: int | None,
    allow_unrelated: bool,
    allow_licences: bool,
    allow_nonfinite: bool,
    **settings: Any,
) -> int:
    """Merge the seed and its experts into a generalist.

    Omitted options default to `merges.NAME` in expertctl.yaml. All checks run before any work starts; with `--plan`,
    the command stops after the checks. With `--config`, it merges according to a mergekit configuration file.
    """
    from ...merge.engine.calculator import EngineSettings
    from ...merge.merging import MergeRun

    run = MergeRun(
        force=force,
        resume=resume,
        allow_unrelated=allow_unrelated,
        allow_licences=allow_licences,
        settings=EngineSettings(threads=threads, device=device, allow_nonfinite=allow_nonfinite),
        shard_bytes=shard_size,
    )
    if self_contained:
        options = as_dictionary((*options.items(), ("self_contained", True)))
    search_settings = {"strategy": search, "trials": trials, "layer_groups": layer_groups}
    settings["options"] = options or None
    settings["search"] = {key: value for key, value in search_settings.items() if value is not None} or None
    if file is not None:
        _refuse_with_file(name, {**settings, "search": search})
        if gate:
            raise click.UsageError("--gate needs experts of a workspace; it cannot be used with --config")
        _merge_file(session, file, output, run, plan_only)
        return 0
    if name is None:
        raise click.UsageError("give the NAME of the merge, or --config FILE with -o DIR")
    workspace = session.open()
    folder = output or workspace.generalists / name
    if plan_only:
        _show_plan(session, workspace.generalists.plan(name, output=output, run=run, **settings), folder)
        return 0
    with session.progress() as reporter:
        manifest = workspace.merge(name, output=output, run=replace(run, reporter=reporter), **settings)
    if not gate:
        show_artefact(session, folder, manifest, origin(manifest))
        return 0
    return _compare(session, workspace, folder, manifest)


def _compare(session: Session, workspace: Workspace, folder: Path, manifest: Manifest) -> int:
    """Compare a merge with its baselines and record the result in its manifest and card."""
    from ...merge.generalists.folder import note_evaluation
    from ..use.eval import report_comparison

    name = folder.name if folder.parent == workspace.generalists.folder else str(folder)
    status, comparison = report_comparison(session, workspace, name, None, artefact=artefact_content(folder, manifest))
    note_evaluation(folder, comparison.table.as_json(), comparison.verdict(), comparison.holds)
    return status


def _refuse_with_file(name: str | None, settings: dict[str, Any]) -> None:
    if name is not None:
        raise click.UsageError("--config defines the merge; omit NAME and give the output folder with -o DIR")
    for key in ("method", "experts", "weights", "fit_on", "options", "tokenizer", "dtype", "search"):
        if settings[key] is not None:
            flag_name = "option" if key == "options" else key.replace("_", "-")
            raise click.UsageError(f"--config defines the whole merge; omit --{flag_name}")


def _merge_file(session: Session, file: Path, output: Path | None, run: MergeRun, plan_only: bool) -> None:
    from ...merge.merging import merge_recipe, plan_recipe
    from ...merge.recipes.mergekit_file import read_mergekit

    recipe = read_mergekit(file)
    if plan_only:
        _show_plan(session, plan_recipe(recipe, output, run=run), output)
        return
    if output is None:
        raise click.UsageError("--config needs an output folder: -o DIR")
    with session.progress() as reporter:
        manifest = merge_recipe(recipe, output, run=replace(run, reporter=reporter))
    show_artefact(session, output, manifest, origin(manifest))


def _show_plan(session: Session, plan: MergePlan, output: Path | None) -> None:
    from ...merge.planning.plan_report import plan_content, plan_rows, tensor_rows

    parts = [Table(("", ""), plan_rows(plan, output), headings=False)]
    if session.verbose:
        columns = ("tensor", "shape", "dtype", "action", "from", "weights")
        parts.append(Table(columns, tensor_rows(plan)))
    session.finish(plan_content(plan, output), *parts)
