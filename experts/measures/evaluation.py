"""Evaluation of models on domains, with every token of each validation part scored once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.artefacts.layout import Layout
from ...core.config.settings import ProjectConfig
from ...core.errors import UserError
from ...core.hooks.evaluation import Evaluator, Metric, Score
from ...core.hooks.manager import installed_plugins
from ...core.models.loading import load_network, max_positions, require_intact_models, tokenizer_folder
from ...core.process.compute import best_device, concurrently
from ...core.reporting import SILENT, Reporter
from ...core.text.token_store import TokenBlocks
from ..text.corpora import domain_config, prepare_domain


@dataclass(frozen=True)
class EvaluationTable:
    """Scores of several models on several domains."""

    domains: tuple[str, ...]
    scores: Mapping[str, Mapping[str, Score]]
    """Model -> domain -> score."""
    metrics: tuple[Metric, ...]
    """The evaluator's metrics; comparisons use the first."""

    def mean(self, model: str, metric: Metric) -> float:
        """Return the unweighted mean of a metric over the domains."""
        values = [self.scores[model][domain].values[metric.name] for domain in self.domains]
        return sum(values) / len(values)

    def best(self, domain: str, metric: Metric) -> str:
        """Return the model with the best value on a domain."""
        return metric.best({model: scores[domain].values[metric.name] for model, scores in self.scores.items()})

    def best_mean(self, metric: Metric) -> str:
        """Return the model with the best mean over the domains."""
        return metric.best({model: self.mean(model, metric) for model in self.scores})

    def as_json(self) -> dict[str, object]:
        """Return the content of `eval --json`: for each model metric -> domain -> value, and token counts."""
        models: dict[str, object] = {}
        for name, by_domain in self.scores.items():
            models[name] = {
                metric.name: {domain: by_domain[domain].values[metric.name] for domain in self.domains}
                for metric in self.metrics
            } | {"tokens": {domain: by_domain[domain].tokens for domain in self.domains}}
        return {"domains": list(self.domains), "models": models}


def evaluate(
    layout: Layout,
    project: ProjectConfig,
    models: Mapping[str, Path],
    domains: Sequence[str] | None = None,
    *,
    evaluator: str = "perplexity",
    jobs: int | None = None,
    reporter: Reporter = SILENT,
) -> EvaluationTable:
    """Score models (display name -> folder) on domains (default: all of the project).

    Each model uses its own tokenizer; bits per byte are comparable across tokenizers. Raises `UserError` for a
    damaged model or an unknown domain.
    """
    names = tuple(domains if domains is not None else project.domains)
    if not names:
        raise UserError("there is no domain to evaluate on; add one under 'domains' in expertctl.yaml")
    scorer = installed_plugins().offer(Evaluator, evaluator)
    size = project.training.sequence_length
    require_intact_models(models.values())
    blocks = {}
    for model, folder in models.items():
        tokenizer = tokenizer_folder(folder)
        for name in names:
            prepared = prepare_domain(layout, name, domain_config(project, name), tokenizer)
            blocks[model, name] = TokenBlocks(prepared.open("valid"), min(size, max_positions(tokenizer)))

    counter = itertools.count(1)

    def score(model: str) -> dict[str, Score]:
        network = load_network(models[model], dtype="float32").to(best_device())
        domain_scores = {}
        for name in names:
            if hasattr(network, "begin_text"):
                network.begin_text()  # reset an adaptive prior, so that scores do not depend on the order of domains
            domain_scores[name] = scorer.evaluate(network, blocks[model, name])
            reporter.progress("evaluating", next(counter), len(models) * len(names), "scores")
        return domain_scores

    sizes = (sum(file.stat().st_size for file in folder.rglob("*.safetensors")) for folder in models.values())
    scores = concurrently(score, models, bytes_each=max(sizes, default=0), jobs=jobs)
    return EvaluationTable(names, dict(zip(models, scores, strict=True)), scorer.metrics)
