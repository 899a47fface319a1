"""The part of `expertctl eval` that asks questions instead of scoring domains: options, and the tables of the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..options import flag, integer, option, path, with_options
from ..output import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from expertctl.workspace import Workspace

    from ...experts.measures.suites.choices import ChoiceTable
    from ...experts.measures.suites.harness.running import HarnessTable, HarnessValue
    from ...experts.measures.suites.intervals import Interval
    from ..context import Session

with_suites = with_options(
    path("--choices", "FILE", "Multiple choice: questions with choices, in a JSON or JSON-lines file.", file=True),
    integer("--shots", "Solved examples before each question.", least=0, default=0),
    path("--shots-from", "FILE", "File with the examples. Default: the file itself, without the question.", file=True),
    option("--suite", "lm-eval:A,B", "Tasks of EleutherAI's lm-eval, by name; needs the extra lm-eval."),
    path("--tasks-folder", "FOLDER", "Folder with task files beside lm-eval's own."),
    flag("--download", "Let tasks of --suite take their data from the Hugging Face hub."),
    integer("--limit", "Number of questions of each task of --suite. Default: all."),
    option("--template", "TEXT", "Text around a question, with {question} in it and up to the answer."),
)
SUITES = ("choices", "suite")
NEEDS = {
    **dict.fromkeys(("shots", "shots_from", "template"), "choices"),
    **dict.fromkeys(("tasks_folder", "download", "limit"), "suite"),
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
        if given[name] and suite not in asked:
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
        suites = workspace.suites
        if suite == "choices":
            choices = suites.choices(
                given["choices"],
                *models,
                shots=given["shots"],
                shots_from=given["shots_from"],
                template=given["template"],
                reporter=progress,
                **settings,
            )
            content, parts = choices.as_json(), choice_tables(choices)
        else:
            results = suites.harness(
                parse_suite(given["suite"]),
                *models,
                folder=given["tasks_folder"],
                download=given["download"],
                limit=given["limit"],
                reporter=progress,
                **settings,
            )
            content, parts = results.as_json(), [harness_table(results)]
    session.finish(content, *parts)
    return 0


def choice_tables(table: ChoiceTable) -> list[Table | str]:
    """Return the accuracy of each model under each rule, and the differences of every two models."""
    from ...experts.measures.suites.choice_scores import RULES

    rows = [(model, *(_with_limits(table.accuracy(model, rule)) for rule in RULES)) for model in table.scores]
    right = frozenset(range(1, len(RULES) + 1))
    shots = f", {table.shots} shot{'s' * (table.shots != 1)}" if table.shots else ""
    title = f"accuracy on {len(table.questions)} questions{shots} (95% interval; guessing: {table.chance:.3f})"
    parts: list[Table | str] = [Table(("model", *RULES), rows, title=title, right=right)]
    if len(table.scores) > 1:
        by_rule = [table.differences(rule) for rule in RULES]
        rows = [
            (f"{line[0][0]} - {line[0][1]}", *(_with_sign(difference) for _, _, difference in line))
            for line in zip(*by_rule, strict=True)
        ]
        title = "difference of accuracy on the same questions (95% interval, * without 0)"
        parts += ["", Table(("models", *RULES), rows, title=title, right=right)]
    return parts


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
