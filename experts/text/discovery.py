"""Domain discovery: unlabelled documents are clustered, and each cluster becomes a domain.

A domain discoverer (a plugin) is fitted, usually to a sample; then every document is assigned to the nearest cluster.
Text is streamed twice, so that memory does not grow with it.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import product
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
from ...core.reporting import SILENT, Reporter, reported
from ...core.text.clustering.clusterer import BATCH, batches
from ...core.text.token_store import TextCounter
from .corpora import PARTS, domain_config, domain_values, require_text

FORMAT = 1
SAMPLE = 50_000
CHARACTERS = 20_000
"""Characters from the start of each document that a discoverer receives."""
PARALLEL_FROM = 20 * BATCH
"""Number of documents above which several processes are faster in spite of their start-up time."""
EXAMPLES = 3
EXAMPLE_LETTERS = 100

Located = tuple[str, str, Document]
"""(part, domain, document)."""


@dataclass(frozen=True)
class DiscoverySettings:
    """Settings of a discovery that do not depend on the discoverer."""

    by: str = "tfidf"
    """Name of the domain discoverer."""
    domains: Sequence[str] | None = None
    """Domains to cluster; None: all but discovered ones."""
    sample: int = SAMPLE
    """Number of documents that vocabulary and centroids are fitted on."""
    seed: int = 0
    jobs: int | None = None
    """Number of processes; None: one per core."""


@dataclass(frozen=True)
class Cluster:
    """One cluster and its domain."""

    name: str
    """Name of the domain."""
    label: str
    """Name within the cluster set: a number or a topic."""
    documents: Mapping[str, int]
    """Number of documents by part (`train`, `valid`, `test`)."""
    bytes: Mapping[str, int]
    """UTF-8 bytes of the documents by part."""
    top_words: tuple[str, ...]
    examples: tuple[str, ...]
    """First characters of the nearest sampled documents."""


@dataclass(frozen=True)
class Discovery:
    """A set of clusters on disk."""

    folder: Path
    by: str
    """Name of the discoverer."""
    source: Mapping[str, str]
    """sha256 over the texts of each clustered domain, in order."""
    licence: str | None
    clusters: tuple[Cluster, ...]
    settings: Mapping[str, Any]

    def statement(self) -> dict[str, Any]:
        """Return the content of `clusters.json`."""
        content = asdict(self)
        return {"format": FORMAT, "name": content.pop("folder").name, **content}


def discover(
    layout: Layout,
    project: ProjectConfig,
    name: str,
    clusters: int | None,
    settings: DiscoverySettings,
    options: Mapping[str, Any],
    *,
    force: bool = False,
    reporter: Reporter = SILENT,
) -> Discovery:
    """Cluster the documents of domains into `clusters/NAME`; `options` are the discoverer's.

    Validation and test documents stay what they are. Raises `UserError` if there is too little text for the clusters.
    """
    folder = layout.root / CLUSTERS_FOLDER / check_name(name, "a set of clusters")
    discoverer = installed_plugins().offer(DomainDiscoverer, settings.by)
    parsed_options = parse_options(discoverer.options, options, f"domain discoverer '{settings.by}'")
    field = discoverer.field(parsed_options) if discoverer.field is not None else None
    text = _Text(layout, project, _sources(layout, project, name, settings.domains), field)
    refuse_existing(folder, force=force, what="set of clusters")
    with exclusive(layout.lock(f"clusters-{name}"), f"clusters '{name}'"):
        sampled = _sample(text("train"), settings.sample, settings.seed, reporter)
        if not sampled:
            raise UserError(
                f"no training document to cluster in {', '.join(text.domains)}: empty texts are skipped, and a path is "
                "split by document, so it needs two different documents; add text"
            )
        inputs = DiscoveryInputs(
            documents=lambda: (document for _, _, document in text("train")),
            sample=lambda: [document.text for document in sampled],
            clusters=clusters,
            random_seed=settings.seed,
            root=layout.root,
            seed=layout.seed,
            reporter=reporter,
        )
        found_domains = discoverer.fit(inputs, parsed_options)
        with new_folder(folder, force=force, what="set of clusters") as partial:
            found_domains.write(partial)
            names = [check_name(f"{name}-{label}", "a cluster") for label in found_domains.labels]
            with closing(_assigned(text(*PARTS), discoverer, found_domains, partial, settings.jobs)) as assigned:
                counts, digests = _write_clusters(assigned, text.domains, partial, names, reporter)
            discovery = Discovery(
                folder,
                settings.by,
                digests,
                _shared_licence(project, text.domains),
                _describe_clusters(found_domains, names, counts, sampled),
                {"clusters": len(names), "seed": settings.seed, **asdict(parsed_options)},
            )
            _require_documents(discovery)
            write_json(partial / CLUSTERS_FILE, discovery.statement())
    return discovery


# --- reading ---


def _sources(layout: Layout, project: ProjectConfig, name: str, requested: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the domains to cluster; raises `UserError` if there are none."""
    sets = cluster_sets(layout.root)
    discovered = {domain for domains in sets.values() for domain in domains}
    sources = tuple(domain for domain in project.domains if domain not in discovered)
    if requested is not None:
        sources = tuple(requested)
    for domain in sources:
        require_text(domain, domain_config(project, domain), "discovery")
        if domain in sets.get(name, ()):
            raise UserError(f"'{domain}' is itself one of the clusters '{name}'; give the domains that were clustered")
    if not sources:
        raise UserError("there is no text to cluster; add a domain to expertctl.yaml")
    return sources


@dataclass(frozen=True)
class _Text:
    """The documents to cluster; calling it with parts streams (part, domain, document) from the start."""

    layout: Layout
    project: ProjectConfig
    domains: tuple[str, ...]
    field: str | None

    def __call__(self, *parts: str) -> Iterator[Located]:
        for part, domain in product(parts, self.domains):
            for document in domain_values(self.project.domains[domain], self.layout.root, part, self.field):
                yield part, domain, document


def _sample(documents: Iterable[Located], size: int, seed: int, reporter: Reporter) -> list[Document]:
    """Return `size` truncated documents, selected by a keyed hash and independent of the input order."""
    key = seed.to_bytes(8, "little", signed=False)
    kept: list[tuple[int, str, str | None]] = []  # a heap whose root has the largest hash
    for _, _, document in reported(documents, reporter, "sampling", "documents", every=BATCH):
        encoded = document.text.encode("utf-8", "surrogatepass")
        priority = -int.from_bytes(hashlib.blake2b(encoded, digest_size=8, key=key).digest(), "little")
        if len(kept) < size:
            heapq.heappush(kept, (priority, document.text[:CHARACTERS], document.value))
        elif priority > kept[0][0]:
            heapq.heapreplace(kept, (priority, document.text[:CHARACTERS], document.value))
    return [Document(text, value) for _, text, value in sorted(kept, key=lambda entry: (-entry[0], entry[1]))]


# --- assigning documents to clusters ---


def _write_clusters(
    assigned: Iterable[tuple[list[Located], list[int]]],
    domains: Sequence[str],
    folder: Path,
    names: Sequence[str],
    reporter: Reporter,
) -> tuple[dict[str, list[TextCounter]], dict[str, str]]:
    """Write every document to its cluster's file.

    Returns the counts of each cluster by part, and the digest of each domain's text.
    """
    counts = {part: [TextCounter() for _ in names] for part in PARTS}
    sources = {domain: TextCounter() for domain in domains}
    num_written = 0
    with ExitStack() as stack:
        files = {}
        for number, cluster in enumerate(names):
            (folder / cluster).mkdir()
            for part in PARTS:
                path = folder / cluster / f"{part}.jsonl"
                files[part, number] = stack.enter_context(path.open("w", encoding="utf-8"))
        for batch, clusters in assigned:
            for (part, domain, document), number in zip(batch, clusters, strict=True):
                sources[domain].add(document.text)
                files[part, number].write(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")
                counts[part][number].add(document.text)
            num_written += len(batch)
            reporter.progress("sorting", num_written, unit="documents")
    return counts, {domain: counter.digest for domain, counter in sources.items()}


def _assigned(
    documents: Iterable[Located], discoverer: DomainDiscoverer, domains: FoundDomains, folder: Path, jobs: int | None
) -> Generator[tuple[list[Located], list[int]], None, None]:
    """Yield batches of documents, in order, with their clusters.

    Documents are assigned in worker processes if there are many and the discoverer supports it.
    """
    import multiprocessing

    jobs = (jobs or available_cores()) if discoverer.read is not None else 1
    waiting: deque[tuple[list[Located], Future[list[int]]]] = deque()
    pool: ProcessPoolExecutor | None = None
    num_seen = 0
    with ExitStack() as stack:
        for batch in batches(documents, BATCH):
            num_seen += len(batch)
            truncated = [Document(document.text[:CHARACTERS], document.value) for _, _, document in batch]
            if jobs < 2 or num_seen <= PARALLEL_FROM:
                yield batch, _nearest(domains, truncated)
                continue
            if pool is None:
                spawn, arguments = multiprocessing.get_context("spawn"), (discoverer.name, str(folder))
                pool = ProcessPoolExecutor(jobs, spawn, _prepare_worker, arguments)
                stack.callback(pool.shutdown, cancel_futures=True)
            waiting.append((batch, pool.submit(_assign, truncated)))
            if len(waiting) > 4 * jobs:
                first, future = waiting.popleft()
                yield first, future.result()
        for batch, future in waiting:
            yield batch, future.result()


_WORKER_STATE: dict[str, FoundDomains] = {}
"""The fitted domains of a worker process."""


def _prepare_worker(discoverer: str, folder: str) -> None:
    read = installed_plugins().offer(DomainDiscoverer, discoverer).read
    assert read is not None
    _WORKER_STATE["domains"] = read(Path(folder))


def _assign(documents: list[Document]) -> list[int]:
    return _nearest(_WORKER_STATE["domains"], documents)


def _nearest(domains: FoundDomains, documents: Sequence[Document]) -> list[int]:
    clusters: list[int] = domains.distances(documents).argmin(axis=1).tolist()
    return clusters


# --- describing clusters ---


def _describe_clusters(
    domains: FoundDomains,
    names: Sequence[str],
    counts: Mapping[str, Sequence[TextCounter]],
    sampled: Sequence[Document],
) -> tuple[Cluster, ...]:
    import numpy as np

    distances = domains.distances(sampled)
    nearest_clusters = distances.argmin(axis=1)
    clusters = []
    for number, name in enumerate(names):
        members = np.flatnonzero(nearest_clusters == number)
        nearest = members[distances[members, number].argsort(kind="stable")[:EXAMPLES]]
        clusters.append(
            Cluster(
                name,
                domains.labels[number],
                {part: counts[part][number].documents for part in PARTS},
                {part: counts[part][number].bytes for part in PARTS},
                tuple(domains.top_words(number)),
                tuple(" ".join(sampled[index].text.split())[:EXAMPLE_LETTERS] for index in nearest),
            )
        )
    return tuple(clusters)


def _require_documents(discovery: Discovery) -> None:
    """Raise `UserError` for a cluster without training or validation documents."""
    for cluster in discovery.clusters:
        for part, word in (("train", "training"), ("valid", "validation")):
            if not cluster.documents[part]:
                raise UserError(
                    f"cluster '{cluster.name}' ({', '.join(cluster.top_words[:5])}) has no {word} document; use fewer "
                    "clusters or add text"
                )


def _shared_licence(project: ProjectConfig, domains: Iterable[str]) -> str | None:
    """Return the licence of all domains; None if they differ or have none."""
    licences = {project.domains[domain].licence for domain in domains}
    return licences.pop() if len(licences) == 1 else None
