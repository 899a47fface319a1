"""Cluster-Branch-Train-Merge (arXiv:2303.14177): domains for text that nobody labelled.

Its experts are ordinary ones (`branch --clusters`), and its ensemble is the `ensemble` method with `router: cluster`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....core.errors import UserError
from ....core.hooks.hookspecs import hookimpl
from ....core.hooks.text import DiscoveryInputs, Document, DomainDiscoverer
from ....core.text.clustering.clusterer import Clusterer, ClustererOptions, ClustererSettings, fit_clusterer
from .metadata_domains import MetadataOptions, fit_metadata
from .vector_clusters import Embed, VectorClusters, fit_vector_clusters, numbered

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class WordClusters:
    """Clusters by the words of texts, as found domains."""

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
class VectorOptions:
    """How vectors become clusters."""

    balanced: bool = True
    """Whether the fit makes clusters of equal size."""
    rounds: int = 20


@dataclass(frozen=True, kw_only=True)
class HiddenStateOptions(VectorOptions):
    """How the seed reads texts."""

    tokens: int = 256
    """Of each text's beginning that are looked at."""


@dataclass(frozen=True, kw_only=True)
class SentenceOptions(VectorOptions):
    """Which model embeds texts."""

    folder: str | None = None
    """Hugging Face folder of a sentence-embedding model."""


def by_words(inputs: DiscoveryInputs, options: ClustererOptions) -> WordClusters:
    """Sort texts by their words."""
    settings = ClustererSettings(**asdict(options), clusters=_count(inputs), seed=inputs.random_seed)
    return WordClusters(fit_clusterer(inputs.sample(), settings, inputs.say))


def by_hidden_states(inputs: DiscoveryInputs, options: HiddenStateOptions) -> VectorClusters:
    """Sort texts by what the seed makes of them."""
    from ....experts.measures.embedder import HiddenStateEmbedder

    if not (inputs.seed / "config.json").is_file():
        raise UserError("hidden_states are the seed's, and there is no seed yet; run `expertctl seed`")
    if options.tokens < 1:
        raise UserError(f"tokens is {options.tokens}; it is 1 or more")
    return _by_vectors(HiddenStateEmbedder(inputs.seed, options.tokens), inputs, options)


def by_sentence_embeddings(inputs: DiscoveryInputs, options: SentenceOptions) -> VectorClusters:
    """Sort texts by another model's embeddings."""
    from ....experts.measures.embedder import SentenceEmbedder

    if options.folder is None:
        raise UserError("sentence_embeddings needs the folder of a model: --option folder=DIR")
    return _by_vectors(SentenceEmbedder(inputs.root / Path(options.folder).expanduser()), inputs, options)


def _by_vectors(embed: Embed, inputs: DiscoveryInputs, options: VectorOptions) -> VectorClusters:
    return fit_vector_clusters(
        embed,
        inputs.sample(),
        _count(inputs),
        seed=inputs.random_seed,
        rounds=options.rounds,
        balanced=options.balanced,
    )


def _count(inputs: DiscoveryInputs) -> int:
    if inputs.clusters is None:
        raise UserError("say how many clusters there are to be: --clusters K")
    return inputs.clusters


@hookimpl
def domain_discoverers() -> list[DomainDiscoverer]:
    return [
        DomainDiscoverer(
            "tfidf",
            "clusters by the words of texts (balanced k-means of tf-idf)",
            by_words,
            options=ClustererOptions,
            read=lambda folder: WordClusters(Clusterer.read(folder)),
        ),
        DomainDiscoverer(
            "hidden_states",
            "clusters by the seed's mean hidden states",
            by_hidden_states,
            options=HiddenStateOptions,
        ),
        DomainDiscoverer(
            "sentence_embeddings",
            "clusters by a local sentence-embedding model",
            by_sentence_embeddings,
            options=SentenceOptions,
        ),
        DomainDiscoverer(
            "metadata",
            "a domain for each value of a field of the documents' records",
            fit_metadata,
            options=MetadataOptions,
            field=lambda options: str(options.field),
        ),
    ]
