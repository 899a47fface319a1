"""Proxy corpora: the documents of a public domain that are most similar to a private domain.

A mixture's router can be tuned on a proxy in place of the owner's text (FlexOlmo, arXiv:2507.07024, section 3.3.3). A
linear classifier on word and character n-grams learns to distinguish the two domains; the proxy consists of the public
documents with the highest scores. The paper uses a small neural classifier.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ...core.artefacts.files import (
    clear_leftovers,
    exclusive,
    os_errors_as_user_errors,
    refuse_existing,
    replacement_file,
    write_json,
)
from ...core.artefacts.layout import Layout, check_name
from ...core.artefacts.versions import package_version
from ...core.config.settings import DomainConfig, ProjectConfig
from ...core.errors import UserError
from ...core.reporting import SILENT, Reporter, reported
from ...core.text.token_store import TextCounter
from .corpora import domain_config, domain_documents, licence_of, require_text

FORMAT = 1
PROXIES = "proxies"
MIN_DOCUMENTS = 20  # of each domain; with fewer, a classifier memorises single documents
MAX_BY_DEFAULT = 1000
SAMPLE = 5000
SCORING_BATCH = 256

Keyed = tuple[bytes, str]
"""A document's key (a hash of its text) and its text."""


@dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """Settings that determine which documents are selected."""

    sample: int = SAMPLE
    """Maximum number of documents of each domain for training and testing the classifier."""
    characters: int = 2048
    """Number of characters used from the start of each document."""
    features_log2: int = 18
    """Binary logarithm of the hash buckets for word uni- and bigrams, and for character 3- and 4-grams."""
    strength: float = 0.1
    """Inverse regularisation strength (`C`); small because public text similar to the private domain is mislabelled."""
    seed: int = 0
    """Random seed of the sample."""


@dataclass(frozen=True)
class TextCount:
    """Counts and digest of the text of a domain or a proxy, without the text."""

    name: str
    documents: int
    bytes: int
    """UTF-8 bytes of the documents' text."""
    digest: str
    """sha256 over the documents' texts in order, as shown by `data list`."""


@dataclass(frozen=True)
class Proxy:
    """A proxy corpus on disk."""

    path: Path
    text: TextCount
    held_out_accuracy: float
    """Balanced accuracy of the classifier on documents held out from its training."""
    lowest_score: float
    """Lowest score of a selected document, from 0 (public domain) to 1 (private domain)."""
    like: TextCount
    source: TextCount
    licence: str | None
    """Licence of the public domain."""
    settings: ProxySettings

    def statement(self) -> dict[str, object]:
        """Return the content of the JSON file beside the text: counts, digests and settings."""
        return {
            "format": FORMAT,
            **asdict(self.text),
            "held_out_accuracy": self.held_out_accuracy,
            "lowest_score": self.lowest_score,
            "like": asdict(self.like),
            "from": asdict(self.source),
            "licence": self.licence,
            "classifier": {**asdict(self.settings), "scikit-learn": package_version("scikit-learn")},
        }

    def domain(self) -> dict[str, str]:
        """Return the entry for the proxy in `domains` of `expertctl.yaml`."""
        licence = {"licence": self.licence} if self.licence is not None else {}
        return {"path": f"{PROXIES}/{self.path.name}", **licence}


def make_proxy(
    layout: Layout,
    project: ProjectConfig,
    name: str,
    *,
    like: str,
    source: str,
    documents: int | None = None,
    settings: ProxySettings | None = None,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> Proxy:
    """Write the documents of the domain `source` that are most similar to the domain `like` to `proxies/NAME.jsonl`.

    `documents` is their number; the default is a tenth of the source's documents, at most 1,000. Only the training
    parts are read: `like` once, `source` three times. Memory holds the sample and a few bytes per selected document.
    Raises `UserError` if there is too little text, or if the text changes while it is read.
    """
    settings = settings or ProxySettings()
    path = layout.root / PROXIES / f"{check_name(name, 'a proxy')}.jsonl"
    private, public = domain_config(project, like), domain_config(project, source)
    require_text(like, private, "a proxy")
    require_text(source, public, "a proxy")
    if like == source:
        raise UserError(f"--like and --from are both '{like}'; select the proxy from another domain")
    existing = project.domains.get(name)
    if name in (like, source) or (existing is not None and existing.path != f"{PROXIES}/{name}.jsonl"):
        raise UserError(f"expertctl.yaml has a domain '{name}' already; give the proxy another name")
    refuse_existing(path, force=force, what="proxy")
    with exclusive(layout.lock(f"proxy-{name}"), f"proxy '{name}'"):
        refuse_existing(path, force=force, what="proxy")  # again: another process may have written it meanwhile

        def read(domain: DomainConfig, work: str) -> Iterator[Keyed]:
            keyed = _with_keys(domain_documents(domain, layout.root, "train"), settings.seed)
            return reported(keyed, reporter, work, "documents", every=SCORING_BATCH)

        like_sample, like_count = _sample(read(private, f"reading {like}"), like, settings)
        source_sample, source_count = _sample(read(public, f"reading {source}"), source, settings)
        number = _number_to_select(documents, source_count)
        classifiers = _train_classifiers(like_sample, source_sample, settings)
        del like_sample, source_sample  # free the memory before scoring
        scores = best_distinct(_score_documents(read(public, f"scoring {source}"), classifiers, settings), number)
        with os_errors_as_user_errors(path):
            path.parent.mkdir(exist_ok=True)
            clear_leftovers(path.parent)
        with replacement_file(path) as file:
            text = _write_selected(read(public, "writing"), set(scores), file, name)
            file.flush()
            path.with_suffix(".json").unlink(missing_ok=True)  # so that a statement never describes other text
        proxy = Proxy(
            path=path,
            text=text,
            held_out_accuracy=classifiers.held_out_accuracy,
            lowest_score=(1 + math.tanh(min(scores.values()) / 2)) / 2,  # the logistic function of the log-odds
            like=like_count,
            source=source_count,
            licence=licence_of(public),
            settings=settings,
        )
        write_json(path.with_suffix(".json"), proxy.statement())
    return proxy


def best_distinct(scored: Iterable[tuple[float, bytes]], number: int) -> dict[bytes, float]:
    """Return the `number` highest scores by key in bounded memory; a repeated key counts once.

    Ties are broken by key, so the result does not depend on the order of the documents.
    """
    heap: list[tuple[float, bytes]] = []
    kept: set[bytes] = set()
    for item in scored:
        if item[1] in kept:
            continue
        if len(heap) < number:
            heapq.heappush(heap, item)
            kept.add(item[1])
        elif item > heap[0]:
            kept.add(item[1])
            kept.remove(heapq.heapreplace(heap, item)[1])
    return {key: score for score, key in heap}


def _number_to_select(requested: int | None, source: TextCount) -> int:
    if requested is None:
        return min(MAX_BY_DEFAULT, max(1, source.documents // 10))
    if requested >= source.documents:
        raise UserError(
            f"cannot select {requested:,} documents: domain '{source.name}' has only {source.documents:,} in its train "
            "part; request fewer with --documents, or a larger domain with --from"
        )
    return requested


# --- reading ---


def _with_keys(documents: Iterable[str], seed: int) -> Iterator[Keyed]:
    for text in documents:
        encoded = text.encode("utf-8", errors="surrogatepass")
        key = hashlib.blake2b(encoded, digest_size=16, key=seed.to_bytes(8, "little"))
        yield key.digest(), text


def _sample(documents: Iterable[Keyed], name: str, settings: ProxySettings) -> tuple[dict[bytes, str], TextCount]:
    """Return the truncated documents with the lowest keys, sorted by key, and the counts of all documents."""
    kept: dict[bytes, str] = {}
    counter = TextCounter()
    for key, text in documents:
        counter.add(text)
        kept[key] = _truncate(text, settings)
        if len(kept) >= 2 * settings.sample:
            kept = _keep_lowest(kept, settings.sample)
    kept = _keep_lowest(kept, settings.sample)
    if len(kept) < MIN_DOCUMENTS:
        raise UserError(
            f"domain '{name}' has {len(kept)} different documents in its train part; the classifier needs at least "
            f"{MIN_DOCUMENTS}; add text, or use another domain"
        )
    return kept, TextCount(name, counter.documents, counter.bytes, counter.digest)


def _keep_lowest(documents: Mapping[bytes, str], number: int) -> dict[bytes, str]:
    return {key: documents[key] for key in heapq.nsmallest(number, documents)}


def _truncate(text: str, settings: ProxySettings) -> str:
    return text[: settings.characters].encode("utf-8", errors="replace").decode()


# --- classifying documents ---


@dataclass(frozen=True)
class _CrossFittedClassifiers:
    """Two classifiers, each trained on one half of the sample and applied to documents outside that half."""

    border: bytes
    """Key of the first public document in the upper half; documents outside the sample have higher keys."""
    of_lower: Any
    """Classifier trained on the lower half."""
    of_upper: Any
    """Classifier trained on the upper half."""
    held_out_accuracy: float

    def score(self, documents: Sequence[Keyed]) -> list[tuple[float, bytes]]:
        """Return (log-odds, key) of each document."""
        scores = []
        for classifier, is_lower in ((self.of_upper, True), (self.of_lower, False)):
            half = [(key, text) for key, text in documents if (key < self.border) == is_lower]
            if half:
                log_odds = classifier.decision_function([text for _, text in half]).tolist()
                scores += [(score, key) for score, (key, _) in zip(log_odds, half, strict=True)]
        return scores


def _train_classifiers(
    like: Mapping[bytes, str], source: Mapping[bytes, str], settings: ProxySettings
) -> _CrossFittedClassifiers:
    (like_lower, like_upper), (source_lower, source_upper) = _halves(like), _halves(source)
    of_lower = _fit_classifier(like_lower, source_lower, settings)
    of_upper = _fit_classifier(like_upper, source_upper, settings)
    held_out_accuracy = (
        _balanced_accuracy(of_lower, like_upper, source_upper) + _balanced_accuracy(of_upper, like_lower, source_lower)
    ) / 2
    return _CrossFittedClassifiers(list(source)[len(source_lower)], of_lower, of_upper, held_out_accuracy)


def _halves(documents: Mapping[bytes, str]) -> tuple[list[str], list[str]]:
    texts = list(documents.values())
    return texts[: len(texts) // 2], texts[len(texts) // 2 :]


def _fit_classifier(like: list[str], source: list[str], settings: ProxySettings) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    # hashing needs no vocabulary, so memory does not grow with the text
    counts = {"n_features": 2**settings.features_log2, "norm": None, "alternate_sign": False}
    classifier = make_pipeline(
        make_union(
            HashingVectorizer(analyzer="word", ngram_range=(1, 2), **counts),
            HashingVectorizer(analyzer="char_wb", ngram_range=(3, 4), **counts),
        ),
        TfidfTransformer(sublinear_tf=True),
        LogisticRegression(C=settings.strength, class_weight="balanced", max_iter=1000),
    )
    return classifier.fit(like + source, [True] * len(like) + [False] * len(source))


def _balanced_accuracy(classifier: Any, like: list[str], source: list[str]) -> float:
    """Return the mean of the two classes' accuracies."""
    return float((classifier.predict(like).mean() + 1 - classifier.predict(source).mean()) / 2)


def _score_documents(
    documents: Iterable[Keyed], classifiers: _CrossFittedClassifiers, settings: ProxySettings
) -> Iterator[tuple[float, bytes]]:
    truncated = ((key, _truncate(text, settings)) for key, text in documents)
    while batch := list(islice(truncated, SCORING_BATCH)):
        yield from classifiers.score(batch)


# --- writing ---


def _write_selected(documents: Iterable[Keyed], selected: set[bytes], file: BinaryIO, name: str) -> TextCount:
    """Write the selected documents in stream order, each once."""
    counter = TextCounter()
    for key, text in documents:
        if key in selected:
            selected.remove(key)
            counter.add(text)
            file.write(json.dumps({"text": text}).encode() + b"\n")
    if selected:
        raise UserError(f"the source text of proxy '{name}' changed while it was read; rerun the command")
    return TextCount(name, counter.documents, counter.bytes, counter.digest)
