"""`expertctl quickstart`: the whole story in one command, from text to a table."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..context import Session, pass_session
from ..group import cli_command

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from expertctl.workspace import TrainResult, Workspace

    from ...experts.measures.evaluation import EvaluationTable

MERGES = {
    "ensemble": {"method": "ensemble"},
    "posterior-average": {"method": "average", "weights": "posterior"},
    "uniform-average": {"method": "average"},
}
BASELINES = ("dense", "random-split")
SETTINGS = """\
# The quickstart: a seed of 1.3 million parameters, one expert for each domain, three generalists.
# `expertctl init` explains every setting.
seed:
  preset: tiny
  training:
    tokens: {seed_tokens}
    schedule_end: 0.5     # experts go on with the learning-rate schedule from here

training:
  tokens: {expert_tokens}
  batch_size: 4
  learning_rate: 0.008

"""


@cli_command("quickstart", example="expertctl quickstart demo")
@click.argument("folder", metavar="[DIR]", type=click.Path(path_type=Path), default=Path("quickstart"))
@click.option(
    "--corpora",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="Take the text from here: a folder for each domain, with train.jsonl and valid.jsonl. Default: text "
    "that is installed already.",
)
@click.option(
    "--baselines",
    is_flag=True,
    help="Also train the dense model and the random-split forest to compare with.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    metavar="N",
    help="Experts to train at a time.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1000),
    default=1_200_000,
    show_default=True,
    metavar="N",
    help="Tokens to train on in all: half for the seed, the rest in equal parts for the experts.",
)
@pass_session
def command(
    session: Session, folder: Path, corpora: Path | None, baselines: bool, jobs: int, tokens: int
) -> None:
    """Branch, train, merge and evaluate, from nothing, in a few minutes.

    Prepares text, pretrains a tiny seed, trains an expert for each domain in a process of its own, merges them
    three ways and scores everything. Stopped at any point, the same command goes on.
    """
    from ...merge.merging import MergeRun

    workspace = _workspace(folder, corpora, tokens)
    domains = list(workspace.config.domains)
    session.note(f"workspace {workspace.root}: domains {', '.join(domains)}")
    _make_seed(session, workspace)
    _train_experts(session, workspace, jobs)
    for name in MERGES:
        if not (workspace.generalists / name / "generalist.json").is_file():
            session.note(f"merging {len(domains)} experts: {name}")
            workspace.merge(name, run=MergeRun(say=session.detail))
    if baselines:
        _train_baselines(session, workspace, jobs)
    table = _evaluate(session, workspace, domains)
    _report(session, workspace, table)


def _workspace(folder: Path, corpora: Path | None, tokens: int) -> Workspace:
    """Return the workspace in `folder`, made now or by an earlier call."""
    from expertctl.workspace import Workspace

    from ...core.artefacts.files import readable_os_errors, write_text
    from ...core.artefacts.layout import CONFIG_FILE
    from ...core.errors import UserError

    names = [name for name, _ in _domains(corpora)]
    text = SETTINGS.format(seed_tokens=tokens // 2, expert_tokens=tokens // 2 // len(names))
    text += _named("domains", dict(_domains(corpora)))
    text += "\n" + _named("experts", {name: f"{{domain: {name}}}" for name in names})
    text += "\n" + _named("merges", {name: _flow(merge) for name, merge in MERGES.items()})
    target = folder / CONFIG_FILE
    if not target.exists():
        with readable_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(target, text)
    elif target.read_text(encoding="utf-8") != text:
        raise UserError(
            f"{target} is not what this quickstart would write; name another folder, or remove it"
        )
    return Workspace(folder)


def _domains(corpora: Path | None) -> Iterator[tuple[str, str]]:
    """Yield each domain's name and settings."""
    import json

    from ...core.artefacts.layout import check_name
    from ...core.errors import UserError

    if corpora is None:
        from ...experts.text.bundled import BUNDLED

        yield from ((name, f"{{bundled: {name}}}") for name in BUNDLED)
        return
    found = [path for path in sorted(corpora.resolve().iterdir()) if (path / "train.jsonl").is_file()]
    if len(found) < 2:
        raise UserError(
            f"{corpora} should hold a folder for each of two or more domains, with train.jsonl and valid.jsonl"
        )
    for path in found:
        check_name(path.name, "the expert of a folder's text")
        files = {part: str(path / f"{part}.jsonl") for part in ("train", "valid")}
        yield path.name, json.dumps(files)


def _named(section: str, entries: Mapping[str, str]) -> str:
    return f"{section}:\n" + "".join(f"  {name}: {entry}\n" for name, entry in entries.items())


def _flow(settings: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in settings.items()) + "}"


def _make_seed(session: Session, workspace: Workspace) -> None:
    from ...experts.runs.specification import is_finished

    if not is_finished(workspace.layout.seed):
        session.note("pretraining the seed on all domains")
        with session.runs(["seed"]) as progress:
            workspace.seed(reporter=progress)
    with session.count("preparing text", "documents") as count:
        workspace.prepare(tell=lambda domain, done: count.to(done, domain))


def _train_experts(session: Session, workspace: Workspace, jobs: int) -> None:
    names = workspace.expert_names()
    session.note(f"training {len(names)} experts, each on its own domain, {jobs} at a time")
    with session.runs(names) as progress:
        result = workspace.train(*names, jobs=jobs, reporter=progress)
    _require_finished(result)


def _require_finished(result: TrainResult) -> None:
    from ...core.errors import Interrupted, UserError

    if result.interrupted:
        raise Interrupted(f"stopped, state saved: {', '.join(result.interrupted)}; the same command goes on")
    if result.failed:
        raise UserError("; ".join(f"{name}: {error}" for name, error in result.failed.items()))


def _train_baselines(session: Session, workspace: Workspace, jobs: int) -> None:
    session.note("training the dense model of equal tokens")
    with session.runs(["dense"]) as progress:
        workspace.dense_baseline(reporter=progress)
    session.note("training experts of random splits")
    with session.runs([]) as progress:
        workspace.random_split_baseline(jobs=jobs, reporter=progress)


def _evaluate(session: Session, workspace: Workspace, domains: list[str]) -> EvaluationTable:
    made = {folder.name for folder in workspace.layout.finished()}
    models = [
        name for name in ("seed", *workspace.expert_names(), *BASELINES, *reversed(MERGES)) if name in made
    ]
    session.note(f"scoring {len(models)} models on the validation text of {len(domains)} domains")
    with session.count("evaluating", "scores", len(models) * len(domains)) as count:
        return workspace.evaluate(*models, tell=lambda model, domain: count.next())


def _report(session: Session, workspace: Workspace, table: EvaluationTable) -> None:
    from ..use.eval import score_table

    content = table.as_json() | {"workspace": str(workspace.root)}
    session.finish(
        content, "", score_table(table, "bits_per_byte"), "", _explanation(table), "", _next_steps(workspace)
    )


def _explanation(table: EvaluationTable) -> str:
    """Return what each line of the table means, a sentence each, and what its figures say."""
    experts = [name for name in table.scores if name in table.domains]
    best = sum(
        min(experts, key=lambda name: table.scores[name][domain].values["bits_per_byte"]) == domain
        for domain in table.domains
    )
    lines = [
        "seed               the model that every expert started from.",
        f"{', '.join(experts)}",
        "                   the experts, each trained further on that domain only: "
        f"{best} of {len(table.domains)} are the best expert at home.",
        "uniform-average    one model, every tensor the mean of the experts'.",
        "posterior-average  the same, weighted by how well each expert predicts validation text.",
        "ensemble           all experts side by side, mixed at every token by how well each predicted the text so far.",
    ]
    if "dense" in table.scores:
        lines.append(
            "dense              one model that went on from the seed on all domains with as many tokens as all experts."
        )
        lines.append(
            "random-split       an ensemble of experts whose text was dealt out at random: no domains, no gain from them."
        )
    means = {name: table.mean(name, "bits_per_byte") for name in table.scores}
    lines.append("")
    lines.append(
        f"Mean: ensemble {means['ensemble']:.3f}, uniform average {means['uniform-average']:.3f}, seed {means['seed']:.3f}."
        + (f" Dense at equal tokens: {means['dense']:.3f}." if "dense" in means else "")
    )
    lines.append(
        "With so few tokens, text shared by all domains still teaches much: a dense model with small batches can be "
        "ahead of the ensemble here. `expertctl baseline dense` trains one to compare."
    )
    return "\n".join(lines)


def _next_steps(workspace: Workspace) -> str:
    folder = shlex.quote(str(workspace.root))
    return "\n".join(
        (
            "Next:",
            f"  cd {folder}",
            '  expertctl generate ensemble "def main(" --show-experts',
            "  expertctl log                          # what was made from what",
            "  expertctl baseline dense               # one model on all text, for as many tokens",
            "  expertctl branch mine --domain manual --trains feed_forward && expertctl train mine",
            "  expertctl init ../my-project           # a project of your own",
        )
    )
