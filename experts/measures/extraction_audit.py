"""Audit of memorised training text: FlexOlmo's extraction attack (arXiv:2507.07024, section 6).

The model is prompted with the first tokens of a training document and samples several continuations. A document
counts as extracted if a sample is close to the true continuation: a normalised Levenshtein similarity over token ids
of at least a threshold. Shapes: B = documents, P = prompt tokens, N = tokens in total.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...core.artefacts.digests import digest_of_tokenizer
from ...core.artefacts.versions import require_privacy_extra
from ...core.errors import UserError
from ...core.models.generation import weight_bytes
from ...core.models.loading import load_network, require_intact_models, text_positions, tokenizer_folder
from ...core.process.compute import best_device, threads_for_tokens
from ...core.reporting import SILENT, Reporter
from ...core.text.tokenizer import TextEncoder


@dataclass(frozen=True)
class AttackSettings:
    """Settings of the attack; defaults as in the paper, except for the number of documents (10,000 there)."""

    documents: int = 1000
    """Maximum number of documents to attack."""
    prefix: int = 32
    """Number of tokens of the document in the prompt."""
    continuation: int = 256
    """Number of tokens to generate; documents shorter than prefix plus continuation are skipped."""
    samples: int = 10
    """Number of samples per document."""
    top_k: int = 50
    top_p: float = 0.95
    temperature: float = 1.0
    threshold: float = 0.9
    """Minimum similarity for a document to count as extracted."""
    batch_size: int = 40
    """Number of continuations to sample at a time."""
    seed: int = 0
    """Random seed of the choice of documents and of the samples."""


@dataclass(frozen=True)
class Target:
    """One document under attack, as token ids."""

    prefix: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Targets:
    """The documents to attack, and counts of all documents."""

    chosen: tuple[Target, ...]
    long_enough: int
    """Number of documents with enough tokens."""
    too_short: int
    """Number of documents with too few tokens."""


@dataclass(frozen=True)
class Extraction:
    """Result of the attack for one model."""

    model: str
    similarities: tuple[float, ...]
    """Similarity of each document's best sample, 0 to 1."""
    threshold: float

    @property
    def hits(self) -> int:
        """Number of extracted documents."""
        return sum(similarity >= self.threshold for similarity in self.similarities)

    @property
    def rate(self) -> float:
        """Fraction of documents that are extracted."""
        return self.hits / len(self.similarities)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % confidence interval of the rate."""
        from scipy.stats import binomtest

        interval = binomtest(self.hits, len(self.similarities)).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)

    @property
    def mean_similarity(self) -> float:
        return sum(self.similarities) / len(self.similarities)

    def as_json(self) -> dict[str, Any]:
        """Return the figures of the model, without any text."""
        return {
            "model": self.model,
            "documents": len(self.similarities),
            "extracted": self.hits,
            "rate": self.rate,
            "interval": list(self.interval),
            "mean_similarity": self.mean_similarity,
            "largest_similarity": max(self.similarities),
        }


@dataclass(frozen=True)
class ExtractionAudit:
    """Results of the attack on a model and optionally on a reference model that has not seen the text."""

    settings: AttackSettings
    long_enough: int
    """Number of documents with enough tokens."""
    too_short: int
    """Number of documents with too few tokens."""
    model: Extraction
    reference: Extraction | None = None

    @property
    def only_model(self) -> int:
        """Number of documents extracted from the model and not from the reference."""
        if self.reference is None:
            return self.model.hits
        pairs = zip(self.model.similarities, self.reference.similarities, strict=True)
        return sum(model >= self.settings.threshold > reference for model, reference in pairs)

    def as_json(self) -> dict[str, Any]:
        return {
            **self.model.as_json(),
            "reference": self.reference.as_json() if self.reference is not None else None,
            "extracted_from_model_only": self.only_model,
            "documents_long_enough": self.long_enough,
            "documents_too_short": self.too_short,
            "similarity": "1 - Levenshtein distance / length, over token ids",
            "settings": asdict(self.settings),
        }


def audit_extraction(
    model: Path,
    documents: Iterable[str],
    settings: AttackSettings,
    *,
    reference: Path | None = None,
    reporter: Reporter = SILENT,
) -> ExtractionAudit:
    """Attack a model, and optionally a reference, with the same documents of the model's training text.

    Raises `UserError` if the tokenizers differ, a model has too few positions, or no document is long enough.
    """
    require_privacy_extra("rapidfuzz", "the audit needs RapidFuzz")
    folders = [model] if reference is None else [model, reference]
    tokenizers = [tokenizer_folder(folder) for folder in folders]
    needed = 1 + settings.prefix + settings.continuation
    for folder in folders:
        positions = text_positions(folder)
        if needed > positions:
            raise UserError(
                f"{folder.name} has {positions} positions, but separator, prefix and continuation need {needed}; lower "
                "--continuation"
            )
        require_intact_models([folder])
    if len({digest_of_tokenizer(tokenizer) for tokenizer in tokenizers}) > 1:
        raise UserError(
            f"{model.name} and {folders[-1].name} have different tokenizers; compare models with the same tokenizer"
        )
    encoder = TextEncoder.of_folder(tokenizers[0])
    targets = choose_targets(documents, encoder, settings)
    extractions = []
    for folder in folders:
        network = load_network(folder).to(best_device())
        similarities = attack(network, targets.chosen, encoder.separator, settings, reporter, folder.name)
        extractions.append(Extraction(folder.name, similarities, settings.threshold))
    return ExtractionAudit(settings, targets.long_enough, targets.too_short, *extractions)


def choose_targets(documents: Iterable[str], encoder: TextEncoder, settings: AttackSettings) -> Targets:
    """Return a uniform random sample of the documents that are long enough, by reservoir sampling in one pass.

    Raises `UserError` if there is none.
    """
    needed = settings.prefix + settings.continuation
    generator = random.Random(settings.seed)
    chosen: list[Target] = []
    long_enough = too_short = 0
    for document in encoder.encode_stream(documents):
        ids = document.ids
        if len(ids) < needed:
            too_short += 1
            continue
        target = Target(tuple(ids[: settings.prefix]), tuple(ids[settings.prefix : needed]))
        if len(chosen) < settings.documents:
            chosen.append(target)
        elif (index := generator.randrange(long_enough + 1)) < settings.documents:
            chosen[index] = target
        long_enough += 1
    if not chosen:
        raise UserError(f"no document has {needed} tokens ({too_short} are shorter); lower --prefix and --continuation")
    return Targets(tuple(chosen), long_enough, too_short)


def attack(
    model: PreTrainedModel,
    targets: Sequence[Target],
    separator: int,
    settings: AttackSettings,
    reporter: Reporter = SILENT,
    task: str = "attacking",
) -> tuple[float, ...]:
    """Return the similarity, 0 to 1, of each document's best sample to its true continuation.

    Prompts begin with the separator, as documents do in training; a sample ends at the first separator.
    """
    torch.manual_seed(settings.seed)
    group_size = max(settings.batch_size // settings.samples, 1)
    best: list[float] = []
    for begin in range(0, len(targets), group_size):
        group = targets[begin : begin + group_size]
        samples = _sample(model, group, separator, settings)
        for number, target in enumerate(group):
            target_samples = samples[number * settings.samples : (number + 1) * settings.samples]
            best.append(max(similarity(sample, target.continuation) for sample in target_samples))
        reporter.progress(task, len(best), len(targets), "documents")
    return tuple(best)


def _sample(
    model: PreTrainedModel, group: Sequence[Target], separator: int, settings: AttackSettings
) -> list[list[int]]:
    """Return `settings.samples` continuations of each document, grouped by document."""
    prompts_BP = torch.tensor([[separator, *target.prefix] for target in group], device=model.device)
    with torch.inference_mode(), threads_for_tokens(weight_bytes(model)):
        texts_BN: Tensor = model.generate(
            prompts_BP,
            attention_mask=torch.ones_like(prompts_BP),
            max_new_tokens=settings.continuation,
            num_return_sequences=settings.samples,
            do_sample=True,
            top_k=settings.top_k,
            top_p=settings.top_p,
            temperature=settings.temperature,
            repetition_penalty=1.0,
            eos_token_id=separator,
            pad_token_id=separator,
        )
    rows: list[list[int]] = texts_BN[:, prompts_BP.shape[1] :].tolist()
    return [row[: row.index(separator)] if separator in row else row for row in rows]


def similarity(first: Sequence[int], second: Sequence[int]) -> float:
    """Return the normalised Levenshtein similarity of two sequences of token ids: 1 - distance / longer length."""
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_similarity(first, second))
