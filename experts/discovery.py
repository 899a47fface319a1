"""Domains for text that has no labels: its documents sorted into clusters, one domain for each.

Words, points and centres are learnt from a sample (Cluster-Branch-Train-Merge, arXiv:2303.14177); then every document goes to its
nearest centre. Text is read twice and never held, so that memory does not grow with it.
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

from ..core.clustering.clusterer import BATCH, Clusterer, ClustererSettings, batches, fit_clusterer
from ..core.compute import available_cores
from ..core.config import ProjectConfig
from ..core.discovered import CLUSTERS_FILE, CLUSTERS_FOLDER, cluster_sets
from ..core.errors import UserError
from ..core.files import exclusive, new_folder, refuse_existing, write_json
from ..core.workspace import Layout, check_name
from .corpora import domain_config, domain_documents

FORMAT = 1
SAMPLE = 50_000
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
    documents: Mapping[str, int]
    """By part."""
    bytes: Mapping[str, int]
    top_words: tuple[str, ...]
    examples: tuple[str, ...]
    """Beginnings of the sampled documents nearest to the centre."""


@dataclass(frozen=True)
class Discovery:
    """A set of clusters that was written."""

    folder: Path
    source: Mapping[str, str]
    """sha256 over the texts of each domain that was sorted, in order."""
    clusters: tuple[Cluster, ...]
    settings: ClustererSettings
    licence: str | None

    def statement(self) -> dict[str, Any]:
        """Return what stands beside the clusters."""
        return {
            "format": FORMAT,
            "name": self.folder.name,
            "source": dict(self.source),
            "licence": self.licence,
            "clusters": [asdict(cluster) for cluster in self.clusters],
            "settings": asdict(self.settings),
        }


def discover(
    layout: Layout,
    project: ProjectConfig,
    name: str,
    settings: ClustererSettings,
    *,
    domains: Sequence[str] | None = None,
    sample: int = SAMPLE,
    jobs: int | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
    tell: Tell = lambda work, documents: None,
) -> Discovery:
    """Sort the documents of domains (default: all that were not discovered) into `clusters/NAME`.

    Validation documents stay validation documents. Raises `UserError` for text that is too little for the clusters.
    """
    folder = layout.root / CLUSTERS_FOLDER / check_name(name, "a set of clusters")
    chosen = _sources(layout, project, name, domains)
    refuse_existing(folder, force=force, what="set of clusters")
    with exclusive(layout.lock(f"clusters-{name}"), f"clusters '{name}'"):
        texts = _sampled(_documents(layout, project, chosen, "train"), sample, settings, tell)
        clusterer = fit_clusterer(texts, settings, say)
        with new_folder(folder, force=force, what="set of clusters") as partial:
            clusterer.write(partial)
            names = [
                f"{name}-{number:0{len(str(settings.clusters - 1))}d}" for number in range(settings.clusters)
            ]
            counts, digests = _sorted(layout, project, chosen, clusterer, partial, names, jobs, tell)
            found = Discovery(
                folder,
                digests,
                _described(clusterer, names, counts, texts),
                clusterer.settings,
                _licence(project, chosen),
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


def _documents(
    layout: Layout, project: ProjectConfig, domains: Iterable[str], part: str
) -> Iterator[tuple[str, str]]:
    """Yield (domain, text)."""
    for domain in domains:
        for text in domain_documents(project.domains[domain], layout.root, part):
            yield domain, text


def _sampled(
    documents: Iterable[tuple[str, str]], size: int, settings: ClustererSettings, tell: Tell
) -> list[str]:
    """Return the beginnings of `size` documents, the same for the same text and random seed, whatever its order."""
    key = settings.seed.to_bytes(8, "little", signed=False)
    kept: list[tuple[int, str]] = []  # a heap with the largest key first
    for number, (_, text) in enumerate(documents, start=1):
        encoded = text.encode("utf-8", "surrogatepass")
        place = -int.from_bytes(hashlib.blake2b(encoded, digest_size=8, key=key).digest(), "little")
        if len(kept) < size:
            heapq.heappush(kept, (place, text[: settings.characters]))
        elif place > kept[0][0]:
            heapq.heapreplace(kept, (place, text[: settings.characters]))
        if number % BATCH == 0:
            tell("sampling", number)
    return [text for _, text in sorted(kept, reverse=True)]


# --- sorting ---


def _sorted(
    layout: Layout,
    project: ProjectConfig,
    domains: Sequence[str],
    clusterer: Clusterer,
    folder: Path,
    names: Sequence[str],
    jobs: int | None,
    tell: Tell,
) -> tuple[dict[str, list[list[int]]], dict[str, str]]:
    """Write every document to its cluster's file; return ([documents, bytes] of each cluster by part, digests by domain)."""
    counts = {part: [[0, 0] for _ in names] for part in PARTS}
    states = {domain: hashlib.sha256() for domain in domains}
    done = 0
    with ExitStack() as stack:
        assign = stack.enter_context(_Assigner(clusterer, folder, jobs))
        for cluster in names:
            (folder / cluster).mkdir()
        for part in PARTS:
            files = [
                stack.enter_context((folder / cluster / f"{part}.jsonl").open("w", encoding="utf-8"))
                for cluster in names
            ]
            for batch, labels in assign(_documents(layout, project, domains, part)):
                for (domain, text), label in zip(batch, labels, strict=True):
                    encoded = text.encode("utf-8", "surrogatepass")
                    states[domain].update(len(encoded).to_bytes(8, "little") + encoded)
                    files[label].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    counts[part][label][0] += 1
                    counts[part][label][1] += len(encoded)
                done += len(batch)
                tell("sorting", done)
    return counts, {domain: state.hexdigest() for domain, state in states.items()}


class _Assigner:
    """Finds the clusters of documents, in this process for a few and in several for many."""

    def __init__(self, clusterer: Clusterer, folder: Path, jobs: int | None) -> None:
        self._clusterer, self._folder = clusterer, folder
        self._jobs = jobs or available_cores()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Assigner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(
        self, documents: Iterable[tuple[str, str]]
    ) -> Iterator[tuple[list[tuple[str, str]], list[int]]]:
        """Yield batches of documents, in order, with their clusters."""
        waiting: deque[tuple[list[tuple[str, str]], Any]] = deque()
        seen = 0
        for batch in batches(documents, BATCH):
            seen += len(batch)
            texts = [text[: self._clusterer.settings.characters] for _, text in batch]
            if self._jobs < 2 or (seen <= PARALLEL_FROM and self._pool is None):
                yield batch, list(self._clusterer.assign(texts))
                continue
            waiting.append((batch, self._started().submit(_assign, texts)))
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
                initargs=(str(self._folder),),
            )
        return self._pool


_OWN: dict[str, Clusterer] = {}
"""The clusterer of a worker process."""


def _prepare(folder: str) -> None:
    _OWN["clusterer"] = Clusterer.read(Path(folder))


def _assign(texts: list[str]) -> list[int]:
    return list(_OWN["clusterer"].assign(texts))


# --- what is said of them ---


def _described(
    clusterer: Clusterer,
    names: Sequence[str],
    counts: Mapping[str, Sequence[Sequence[int]]],
    texts: Sequence[str],
) -> tuple[Cluster, ...]:
    import numpy as np

    distances = clusterer.distances(clusterer.points(texts))
    own = distances.argmin(axis=1)
    found = []
    for number, name in enumerate(names):
        members = np.flatnonzero(own == number)
        nearest = members[distances[members, number].argsort(kind="stable")[:EXAMPLES]]
        found.append(
            Cluster(
                name,
                {part: counts[part][number][0] for part in PARTS},
                {part: counts[part][number][1] for part in PARTS},
                tuple(clusterer.top_words(number)),
                tuple(" ".join(texts[place].split())[:EXAMPLE_LETTERS] for place in nearest),
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
