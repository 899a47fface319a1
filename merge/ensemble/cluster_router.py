"""Router of Cluster-Branch-Train-Merge (arXiv:2303.14177): weights experts by distance to their clusters.

    w_k = exp(-distance(text, centre_k)^2 / T) / sum over all k

The code released with the paper squares the squared distance again, so its temperatures are on another scale.
Both forms are supported, and a temperature is stored with its form. Shapes: B = batch, T = tokens, K =
experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...core.text.clustering.clusterer import Clusterer, unit_rows
from ...core.text.clustering.growing_text import GrowingText, Reader
from ...core.text.tokenizer import TextEncoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

DistanceForm = Literal["squared", "released"]
"""`squared`: exp(-distance^2 / T), the paper's formula; `released`: exp(-distance^4 / T), as in its code."""
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

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> ClusterRouting:
        """Restore the settings from `as_json`."""
        return cls(**{**content, "clusters": tuple(content["clusters"])})

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "clusters": list(self.clusters)}

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
        log_weights: NDArray[np.float64] = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        return log_weights


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
class ClusterRouter:
    """Calculates the weights of experts after every token of a text."""

    routing: ClusterRouting
    reader: Reader

    @classmethod
    def read(cls, folder: Path, routing: ClusterRouting) -> ClusterRouter:
        """Load the clusterer and the tokenizer of a model folder; raises `UserError` if they are missing."""
        encoder = TextEncoder.of_folder(folder)
        return cls(routing, Reader(Clusterer.read(folder), encoder.tokenizer, encoder.separator))

    def write(self, folder: Path) -> None:
        """Write the clusterer, and the tokenizer unless the folder has one."""
        self.reader.clusterer.write(folder)
        if not (folder / "tokenizer.json").exists():
            self.reader.tokenizer.save(str(folder / "tokenizer.json"))

    def subset(self, experts: Sequence[int]) -> ClusterRouter:
        """Return the router of a subset of the experts."""
        routing = self.routing
        kept = tuple(routing.clusters[number] for number in experts)
        top_k = None if routing.top_k is None else min(routing.top_k, len(kept))
        return replace(self, routing=replace(routing, clusters=kept, top_k=top_k))

    def begin(self) -> RoutedText:
        """Return the state of an empty text."""
        import numpy as np

        nothing = np.zeros((1, len(self.routing.clusters)))
        return RoutedText(self.reader.begin(), 0, (), self.routing.log_weights(nothing, np.array([False]))[0])

    def __call__(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, texts: Sequence[RoutedText] | None = None
    ) -> tuple[Tensor, list[RoutedText]]:
        """Return log weights after every token, (B, T, K), and new text states; skips masked tokens."""
        import torch

        rows, new_texts = [], []
        for number, ids in enumerate(ids_BT.tolist()):
            is_token = [True] * len(ids) if mask_BT is None else mask_BT[number].bool().tolist()
            weights, text = self._route_row(ids, is_token, texts[number] if texts is not None else self.begin())
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


def fit_temperature(router: ClusterRouter, texts: Sequence[tuple[Sequence[int], NDArray[np.float64]]]) -> float:
    """Return the temperature that maximises the log-likelihood of texts under the weighted experts.

    A text is given as T + 1 token ids and the log-probabilities of all but the first token per expert, (K,
    T).
    """
    import numpy as np
    from scipy.optimize import minimize_scalar

    squares, known, scores = [], [], []
    for tokens, scores_KT in texts:
        updates = [count for count in range(1, len(tokens)) if router.routing.is_update_due(count)]
        pieces = [list(tokens[begin:end]) for begin, end in pairwise((0, *updates))]
        _, sums = router.reader.grow(router.reader.begin(), pieces)
        update_squares, is_known = router.squared_distances(sums)
        last_update = np.searchsorted(updates, np.arange(1, len(tokens)), side="right") - 1
        squares.append(update_squares[last_update])
        known.append(is_known[last_update])
        scores.append(scores_KT.T)
    squares_NK, known_N, scores_NK = np.concatenate(squares), np.concatenate(known), np.concatenate(scores)

    def loss(log_temperature: float) -> float:
        routing = replace(router.routing, temperature=float(np.exp(log_temperature)))
        joint = routing.log_weights(squares_NK, known_N) + scores_NK
        return -float(np.logaddexp.reduce(joint, axis=1).mean())

    grid = np.linspace(np.log(MIN_TEMPERATURE), np.log(MAX_TEMPERATURE), GRID_SIZE)
    best = int(np.argmin([loss(log_temperature) for log_temperature in grid]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, GRID_SIZE - 1)])
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))
