"""Looking for the weights of a merge that predict validation text best, without writing a model for each trial.

Every trial merges in memory and scores the same blocks of text. The search begins at the domain posterior's weights and
never returns anything worse. Its log is its memory: the same search, begun again, takes results from it and goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.files import readable_os_errors
from ...core.config.settings import SearchConfig
from ...core.errors import UserError
from ...core.hooks.text import ValidationText
from ...core.models.loading import load_model, overlay_tensors
from ...core.models.scoring import token_log_probs
from ...core.process.compute import best_device
from ..engine.calculator import Calculator
from ..engine.reading import Reader
from ..engine.writing import fingerprint_of
from ..recipes.recipe import Setting
from .plan import MergePlan

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

SMALLEST = 1e-3
"""Weights are searched by their logarithm; one that starts at 0 starts here."""
_FIRST_FACTOR = 2.0
_LAST_FACTOR = 1.02
_CMA_SIGMA = 0.5

Weights = Mapping[str, Setting]
Point = tuple[float, ...]
Planner = Callable[[Weights], MergePlan]


@dataclass(frozen=True)
class SearchResult:
    """The best weights that were found."""

    weights: dict[str, Setting]
    bits_per_byte: float
    """Mean over the domains, on the blocks that trials were scored on."""
    start_bits_per_byte: float
    trials: int


def search_weights(
    plan_for: Planner,
    seed: Path,
    start: Mapping[str, float],
    texts: Sequence[ValidationText],
    config: SearchConfig,
    log: Path,
    say: Callable[[str], None] = lambda line: None,
) -> SearchResult:
    """Return the weights with the lowest mean bits per byte over the domains, `start`'s at worst.

    `log` gets a line for each trial and gives back those of an earlier run of the very same search. Raises
    `UserError` when there is no text to score, or the merge changes the vocabulary.
    """
    if not texts:
        raise UserError(
            "weights are searched on validation text and there is none; run `expertctl data prepare`"
        )
    space = _Space(tuple(start), config.layer_groups)
    plan = plan_for(space.weights(space.point(start)))
    if plan.vocabulary is not None:
        raise UserError("weights cannot be searched where tokenizers differ; merge to one tokenizer first")
    scorer = _Scorer(seed, plan_for, texts, config.blocks)
    identity = {
        "start": dict(start),
        "config": config.model_dump(),
        "plan": plan.identity(),
        "text": scorer.identity(),
    }
    trials = _Trials(log, fingerprint_of(identity), space, scorer, config.trials, say)
    steps = {"coordinate": _by_coordinates, "cma": _by_cma}[config.strategy]
    first = trials.score(space.point(start))
    assert first is not None
    steps(trials, space.point(start), first, config.seed)
    best = min(trials.done, key=lambda pair: pair[1])
    return SearchResult(space.weights(best[0]), best[1], first, len(trials.done))


class _Space:
    """Weights as points: the logarithm of one number for each expert and layer group."""

    def __init__(self, experts: tuple[str, ...], groups: int) -> None:
        self.experts, self.groups = experts, groups

    def point(self, weights: Mapping[str, float]) -> Point:
        return tuple(
            math.log(max(weights[name], SMALLEST)) for name in self.experts for _ in range(self.groups)
        )

    def weights(self, point: Point) -> dict[str, Setting]:
        """Return each expert's weight; with several groups, a gradient over the layers."""
        values = [float(f"{math.exp(one):.6g}") for one in point]
        found: dict[str, Setting] = {}
        for number, name in enumerate(self.experts):
            own = values[number * self.groups : (number + 1) * self.groups]
            found[name] = own[0] if self.groups == 1 else own
        return found


class _Scorer:
    """Merges in memory and scores fixed blocks of every domain."""

    def __init__(self, seed: Path, plan_for: Planner, texts: Sequence[ValidationText], blocks: int) -> None:
        self._seed, self._plan_for, self._texts = seed, plan_for, texts
        self._blocks = {text.domain: list(_spread(text, blocks)) for text in texts}
        self._model: PreTrainedModel | None = None

    def identity(self) -> dict[str, Any]:
        """Return what tells one set of blocks from another."""
        return {
            domain: fingerprint_of([block.tolist() for block in found])
            for domain, found in self._blocks.items()
        }

    def score(self, weights: Weights) -> dict[str, float]:
        """Return bits per byte by domain."""
        import torch

        model = self._merged(weights)
        found = {}
        with torch.inference_mode():
            for text in self._texts:
                nats, count = 0.0, 0
                for block in self._blocks[text.domain]:
                    scores = token_log_probs(model, torch.from_numpy(block)[None].to(model.device))
                    nats -= float(scores.double().sum())
                    count += scores.numel()
                tokens_per_byte = text.blocks.num_targets / text.blocks.num_bytes
                found[text.domain] = nats / count / math.log(2) * tokens_per_byte
        return found

    def _merged(self, weights: Weights) -> PreTrainedModel:
        """Return the one model that all trials share, holding the tensors of this merge."""
        import torch

        if self._model is None:
            self._model, _ = load_model(self._seed, dtype="float32")
            self._model.to(best_device())
        plan = self._plan_for(weights)
        with Reader(plan.recipe.input_dtype) as reader:
            calculator = Calculator(plan.method, reader, None, plan.settings.device)
            for one in plan.stack.tensors:
                if one.action != "agree":
                    numbers = torch.from_numpy(calculator.numbers_of(one).copy())
                    overlay_tensors(self._model, {one.name: numbers})
        return self._model


def _spread(text: ValidationText, count: int) -> Iterator[NDArray[Any]]:
    available = max(len(text.blocks), 1)
    taken = min(count, available)
    return (text.blocks.block(index * available // taken) for index in range(taken))


class _Trials:
    """Scores points, each once, and keeps the log."""

    def __init__(
        self,
        log: Path,
        fingerprint: str,
        space: _Space,
        scorer: _Scorer,
        limit: int,
        say: Callable[[str], None],
    ) -> None:
        self.done: list[tuple[Point, float]] = []
        self._log, self._space, self._scorer, self._limit, self._say = log, space, scorer, limit, say
        self._known = _read_log(log, fingerprint)
        if not self._known:
            with readable_os_errors(log):
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
        elif self._known:
            say(f"{len(self._known)} trials of this search are in {log} and are taken from there")

    def score(self, point: Point) -> float | None:
        """Return the mean bits per byte of a point, None when all trials are used up."""
        weights = self._space.weights(point)
        for other, score in self.done:
            if self._space.weights(other) == weights:
                return score
        if len(self.done) >= self._limit:
            return None
        key = json.dumps(weights)
        if key in self._known:
            score = self._known[key]
        else:
            by_domain = self._scorer.score(weights)
            score = sum(by_domain.values()) / len(by_domain)
            score = score if math.isfinite(score) else math.inf
            self._note({"weights": weights, "bits_per_byte": by_domain, "mean": score})
        self.done.append((point, score))
        best = min(one for _, one in self.done)
        self._say(f"trial {len(self.done)} of {self._limit}: {score:.4f} bits per byte, best {best:.4f}")
        return score

    def _note(self, record: Mapping[str, Any]) -> None:
        with readable_os_errors(self._log), self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _read_log(log: Path, fingerprint: str) -> dict[str, float]:
    """Return what an earlier run of the same search found, by weights; a line that a kill cut off does not count."""
    if not log.is_file():
        return {}
    found: dict[str, float] = {}
    lines = log.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if number == 0 and record.get("fingerprint") != fingerprint:
            return {}
        if "weights" in record:
            found[json.dumps(record["weights"])] = record["mean"]
    return found


def _by_coordinates(trials: _Trials, start: Point, score: float, seed: int) -> None:
    """Try more and less of each weight in turn; where neither helps, try smaller steps."""
    best, factor = start, math.log(_FIRST_FACTOR)
    while factor >= math.log(_LAST_FACTOR):
        improved = False
        for place in range(len(start)):
            for step in (factor, -factor):
                point = (*best[:place], best[place] + step, *best[place + 1 :])
                found = trials.score(point)
                if found is None:
                    return
                if found < score:
                    best, score, improved = point, found, True
                    break
        if not improved:
            factor /= 2


def _by_cma(trials: _Trials, start: Point, score: float, seed: int) -> None:
    """Draw points from a normal distribution that learns from their scores (CMA-ES, arXiv:1604.00772)."""
    import numpy as np
    from cmaes import CMA

    if len(start) < 2:
        _by_coordinates(trials, start, score, seed)
        return
    optimiser = CMA(mean=np.array(start), sigma=_CMA_SIGMA, seed=seed)
    while not optimiser.should_stop():
        generation = []
        for _ in range(optimiser.population_size):
            point = optimiser.ask()
            found = trials.score(tuple(float(one) for one in point))
            if found is None:
                return
            generation.append((point, found))
        optimiser.tell(generation)
