"""Scoring models on domains: every token of each validation part once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.artefacts.layout import Layout
from ...core.config.settings import ProjectConfig
from ...core.errors import UserError
from ...core.hooks.evaluation import Score
from ...core.hooks.manager import installed_plugins
from ...core.models.loading import load_model, max_positions, require_intact_models, tokenizer_folder
from ...core.process.compute import best_device, concurrently
from ...core.text.token_store import TokenBlocks
from ..text.corpora import domain_config, prepare_domain

Tell = Callable[[str, str], None]


@dataclass(frozen=True)
class EvaluationTable:
    """Scores of several models on several domains."""

    domains: tuple[str, ...]
    scores: Mapping[str, Mapping[str, Score]]
    """Model -> domain -> score."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the values that the evaluator gave."""
        return tuple(next(iter(next(iter(self.scores.values())).values())).values)

    def mean(self, model: str, metric: str) -> float:
        """Return the mean of a metric over the domains, each counting the same."""
        values = [self.scores[model][domain].values[metric] for domain in self.domains]
        return sum(values) / len(values)

    def best(self, domain: str, metric: str) -> str:
        """Return the model with the lowest value on a domain."""
        return min(self.scores, key=lambda model: self.scores[model][domain].values[metric])

    def as_json(self) -> dict[str, object]:
        """Return what `eval --json` prints: metric -> domain -> value for each model, and token counts."""
        models = {}
        for name, by_domain in self.scores.items():
            metrics = next(iter(by_domain.values())).values
            models[name] = {
                metric: {domain: by_domain[domain].values[metric] for domain in self.domains}
                for metric in metrics
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
    tell: Tell = lambda model, domain: None,
) -> EvaluationTable:
    """Score models (folders by the name they are shown under) on domains (default: all of the project).

    Each model reads the text through its own tokenizer, so bits per byte compare across tokenizers. `tell`
    hears (model, domain) after each score. Raises `UserError` for a damaged model or an unknown domain.
    """
    names = tuple(domains if domains is not None else project.domains)
    if not names:
        raise UserError("there is no domain to evaluate on; add one under 'domains' in expertctl.yaml")
    scorer = installed_plugins().evaluator(evaluator)
    size = project.training.sequence_length
    require_intact_models(models.values())
    blocks = {}
    for model, folder in models.items():
        tokenizer = tokenizer_folder(folder)
        for name in names:
            prepared = prepare_domain(layout, name, domain_config(project, name), tokenizer)
            blocks[model, name] = TokenBlocks(prepared.open("valid"), min(size, max_positions(tokenizer)))

    def score(model: str) -> dict[str, Score]:
        network, _ = load_model(models[model], dtype="float32")
        network.to(best_device())
        found = {}
        for name in names:
            if hasattr(network, "begin_text"):
                network.begin_text()  # a prior that moves begins anew, so that the order of domains says nothing
            found[name] = scorer.evaluate(network, blocks[model, name])
            tell(model, name)
        return found

    largest = max((_num_bytes(folder) for folder in models.values()), default=0)
    return EvaluationTable(
        names, dict(zip(models, concurrently(score, models, bytes_each=largest, jobs=jobs), strict=True))
    )


def _num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
