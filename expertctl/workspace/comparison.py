"""Comparison of a generalist with its seed, best expert, average and ensemble."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertctl.core.artefacts.layout import Layout
from expertctl.core.config.settings import MergeConfig
from expertctl.core.errors import UserError, unknown_name
from expertctl.core.hooks.evaluation import Metric
from expertctl.core.manifests.manifest import manifest_path, read_manifest
from expertctl.core.reporting import SILENT, Reporter
from expertctl.experts.measures.evaluation import EvaluationTable, evaluate

from .data import Data
from .project import Project

BASELINES = ("seed", "best-expert", "average", "ensemble")
BEST_EXPERT = "best-expert"
_MERGED = ("average", "ensemble")
_FROM_EXPERTS = (BEST_EXPERT, *_MERGED)


@dataclass(frozen=True)
class Comparison:
    """A model's scores beside those of its baselines."""

    model: str
    baselines: tuple[str, ...]
    table: EvaluationTable
    """A row for the model and for each baseline."""

    @property
    def metric(self) -> Metric:
        return self.table.metrics[0]

    @property
    def best(self) -> str:
        """The baseline with the best mean."""
        return self.metric.best({name: self.table.mean(name, self.metric) for name in self.baselines})

    @property
    def holds(self) -> bool:
        """Whether the model's mean is no worse than that of any baseline."""
        return not self.metric.is_worse(
            self.table.mean(self.model, self.metric), self.table.mean(self.best, self.metric)
        )

    def verdict(self) -> str:
        """Return in a sentence how the model compares."""
        own, other = (self.table.mean(name, self.metric) for name in (self.model, self.best))
        word = "not worse than" if self.holds else "worse than"
        return (
            f"{self.model} is {word} the best of its baselines, {self.best}: {own:.4f} and {other:.4f} "
            f"{self.metric.title} on average over {', '.join(self.table.domains)}"
        )


def compare(
    project: Project,
    data: Data,
    model: str,
    against: Sequence[str] = BASELINES,
    domains: Sequence[str] | None = None,
    *,
    jobs: int | None = None,
    nproc: int = 1,
    reporter: Reporter = SILENT,
) -> Comparison:
    """Score a generalist and its baselines; baselines that need a merge are made temporarily.

    `against` names baselines, or else models of the workspace; a baseline that has the name of the model itself gets a row
    of its own. Raises `UserError` for a model without experts where a baseline needs them.
    """
    folder = project.layout.artefact(model)
    experts = _experts_of(project.layout, folder) if set(_FROM_EXPERTS) & set(against) else {}
    rows = {name: f"{name} of its experts" if name == model and name in _FROM_EXPERTS else name for name in against}
    with tempfile.TemporaryDirectory(prefix=".baselines-", dir=project.layout.root) as scratch:
        folders = {model: folder}
        for name, row in rows.items():
            if name == BEST_EXPERT:
                folders |= {_row(expert): path for expert, path in experts.items()}
            elif name in _MERGED:
                reporter.say(f"making the {name} of {', '.join(experts)} to compare with")
                folders[row] = _merged(project, data, name, experts, Path(scratch))
            else:
                folders[row] = project.layout.artefact(name)
        ranked = [list(folders)]
        table = evaluate(
            project.layout, project.config, folders, domains, ranked=ranked, jobs=jobs, nproc=nproc, reporter=reporter
        )
    scores = dict(table.scores)
    if BEST_EXPERT in against:
        metric = table.metrics[0]
        best = metric.best({expert: table.mean(_row(expert), metric) for expert in experts})
        reporter.say(f"the best expert is {best}")
        scores[rows[BEST_EXPERT]] = scores[_row(best)]
    shown = {row: scores[row] for row in (model, *rows.values())}
    texts = {row: table.texts.get(row, table.texts[model]) for row in shown}
    return Comparison(model, tuple(rows.values()), EvaluationTable(table.domains, shown, table.metrics, texts))


def _row(expert: str) -> str:
    """Return the internal row name of an expert; it contains a blank, which no model name does."""
    return f"expert {expert}"


def _experts_of(layout: Layout, folder: Path) -> dict[str, Path]:
    if manifest_path(folder) is None:
        raise UserError(f"{folder} has no manifest, so that its experts are not known; name models to compare with")
    experts = {}
    for parent in read_manifest(folder).parents:
        if parent.kind == "expert":
            expert = layout.experts / parent.name
            if manifest_path(expert) is None:
                raise unknown_name("expert", parent.name, layout.finished_experts())
            experts[parent.name] = expert
    if not experts:
        raise UserError(f"{folder} has no experts; name models to compare with")
    return experts


def _merged(project: Project, data: Data, method: str, experts: dict[str, Path], scratch: Path) -> Path:
    from expertctl.merge.merging import merge

    target = scratch / method
    domains = data.trained_domains(experts.values())
    merge(
        project.layout,
        method,
        MergeConfig(method=method, experts=tuple(experts)),
        output=target,
        validation=lambda: data.validation(domains),
    )
    return target
