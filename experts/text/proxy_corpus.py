"""Proxies: the documents of a public domain that look most like another domain, whose text stays where it is.

A mixture's router can be tuned on them in place of the owner's text (FlexOlmo, arXiv:2507.07024, section 3.3.3). A linear
classifier on words and pieces of words learns to tell the two domains apart; what it takes for the owner's, most surely
first, is the proxy. The paper's is a small neural one.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from ...core.artefacts.files import (
    clear_leftovers,
    exclusive,
    partial_sibling,
    readable_os_errors,
    refuse_existing,
    write_json,
)
from ...core.artefacts.layout import Layout, check_name
from ...core.artefacts.lineage import package_version
from ...core.config.settings import DomainConfig, ProjectConfig
from ...core.errors import UserError
from .corpora import domain_config, domain_documents

FORMAT = 1
PROXIES = "proxies"
FEWEST_DOCUMENTS = 20  # of each domain; of fewer a classifier learns single documents by heart
MOST_BY_DEFAULT = 1000
SAMPLE = 5000
SCORED_TOGETHER = 256

Tell = Callable[[str, int], None]
Keyed = tuple[bytes, str]
"""A document's key, which equal documents share, and its text."""


@dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """What decides which documents are picked."""

    sample: int = SAMPLE
    """Documents of each domain that the classifier learns from and is tested on, at most."""
    characters: int = 2048
    """How much of a document's beginning it looks at."""
    features_log2: int = 18
    """Hash buckets of words and pairs of words, and as many of runs of 3 and 4 letters, as a power of 2."""
    strength: float = 0.1
    """Inverse of the regularisation (`C`): small, since public text that looks like the other domain is mislabelled."""
    seed: int = 0
    """Which documents are in the sample."""


@dataclass(frozen=True)
class TextCount:
    """What was read of a domain, or written of a proxy: counts and digest, never text."""

    name: str
    documents: int
    bytes: int
    """UTF-8 bytes of the documents' text."""
    digest: str
    """sha256 over the documents' texts in order, as `data list` gives it."""


@dataclass(frozen=True)
class Proxy:
    """A proxy that was written."""

    path: Path
    text: TextCount
    held_out_accuracy: float
    """Mean of the two domains' shares of documents, unseen in training, that the classifier told apart."""
    lowest_score: float
    """The least score that was picked: 0 looks like the public domain, 1 like the other."""
    like: TextCount
    source: TextCount
    licence: str | None
    """Of the public domain."""
    settings: ProxySettings

    def statement(self) -> dict[str, object]:
        """Return what stands beside the text: counts, digests and settings."""
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
        """Return the proxy as an entry of `domains` in `expertctl.yaml`."""
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
    tell: Tell = lambda work, documents: None,
) -> Proxy:
    """Write the `documents` of the domain `source` that look most like `like` to `proxies/NAME.jsonl`.

    Not given, their number is a tenth of the source's, at most 1,000. Only the training parts are read: `like` once,
    `source` three times; what is held is the sample, and a few bytes for each document to be picked. `tell` hears what is
    being done and how many documents were. Raises `UserError` for text that is too little, or that changes meanwhile.
    """
    settings = settings or ProxySettings()
    path = layout.root / PROXIES / f"{check_name(name, 'a proxy')}.jsonl"
    wanted, public = domain_config(project, like), domain_config(project, source)
    _check_names(project, name, like, source)
    refuse_existing(path, force=force, what="proxy")
    with exclusive(layout.lock(f"proxy-{name}"), f"proxy '{name}'"):
        refuse_existing(path, force=force, what="proxy")  # another process may have just written it

        def read(domain: DomainConfig, work: str) -> Iterator[Keyed]:
            return _told(_keyed(domain_documents(domain, layout.root, "train"), settings.seed), work, tell)

        like_sample, like_count = _sampled(read(wanted, f"reading {like}"), like, settings)
        source_sample, source_count = _sampled(read(public, f"reading {source}"), source, settings)
        number = _number(documents, source_count)
        judges = _trained(like_sample, source_sample, settings)
        del like_sample, source_sample  # the largest thing that there is
        scores = best_distinct(_scored(read(public, f"scoring {source}"), judges, settings), number)
        with _replaced(path) as file:
            text = _written(read(public, "writing"), set(scores), file, name)
        proxy = Proxy(
            path=path,
            text=text,
            held_out_accuracy=judges.held_out_accuracy,
            lowest_score=_share(min(scores.values())),
            like=like_count,
            source=source_count,
            licence=_licence(public),
            settings=settings,
        )
        write_json(path.with_suffix(".json"), proxy.statement())
    return proxy


def best_distinct(scored: Iterable[tuple[float, bytes]], number: int) -> dict[bytes, float]:
    """Return the `number` highest scores by key, holding no more than those; a key that comes again counts once.

    Equal scores are in the order of their keys, so that the order of the documents does not matter.
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


def _check_names(project: ProjectConfig, name: str, like: str, source: str) -> None:
    if like == source:
        raise UserError(
            f"--like and --from both name the domain '{like}': a proxy is picked from another domain"
        )
    taken = project.domains.get(name)
    if name in (like, source) or (taken is not None and taken.path != f"{PROXIES}/{name}.jsonl"):
        raise UserError(f"expertctl.yaml has a domain '{name}' already; give the proxy another name")


def _number(wanted: int | None, source: TextCount) -> int:
    """Return how many documents to pick."""
    if wanted is None:
        return min(MOST_BY_DEFAULT, max(1, source.documents // 10))
    if wanted >= source.documents:
        raise UserError(
            f"domain '{source.name}' has {source.documents:,} documents in its train part, so that there is nothing "
            f"to choose when {wanted:,} are asked for; ask for fewer with --documents, or name a larger domain with --from"
        )
    return wanted


# --- reading ---


def _keyed(documents: Iterable[str], seed: int) -> Iterator[Keyed]:
    for text in documents:
        key = hashlib.blake2b(_bytes(text), digest_size=16, key=seed.to_bytes(8, "little"))
        yield key.digest(), text


def _told(documents: Iterable[Keyed], work: str, tell: Tell) -> Iterator[Keyed]:
    for index, document in enumerate(documents, start=1):
        yield document
        if index % SCORED_TOGETHER == 0:
            tell(work, index)


def _sampled(
    documents: Iterable[Keyed], name: str, settings: ProxySettings
) -> tuple[dict[bytes, str], TextCount]:
    """Return the beginnings of the documents with the lowest keys, in their order, and what was read in all."""
    kept: dict[bytes, str] = {}
    count = _Counter(name)
    for key, text in documents:
        count.add(text)
        kept[key] = _beginning(text, settings)
        if len(kept) >= 2 * settings.sample:
            kept = _lowest(kept, settings.sample)
    kept = _lowest(kept, settings.sample)
    if len(kept) < FEWEST_DOCUMENTS:
        raise UserError(
            f"domain '{name}' of expertctl.yaml has {len(kept)} different documents in its train part, and "
            f"{FEWEST_DOCUMENTS} are needed to learn how it looks; add text to it, or name another domain"
        )
    return kept, count.total()


def _lowest(documents: Mapping[bytes, str], number: int) -> dict[bytes, str]:
    return {key: documents[key] for key in heapq.nsmallest(number, documents)}


class _Counter:
    """Counts documents and digests their text, as a prepared domain does."""

    def __init__(self, name: str) -> None:
        self._name, self._documents, self._bytes = name, 0, 0
        self._state = hashlib.sha256()

    def add(self, text: str) -> None:
        encoded = _bytes(text)
        self._state.update(len(encoded).to_bytes(8, "little") + encoded)
        self._documents += 1
        self._bytes += len(encoded)

    def total(self) -> TextCount:
        return TextCount(self._name, self._documents, self._bytes, self._state.hexdigest())


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


def _beginning(text: str, settings: ProxySettings) -> str:
    return text[: settings.characters].encode("utf-8", errors="replace").decode()


# --- telling the domains apart ---


@dataclass(frozen=True)
class _Judges:
    """Two classifiers, each trained on one half of the sample, so that neither judges what it learnt from."""

    border: bytes
    """Key of the first public document of the upper half. All beyond the sample lie above it too."""
    of_lower: Any
    of_upper: Any
    held_out_accuracy: float

    def score(self, documents: Sequence[Keyed]) -> list[tuple[float, bytes]]:
        """Return the log odds of each document, with its key."""
        found = []
        for judge, lower in ((self.of_upper, True), (self.of_lower, False)):
            half = [(key, text) for key, text in documents if (key < self.border) == lower]
            if half:
                odds = judge.decision_function([text for _, text in half]).tolist()
                found += [(score, key) for score, (key, _) in zip(odds, half, strict=True)]
        return found


def _trained(like: Mapping[bytes, str], source: Mapping[bytes, str], settings: ProxySettings) -> _Judges:
    like_lower, like_upper = _halves(list(like.values()))
    source_lower, source_upper = _halves(list(source.values()))
    of_lower = _fitted(like_lower, source_lower, settings)
    of_upper = _fitted(like_upper, source_upper, settings)
    right = (
        _accuracy(of_lower, like_upper, source_upper) + _accuracy(of_upper, like_lower, source_lower)
    ) / 2
    return _Judges(list(source)[len(source_lower)], of_lower, of_upper, right)


def _halves(texts: list[str]) -> tuple[list[str], list[str]]:
    return texts[: len(texts) // 2], texts[len(texts) // 2 :]


def _fitted(like: list[str], source: list[str], settings: ProxySettings) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    # Hashing keeps no vocabulary: neither memory nor anything else here grows with the text.
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


def _accuracy(classifier: Any, like: list[str], source: list[str]) -> float:
    """Return the mean of the two sides' shares that were told right, whichever side is the larger."""
    return float(
        (classifier.predict(like).mean() + 1 - classifier.predict(source).mean()) / 2,
    )


def _scored(
    documents: Iterable[Keyed], judges: _Judges, settings: ProxySettings
) -> Iterator[tuple[float, bytes]]:
    beginnings = ((key, _beginning(text, settings)) for key, text in documents)
    while batch := list(islice(beginnings, SCORED_TOGETHER)):
        yield from judges.score(batch)


def _share(log_odds: float) -> float:
    """Return log odds as a score from 0 to 1."""
    return (1 + math.tanh(log_odds / 2)) / 2


# --- writing ---


def _written(documents: Iterable[Keyed], picked: set[bytes], file: TextIO, name: str) -> TextCount:
    """Write the picked documents in their own order, each once."""
    count = _Counter(name)
    for key, text in documents:
        if key in picked:
            picked.remove(key)
            count.add(text)
            file.write(json.dumps({"text": text}) + "\n")
    if picked:
        raise UserError(
            f"the text that proxy '{name}' is picked from changed while it was read; run the same command again"
        )
    return count.total()


@contextmanager
def _replaced(path: Path) -> Iterator[TextIO]:
    """Give a file to write; it takes the place of `path` when the block ends, and is gone if it fails.

    The statement of what was there goes first: none ever stands beside text that it does not describe.
    """
    partial = partial_sibling(path)
    with readable_os_errors(path):
        path.parent.mkdir(exist_ok=True)
        clear_leftovers(path.parent)
        try:
            with partial.open("w", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            path.with_suffix(".json").unlink(missing_ok=True)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _licence(domain: DomainConfig) -> str | None:
    if domain.licence is None and domain.bundled is not None:
        from .bundled import BUNDLED

        return BUNDLED[domain.bundled].licence
    return domain.licence
