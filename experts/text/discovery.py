"""Domains for text that has no labels: its documents sorted into clusters, one domain for each.

A discoverer (a plugin's) learns what to tell documents apart by, most from a sample; then every document goes to the
nearest cluster. Text is read twice and never held, so that memory does not grow with it.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...core.artefacts.files import exclusive, new_folder, refuse_existing, write_json
from ...core.artefacts.layout import Layout, check_name
from ...core.config.discovered import CLUSTERS_FILE, CLUSTERS_FOLDER, cluster_sets
from ...core.config.settings import ProjectConfig
from ...core.errors import UserError
from ...core.hooks.manager import installed_plugins
from ...core.hooks.options import parse_options
from ...core.hooks.text import DiscoveryInputs, Document, DomainDiscoverer, FoundDomains
from ...core.process.compute import available_cores
from ...core.text.clustering.clusterer import BATCH, batches
from .corpora import domain_config, domain_values

FORMAT = 1
SAMPLE = 50_000
CHARACTERS = 20_000
"""How much of a document's beginning a discoverer sees."""
PARALLEL_FROM = 20 * BATCH
"""Documents from which on several processes are worth their start."""
EXAMPLES = 3
EXAMPLE_LETTERS = 100
PARTS = ("train", "valid")
Tell = Callable[[str, int], None]


@dataclass(frozen=True)
class Cluster:
    """One cluster, and the domain that it became."""

    name: str
    label: str
    """What it is called within its set: a number, or what it is about."""
    documents: Mapping[str, int]
    """By part."""
    bytes: Mapping[str, int]
    top_words: tuple[str, ...]
    examples: tuple[str, ...]
    """Beginnings of the sampled documents nearest to it."""


@dataclass(frozen=True)
class Discovery:
    """A set of clusters that was written."""

    folder: Path
    source: Mapping[str, str]
    """sha256 over the texts of each domain that was sorted, in order."""
    clusters: tuple[Cluster, ...]
    by: str
    """Name of the discoverer."""
    settings: Mapping[str, Any]
    licence: str | None

    def statement(self) -> dict[str, Any]:
        """Return what stands beside the clusters."""
        return {
            "format": FORMAT,
            "name": self.folder.name,
            "by": self.by,
            "source": dict(self.source),
            "licence": self.licence,
            "clusters": [asdict(cluster) for cluster in self.clusters],
            "settings": dict(self.settings),
        }


def discover(
    layout: Layout,
    project: ProjectConfig,
    name: str,
    clusters: int | None,
    *,
    by: str = "tfidf",
    options: Mapping[str, Any] | None = None,
    domains: Sequence[str] | None = None,
    sample: int = SAMPLE,
    seed: int = 0,
    jobs: int | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
    tell: Tell = lambda work, documents: None,
) -> Discovery:
    """Sort the documents of domains (default: all that were not discovered) into `clusters/NAME`.

    Validation documents stay validation documents. Raises `UserError` for text that is too little for the clusters.
    """
    folder = layout.root / CLUSTERS_FOLDER / check_name(name, "a set of clusters")
    discoverer = installed_plugins().domain_discoverer(by)
    chosen_options = parse_options(discoverer.options, options or {}, f"domain discoverer '{by}'")
    field = discoverer.field(chosen_options) if discoverer.field is not None else None
    text = _Text(layout, project, _sources(layout, project, name, domains), field)
    refuse_existing(folder, force=force, what="set of clusters")
    with exclusive(layout.lock(f"clusters-{name}"), f"clusters '{name}'"):
        sampled = _sampled(text("train"), sample, seed, tell)
        if not sampled:
            raise UserError(
                f"there is no training document to sort in {', '.join(text.domains)}: texts that are empty are left out, and a "
                "path is split by document, so that it needs two that differ; add text"
            )
        inputs = DiscoveryInputs(
            documents=lambda: (document for _, document in text("train")),
            sample=lambda: [document.text for document in sampled],
            clusters=clusters,
            random_seed=seed,
            root=layout.root,
            seed=layout.seed,
            say=say,
        )
        domains_found = discoverer.fit(inputs, chosen_options)
        with new_folder(folder, force=force, what="set of clusters") as partial:
            domains_found.write(partial)
            names = [check_name(f"{name}-{label}", "a cluster") for label in domains_found.labels]
            counts, digests = _sorted(
                text, _Assigner(discoverer, domains_found, partial, jobs), partial, names, tell
            )
            found = Discovery(
                folder,
                digests,
                _described(domains_found, names, counts, sampled),
                by,
                {"clusters": len(names), "seed": seed, **asdict(chosen_options)},
                _licence(project, text.domains),
            )
            _require_text(found)
            write_json(partial / CLUSTERS_FILE, found.statement())
    return found


# --- reading ---


def _sources(
    layout: Layout, project: ProjectConfig, name: str, wanted: Sequence[str] | None
) -> tuple[str, ...]:
    made = {domain for domains in cluster_sets(layout.root).values() for domain in domains}
    chosen = tuple(wanted) if wanted is not None else tuple(one for one in project.domains if one not in made)
    for domain in chosen:
        domain_config(project, domain)
        if domain in cluster_sets(layout.root).get(name, ()):
            raise UserError(
                f"'{domain}' is one of the clusters '{name}' itself; name the text that they are made of"
            )
    if not chosen:
        raise UserError("there is no text to sort; add a domain to expertctl.yaml")
    return chosen


@dataclass(frozen=True)
class _Text:
    """The documents that are sorted; called with a part, reads them anew as (domain, document)."""

    layout: Layout
    project: ProjectConfig
    domains: tuple[str, ...]
    field: str | None

    def __call__(self, part: str) -> Iterator[tuple[str, Document]]:
        for domain in self.domains:
            config = self.project.domains[domain]
            for document in domain_values(config, self.layout.root, part, self.field):
                yield domain, document


def _beginning(document: Document) -> Document:
    return Document(document.text[:CHARACTERS], document.value)


def _sampled(documents: Iterable[tuple[str, Document]], size: int, seed: int, tell: Tell) -> list[Document]:
    """Return the beginnings of `size` documents, the same for the same text and random seed, whatever its order."""
    key = seed.to_bytes(8, "little", signed=False)
    kept: list[tuple[int, str, str | None]] = []  # a heap with the largest key first
    for number, (_, document) in enumerate(documents, start=1):
        encoded = document.text.encode("utf-8", "surrogatepass")
        place = -int.from_bytes(hashlib.blake2b(encoded, digest_size=8, key=key).digest(), "little")
        if len(kept) < size:
            heapq.heappush(kept, (place, document.text[:CHARACTERS], document.value))
        elif place > kept[0][0]:
            heapq.heapreplace(kept, (place, document.text[:CHARACTERS], document.value))
        if number % BATCH == 0:
            tell("sampling", number)
    return [Document(text, value) for _, text, value in sorted(kept, key=lambda one: (-one[0], one[1]))]


# --- sorting ---


def _sorted(
    text: _Text, assigner: _Assigner, folder: Path, names: Sequence[str], tell: Tell
) -> tuple[dict[str, list[list[int]]], dict[str, str]]:
    """Write every document to its cluster's file; return ([documents, bytes] of each cluster by part, digests by domain)."""
    counts = {part: [[0, 0] for _ in names] for part in PARTS}
    states = {domain: hashlib.sha256() for domain in text.domains}
    done = 0
    with ExitStack() as stack:
        assign = stack.enter_context(assigner)
        for cluster in names:
            (folder / cluster).mkdir()
        for part in PARTS:
            files = [
                stack.enter_context((folder / cluster / f"{part}.jsonl").open("w", encoding="utf-8"))
                for cluster in names
            ]
            for batch, clusters in assign(text(part)):
                for (domain, document), label in zip(batch, clusters, strict=True):
                    encoded = document.text.encode("utf-8", "surrogatepass")
                    states[domain].update(len(encoded).to_bytes(8, "little") + encoded)
                    files[label].write(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")
                    counts[part][label][0] += 1
                    counts[part][label][1] += len(encoded)
                done += len(batch)
                tell("sorting", done)
    return counts, {domain: state.hexdigest() for domain, state in states.items()}


class _Assigner:
    """Finds the clusters of documents, in this process for a few and in several for many where that can be."""

    def __init__(
        self, discoverer: DomainDiscoverer, domains: FoundDomains, folder: Path, jobs: int | None
    ) -> None:
        self._name, self._domains, self._folder = discoverer.name, domains, folder
        self._jobs = (jobs or available_cores()) if discoverer.read is not None else 1
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Assigner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(
        self, documents: Iterable[tuple[str, Document]]
    ) -> Iterator[tuple[list[tuple[str, Document]], list[int]]]:
        """Yield batches of documents, in order, with their clusters."""
        waiting: deque[tuple[list[tuple[str, Document]], Any]] = deque()
        seen = 0
        for batch in batches(documents, BATCH):
            seen += len(batch)
            beginnings = [_beginning(document) for _, document in batch]
            if self._jobs < 2 or (seen <= PARALLEL_FROM and self._pool is None):
                yield batch, _nearest(self._domains, beginnings)
                continue
            waiting.append((batch, self._started().submit(_assign, beginnings)))
            if len(waiting) > 4 * self._jobs:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            import multiprocessing

            self._pool = ProcessPoolExecutor(
                self._jobs,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_prepare,
                initargs=(self._name, str(self._folder)),
            )
        return self._pool


_OWN: dict[str, FoundDomains] = {}
"""What a worker process sorts by."""


def _prepare(discoverer: str, folder: str) -> None:
    read = installed_plugins().domain_discoverer(discoverer).read
    assert read is not None
    _OWN["domains"] = read(Path(folder))


def _assign(documents: list[Document]) -> list[int]:
    return _nearest(_OWN["domains"], documents)


def _nearest(domains: FoundDomains, documents: Sequence[Document]) -> list[int]:
    found: list[int] = domains.distances(documents).argmin(axis=1).tolist()
    return found


# --- what is said of them ---


def _described(
    domains: FoundDomains,
    names: Sequence[str],
    counts: Mapping[str, Sequence[Sequence[int]]],
    sampled: Sequence[Document],
) -> tuple[Cluster, ...]:
    import numpy as np

    distances = domains.distances(sampled)
    own = distances.argmin(axis=1)
    found = []
    for number, name in enumerate(names):
        members = np.flatnonzero(own == number)
        nearest = members[distances[members, number].argsort(kind="stable")[:EXAMPLES]]
        found.append(
            Cluster(
                name,
                domains.labels[number],
                {part: counts[part][number][0] for part in PARTS},
                {part: counts[part][number][1] for part in PARTS},
                tuple(domains.top_words(number)),
                tuple(" ".join(sampled[place].text.split())[:EXAMPLE_LETTERS] for place in nearest),
            )
        )
    return tuple(found)


def _require_text(found: Discovery) -> None:
    """Refuse clusters that no expert could be trained on, or that nothing could be measured on."""
    for cluster in found.clusters:
        for part, word in (("train", "training"), ("valid", "validation")):
            if not cluster.documents[part]:
                raise UserError(
                    f"cluster '{cluster.name}' ({', '.join(cluster.top_words[:5])}) gets no {word} document; ask for fewer "
                    "clusters, or add text"
                )


def _licence(project: ProjectConfig, domains: Iterable[str]) -> str | None:
    """Return the licence that all domains share; None where they differ or say nothing."""
    found = {project.domains[domain].licence for domain in domains}
    return found.pop() if len(found) == 1 else None
