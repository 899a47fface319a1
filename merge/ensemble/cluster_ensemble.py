"""The router of an ensemble whose experts were trained on clusters (Cluster-Branch-Train-Merge, arXiv:2303.14177).

`data discover` sorts text into clusters, `branch --clusters` starts an expert for each, and an ensemble with `router: cluster`
weighs them by how near the text so far is to the centres that they were trained around.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ...core.artefacts.layout import Layout
from ...core.artefacts.lineage import read_manifest
from ...core.config.discovered import CLUSTERS_FOLDER, cluster_sets, discoverer_of
from ...core.errors import UserError, unknown_name
from ...core.hooks.merging import MergeInputs

FOLLOWED = "tfidf"
"""The discoverer whose clusters can be told token by token."""

if TYPE_CHECKING:
    from .cluster_router import ClusterRouter, DistanceForm


class RouterOptions(Protocol):
    """What is asked of the router; see `EnsembleOptions`."""

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
class SettledRouter:
    """A router, and the set of clusters that it is over."""

    router: ClusterRouter
    clusters: str


def cluster_router(inputs: MergeInputs, options: RouterOptions) -> SettledRouter:
    """Return the router over the clusters that the experts were trained on, its temperature fitted where none is given.

    Raises `UserError` for experts of no cluster, and for options that say otherwise.
    """
    from dataclasses import replace

    from ...core.text.clustering.clusterer import Clusterer
    from ...core.text.clustering.growing_text import Reader
    from ...core.text.tokenizer import TextEncoder
    from .cluster_router import ClusterRouter, ClusterRouting, fitted_temperature
    from .prior import validation_scores

    _check(inputs, options)
    folder, clusters = _clusters_of(inputs, options.clusters)
    encoder = TextEncoder.of_folder(inputs.seed)
    routing = ClusterRouting(
        clusters, options.temperature or 1.0, options.distance, options.every, options.top_k
    )
    router = ClusterRouter(routing, Reader(Clusterer.read(folder), encoder.tokenizer, encoder.separator))
    if options.temperature is not None:
        return SettledRouter(router, folder.name)
    batches = validation_scores(
        inputs.seed,
        inputs.experts,
        inputs.validation(),
        options.samples,
        say=inputs.say,
        what=f"the temperature of {len(clusters)} clusters",
    )
    texts = [(one.tokens.tolist(), one.scores.astype(float)) for batch in batches for one in batch]
    temperature = fitted_temperature(router, texts)
    inputs.say(f"temperature {temperature:.4g} ({options.distance} distance)")
    return SettledRouter(replace(router, routing=replace(routing, temperature=temperature)), folder.name)


def _check(inputs: MergeInputs, options: RouterOptions) -> None:
    if inputs.weights_given or options.prior is not None:
        raise UserError(
            "router: cluster weighs experts by their clusters, and weights or a prior would be ignored; leave them out"
        )
    if options.temperature is not None and not options.temperature > 0:
        raise UserError(f"temperature is {options.temperature:g}; it is above 0")
    if options.every < 1:
        raise UserError(f"every is {options.every}; it is 1 or more")
    if options.top_k is not None and not 1 <= options.top_k <= len(inputs.experts):
        raise UserError(
            f"top_k is {options.top_k}; with {len(inputs.experts)} experts it is 1 to {len(inputs.experts)}"
        )


def _clusters_of(inputs: MergeInputs, wanted: str | None) -> tuple[Path, tuple[int, ...]]:
    """Return the folder of a set of clusters, and which of them each expert was trained on."""
    root = Layout.find(inputs.seed).root
    sets = cluster_sets(root)
    if wanted is not None and wanted not in sets:
        raise unknown_name("set of clusters", wanted, sets, listed_as="this workspace has")
    trained = {
        name: tuple(read_manifest(path).data.get("domains", {})) for name, path in inputs.experts.items()
    }
    places = {name: {cluster: number for number, cluster in enumerate(made)} for name, made in sets.items()}
    for name in [wanted] if wanted is not None else sets:
        found = [places[name].get(domains[0]) if len(domains) == 1 else None for domains in trained.values()]
        if None not in found:
            if (by := discoverer_of(root, name)) != FOLLOWED:
                raise UserError(
                    f"router: cluster follows a text by its words, and '{name}' was found by {by}; leave the router at "
                    f"posterior, or sort the text by {FOLLOWED}"
                )
            return root / CLUSTERS_FOLDER / name, tuple(number for number in found if number is not None)
    odd = next(
        (
            f"'{name}' was trained on {', '.join(domains) or 'no domain'}"
            for name, domains in trained.items()
            if len(domains) != 1 or not any(domains[0] in made for made in sets.values())
        ),
        "they are of several sets",
    )
    raise UserError(
        f"router: cluster needs experts of the clusters of one set, and {odd}; make some with `expertctl data discover` and "
        "`expertctl branch --clusters`, or name others with --experts"
    )
