"""The `clusters` mixer of Cluster-Branch-Train-Merge (arXiv:2303.14177): experts of the clusters of one set.

`data discover` clusters the text, `branch --clusters` starts an expert for each cluster, and this mixer weights them by
the distance of the text so far to the cluster centres.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.artefacts.layout import Layout
from ...core.config.discovered import CLUSTERS_FOLDER, cluster_sets, discoverer_of
from ...core.errors import UserError, unknown_name
from ...core.hooks.merging import BuiltModel, MergeInputs
from ...core.manifests.manifest import read_manifest
from ...core.text.clustering.clusterer import Clusterer
from ...core.text.clustering.growing_text import Reader
from ...core.text.tokenizer import TextEncoder
from .cluster_router import ClusterRouter, ClusterRouting, DistanceForm, RoutedText, fit_temperature
from .prior import validation_scores
from .routed_mixing import RoutedMixer

if TYPE_CHECKING:
    from torch import Tensor

PER_TOKEN_DISCOVERER = "tfidf"
"""Discoverer whose clusters can be evaluated per token."""


@dataclass(frozen=True)
class ClusterOptions:
    """Options of the `clusters` mixer."""

    clusters: str | None = None
    """Set of clusters made by `data discover`. Not set: the set that the experts' domains belong to."""
    temperature: float | None = None
    """Not set: fitted on validation text."""
    distance: DistanceForm = "squared"
    """Weights: `squared` is exp(-distance^2 / T), `released` exp(-distance^4 / T), as in the released code of
    Cluster-Branch-Train-Merge."""
    every: int = 8
    """Interval in tokens between weight updates."""
    top_k: int | None = None
    """Number of experts per token; not set: all."""
    samples: int = 100
    """Number of validation blocks for fitting the temperature."""


class ClusterMixer(RoutedMixer):
    """Weights the members by a cluster router."""

    def __init__(self, router: ClusterRouter) -> None:
        self.router = router

    @property
    def active(self) -> Sequence[int]:
        return range(len(self.router.routing.clusters))

    def settings(self) -> dict[str, Any]:
        return self.router.routing.as_json()

    def write(self, folder: Path) -> None:
        self.router.write(folder)

    def subset(self, members: Sequence[int]) -> ClusterMixer:
        return ClusterMixer(self.router.subset(members))

    def route(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, texts: Sequence[RoutedText] | None = None
    ) -> tuple[Tensor, Sequence[RoutedText]]:
        return self.router(ids_BT, mask_BT, texts)


def read_clusters(settings: Mapping[str, Any], folder: Path | None) -> ClusterMixer:
    """Restore a cluster mixer; raises `UserError` without a folder, which holds its clusters."""
    if folder is None:
        raise UserError("an ensemble with mixer 'clusters' is made from a folder, which holds its clusters")
    return ClusterMixer(ClusterRouter.read(folder, ClusterRouting.of_json(settings)))


def fit_clusters(inputs: MergeInputs, options: ClusterOptions) -> tuple[ClusterMixer, BuiltModel]:
    """Return the mixer over the clusters of the experts; fits the temperature if none is given.

    Raises `UserError` for experts that were not trained on clusters of one set, and for conflicting options.
    """
    _check(inputs, options)
    folder, clusters = _clusters_of(inputs, options.clusters)
    encoder = TextEncoder.of_folder(inputs.seed)
    routing = ClusterRouting(clusters, options.temperature or 1.0, options.distance, options.every, options.top_k)
    router = ClusterRouter(routing, Reader(Clusterer.read(folder), encoder.tokenizer, encoder.separator))
    if options.temperature is None:
        batches = validation_scores(
            inputs.seed,
            inputs.experts,
            inputs.validation(),
            options.samples,
            reporter=inputs.reporter,
            what=f"the temperature of {len(clusters)} clusters",
        )
        texts = [(block.tokens.tolist(), block.scores.astype(float)) for batch in batches for block in batch]
        router = replace(router, routing=replace(routing, temperature=fit_temperature(router, texts)))
        inputs.reporter.say(f"temperature {router.routing.temperature:.4g} ({options.distance} distance)")
    resolved = {"clusters": folder.name, "temperature": router.routing.temperature}
    return ClusterMixer(router), BuiltModel({}, resolved)


def _check(inputs: MergeInputs, options: ClusterOptions) -> None:
    if inputs.weights_given:
        raise UserError("mixer: clusters weights experts by their clusters and ignores weights; remove them")
    if options.temperature is not None and not options.temperature > 0:
        raise UserError(f"temperature is {options.temperature:g}; it must be greater than 0")
    if options.every < 1:
        raise UserError(f"every is {options.every}; it must be at least 1")
    count = len(inputs.experts)
    if options.top_k is not None and not 1 <= options.top_k <= count:
        raise UserError(f"top_k is {options.top_k}; with {count} experts it must be in the range 1 to {count}")


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
                    f"mixer: clusters needs clusters of {PER_TOKEN_DISCOVERER}, and '{name}' was made by "
                    f"{discoverer}; use mixer: posterior, or discover clusters by {PER_TOKEN_DISCOVERER}"
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
        f"mixer: clusters needs experts of the clusters of one set, and {reason}; train some with "
        "`expertctl data discover` and `expertctl branch --clusters`, or name others with --experts"
    )
