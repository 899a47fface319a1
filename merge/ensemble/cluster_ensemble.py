"""Build the router of an ensemble of cluster experts (Cluster-Branch-Train-Merge, arXiv:2303.14177).

`data discover` clusters the text, `branch --clusters` starts an expert for each cluster, and an ensemble with
`router: cluster` weights them by the distance of the text so far to the cluster centres.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ...core.artefacts.layout import Layout
from ...core.config.discovered import CLUSTERS_FOLDER, cluster_sets, discoverer_of
from ...core.errors import UserError, unknown_name
from ...core.hooks.merging import MergeInputs
from ...core.manifests.manifest import read_manifest

PER_TOKEN_DISCOVERER = "tfidf"
"""Discoverer whose clusters can be evaluated per token."""

if TYPE_CHECKING:
    from .cluster_router import ClusterRouter, DistanceForm


class RouterOptions(Protocol):
    """Options of the cluster router; see `EnsembleOptions`."""

    @property
    def prior(self) -> str | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def samples(self) -> int: ...
    @property
    def clusters(self) -> str | None: ...
    @property
    def temperature(self) -> float | None: ...
    @property
    def distance(self) -> DistanceForm: ...
    @property
    def every(self) -> int: ...


@dataclass(frozen=True)
class NamedRouter:
    """A router and the name of its set of clusters."""

    router: ClusterRouter
    clusters: str


def cluster_router(inputs: MergeInputs, options: RouterOptions) -> NamedRouter:
    """Return the router over the clusters of the experts; fits the temperature if none is given.

    Raises `UserError` for experts that were not trained on clusters of one set, and for conflicting options.
    """
    from dataclasses import replace

    from ...core.text.clustering.clusterer import Clusterer
    from ...core.text.clustering.growing_text import Reader
    from ...core.text.tokenizer import TextEncoder
    from .cluster_router import ClusterRouter, ClusterRouting, fit_temperature
    from .prior import validation_scores

    _check(inputs, options)
    folder, clusters = _clusters_of(inputs, options.clusters)
    encoder = TextEncoder.of_folder(inputs.seed)
    routing = ClusterRouting(clusters, options.temperature or 1.0, options.distance, options.every, options.top_k)
    router = ClusterRouter(routing, Reader(Clusterer.read(folder), encoder.tokenizer, encoder.separator))
    if options.temperature is not None:
        return NamedRouter(router, folder.name)
    batches = validation_scores(
        inputs.seed,
        inputs.experts,
        inputs.validation(),
        options.samples,
        say=inputs.say,
        what=f"the temperature of {len(clusters)} clusters",
    )
    texts = [(block.tokens.tolist(), block.scores.astype(float)) for batch in batches for block in batch]
    temperature = fit_temperature(router, texts)
    inputs.say(f"temperature {temperature:.4g} ({options.distance} distance)")
    return NamedRouter(replace(router, routing=replace(routing, temperature=temperature)), folder.name)


def _check(inputs: MergeInputs, options: RouterOptions) -> None:
    if inputs.weights_given or options.prior is not None:
        raise UserError("router: cluster weights experts by their clusters and ignores weights and prior; remove them")
    if options.temperature is not None and not options.temperature > 0:
        raise UserError(f"temperature is {options.temperature:g}; it must be greater than 0")
    if options.every < 1:
        raise UserError(f"every is {options.every}; it must be at least 1")
    if options.top_k is not None and not 1 <= options.top_k <= len(inputs.experts):
        raise UserError(
            f"top_k is {options.top_k}; with {len(inputs.experts)} experts it must be in the range 1 to "
            f"{len(inputs.experts)}"
        )


def _clusters_of(inputs: MergeInputs, wanted: str | None) -> tuple[Path, tuple[int, ...]]:
    """Return the folder of a set of clusters and the cluster index of each expert."""
    root = Layout.find(inputs.seed).root
    sets = cluster_sets(root)
    if wanted is not None and wanted not in sets:
        raise unknown_name("set of clusters", wanted, sets, listed_as="this workspace has")
    trained = {name: tuple(read_manifest(path).domains) for name, path in inputs.experts.items()}
    indices = {name: {cluster: number for number, cluster in enumerate(clusters)} for name, clusters in sets.items()}
    for name in [wanted] if wanted is not None else sets:
        clusters = [indices[name].get(domains[0]) if len(domains) == 1 else None for domains in trained.values()]
        if None not in clusters:
            if (discoverer := discoverer_of(root, name)) != PER_TOKEN_DISCOVERER:
                raise UserError(
                    f"router: cluster needs clusters of {PER_TOKEN_DISCOVERER}, and '{name}' was made by "
                    f"{discoverer}; use router: posterior, or discover clusters by {PER_TOKEN_DISCOVERER}"
                )
            return root / CLUSTERS_FOLDER / name, tuple(number for number in clusters if number is not None)
    reason = next(
        (
            f"'{name}' was trained on {', '.join(domains) or 'no domain'}"
            for name, domains in trained.items()
            if len(domains) != 1 or not any(domains[0] in clusters for clusters in sets.values())
        ),
        "these are of several sets",
    )
    raise UserError(
        f"router: cluster needs experts of the clusters of one set, and {reason}; train some with "
        "`expertctl data discover` and `expertctl branch --clusters`, or name others with --experts"
    )
