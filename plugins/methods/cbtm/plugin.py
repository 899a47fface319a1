"""Cluster-Branch-Train-Merge (arXiv:2303.14177): discoverers of domains in unlabelled text, and the mixer `clusters`.

Experts of the clusters are started by `branch --clusters`, and merged by method `ensemble` with `mixer: clusters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....core.errors import UserError
from ....core.hooks.ensembles import Mixer
from ....core.hooks.hookspecs import hookimpl
from ....core.hooks.text import DiscoveryInputs, Document, DomainDiscoverer
from ....core.text.clustering.clusterer import Clusterer, ClustererOptions, ClustererSettings, fit_clusterer
from .metadata_domains import MetadataOptions, fit_metadata
from .vector_clusters import VectorClusters, VectorOptions, fit_vector_clusters, num_clusters, numbered

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class WordClusters:
    """Domains that are clusters of tf-idf vectors."""

    clusterer: Clusterer

    @property
    def labels(self) -> tuple[str, ...]:
        return numbered(len(self.clusterer.centres))

    def distances(self, documents: Sequence[Document]) -> NDArray[Any]:
        return self.clusterer.distances(self.clusterer.points([document.text for document in documents]))

    def top_words(self, domain: int) -> list[str]:
        return self.clusterer.top_words(domain)

    def write(self, folder: Path) -> None:
        self.clusterer.write(folder)


@dataclass(frozen=True, kw_only=True)
class HiddenStateOptions(VectorOptions):
    """Options of the discoverer `hidden_states`."""

    tokens: int = 256
    """Number of tokens at the start of each text that are embedded."""


@dataclass(frozen=True, kw_only=True)
class SentenceOptions(VectorOptions):
    """Options of the discoverer `sentence_embeddings`."""

    folder: str | None = None
    """Folder of a sentence-embedding model in Hugging Face format."""


def by_words(inputs: DiscoveryInputs, options: ClustererOptions) -> WordClusters:
    """Cluster texts by tf-idf vectors."""
    settings = ClustererSettings(**asdict(options), clusters=num_clusters(inputs), seed=inputs.random_seed)
    return WordClusters(fit_clusterer(inputs.sample(), settings, inputs.reporter))


def by_hidden_states(inputs: DiscoveryInputs, options: HiddenStateOptions) -> VectorClusters:
    """Cluster texts by the seed's mean hidden states."""
    from ....experts.measures.embedder import HiddenStateEmbedder

    if not (inputs.seed / "config.json").is_file():
        raise UserError("discoverer hidden_states needs a seed, and there is none; run `expertctl seed`")
    if options.tokens < 1:
        raise UserError(f"tokens is {options.tokens}; it must be at least 1")
    return fit_vector_clusters(HiddenStateEmbedder(inputs.seed, options.tokens), inputs, options)


def by_sentence_embeddings(inputs: DiscoveryInputs, options: SentenceOptions) -> VectorClusters:
    """Cluster texts by the embeddings of a sentence-embedding model."""
    from ....experts.measures.embedder import SentenceEmbedder

    if options.folder is None:
        raise UserError("discoverer sentence_embeddings needs the folder of a model; add --option folder=DIR")
    return fit_vector_clusters(SentenceEmbedder(inputs.root / Path(options.folder).expanduser()), inputs, options)


@hookimpl
def mixers() -> list[Mixer]:
    from ....merge.ensemble.cluster_mixing import ClusterOptions, fit_clusters, read_clusters

    summary = "distance of the text so far to the clusters that the experts were trained on"
    return [Mixer("clusters", summary, fit_clusters, read_clusters, ClusterOptions)]


@hookimpl
def domain_discoverers() -> list[DomainDiscoverer]:
    return [
        DomainDiscoverer(
            "tfidf",
            "balanced k-means on tf-idf vectors",
            by_words,
            options=ClustererOptions,
            read=lambda folder: WordClusters(Clusterer.read(folder)),
        ),
        DomainDiscoverer(
            "hidden_states",
            "balanced k-means on the seed's mean hidden states",
            by_hidden_states,
            options=HiddenStateOptions,
        ),
        DomainDiscoverer(
            "sentence_embeddings",
            "balanced k-means on embeddings of a local sentence-embedding model",
            by_sentence_embeddings,
            options=SentenceOptions,
        ),
        DomainDiscoverer(
            "metadata",
            "one domain per value of a metadata field",
            fit_metadata,
            options=MetadataOptions,
            field=lambda options: str(options.field),
        ),
    ]
