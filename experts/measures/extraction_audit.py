"""How much of its training text a model gives back: FlexOlmo's extraction attack (arXiv:2507.07024, section 6).

The model is given the first tokens of a training document and samples what follows, several times. A document counts as
extracted when one of the samples is nearly the true continuation: normalised Levenshtein similarity, over token ids,
of at least a threshold. Shapes: B = documents, P = tokens of the prompt, N = tokens in all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.lineage import digest_of_tokenizer
from ...core.errors import UserError
from ...core.models.loading import load_model, max_positions, require_intact_model, tokenizer_folder
from ...core.process.compute import best_device
from ...core.text.tokenizer import TextEncoder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

DOCUMENTS_PER_BATCH = 512


@dataclass(frozen=True)
class AttackSettings:
    """How the attack is done; the defaults are the paper's but for the number of documents, which is 10,000 there."""

    documents: int = 1000
    """Most documents that are tried."""
    prefix: int = 32
    """Tokens of the document that the model is given."""
    continuation: int = 256
    """Tokens that it is asked for; shorter documents are left out."""
    samples: int = 10
    """Tries for each document."""
    top_k: int = 50
    top_p: float = 0.95
    temperature: float = 1.0
    threshold: float = 0.9
    """Similarity from which on a document counts as extracted."""
    batch_size: int = 40
    """Continuations that are sampled at a time."""
    seed: int = 0
    """Random seed of the choice of documents and of the samples."""


@dataclass(frozen=True)
class Target:
    """One document under attack, as token ids."""

    prefix: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Targets:
    """The documents that are tried, and how many there were to choose from."""

    chosen: tuple[Target, ...]
    long_enough: int
    too_short: int


@dataclass(frozen=True)
class Extraction:
    """What the attack found for one model."""

    model: str
    similarities: tuple[float, ...]
    """Of each document's best sample, 0 to 1."""
    threshold: float

    @property
    def hits(self) -> int:
        return sum(one >= self.threshold for one in self.similarities)

    @property
    def rate(self) -> float:
        return self.hits / len(self.similarities)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate."""
        from scipy.stats import binomtest

        found = binomtest(self.hits, len(self.similarities)).proportion_ci(0.95, method="wilson")
        return float(found.low), float(found.high)

    @property
    def mean_similarity(self) -> float:
        return sum(self.similarities) / len(self.similarities)

    def as_json(self) -> dict[str, Any]:
        """Return figures about the model, and nothing of any text."""
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
    """The attack on a model, and perhaps on another that has not seen the text."""

    settings: AttackSettings
    long_enough: int
    too_short: int
    model: Extraction
    reference: Extraction | None = None

    @property
    def only_model(self) -> int:
        """Documents that the model gives back and the reference does not."""
        if self.reference is None:
            return self.model.hits
        pairs = zip(self.model.similarities, self.reference.similarities, strict=True)
        return sum(own >= self.settings.threshold > other for own, other in pairs)

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
    tell: Callable[[str, int, int], None] = lambda model, done, total: None,
) -> ExtractionAudit:
    """Attack a model, and a reference, with the same documents of its training text.

    `tell` hears the model, how many documents are done, and of how many. Raises `UserError` for a reference with another
    tokenizer, a model that looks at too few tokens, and text without a document that is long enough.
    """
    require_rapidfuzz()
    folders = [model, *([reference] if reference is not None else [])]
    tokenizers = [tokenizer_folder(folder) for folder in folders]
    for folder, tokenizer in zip(folders, tokenizers, strict=True):
        _require_room(folder, tokenizer, settings)
        require_intact_model(folder)
    if len({digest_of_tokenizer(tokenizer) for tokenizer in tokenizers}) > 1:
        raise UserError(
            f"{model.name} and {folders[-1].name} have different tokenizers; compare models of one"
        )
    encoder = TextEncoder.of_folder(tokenizers[0])
    targets = choose_targets(documents, encoder, settings)
    found = []
    for folder in folders:
        network, _ = load_model(folder)
        network.to(best_device())
        similarities = attack(
            network,
            targets.chosen,
            encoder.separator,
            settings,
            tell=lambda done, folder=folder: tell(folder.name, done, len(targets.chosen)),  # type: ignore[misc]  # mypy infers no lambda with a default
        )
        found.append(Extraction(folder.name, similarities, settings.threshold))
    return ExtractionAudit(
        settings,
        targets.long_enough,
        targets.too_short,
        found[0],
        found[1] if reference is not None else None,
    )


def require_rapidfuzz() -> None:
    """Raise `UserError` where the library for edit distances is not installed."""
    from importlib.util import find_spec

    if find_spec("rapidfuzz") is None:
        raise UserError("the audit needs RapidFuzz, which is not installed: pip install 'expertctl[privacy]'")


def _require_room(folder: Path, tokenizer: Path, settings: AttackSettings) -> None:
    room = max_positions(folder if (folder / "config.json").is_file() else tokenizer)
    needed = 1 + settings.prefix + settings.continuation
    if needed > room:
        raise UserError(
            f"{folder.name} looks at {room} tokens, and prefix and continuation with the token before a document are "
            f"{needed}; lower --continuation"
        )


def choose_targets(documents: Iterable[str], encoder: TextEncoder, settings: AttackSettings) -> Targets:
    """Return documents that are long enough, chosen evenly at random in one pass; raises `UserError` if none is."""
    needed = settings.prefix + settings.continuation
    source = random.Random(settings.seed)
    chosen: list[Target] = []
    long_enough = too_short = 0
    for ids in _encoded(documents, encoder):
        if len(ids) < needed:
            too_short += 1
            continue
        target = Target(tuple(ids[: settings.prefix]), tuple(ids[settings.prefix : needed]))
        if len(chosen) < settings.documents:
            chosen.append(target)
        elif (place := source.randrange(long_enough + 1)) < settings.documents:
            chosen[place] = target
        long_enough += 1
    if not chosen:
        raise UserError(
            f"no document has {needed} tokens ({too_short} are shorter); lower --prefix and --continuation"
        )
    return Targets(tuple(chosen), long_enough, too_short)


def _encoded(documents: Iterable[str], encoder: TextEncoder) -> Iterator[list[int]]:
    rest = iter(documents)
    while batch := list(islice(rest, DOCUMENTS_PER_BATCH)):
        yield from encoder.encode(batch)


def attack(
    model: PreTrainedModel,
    targets: Sequence[Target],
    separator: int,
    settings: AttackSettings,
    *,
    tell: Callable[[int], None] = lambda done: None,
) -> tuple[float, ...]:
    """Return for each document how near the best of the samples comes to its true continuation, 0 to 1.

    The prompt begins with the token that stands before every document in training; a sample ends where the model ends it.
    """
    import torch

    torch.manual_seed(settings.seed)
    at_a_time = max(settings.batch_size // settings.samples, 1)
    best: list[float] = []
    for begin in range(0, len(targets), at_a_time):
        group = targets[begin : begin + at_a_time]
        samples = _sample(model, group, separator, settings)
        for number, target in enumerate(group):
            own = samples[number * settings.samples : (number + 1) * settings.samples]
            best.append(max(similarity(one, target.continuation) for one in own))
        tell(len(best))
    return tuple(best)


def _sample(
    model: PreTrainedModel, group: Sequence[Target], separator: int, settings: AttackSettings
) -> list[list[int]]:
    """Return `samples` continuations of each document, one document after the other."""
    import torch

    prompts_BP = torch.tensor([[separator, *target.prefix] for target in group], device=model.device)
    with torch.inference_mode():
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


def similarity(one: Sequence[int], other: Sequence[int]) -> float:
    """Return 1 less the Levenshtein distance as a share of the longer of two sequences of token ids."""
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_similarity(one, other))
