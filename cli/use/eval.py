"""`expertctl eval`: the table of models and domains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..context import Session, pass_session
from ..group import cli_command
from ..output import Table
from ..parsing import gate, names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from expertctl.comparison import Comparison
    from expertctl.workspace import Workspace

    from ...experts.measures.evaluation import EvaluationTable

GATE_FAILED = 3
TITLES = {"bits_per_byte": "bits per byte (lower is better, * best)", "perplexity": "perplexity per token"}


@cli_command("eval", example='expertctl eval seed law forest --domains law,code --require "forest < seed"')
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option("--domains", type=names, metavar="A,B", help="Which domains. Default: all of the project.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Models to score at a time. Default: what the machine takes.",
)
@click.option(
    "--evaluator",
    default="perplexity",
    show_default=True,
    metavar="NAME",
    help="How; `expertctl plugins` lists them.",
)
@click.option(
    "--require",
    "gates",
    type=gate,
    multiple=True,
    metavar='"A < B"',
    help="Exit with status 3 unless the mean of A (bits per byte) is below that of B.",
)
@click.option(
    "--against",
    type=names,
    metavar="A,B",
    help="Compare one generalist with these: seed, best-expert, average and ensemble of its experts (made for the "
    "occasion), or other models. Exit with status 3 when it is worse than the best of them.",
)
@pass_session
def command(
    session: Session,
    models: tuple[str, ...],
    domains: tuple[str, ...] | None,
    jobs: int | None,
    evaluator: str,
    gates: tuple[tuple[str, str], ...],
    against: tuple[str, ...] | None,
) -> int:
    """Score models on the validation text of domains.

    Every token is scored once. MODEL is a name of this workspace or the folder of any Hugging Face causal language model; default: all
    models there are. Bits per byte compare across tokenizers, perplexity only within one.
    """
    workspace = session.open()
    if against is not None:
        if len(models) != 1 or gates:
            raise click.UsageError("--against compares one MODEL, without --require")
        return report_comparison(session, workspace, models[0], against, domains, jobs)[0]
    chosen = tuple(dict.fromkeys(models)) or tuple(folder.name for folder in workspace.layout.finished())
    _require_models(gates, chosen)
    with session.count("evaluating", "scores", _num_scores(workspace, chosen, domains)) as count:
        table = workspace.evaluate(
            *chosen, domains=domains, evaluator=evaluator, jobs=jobs, tell=lambda model, domain: count.next()
        )
    session.finish(
        table.as_json(), *(part for metric in table.metrics for part in (score_table(table, metric), ""))
    )
    metric = table.metrics[0]
    failed = [pair for pair in gates if not table.mean(pair[0], metric) < table.mean(pair[1], metric)]
    for lower, upper in failed:
        click.echo(
            f"Error: {lower} < {upper} does not hold: {table.mean(lower, metric):.4f} and "
            f"{table.mean(upper, metric):.4f} {metric.replace('_', ' ')}",
            err=True,
        )
    return GATE_FAILED if failed else 0


def report_comparison(
    session: Session,
    workspace: Workspace,
    model: str,
    against: Sequence[str] | None,
    domains: Sequence[str] | None = None,
    jobs: int | None = None,
    *,
    made: Mapping[str, Any] | None = None,
) -> tuple[int, Comparison]:
    """Compare a model with its baselines and print the table; return the exit status and what was found.

    `made` is what `--json` says of a model that was made just now; its evaluation is then a part of that.
    """
    with session.count("evaluating", "scores") as count:
        found = workspace.compare(
            model, against, domains, jobs=jobs, say=session.note, tell=lambda model, domain: count.next()
        )
    content = {**found.table.as_json(), "holds": found.holds, "best_baseline": found.best}
    session.finish(
        content if made is None else {**made, "evaluation": content},
        score_table(found.table, found.metric),
        "",
        *([found.verdict()] if found.holds else []),
    )
    if not found.holds:
        click.echo(f"Error: {found.verdict()}", err=True)
    return (0 if found.holds else GATE_FAILED), found


def score_table(table: EvaluationTable, metric: str) -> Table:
    """Return the table of one metric: a row for each model, a column for each domain, and the mean."""
    best = [table.best(domain, metric) for domain in table.domains]
    best.append(min(table.scores, key=lambda model: table.mean(model, metric)))
    rows = []
    for model, scores in table.scores.items():
        values = [scores[domain].values[metric] for domain in table.domains] + [table.mean(model, metric)]
        rows.append(
            (
                model,
                *(
                    f"{value:.4f}{'*' if model == winner else ' '}"
                    for value, winner in zip(values, best, strict=True)
                ),
            )
        )
    strong = frozenset(
        (row, column)
        for row, cells in enumerate(rows)
        for column, cell in enumerate(cells)
        if column and cell[-1] == "*"
    )
    columns = ("model", *(f"{heading} " for heading in (*table.domains, "mean")))
    return Table(
        columns,
        rows,
        title=TITLES.get(metric, metric),
        right=frozenset(range(1, len(columns))),
        strong=strong,
    )


def _num_scores(workspace: Workspace, models: Sequence[str], domains: Sequence[str] | None) -> int:
    return len(models) * len(workspace.config.domains if domains is None else domains)


def _require_models(gates: Sequence[tuple[str, str]], models: Sequence[str]) -> None:
    """Refuse a gate on a model that will not be scored, before anything is."""
    from ...core.errors import unknown_name

    for name in (name for pair in gates for name in pair):
        if name not in models:
            raise unknown_name("model", name, models, listed_as="evaluated here")
