"""The part of `expertctl eval` that asks questions instead of scoring domains: options, and the tables of the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..options import Number, choice, flag, integer, option, path, with_options
from ..output import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from expertctl.workspace import Workspace

    from ...experts.measures.document_intervals import DomainIntervals
    from ...experts.measures.suites.answers.judging import AnswerTable
    from ...experts.measures.suites.choices import ChoiceTable
    from ...experts.measures.suites.harness.running import HarnessTable, HarnessValue
    from ...experts.measures.suites.intervals import Interval
    from ...experts.measures.suites.skills import SkillTable
    from ..context import Session

with_suites = with_options(
    path("--choices", "FILE", "Multiple choice: questions with choices, in a JSON or JSON-lines file.", file=True),
    integer("--shots", "Solved examples before each question.  [default: 0]", least=0),
    path("--shots-from", "FILE", "File with the examples. Default: the file itself, without the question.", file=True),
    choice(
        "--shots-by",
        ["order", "similarity"],
        "In one shuffled order for all questions, or by the words that they share with each.  [default: order]",
    ),
    option("--suite", "lm-eval:A,B", "Tasks of EleutherAI's lm-eval, by name; needs the extra lm-eval."),
    path("--tasks-folder", "FOLDER", "Folder with task files beside lm-eval's own."),
    flag("--download", "Let tasks of --suite take their data from the Hugging Face hub."),
    integer("--limit", "Number of questions of each task of --suite. Default: all."),
    path("--generate", "FILE", "Prompts with expected answers, or with tests of programs, in a JSON file.", file=True),
    integer("--samples", "Samples of each prompt of --generate.  [default: 1]"),
    integer("--max-new-tokens", "Longest answer of --generate, in tokens.  [default: 256]"),
    option("--temperature", "T", "Of --generate. Default: 0 for one sample, 0.8 for several.", type=Number(min=0)),
    integer("--seed", "Random seed of --generate.", least=0),
    flag("--run-code", "Run programs that the models write, in processes with limits: no security boundary."),
    option("--template", "TEXT", "Text around a question, with {question} in it and up to the answer."),
)
SUITES = ("choices", "suite", "generate")
NEEDS = {
    **dict.fromkeys(("shots", "shots_from", "shots_by", "template"), "choices"),
    **dict.fromkeys(("tasks_folder", "download", "limit"), "suite"),
    **dict.fromkeys(("samples", "max_new_tokens", "temperature", "seed", "run_code"), "generate"),
}
"""Option -> the suite that it belongs to."""


def asked_suite(given: Mapping[str, Any], others: Mapping[str, Any]) -> str | None:
    """Return which suite is asked for, None for domains; raises `click.UsageError` for options that do not go together.

    `others` are options for domains, by their flags.
    """
    asked = [name for name in SUITES if given[name]]
    if len(asked) > 1:
        raise click.UsageError(f"give only one of {', '.join(_flag(name) for name in asked)}")
    for name, suite in NEEDS.items():
        if given[name] is not None and given[name] is not False and suite not in asked:
            raise click.UsageError(f"{_flag(name)} needs {_flag(suite)}")
    if not asked:
        return None
    if unfit := [flag for flag, value in others.items() if value]:
        raise click.UsageError(f"{_flag(asked[0])} does not go with {', '.join(unfit)}")
    return asked[0]


def report_suite(
    session: Session, workspace: Workspace, suite: str, models: Sequence[str], given: Mapping[str, Any], **settings: Any
) -> int:
    """Ask the models and print the tables; return the exit status."""
    from ...experts.measures.suites.harness.running import parse_suite

    with session.progress() as progress:
        asked = {"reporter": progress, **settings}
        suites = workspace.suites
        parts: Sequence[Table | str]
        if suite == "choices":
            choices = suites.choices(
                given["choices"],
                *models,
                shots=given["shots"] or 0,
                shots_from=given["shots_from"],
                shots_by=given["shots_by"] or "order",
                template=given["template"],
                **asked,
            )
            content, parts = choices.as_json(), choice_tables(choices)
        elif suite == "suite":
            folder, tasks = given["tasks_folder"], parse_suite(given["suite"])
            results = suites.harness(
                tasks, *models, folder=folder, download=given["download"], limit=given["limit"], **asked
            )
            content, parts = results.as_json(), [harness_table(results)]
        else:
            names = ("samples", "max_new_tokens", "temperature", "seed", "run_code")
            writing = {name: given[name] for name in names if given[name] is not None}
            answers = suites.answers(given["generate"], *models, **writing, **asked)
            content, parts = answers.as_json(), answer_tables(answers)
    session.finish(content, *parts)
    return 0


def choice_tables(table: ChoiceTable) -> list[Table | str]:
    """Return the accuracy of each model under each rule, and the differences of every two models."""
    from ...experts.measures.suites.choice_scores import RULES

    rates = {model: [table.accuracy(model, rule) for rule in RULES] for model in table.scores}
    shots = f", {table.shots} shot{'s' * (table.shots != 1)}" if table.shots else ""
    title = f"accuracy on {len(table.questions)} questions{shots} (95% interval; guessing: {table.chance:.3f})"
    parts = rate_tables(title, RULES, rates, [table.differences(rule) for rule in RULES], "accuracy")
    for model in table.scores:
        # the rule of published accuracies
        parts += skill_tables(f"{model}, accuracy ({RULES[0]})", table.skills(model, RULES[0]))
    return parts


def answer_tables(table: AnswerTable) -> list[Table | str]:
    """Return each model's share of right answers and passing programs, and the differences of every two models."""
    columns = [f"{kind}@{tries}" for kind, tries in table.metrics]
    rates = {model: [table.rate(model, *metric) for metric in table.metrics] for model in table.right}
    samples = f"{table.samples} sample{'s' * (table.samples != 1)} each"
    title = f"right answers (match@k) and programs (pass@k) to {len(table.prompts)} prompts, {samples} (95% interval)"
    parts = rate_tables(title, columns, rates, [table.differences(*metric) for metric in table.metrics], "share")
    for model in table.right:
        parts += skill_tables(f"{model}, share of right samples", table.skills(model))
    return parts


def rate_tables(
    title: str,
    columns: Sequence[str],
    rates: Mapping[str, Sequence[Interval]],
    differences: Sequence[Sequence[tuple[str, str, Interval]]],
    what: str,
) -> list[Table | str]:
    """Return a table with a row per model, and one with a row per two models; `differences` are those of each column."""
    right = frozenset(range(1, len(columns) + 1))
    rows = [(model, *map(_with_limits, intervals)) for model, intervals in rates.items()]
    parts: list[Table | str] = [Table(("model", *columns), rows, title=title, right=right)]
    if len(rates) > 1:
        rows = [
            (f"{line[0][0]} - {line[0][1]}", *(_with_sign(difference) for _, _, difference in line))
            for line in zip(*differences, strict=True)
        ]
        title = f"difference of {what} on the same questions (95% interval, * without 0)"
        parts += ["", Table(("models", *columns), rows, title=title, right=right)]
    return parts


def interval_tables(intervals: DomainIntervals) -> list[Table]:
    """Return bits per byte with intervals, and the differences of every two models."""
    models, domains = list(intervals.units), intervals.domains
    columns = (*domains, "mean")
    right = frozenset(range(1, len(columns) + 1))
    rows = [
        (model, *(_or_dash(intervals.of(model, domain)) for domain in domains), _or_dash(intervals.mean(model)))
        for model in models
    ]
    kinds = {units.kind for by_domain in intervals.units.values() for units in by_domain.values() if units is not None}
    title = f"bits per byte (95% interval over {' or '.join(sorted(kinds)) or 'documents'})"
    tables = [Table(("model", *columns), rows, title=title, right=right)]
    if len(models) > 1:
        rows = [
            (
                f"{model} - {other}",
                *(_or_dash(intervals.difference(model, other, domain), _with_sign) for domain in (*domains, None)),
            )
            for number, other in enumerate(models)
            for model in models[number + 1 :]
        ]
        title = "difference of bits per byte on the same text (95% interval, * without 0)"
        tables.append(Table(("models", *columns), rows, title=title, right=right))
    return tables


def _or_dash(interval: Interval | None, shown: Callable[[Interval], str] | None = None) -> str:
    return "-" if interval is None else (shown or _with_limits)(interval)


def skill_tables(title: str, table: SkillTable | None) -> list[Table | str]:
    """Return a table with a row per skill and per pair of skills; nothing if no question is tagged."""
    if table is None:
        return []
    rows = [(skill.name, str(skill.questions), _with_limits(skill.score), "", "", "", "") for skill in table.skills] + [
        (
            " + ".join(pair.names),
            str(pair.questions),
            _with_limits(pair.score),
            pair.weaker or "-",
            "-" if pair.above_weaker is None else _with_sign(pair.above_weaker),
            "-" if pair.place is None else f"{pair.place:.2f}",
            pair.at_weaker or "-",
        )
        for pair in table.pairs
    ]
    columns = ("skills", "questions", "score", "weaker", "above the weaker", "place", "at the weaker")
    return ["", Table(columns, rows, title=f"{title}, by skill (95% interval)", right=frozenset({1, 2, 4, 5}))]


def harness_table(table: HarnessTable) -> Table:
    """Return lm-eval's numbers: a row per task and metric, a column per model."""
    from ...experts.measures.suites.harness.running import task_rows

    models = list(table.results)
    rows = [
        (task, metric, *(_with_error(by_model[model]) if model in by_model else "-" for model in models))
        for task, metric, by_model in task_rows(table)
    ]
    title = "lm-eval (± standard error)"
    return Table(("task", "metric", *models), rows, title=title, right=frozenset(range(2, len(models) + 2)))


def _with_error(value: HarnessValue) -> str:
    return f"{value.value:.4f}" + ("" if value.error is None else f" ± {value.error:.4f}")


def _with_limits(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _with_sign(interval: Interval) -> str:
    mark = "*" if interval.excludes_zero else " "
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]{mark}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
