"""`expertctl quickstart`: the whole workflow in one command, from text to an evaluation table."""

from __future__ import annotations

import shlex
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..options import flag, integer, option

if TYPE_CHECKING:
    from expertctl.workspace import Workspace

    from ...experts.measures.evaluation import EvaluationTable

BASELINES = ("dense", "random-split")
EXPLANATION = """\
seed             the common starting point of all experts.
{experts}
                 the experts, each trained on its own domain only; {best_at_home} are the best expert on their domain.
uniform-average  one model; every tensor is the mean of the experts' tensors.
ensemble         all experts; next-token distributions are mixed by how well each expert predicted the text so far.
"""
BASELINES_EXPLANATION = """\
dense            the seed, trained further on all domains for as many tokens as all experts together.
random-split     an ensemble of experts trained on random slices of the text, without domains.
"""
NEXT_STEPS = """\
Next:
  cd {folder}
  expertctl generate ensemble "def main(" --show-experts
  expertctl log                          # lineage of all models
  expertctl baseline dense               # one model on all text, for the same number of tokens
  expertctl branch mine --domain manual --trains feed_forward && expertctl train mine
  expertctl init ../my-project           # start your own project"""


@cli_command("quickstart", example="expertctl quickstart demo")
@click.argument("folder", metavar="[DIR]", type=click.Path(path_type=Path), default=Path("quickstart"))
@option(
    "--corpora",
    "FOLDER",
    "Use your own text: a folder with one subfolder per domain, each with train.jsonl, valid.jsonl and perhaps test.jsonl. Default: "
    "the installed text.",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
)
@flag("--baselines", "Also train the baselines: a dense model and an ensemble of random-split experts.")
@integer("--jobs", "Number of experts to train at the same time.", default=2)
@integer(
    "--tokens",
    "Total training budget in tokens: half for the seed, the rest divided equally among the experts.",
    least=1000,
    default=1_200_000,
)
@pass_session
def command(session: Session, folder: Path, corpora: Path | None, baselines: bool, jobs: int, tokens: int) -> None:
    """Run the whole workflow in a few minutes.

    Prepares text, pretrains a tiny seed, trains an expert for each domain in its own process, merges the experts in
    three ways and evaluates all models. If it is interrupted, run the same command again to resume.
    """
    from ...core.reporting import SILENT
    from ...merge.merging import MergeRun
    from ..use.eval import score_table

    workspace = _workspace(folder, corpora, tokens)
    domains = list(workspace.config.domains)
    session.note(f"workspace {workspace.root}: domains {', '.join(domains)}")
    _make_seed(session, workspace)
    _train_experts(session, workspace, jobs)
    for name in workspace.config.merges:
        if not (workspace.generalists / name / "generalist.json").is_file():
            session.note(f"merging {len(domains)} experts: {name}")
            with session.progress() as progress:
                workspace.merge(name, run=MergeRun(reporter=progress if session.verbose else SILENT))
    if baselines:
        _train_baselines(session, workspace, jobs)
    table = _evaluate(session, workspace, domains)
    content = table.as_json() | {"workspace": str(workspace.root)}
    scores = score_table(table, table.metrics[0])
    session.finish(content, "", scores, "", _explanation(table), "", _next_steps(workspace))


def _workspace(folder: Path, corpora: Path | None, tokens: int) -> Workspace:
    """Return the workspace in `folder`, which an earlier call may have created."""
    from expertctl.workspace import Workspace

    from ...core.artefacts.files import os_errors_as_user_errors, write_text
    from ...core.artefacts.layout import CONFIG_FILE
    from ...core.errors import UserError

    domains = _domains(corpora)
    text = Template(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")).substitute(
        seed_tokens=tokens // 2,
        expert_tokens=tokens // 2 // len(domains),
        domains="".join(f"  {name}: {settings}\n" for name, settings in domains.items()),
        experts="".join(f"  {name}: {{domain: {name}}}\n" for name in domains),
    )
    target = folder / CONFIG_FILE
    if not target.exists():
        with os_errors_as_user_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(target, text)
    elif target.read_text(encoding="utf-8") != text:
        raise UserError(f"{target} was not written by this quickstart; choose another folder, or remove the file")
    return Workspace(folder)


def _domains(corpora: Path | None) -> dict[str, str]:
    """Return each domain's settings in YAML, by name."""
    import json

    from ...core.artefacts.layout import check_name
    from ...core.errors import UserError

    if corpora is None:
        from ...experts.text.bundled import BUNDLED

        return {name: f"{{bundled: {name}}}" for name in BUNDLED}
    folders = [folder for folder in sorted(corpora.resolve().iterdir()) if (folder / "train.jsonl").is_file()]
    if len(folders) < 2:
        raise UserError(f"{corpora} needs subfolders for at least two domains, each with train.jsonl and valid.jsonl")
    return {
        check_name(folder.name, "the expert of a folder's text"): json.dumps(
            {
                part: str(folder / f"{part}.jsonl")
                for part in ("train", "valid", "test")
                if part != "test" or (folder / "test.jsonl").is_file()
            }
        )
        for folder in folders
    }


def _make_seed(session: Session, workspace: Workspace) -> None:
    from ...core.manifests.run import is_finished

    if not is_finished(workspace.layout.seed):
        session.note("pretraining the seed on all domains")
        with session.progress("seed") as progress:
            workspace.seed(reporter=progress)
    with session.progress() as progress:
        workspace.prepare(reporter=progress)


def _train_experts(session: Session, workspace: Workspace, jobs: int) -> None:
    names = workspace.experts.names()
    session.note(f"training {len(names)} experts, one per domain, {jobs} at a time")
    with session.progress(*names) as progress:
        workspace.train(*names, jobs=jobs, reporter=progress).raise_for_failures()


def _train_baselines(session: Session, workspace: Workspace, jobs: int) -> None:
    session.note("training the dense baseline for as many tokens as all experts")
    with session.progress("dense") as progress:
        workspace.baselines.dense(reporter=progress)
    session.note("training experts on random splits of the text")
    with session.progress() as progress:
        workspace.baselines.random_split(jobs=jobs, reporter=progress)


def _evaluate(session: Session, workspace: Workspace, domains: list[str]) -> EvaluationTable:
    finished = {folder.name for folder in workspace.layout.finished()}
    merges = reversed(tuple(workspace.config.merges))
    models = [name for name in ("seed", *workspace.experts.names(), *BASELINES, *merges) if name in finished]
    session.note(f"evaluating {len(models)} models on the test text of {len(domains)} domains")
    with session.progress() as progress:
        return workspace.evaluate(*models, reporter=progress)


def _explanation(table: EvaluationTable) -> str:
    experts = [name for name in table.scores if name in table.domains]
    best_at_home = sum(
        table.metrics[0].best({name: table.scores[name][domain].values["bits_per_byte"] for name in experts}) == domain
        for domain in table.domains
    )
    means = {name: table.mean(name, table.metrics[0]) for name in table.scores}
    dense = f" Dense at equal tokens: {means['dense']:.3f}." if "dense" in means else ""
    return (
        EXPLANATION.format(experts=", ".join(experts), best_at_home=f"{best_at_home} of {len(table.domains)}")
        + (BASELINES_EXPLANATION if "dense" in means else "")
        + f"\nMean: ensemble {means['ensemble']:.3f}, uniform average {means['uniform-average']:.3f}, "
        f"seed {means['seed']:.3f}.{dense}\n"
        "With so few tokens, all domains still benefit from each other's text: a dense model with small batches can be "
        "better than the ensemble here. `expertctl baseline dense` trains one for comparison."
    )


def _next_steps(workspace: Workspace) -> str:
    return NEXT_STEPS.format(folder=shlex.quote(str(workspace.root)))
