"""Running tasks of lm-eval on models, and the table of its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .....core.errors import UserError, first_line
from .....core.reporting import SILENT, Reporter
from ..opening import DEFAULT_SETTINGS, CheckedModels, ModelSettings
from .surroundings import require_harness, surrounded
from .tasks import find_tasks, open_tasks

PREFIX = "lm-eval:"
RESAMPLES = 1000
"""For standard errors of metrics that have no formula, such as perplexity of words."""


@dataclass(frozen=True)
class HarnessSettings:
    """Which tasks are run."""

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags."""
    folder: Path | None = None
    """Folder with task files."""
    download: bool = False
    """Whether the data of tasks may be downloaded from the Hugging Face hub."""
    limit: int | None = None
    """Number of questions of each task; None: all."""


@dataclass(frozen=True)
class HarnessValue:
    """One number of lm-eval."""

    task: str
    metric: str
    """With the name of the filter, unless that is `none`: `exact_match,strict-match`."""
    value: float
    error: float | None
    """Standard error, where lm-eval has one."""


@dataclass(frozen=True)
class HarnessTable:
    """lm-eval's results for several models."""

    results: Mapping[str, Mapping[str, Any]]
    """Model -> what lm-eval's `evaluate` returns, without samples."""

    def values(self, model: str) -> list[HarnessValue]:
        """Return the numbers of a model."""
        found = []
        for task, content in self.results[model]["results"].items():
            for key, value in content.items():
                metric, comma, filter_name = key.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = content.get(f"{metric}_stderr,{filter_name}")
                shown = metric if filter_name == "none" else key
                is_number = isinstance(error, int | float)
                found.append(HarnessValue(task, shown, float(value), float(error) if is_number else None))
        return found

    def as_json(self) -> dict[str, Any]:
        """Return the content of `eval --suite --json`: for each model what lm-eval itself reports."""
        kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")
        models = {model: {key: result[key] for key in kept if key in result} for model, result in self.results.items()}
        return {"suite": "lm-eval", "version": version("lm-eval"), "models": models}


def parse_suite(text: str) -> tuple[str, ...]:
    """Return the tasks of `lm-eval:A,B`; raises `UserError` for another suite or none."""
    names = tuple(name.strip() for name in text.removeprefix(PREFIX).split(",") if name.strip())
    if not text.startswith(PREFIX) or not names:
        raise UserError(f"no suite '{text:.60}'; write {PREFIX}TASK, or several tasks with commas between them")
    return tuple(dict.fromkeys(names))


def run_harness(
    folders: Mapping[str, Path],
    settings: HarnessSettings,
    model_settings: ModelSettings = DEFAULT_SETTINGS,
    reporter: Reporter = SILENT,
) -> HarnessTable:
    """Run tasks on models (name -> folder), in float32, without chat templates.

    Raises `UserError` before any model is loaded for what is not installed, for tasks that cannot be opened, and for a model or
    decoder that does not fit.
    """
    require_harness()
    if settings.folder is not None and not settings.folder.is_dir():
        raise UserError(f"{settings.folder} is not a folder; --tasks-folder names one with task files")
    models = CheckedModels.of(folders, model_settings, scored=True)
    reporter.say(f"opening {', '.join(settings.tasks)} with lm-eval {version('lm-eval')}")
    results: dict[str, Mapping[str, Any]] = {}
    with surrounded(download=settings.download):
        manager = find_tasks(settings.tasks, settings.folder, download=settings.download)
    for name in folders:
        with surrounded(download=settings.download):  # again for each model, since tasks keep the answers
            tasks = open_tasks(manager, settings.tasks)
        reporter.progress("running lm-eval", len(results), len(folders), "models")
        opened = models.open(name, reporter)
        with surrounded(download=settings.download):
            results[name] = _evaluate(opened, tasks, settings.limit)
    reporter.progress("running lm-eval", len(results), len(folders), "models")
    return HarnessTable(results)


def _evaluate(opened: Any, tasks: Mapping[str, Any], limit: int | None) -> Mapping[str, Any]:
    import random

    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate

    from .adapter import ArtefactLM

    make: Any = ArtefactLM  # lm-eval's own class is abstract for a checker without its types

    # as its `simple_evaluate`, which also asks the machine about itself, for seconds
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    try:
        result: Any = evaluate(
            lm=make(opened), task_dict=tasks, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False
        )
    except (ValueError, KeyError, TypeError, AssertionError) as error:  # how lm-eval reports tasks that do not fit
        raise UserError(
            f"lm-eval stopped at {opened.name}: {type(error).__name__}: {first_line(error):.300}; check the task's file"
        ) from error
    return {**result}


def task_rows(table: HarnessTable) -> Sequence[tuple[str, str, Mapping[str, HarnessValue]]]:
    """Return task, metric and the value of each model, in lm-eval's order."""
    rows: dict[tuple[str, str], dict[str, HarnessValue]] = {}
    for model in table.results:
        for value in table.values(model):
            rows.setdefault((value.task, value.metric), {})[model] = value
    return [(task, metric, by_model) for (task, metric), by_model in rows.items()]
