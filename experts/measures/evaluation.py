"""Evaluation of models on domains, with every token of the text of each test part scored once."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.artefacts.layout import Layout
from ...core.config.settings import ProjectConfig
from ...core.errors import UserError
from ...core.hooks.evaluation import Evaluator, Metric, Score
from ...core.hooks.manager import installed_plugins
from ...core.manifests.manifest import Manifest, manifest_path, read_manifest
from ...core.manifests.run import RunSpec
from ...core.models.adapters.prompts import num_prompt_tokens
from ...core.models.decoding.opening import CheckedDecoder, DecoderChoice, check_decoder
from ...core.models.kernels.quantised_linear import require_quantisation
from ...core.models.loading import (
    load_network,
    require_intact_models,
    require_members,
    text_positions,
    tokenizer_folder,
)
from ...core.models.scoring import begin_text
from ...core.process.compute import best_device, concurrently
from ...core.process.placement import DeviceMap
from ...core.reporting import SILENT, Reporter
from ...core.text.conversation_blocks import windows_of
from ...core.text.token_store import TokenWindows
from ...core.text.tokenizer import load_tokenizer
from ..text.corpora import NEGLIGIBLE_LOSS, domain_config, lost_text, prepare_domain
from .document_intervals import DomainIntervals, intervals_of, token_evaluator
from .positions import PositionScore, position_evaluator
from .shared_evaluation import EvaluationJob, require_devices, score_in_processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST_CONTEXT = 2048


@dataclass(frozen=True)
class EvaluationTable:
    """Scores of several models on several domains."""

    domains: tuple[str, ...]
    scores: Mapping[str, Mapping[str, Score]]
    """Model -> domain -> score."""
    metrics: tuple[Metric, ...]
    """The evaluator's metrics; comparisons use the first."""
    texts: Mapping[str, Mapping[str, EvaluatedText]]
    """Model -> domain -> the text as the model read it."""
    intervals: DomainIntervals | None = None
    """Intervals of bits per byte, if they were asked for."""

    def mean(self, model: str, metric: Metric) -> float:
        """Return the unweighted mean of a metric over the domains."""
        values = [self.scores[model][domain].values[metric.name] for domain in self.domains]
        return sum(values) / len(values)

    def best(self, domain: str, metric: Metric) -> str | None:
        """Return the model with the best value on a domain; None if their tokenizers keep different shares of the text."""
        if not self.is_comparable(self.scores, [domain]):
            return None
        return metric.best({model: scores[domain].values[metric.name] for model, scores in self.scores.items()})

    def best_mean(self, metric: Metric) -> str | None:
        """Return the model with the best mean over the domains; None if models cannot be compared on one of them."""
        if not self.is_comparable(self.scores):
            return None
        return metric.best({model: self.mean(model, metric) for model in self.scores})

    def is_comparable(self, models: Iterable[str], domains: Sequence[str] | None = None) -> bool:
        """Return whether the models' tokenizers keep the same share of the text of every domain."""
        texts = [self.texts[name] for name in models]
        return all(_is_comparable(texts, domain) for domain in domains or self.domains)

    def as_json(self) -> dict[str, object]:
        """Return the content of `eval --json`: for each model metric -> domain -> value, and token counts."""
        models: dict[str, dict[str, object]] = {}
        for name, by_domain in self.scores.items():
            models[name] = {
                metric.name: {domain: by_domain[domain].values[metric.name] for domain in self.domains}
                for metric in self.metrics
            } | {
                "tokens": {domain: by_domain[domain].tokens for domain in self.domains},
                "text": {domain: asdict(self.texts[name][domain]) for domain in self.domains},
            }
            buckets = {
                domain: [asdict(bucket) for bucket in score.buckets]
                for domain, score in by_domain.items()
                if isinstance(score, PositionScore)
            }
            models[name] |= {"by_position": buckets} if buckets else {}
        content: dict[str, object] = {"domains": list(self.domains), "models": models}
        if self.intervals is not None:
            by_model, differences = self.intervals.as_json()
            for name, own in by_model.items():
                models[name]["intervals"] = own
            content["differences"] = differences
        return content


@dataclass(frozen=True)
class EvaluatedText:
    """How a model reads the text that it is evaluated on."""

    part: str
    """`test`, or `valid` for a domain with too little text for a test part."""
    context: int
    """Tokens of a window."""
    stride: int
    """Tokens from the begin of a window to the next; every later token is scored with `context - stride` before it."""
    coverage: float
    """Share of the bytes that the model's tokens give back."""


def evaluate(
    layout: Layout,
    project: ProjectConfig,
    models: Mapping[str, Path],
    domains: Sequence[str] | None = None,
    *,
    evaluator: str = "perplexity",
    context: int | None = None,
    stride: int | None = None,
    by_position: int | None = None,
    known_domains: bool = False,
    intervals: bool = False,
    ranked: Iterable[Collection[str]] = (),
    jobs: int | None = None,
    nproc: int = 1,
    device_map: DeviceMap | None = None,
    quantise: str | None = None,
    decoder: DecoderChoice | None = None,
    reporter: Reporter = SILENT,
) -> EvaluationTable:
    """Score models (display name -> folder) on the test text of domains (default: all of the project).

    Each model uses its own tokenizer; bits per byte are comparable across tokenizers that keep the whole text. `context`
    is the length of a window in tokens (default: the model's own, at most 2,048), `stride` the distance between windows
    (default: half of `context`). `by_position` scores bits per token by position instead, in buckets of which the first has so
    many; windows do not overlap then, so `stride` is not given. With `known_domains`, ensembles are told which domain they read, if they have a prior for
    it. `intervals` adds those of bits per byte over documents. `ranked` are models that will be compared with each other. `nproc` processes share the batches of all texts, one GPU
    each if there are any; scores do not depend on their number. `device_map` places the members of all models on devices; see
    `load_model`; `quantise` likewise. `decoder` changes the distribution of all models.

    Raises `UserError` for a damaged model, an unknown domain, a context that a model cannot read, and for ranked models
    whose tokenizers keep different shares of a text.
    """
    names = tuple(domains if domains is not None else project.domains)
    if not names:
        raise UserError("there is no domain to evaluate on; add one under 'domains' in expertctl.yaml")
    scorer = installed_plugins().offer(Evaluator, evaluator)
    if by_position is not None:
        if stride is not None:
            raise UserError("by position, windows do not overlap; leave out the stride, or the loss by position")
        scorer = position_evaluator(scorer, by_position)
    if intervals:
        if by_position is not None:
            raise UserError("intervals are those of bits per byte; leave out either them or the loss by position")
        scorer = token_evaluator(scorer)
    if nproc > 1:
        if jobs is not None:
            raise UserError("processes and models at the same time cannot both be given; give either nproc or jobs")
        if device_map is not None:
            raise UserError("a device map is for one process; give either nproc or device_map")
        if quantise is not None:
            raise UserError("weights in few bits are for one process; give either nproc or quantise")
        if decoder is not None:
            raise UserError("a decoder is for one process; give either nproc or decoder")
        require_devices(nproc)
    checked = None if decoder is None else check_decoder(decoder)
    if checked is not None:
        checked.require_scores()
        for folder in models.values():
            checked.require_for(folder)
    if quantise is not None:
        require_quantisation(quantise)
    if device_map is not None:
        for folder in models.values():
            require_members(folder, device_map)
    require_intact_models(models.values())
    windows, texts, notes = _open_texts(layout, project, models, names, context, stride, overlap=by_position is None)
    for group in ranked:
        _require_comparable(texts, group, names)
    if nproc > 1 and scorer.division is None:
        notes.append(f"evaluator '{evaluator}' scores a text as a whole, so only one process is used")
    for note in notes:
        reporter.say(note)

    job = EvaluationJob(models, windows, known_domains)
    nproc = min(nproc, job.num_windows)
    if nproc > 1 and scorer.division is not None:
        scores, knows_domains = score_in_processes(job, scorer.division, nproc, reporter)
    else:
        scores, knows_domains = _score_here(job, scorer, names, jobs, device_map, quantise, checked, reporter)
    if known_domains and not knows_domains:
        reporter.say(f"no model has a prior for {', '.join(names)}, so it makes no difference that domains are known")
    found = intervals_of(models, windows, scores) if intervals else None
    return EvaluationTable(names, scores, scorer.metrics, texts, found)


def _score_here(
    job: EvaluationJob,
    scorer: Evaluator,
    domains: Sequence[str],
    jobs: int | None,
    device_map: DeviceMap | None,
    quantise: str | None,
    decoder: CheckedDecoder | None,
    reporter: Reporter,
) -> tuple[dict[str, dict[str, Score]], bool]:
    """Return model -> domain -> score, and whether a model has weights of its own for one of the domains."""
    counter = itertools.count(1)
    told: dict[tuple[str, str], bool] = {}

    def score(model: str) -> dict[str, Score]:
        network = load_network(job.models[model], dtype="float32", device_map=device_map, quantise=quantise)
        if device_map is None:
            network.to(best_device())
        scored = network if decoder is None else _with_decoder(network, job, model, decoder, domains, reporter)
        domain_scores = {}
        for name in domains:
            # scores do not depend on the order of domains
            told[model, name] = begin_text(network, name if job.known_domains else None)
            domain_scores[name] = scorer.evaluate(scored, job.windows[model, name])
            reporter.progress("evaluating", next(counter), len(job.models) * len(domains), "scores")
        return domain_scores

    sizes = (sum(file.stat().st_size for file in folder.rglob("*.safetensors")) for folder in job.models.values())
    scores = concurrently(score, job.models, bytes_each=max(sizes, default=0), jobs=jobs)
    return dict(zip(job.models, scores, strict=True)), any(told.values())


def _with_decoder(
    network: PreTrainedModel,
    job: EvaluationJob,
    model: str,
    decoder: CheckedDecoder,
    domains: Sequence[str],
    reporter: Reporter,
) -> PreTrainedModel:
    """Return the model with a decoder's distribution; raises `UserError` for windows that leave no room for its contexts."""
    from ...core.models.decoding.wrapped import positions_of

    tokenizer = load_tokenizer(tokenizer_folder(job.models[model]))
    scored = decoder.open(network, tokenizer, dtype="float32", reporter=reporter).model
    longest = max(job.windows[model, name].context for name in domains)
    if longest > (positions := positions_of(scored)):
        raise UserError(
            f"decoder '{decoder.decoder.name}' leaves {positions} positions of {model}, and a window has {longest} tokens; "
            f"give at most --context {positions}"
        )
    return scored


def _open_texts(
    layout: Layout,
    project: ProjectConfig,
    models: Mapping[str, Path],
    domains: Sequence[str],
    context: int | None,
    stride: int | None,
    *,
    overlap: bool,
) -> tuple[dict[tuple[str, str], TokenWindows], dict[str, dict[str, EvaluatedText]], list[str]]:
    """Return the windows of each model and domain, what they are (model -> domain), and notes for the user."""
    windows: dict[tuple[str, str], TokenWindows] = {}
    texts: dict[str, dict[str, EvaluatedText]] = {model: {} for model in models}
    readers: dict[str, list[str]] = {}
    untested: dict[str, None] = {}
    notes = []
    for model, folder in models.items():
        length = window_length(layout, model, folder, context)
        if (count := num_prompt_tokens(folder)) and length == text_positions(folder):
            notes.append(f"{model}: windows of {length} tokens, since its prompt takes {count} of the positions")
        if stride is not None and stride > length:
            raise UserError(f"a stride of {stride} skips tokens, since a window has {length}; give at most {length}")
        for name in domains:
            prepared = prepare_domain(layout, name, domain_config(project, name), tokenizer_folder(folder))
            if lost := lost_text(prepared):
                readers.setdefault(lost, []).append(model)
            if prepared.test is None:
                untested[name] = None
            part = "test" if prepared.test is not None else "valid"
            default = max(length // 2, 1) if overlap else length
            opened = windows_of(prepared.open(part), length, stride or default)
            texts[model][name] = EvaluatedText(part, length, opened.stride, opened.store.part.coverage)
            windows[model, name] = opened
    notes += [f"{', '.join(names)}: {lost}" for lost, names in readers.items()]
    if untested:
        notes.append(
            "too little text for a test part, so scored on validation text, which merges may be fitted on: "
            f"{', '.join(untested)}"
        )
    return windows, texts, notes


def _is_comparable(texts: Iterable[Mapping[str, EvaluatedText]], domain: str) -> bool:
    shares = [text[domain].coverage for text in texts]
    return max(shares) - min(shares) <= NEGLIGIBLE_LOSS


def _require_comparable(
    texts: Mapping[str, Mapping[str, EvaluatedText]], models: Collection[str], domains: Sequence[str]
) -> None:
    """Raise `UserError` for models whose tokenizers keep different shares of a domain's text."""
    for domain in domains:
        if not _is_comparable([texts[name] for name in models], domain):
            shares = ", ".join(f"{name} {texts[name][domain].coverage:.1%}" for name in models)
            raise UserError(
                f"these models cannot be ranked on '{domain}', since their tokenizers keep different shares of its text "
                f"({shares}); leave the domain out with --domains, or compare models that keep all of it"
            )


def window_length(layout: Layout, model: str, folder: Path, requested: int | None) -> int:
    """Return the length of a model's windows; raises `UserError` if it has fewer positions than are requested."""
    positions = text_positions(folder)
    if requested is None:
        return min(positions, LONGEST_CONTEXT, _trained_context(layout, folder) or LONGEST_CONTEXT)
    if requested > positions:
        raise UserError(
            f"--context {requested} exceeds the {positions} positions{_left_by_prompt(folder)} of {model}; give at most {positions}"
        )
    return requested


def _left_by_prompt(folder: Path) -> str:
    count = num_prompt_tokens(folder)
    return f" that a prompt of {count} leaves" if count else ""


def _trained_context(layout: Layout, folder: Path) -> int | None:
    """Return the longest sequences that a model pretrained here has seen; None if others pretrained it."""
    if manifest_path(folder) is None:
        return None
    manifest = read_manifest(folder)
    lengths = [_sequence_length(manifest)]
    if manifest.kind != "seed" and manifest_path(layout.seed) is not None:
        seed = read_manifest(layout.seed)
        if not isinstance(seed.config, RunSpec):
            return None
        lengths.append(_sequence_length(seed))
    return max(lengths) or None


def _sequence_length(manifest: Manifest) -> int:
    return manifest.config.training.sequence_length if isinstance(manifest.config, RunSpec) else 0
