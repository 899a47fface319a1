"""`expertctl eval`: evaluate models on domains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..context import GATE_FAILED, Session, pass_session
from ..group import cli_command
from ..options import flag, integer, name_list, option, with_decoder, with_device_map, with_quantise
from ..output import Table
from ..parsing import gate
from .eval_suites import asked_suite, interval_tables, report_suite, with_suites

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from expertctl.workspace import Workspace
    from expertctl.workspace.comparison import Comparison

    from ...core.hooks.evaluation import Metric
    from ...experts.measures.evaluation import EvaluationTable


@cli_command("eval", example='expertctl eval seed law forest --domains law,code --require "forest < seed"')
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@name_list("--domains", "Domains to evaluate on. Default: all domains of the project.")
@integer("--context", "Length of a window in tokens. Default: the model's own, at most 2,048.", metavar="N")
@integer("--stride", "Tokens from one window to the next. Default: half of the context.", metavar="M")
@integer(
    "--by-position",
    "Score bits per token by position instead, in buckets of N, N, 2N, 4N ... tokens of windows that do not overlap.",
)
@flag("--known-domains", "Tell ensembles which domain they read, so that they use the prior fitted on it.")
@flag("--intervals", "Add 95% intervals of bits per byte over documents, and paired differences of models.")
@integer("--jobs", "Number of models to evaluate at the same time. Default: as many as the machine allows.")
@integer(
    "--nproc",
    "Number of processes that share the text, one GPU each if there are any; figures do not depend on it.",
    default=1,
)
@with_device_map
@with_quantise
@with_decoder
@option("--evaluator", "NAME", "Evaluator; `expertctl plugins` lists the choices.", default="perplexity")
@option(
    "--require",
    '"A < B"',
    "Exit with status 3 unless A is better than B on average, by the evaluator's first metric; repeatable.",
    name="gates",
    type=gate,
    multiple=True,
)
@name_list(
    "--against",
    "Compare one generalist with baselines: seed, best-expert, average, ensemble (of its experts, made "
    "temporarily), or other models. Exit with status 3 if it is worse than the best of them.",
)
@with_suites
@pass_session
def command(
    session: Session,
    /,
    models: tuple[str, ...],
    domains: tuple[str, ...] | None,
    context: int | None,
    stride: int | None,
    by_position: int | None,
    known_domains: bool,
    intervals: bool,
    jobs: int | None,
    nproc: int,
    device_map: str | None,
    quantise: str | None,
    decoder: str | None,
    decoder_options: dict[str, Any],
    evaluator: str,
    gates: tuple[tuple[str, str], ...],
    against: tuple[str, ...] | None,
    **suite_options: Any,
) -> int:
    """Evaluate models on the test text of domains.

    Every token of the text is scored once, in overlapping windows. MODEL is a name in this workspace or the folder of a
    Hugging Face causal language model; default: all models. Bits per byte are comparable across tokenizers, perplexity is
    not.
    """
    if jobs is not None and nproc > 1:
        raise click.UsageError("give either --jobs or --nproc")
    if by_position is not None and (gates or stride is not None or evaluator != "perplexity"):
        raise click.UsageError("--by-position goes with none of --stride, --evaluator and --require")
    workspace = session.open()
    loading: dict[str, Any] = {
        "device_map": device_map,
        "quantise": quantise,
        "decoder": decoder,
        "decoder_options": decoder_options,
    }
    of_domains = {
        "--domains": domains,
        "--context": context,
        "--stride": stride,
        "--by-position": by_position,
        "--known-domains": known_domains,
        "--intervals": intervals,
        "--jobs": jobs,
        "--nproc": nproc > 1,
        "--evaluator": evaluator != "perplexity",
        "--require": gates,
        "--against": against,
    }
    if (suite := asked_suite(suite_options, of_domains)) is not None:
        return report_suite(session, workspace, suite, models, suite_options, **loading)
    if against is not None:
        others = (
            gates,
            context,
            stride,
            by_position,
            known_domains,
            intervals,
            device_map,
            quantise,
            decoder,
            decoder_options,
        )
        if len(models) != 1 or any(others) or evaluator != "perplexity":
            raise click.UsageError(
                "--against takes exactly one MODEL, and of the other options only --domains, --jobs and --nproc"
            )
        return report_comparison(session, workspace, models[0], against, domains, jobs, nproc)[0]
    model_names = tuple(dict.fromkeys(models)) or tuple(folder.name for folder in workspace.layout.finished())
    _require_models(gates, model_names)
    with session.progress() as progress:
        table = workspace.evaluate(
            *model_names,
            domains=domains,
            evaluator=evaluator,
            context=context,
            stride=stride,
            by_position=by_position,
            known_domains=known_domains,
            intervals=intervals,
            ranked=gates,
            jobs=jobs,
            nproc=nproc,
            **loading,
            reporter=progress,
        )
    if not table.is_comparable(table.scores):
        session.note(
            "no model is marked as the best where tokenizers keep different shares of the text (--json: coverage)"
        )
    tables = (
        [score_table(table, metric) for metric in table.metrics]
        if by_position is None
        else [position_table(table, domain) for domain in table.domains]
    )
    if table.intervals is not None:
        tables += interval_tables(table.intervals)
    session.finish(table.as_json(), *(part for table in tables for part in (table, "")))
    metric = table.metrics[0]
    failed = [pair for pair in gates if not metric.is_worse(table.mean(pair[1], metric), table.mean(pair[0], metric))]
    for better, other in failed:
        click.echo(
            f"Error: {better} < {other} does not hold: {better} is not better, {table.mean(better, metric):.4f} and "
            f"{table.mean(other, metric):.4f} {metric.title}",
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
    nproc: int = 1,
    *,
    artefact: Mapping[str, Any] | None = None,
) -> tuple[int, Comparison]:
    """Compare a model with its baselines, print the table, and return the exit status and the comparison.

    `artefact` is the `--json` content of a new model; the evaluation is then added to it.
    """
    with session.progress() as progress:
        comparison = workspace.compare(model, against, domains, jobs=jobs, nproc=nproc, reporter=progress)
    content = {**comparison.table.as_json(), "holds": comparison.holds, "best_baseline": comparison.best}
    session.finish(
        content if artefact is None else {**artefact, "evaluation": content},
        score_table(comparison.table, comparison.metric),
        "",
        *([comparison.verdict()] if comparison.holds else []),
    )
    if not comparison.holds:
        click.echo(f"Error: {comparison.verdict()}", err=True)
    return (0 if comparison.holds else GATE_FAILED), comparison


def score_table(table: EvaluationTable, metric: Metric) -> Table:
    """Return the table of one metric: a row per model, a column per domain, and the mean."""
    best = [*(table.best(domain, metric) for domain in table.domains), table.best_mean(metric)]
    rows, strong = [], set()
    for row, (model, scores) in enumerate(table.scores.items()):
        values = [*(scores[domain].values[metric.name] for domain in table.domains), table.mean(model, metric)]
        strong |= {(row, column) for column, winner in enumerate(best, start=1) if model == winner}
        cells = (f"{value:.4f}{'*' if model == winner else ' '}" for value, winner in zip(values, best, strict=True))
        rows.append((model, *cells))
    columns = ("model", *(f"{heading} " for heading in (*table.domains, "mean")))
    return Table(
        columns,
        rows,
        title=f"{metric.title} ({'higher' if metric.higher_is_better else 'lower'} is better, * best)",
        right=frozenset(range(1, len(columns))),
        strong=frozenset(strong),
    )


def position_table(table: EvaluationTable, domain: str) -> Table:
    """Return the table of one domain: a row per model, a column per bucket of positions, and the mean over all tokens."""
    from ...experts.measures.positions import PositionScore

    scores = {model: by_domain[domain] for model, by_domain in table.scores.items()}
    buckets = {model: score.buckets for model, score in scores.items() if isinstance(score, PositionScore)}
    distinct = {(bucket.begin, bucket.end): bucket.title for of_model in buckets.values() for bucket in of_model}
    titles = [distinct[key] for key in sorted(distinct)]
    rows = []
    for model, of_model in buckets.items():
        bits = {bucket.title: bucket.bits_per_token for bucket in of_model}
        values = [*(bits.get(title) for title in titles), scores[model].values["bits_per_token"]]
        rows.append((model, *("-" if value is None else f"{value:.4f}" for value in values)))
    columns = ("model", *titles, "all")
    title = f"{domain}: bits per token by position (lower is better)"
    return Table(columns, rows, title=title, right=frozenset(range(1, len(columns))))


def _require_models(gates: Sequence[tuple[str, str]], models: Sequence[str]) -> None:
    """Raise `UserError` if a --require names a model that is not evaluated."""
    from ...core.errors import unknown_name

    for name in (name for pair in gates for name in pair):
        if name not in models:
            raise unknown_name("model", name, models, listed_as="evaluated here")
