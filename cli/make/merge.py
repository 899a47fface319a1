"""`expertctl merge`: merge experts into a generalist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import choice, flag, integer, name_list, option, pairs, path
from ..output import Table
from ..parsing import as_dictionary, byte_count, weights
from ..summaries import artefact_content, artefact_line, origin, show_artefact

if TYPE_CHECKING:
    from expertctl.workspace import Workspace

    from ...core.manifests.manifest import Manifest
    from ...merge.merging import MergeRun
    from ...merge.planning.plan import MergePlan
    from ...merge.recipes.mergekit_documents import Stage


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
    "Merge according to a mergekit configuration file, into -o DIR, or into a folder in DIR for each of several documents; "
    "needs no workspace.",
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
@integer("--workers", "Number of processes that share the tensors; the result does not depend on it.", default=1)
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
    workers: int,
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
        settings=EngineSettings(threads, device, workers=workers, allow_nonfinite=allow_nonfinite),
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
    _note_contributions(session, workspace, settings["experts"])
    if plan_only:
        _show_plan(session, workspace.generalists.plan(name, output=output, run=run, **settings), folder)
        return 0
    with session.progress() as reporter:
        manifest = workspace.merge(name, output=output, run=replace(run, reporter=reporter), **settings)
    if not gate:
        show_artefact(session, folder, manifest, origin(manifest))
        return 0
    return _compare(session, workspace, folder, manifest)


def _note_contributions(session: Session, workspace: Workspace, experts: Sequence[str] | None) -> None:
    """Print the loss on public text of each expert that an owner of a federation delivered, and that is the same still."""
    from ...core.manifests.manifest import find_manifest
    from ...experts.federation.coordinator.storage import FederationFiles
    from ..federate.shared import public_loss_text

    if not (root := workspace.root / "federation").is_dir():
        return
    losses = FederationFiles(root).ledger.public_losses()
    for name in experts or workspace.layout.finished_experts():
        manifest = find_manifest(workspace.layout.experts / name)
        if manifest is not None and manifest.digest in losses:
            text = public_loss_text(losses[manifest.digest])
            session.note(f"{name}: loss on public text {text}, compared with the seed")


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
    """Run or plan the merges of a mergekit configuration file."""
    from ...merge.recipes.mergekit_documents import read_stages

    if output is None and not plan_only:
        raise click.UsageError("--config needs an output folder: -o DIR")
    stages = read_stages(file, output if output is not None else Path())
    folders = [stage.folder if output is not None else None for stage in stages]
    if plan_only:
        _show_plans(session, stages, folders, run)
    else:
        _merge_stages(session, stages, run)


def _merge_stages(session: Session, stages: Sequence[Stage], run: MergeRun) -> None:
    from ...merge.merging import merge_recipe
    from ...merge.remaking.stages import merge_stages

    with session.progress() as reporter:
        run = replace(run, reporter=reporter)
        if len(stages) > 1:
            manifests = merge_stages(stages, run)
        else:
            manifests = [merge_recipe(stages[0].recipe, stages[0].folder, run=run)]
    results = [(stage.folder, manifest) for stage, manifest in zip(stages, manifests, strict=True)]
    if len(stages) == 1:
        show_artefact(session, *results[0], origin(manifests[0]))
        return
    lines = [f"{artefact_line(folder, manifest)}: {origin(manifest)}" for folder, manifest in results]
    session.finish({"merges": [artefact_content(folder, manifest) for folder, manifest in results]}, *lines)


def _show_plan(session: Session, plan: MergePlan, output: Path | None) -> None:
    from ...merge.planning.plan_report import plan_content

    session.finish(plan_content(plan, output), *_plan_tables(session, plan, output))


def _show_plans(session: Session, stages: Sequence[Stage], folders: Sequence[Path | None], run: MergeRun) -> None:
    """Show the plans of a file's merges; one that needs the result of another can be planned only after it."""
    from ...merge.merging import plan_recipe
    from ...merge.planning.plan_report import plan_content

    if len(stages) == 1:
        _show_plan(session, plan_recipe(stages[0].recipe, folders[0], run=run), folders[0])
        return
    contents: dict[str, Any] = {}
    parts: list[str | Table] = []
    for stage, folder in zip(stages, folders, strict=True):
        contents[stage.name] = {"needs": list(stage.needs)}
        if stage.needs:
            parts.append(f"{stage.name}: planned after {', '.join(stage.needs)}")
            continue
        plan = plan_recipe(stage.recipe, folder, run=run)
        contents[stage.name] |= plan_content(plan, folder)
        parts += [f"{stage.name}:", *_plan_tables(session, plan, folder)]
    session.finish({"merges": contents}, *parts)


def _plan_tables(session: Session, plan: MergePlan, output: Path | None) -> list[Table]:
    from ...merge.planning.plan_report import plan_rows, tensor_rows

    tables = [Table(("", ""), plan_rows(plan, output), headings=False)]
    if session.verbose:
        columns = ("tensor", "shape", "dtype", "action", "from", "weights")
        tables.append(Table(columns, tensor_rows(plan)))
    return tables
