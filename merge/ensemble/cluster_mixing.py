"""The `clusters` mixer of Cluster-Branch-Train-Merge (arXiv:2303.14177): weights by distance to the experts' clusters.

    w_k = exp(-distance(text, centre_k)^2 / T) / sum over all k

The code released with the paper squares the squared distance again, so its temperatures are on another scale.
Both forms are supported, and a temperature is stored with its form. Shapes: B = batch, T = tokens, K = experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...core.artefacts.layout import Layout
from ...core.config.discovered import CLUSTERS_FOLDER, cluster_sets, discoverer_of
from ...core.errors import UserError, unknown_name
from ...core.hooks.merging import BuiltModel, MergeInputs
from ...core.hooks.option_checks import check_at_least, check_positive, check_top_k
from ...core.manifests.manifest import read_manifest
from ...core.text.clustering.clusterer import Clusterer, unit_rows
from ...core.text.clustering.growing_text import GrowingText, Reader
from ...core.text.tokenizer import TextEncoder
from .prior import validation_scores
from .routed_mixing import RoutedMixer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

DistanceForm = Literal["squared", "released"]
"""`squared`: exp(-distance^2 / T), the paper's formula; `released`: exp(-distance^4 / T), as in its code."""
PER_TOKEN_DISCOVERER = "tfidf"
"""Discoverer whose clusters can be evaluated per token."""
MIN_TEMPERATURE, MAX_TEMPERATURE, GRID_SIZE = 1e-3, 10.0, 33


@dataclass(frozen=True)
class ClusterRouting:
    """Settings of the cluster router, as stored in an ensemble's configuration."""

    clusters: tuple[int, ...]
    """Cluster index of each expert."""
    temperature: float
    distance: DistanceForm = "squared"
    every: int = 8
    """Interval in tokens between updates of the weights; the first updates are after 1, 2, 4 ... tokens."""
    top_k: int | None = None
    """Number of experts with nonzero weight; None for all."""

    def is_update_due(self, count: int) -> bool:
        """Return whether weights are updated after `count` tokens of a text."""
        return count % self.every == 0 or (count < self.every and count & (count - 1) == 0)

    def log_weights(self, squares_NK: NDArray[np.float64], known_N: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return log weights (N, K) from squared distances; uniform for texts without known words."""
        import numpy as np

        powers = squares_NK if self.distance == "squared" else squares_NK**2
        scores = np.where(known_N[:, None], -powers / self.temperature, 0.0)
        if self.top_k is not None and self.top_k < scores.shape[1]:
            order = np.argsort(-scores, axis=1, kind="stable")[:, self.top_k :]
            truncated = scores.copy()
            np.put_along_axis(truncated, order, -np.inf, axis=1)
            scores = np.where(known_N[:, None], truncated, scores)
        scores = scores - scores.max(axis=1, keepdims=True)
        return np.asarray(scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)))


@dataclass(frozen=True)
class RoutedText:
    """Routing state of a text so far; immutable."""

    text: GrowingText
    count: int
    """Number of tokens so far."""
    pending: tuple[int, ...]
    """Token ids since the last update of the weights."""
    log_weights: NDArray[np.float64]
    """Log weights of the experts, (K,)."""


@dataclass(frozen=True)
class ClusterMixer(RoutedMixer):
    """Weights the experts after every token of a text by its distance to their clusters."""

    routing: ClusterRouting
    reader: Reader

    @property
    def active(self) -> Sequence[int]:
        return range(len(self.routing.clusters))

    def settings(self) -> dict[str, Any]:
        return {**asdict(self.routing), "clusters": list(self.routing.clusters)}

    def write(self, folder: Path) -> None:
        """Write the clusterer, and the tokenizer unless the folder has one."""
        self.reader.clusterer.write(folder)
        if not (folder / "tokenizer.json").exists():
            self.reader.tokenizer.save(str(folder / "tokenizer.json"))

    def subset(self, members: Sequence[int]) -> ClusterMixer:
        kept = tuple(self.routing.clusters[member] for member in members)
        top_k = None if self.routing.top_k is None else min(self.routing.top_k, len(kept))
        return replace(self, routing=replace(self.routing, clusters=kept, top_k=top_k))

    def empty_text(self) -> RoutedText:
        """Return the state of an empty text."""
        import numpy as np

        nothing = np.zeros((1, len(self.routing.clusters)))
        return RoutedText(self.reader.begin(), 0, (), self.routing.log_weights(nothing, np.array([False]))[0])

    def route(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, texts: Sequence[RoutedText] | None = None
    ) -> tuple[Tensor, list[RoutedText]]:
        import torch

        rows, new_texts = [], []
        for number, ids in enumerate(ids_BT.tolist()):
            is_token = [True] * len(ids) if mask_BT is None else mask_BT[number].bool().tolist()
            weights, text = self._route_row(ids, is_token, texts[number] if texts is not None else self.empty_text())
            rows.append(torch.from_numpy(weights).float())
            new_texts.append(text)
        return torch.stack(rows).to(ids_BT.device), new_texts

    def _route_row(
        self, ids: Sequence[int], is_token: Sequence[bool], before: RoutedText
    ) -> tuple[NDArray[np.float64], RoutedText]:
        import numpy as np

        pieces, positions, pending, count = [], [], list(before.pending), before.count
        for position, (token, is_real) in enumerate(zip(ids, is_token, strict=True)):
            if not is_real:
                continue
            pending.append(token)
            count += 1
            if self.routing.is_update_due(count):
                pieces.append(pending)
                positions.append(position)
                pending = []
        text, sums = self.reader.grow(before.text, pieces)
        updates = self.routing.log_weights(*self.squared_distances(sums))
        is_update = np.zeros(len(ids), np.int64)
        is_update[positions] = 1
        all_weights = np.concatenate([before.log_weights[None], updates])
        return all_weights[is_update.cumsum()], RoutedText(text, count, tuple(pending), all_weights[-1])

    def squared_distances(self, sums_Nd: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return squared distances to the experts' centres, (N, K), and whether texts have a known word."""
        points = unit_rows(sums_Nd)
        distances = self.reader.clusterer.distances(points)[:, list(self.routing.clusters)]
        return distances, (points != 0).any(axis=1)


def reader_of(clusters: Path, folder: Path) -> Reader:
    """Return the reader of a folder of clusters with a model's tokenizer; raises `UserError` if one is missing."""
    encoder = TextEncoder.of_folder(folder)
    return Reader(Clusterer.read(clusters), encoder.tokenizer, encoder.separator)


def read_clusters(settings: Mapping[str, Any], folder: Path | None) -> ClusterMixer:
    """Restore a cluster mixer; raises `UserError` without a folder, which holds its clusters."""
    if folder is None:
        raise UserError("an ensemble with mixer 'clusters' is made from a folder, which holds its clusters")
    routing = ClusterRouting(**{**settings, "clusters": tuple(settings["clusters"])})
    return ClusterMixer(routing, reader_of(folder, folder))


def fit_temperature(mixer: ClusterMixer, texts: Sequence[tuple[Sequence[int], NDArray[np.float64]]]) -> float:
    """Return the temperature that maximises the log-likelihood of texts under the weighted experts.

    A text is given as T + 1 token ids and the log-probabilities of all but the first token per expert, (K, T).
    """
    import numpy as np
    from scipy.optimize import minimize_scalar

    squares, known, scores = [], [], []
    for tokens, scores_KT in texts:
        updates = [count for count in range(1, len(tokens)) if mixer.routing.is_update_due(count)]
        pieces = [list(tokens[begin:end]) for begin, end in pairwise((0, *updates))]
        _, sums = mixer.reader.grow(mixer.reader.begin(), pieces)
        update_squares, is_known = mixer.squared_distances(sums)
        last_update = np.searchsorted(updates, np.arange(1, len(tokens)), side="right") - 1
        squares.append(update_squares[last_update])
        known.append(is_known[last_update])
        scores.append(scores_KT.T)
    squares_NK, known_N, scores_NK = np.concatenate(squares), np.concatenate(known), np.concatenate(scores)

    def loss(log_temperature: float) -> float:
        routing = replace(mixer.routing, temperature=float(np.exp(log_temperature)))
        joint = routing.log_weights(squares_NK, known_N) + scores_NK
        return -float(np.logaddexp.reduce(joint, axis=1).mean())

    grid = np.linspace(np.log(MIN_TEMPERATURE), np.log(MAX_TEMPERATURE), GRID_SIZE)
    best = int(np.argmin([loss(log_temperature) for log_temperature in grid]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, GRID_SIZE - 1)])
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


# --- merging ---


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

    def __post_init__(self) -> None:
        if self.temperature is not None:
            check_positive("temperature", self.temperature)
        check_at_least("every", self.every, 1)


def fit_clusters(inputs: MergeInputs, options: ClusterOptions) -> tuple[ClusterMixer, BuiltModel]:
    """Return the mixer over the clusters of the experts; fits the temperature if none is given.

    Raises `UserError` for experts that were not trained on clusters of one set, and for conflicting options.
    """
    if inputs.weights_given:
        raise UserError("mixer: clusters weights experts by their clusters and ignores weights; remove them")
    check_top_k(options.top_k, len(inputs.experts))
    folder, clusters = _clusters_of(inputs, options.clusters)
    routing = ClusterRouting(clusters, options.temperature or 1.0, options.distance, options.every, options.top_k)
    mixer = ClusterMixer(routing, reader_of(folder, inputs.seed))
    if options.temperature is None:
        each = max(options.samples // max(len(inputs.validation()), 1), 1)
        scored = validation_scores(inputs, each, "the temperature", f"{len(clusters)} clusters")
        texts = [(block.tokens.tolist(), block.scores.astype(float)) for blocks in scored.values() for block in blocks]
        mixer = replace(mixer, routing=replace(routing, temperature=fit_temperature(mixer, texts)))
        inputs.reporter.say(f"temperature {mixer.routing.temperature:.4g} ({options.distance} distance)")
    return mixer, BuiltModel({}, {"clusters": folder.name, "temperature": mixer.routing.temperature})


def _clusters_of(inputs: MergeInputs, wanted: str | None) -> tuple[Path, tuple[int, ...]]:
    """Return the folder of a set of clusters and the cluster index of each expert."""
    root = Layout.find(inputs.seed).root
    sets = cluster_sets(root)
    if wanted is not None and wanted not in sets:
        raise unknown_name("set of clusters", wanted, sets, listed_as="this workspace has")
    trained = {name: tuple(read_manifest(path).domains) for name, path in inputs.experts.items()}
    for name in [wanted] if wanted is not None else sets:
        if all(len(domains) == 1 and domains[0] in sets[name] for domains in trained.values()):
            if (discoverer := discoverer_of(root, name)) != PER_TOKEN_DISCOVERER:
                raise UserError(
                    f"mixer: clusters needs clusters of {PER_TOKEN_DISCOVERER}, and '{name}' was made by "
                    f"{discoverer}; use mixer: posterior, or discover clusters by {PER_TOKEN_DISCOVERER}"
                )
            return root / CLUSTERS_FOLDER / name, tuple(sets[name].index(domain) for (domain,) in trained.values())
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
