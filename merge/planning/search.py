"""Search for the merge weights that predict validation text best.

Every trial merges in memory and scores the same blocks of text. The search starts from the domain posterior's weights
and never returns worse weights. Trials are logged; the same search, started again, reuses the logged trials.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.artefacts.files import os_errors_as_user_errors
from ...core.artefacts.json_lines import JsonLines
from ...core.config.settings import SearchConfig
from ...core.errors import UserError
from ...core.hooks.text import ValidationText
from ...core.manifests.generalist import SearchRecord
from ...core.models.loading import load_model
from ...core.models.overlay import Overlay
from ...core.models.scoring import total_loss
from ...core.process.compute import best_device
from ...core.reporting import SILENT, Reporter
from ...core.text.token_store import spread_indices
from ..engine.actions import MergeTools, MergeWhole
from ..engine.reading import Reader
from ..engine.surveying import run_survey
from ..engine.writing import fingerprint_of
from ..recipes.recipe import Setting
from .plan import MergePlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST = 1e-3
"""Lower bound of initial weights, because the search works on logarithms."""
_FIRST_FACTOR = 2.0
_LAST_FACTOR = 1.02
_CMA_SIGMA = 0.5

Weights = Mapping[str, Setting]
Point = tuple[float, ...]
Planner = Callable[[Weights], MergePlan]


def search_weights(
    plan_for: Planner,
    seed: Path,
    start: Mapping[str, float],
    texts: Sequence[ValidationText],
    config: SearchConfig,
    log: Path,
    reporter: Reporter = SILENT,
) -> SearchRecord:
    """Return the weights with the lowest mean bits per byte over the domains, at most those of `start`.

    Each trial adds a line to `log`; trials of an earlier run of the same search are read from it. Raises `UserError` if
    there is no validation text or the merge changes the vocabulary.
    """
    if not texts:
        raise UserError("a weight search needs validation text, but there is none; run `expertctl data prepare`")
    space = _Space(tuple(start), config.layer_groups)
    plan = plan_for(space.weights(space.point(start)))
    if plan.vocabulary is not None:
        raise UserError("a weight search needs models with the same tokenizer; merge to one tokenizer first")
    scorer = _Scorer(seed, plan_for, texts, config.blocks)
    identity = {"start": dict(start), "config": config.model_dump(), "plan": plan.identity(), "text": scorer.identity()}
    trials = _Trials(log, fingerprint_of(identity), space, scorer, config.trials, reporter)
    strategy = {"coordinate": _coordinate_search, "cma": _cma_search}[config.strategy]
    start_score = trials.score(space.point(start))
    assert start_score is not None
    strategy(trials, space.point(start), start_score, config.seed)
    best = min(trials.done, key=lambda pair: pair[1])
    return SearchRecord(space.weights(best[0]), best[1], start_score, len(trials.done))


class _Space:
    """Search space: one log-weight per expert and layer group."""

    def __init__(self, experts: tuple[str, ...], groups: int) -> None:
        self.experts, self.groups = experts, groups

    def point(self, weights: Mapping[str, float]) -> Point:
        return tuple(math.log(max(weights[name], SMALLEST)) for name in self.experts for _ in range(self.groups))

    def weights(self, point: Point) -> dict[str, Setting]:
        """Return each expert's weight, or a gradient over the layers if there are several groups."""
        values = iter([float(f"{math.exp(log_weight):.6g}") for log_weight in point])
        if self.groups == 1:
            return dict(zip(self.experts, values, strict=True))
        return {name: list(islice(values, self.groups)) for name in self.experts}


class _Scorer:
    """Evaluates merges in memory on fixed blocks of every domain."""

    def __init__(self, seed: Path, plan_for: Planner, texts: Sequence[ValidationText], blocks: int) -> None:
        self._seed, self._plan_for, self._texts = seed, plan_for, texts
        self._blocks = {
            text.domain: [text.blocks.window(index) for index in spread_indices(text.blocks, blocks)] for text in texts
        }
        self._model: PreTrainedModel | None = None
        self._survey: Any = None
        self._is_surveyed = False

    def identity(self) -> dict[str, Any]:
        return {
            domain: fingerprint_of([block.tokens[0].tolist() for block in blocks])
            for domain, blocks in self._blocks.items()
        }

    def score(self, weights: Weights) -> dict[str, float]:
        """Return the bits per byte of each domain."""
        import torch

        model = self._merge(weights)
        bits_per_byte = {}
        with torch.inference_mode():
            for text in self._texts:
                nats, count = total_loss(model, self._blocks[text.domain])
                tokens_per_byte = text.blocks.num_targets / text.blocks.num_bytes
                bits_per_byte[text.domain] = nats / count / math.log(2) * tokens_per_byte
        return bits_per_byte

    def _merge(self, weights: Weights) -> PreTrainedModel:
        """Return the model that all trials share, with the tensors of this merge."""
        import torch

        if self._model is None:
            self._model, _ = load_model(self._seed, dtype="float32")
            self._model.to(best_device())
        plan, overlay = self._plan_for(weights), Overlay(self._model)
        with Reader(plan.recipe.input_dtype) as reader:
            tools = MergeTools(plan.tensor_method, reader, device=plan.settings.device)
            if not self._is_surveyed:  # the weights have no effect on what a survey finds
                self._survey = run_survey(plan.stack.tensors, tools)
                self._is_surveyed = True
            tools = replace(tools, survey=self._survey)
            for tensor in plan.stack.tensors:
                if tensor.action != "require_equal":
                    is_merged = tensor.action == "merge"
                    numbers = MergeWhole(tensor, tools).numbers() if is_merged else reader.read(tensor.experts[0])
                    overlay.add(tensor.name, torch.from_numpy(numbers.copy()))
        overlay.finish()
        return self._model


class _Trials:
    """Evaluates each point at most once and writes the log."""

    def __init__(
        self, log: Path, fingerprint: str, space: _Space, scorer: _Scorer, limit: int, reporter: Reporter
    ) -> None:
        self.done: list[tuple[Point, float]] = []
        self._space, self._scorer, self._limit, self._reporter = space, scorer, limit, reporter
        self._log = JsonLines[dict[str, Any]](log, dict, durable=False)
        records = self._log.read()
        if not records or records[0].get("fingerprint") != fingerprint:
            with os_errors_as_user_errors(log):
                log.parent.mkdir(parents=True, exist_ok=True)
            self._log.rewrite([{"fingerprint": fingerprint}])
            records = []
        self._logged = {json.dumps(record["weights"]): record["mean"] for record in records if "weights" in record}
        if self._logged:
            reporter.say(f"reusing {len(self._logged)} trials of this search from {log}")

    def score(self, point: Point) -> float | None:
        """Return the mean bits per byte of a point; None if no trials are left."""
        weights = self._space.weights(point)
        for other, score in self.done:
            if self._space.weights(other) == weights:
                return score
        if len(self.done) >= self._limit:
            return None
        key = json.dumps(weights)
        if key in self._logged:
            score = self._logged[key]
        else:
            by_domain = self._scorer.score(weights)
            score = sum(by_domain.values()) / len(by_domain)
            score = score if math.isfinite(score) else math.inf
            self._log.append({"weights": weights, "bits_per_byte": by_domain, "mean": score})
        self.done.append((point, score))
        best = min(trial_score for _, trial_score in self.done)
        self._reporter.say(f"trial {len(self.done)} of {self._limit}: {score:.4f} bits per byte, best {best:.4f}")
        return score


def _coordinate_search(trials: _Trials, start: Point, score: float, seed: int) -> None:
    """Coordinate search: scale each weight up and down in turn, with smaller steps once nothing improves."""
    best, factor = start, math.log(_FIRST_FACTOR)
    while factor >= math.log(_LAST_FACTOR):
        improved = False
        for coordinate in range(len(start)):
            for step in (factor, -factor):
                point = (*best[:coordinate], best[coordinate] + step, *best[coordinate + 1 :])
                new_score = trials.score(point)
                if new_score is None:
                    return
                if new_score < score:
                    best, score, improved = point, new_score, True
                    break
        if not improved:
            factor /= 2


def _cma_search(trials: _Trials, start: Point, score: float, seed: int) -> None:
    """CMA-ES (arXiv:1604.00772); coordinate search for a single weight."""
    from cmaes import CMA

    if len(start) < 2:
        _coordinate_search(trials, start, score, seed)
        return
    optimiser = CMA(mean=np.array(start), sigma=_CMA_SIGMA, seed=seed)
    while not optimiser.should_stop():
        generation = []
        for _ in range(optimiser.population_size):
            point = optimiser.ask()
            point_score = trials.score(tuple(float(log_weight) for log_weight in point))
            if point_score is None:
                return
            generation.append((point, point_score))
        optimiser.tell(generation)
