"""The router of Cluster-Branch-Train-Merge (arXiv:2303.14177): experts weigh by how near the text so far is to their clusters.

    w_k = exp(-distance(text, centre_k)^2 / T) / sum over all k

The code released with the paper squares a distance that is squared already, so its temperatures mean something else. Both forms are
here, and a temperature is kept together with its form. Shapes: B = batch, T = tokens, K = experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...core.text.clustering.clusterer import Clusterer, unit_rows
from ...core.text.clustering.growing_text import Reader, TextSoFar
from ...core.text.tokenizer import TextEncoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

DistanceForm = Literal["squared", "released"]
"""`squared`: exp(-distance^2 / T), the paper's formula; `released`: exp(-distance^4 / T), what its code computes."""
COLDEST, HOTTEST, STEPS = 1e-3, 10.0, 33


@dataclass(frozen=True)
class ClusterRouting:
    """How distances become weights; what an ensemble's configuration holds of its router."""

    clusters: tuple[int, ...]
    """Cluster of each expert."""
    temperature: float
    distance: DistanceForm = "squared"
    every: int = 8
    """Tokens after which weights are calculated anew; in a text's first tokens after 1, 2, 4 ..."""
    top_k: int | None = None
    """Experts that keep a weight."""

    def due(self, count: int) -> bool:
        """Tell whether weights are calculated after so many tokens of a text."""
        return count % self.every == 0 or (count < self.every and count & (count - 1) == 0)

    def log_weights(self, squares_NK: NDArray[np.float64], known_N: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return (N, K) from squared distances; a text of which no word is known weighs all experts the same."""
        import numpy as np

        powers = squares_NK if self.distance == "squared" else squares_NK**2
        scores = np.where(known_N[:, None], -powers / self.temperature, 0.0)
        if self.top_k is not None and self.top_k < scores.shape[1]:
            order = np.argsort(-scores, axis=1, kind="stable")[:, self.top_k :]
            cut = scores.copy()
            np.put_along_axis(cut, order, -np.inf, axis=1)
            scores = np.where(known_N[:, None], cut, scores)
        scores = scores - scores.max(axis=1, keepdims=True)
        found: NDArray[np.float64] = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        return found


@dataclass(frozen=True)
class RoutedText:
    """A text as far as it is routed; never changes."""

    text: TextSoFar
    count: int
    """Tokens so far."""
    pending: tuple[int, ...]
    """Tokens since the weights were calculated."""
    log_weights: NDArray[np.float64]
    """(K,)."""


@dataclass(frozen=True)
class ClusterRouter:
    """Weighs experts after every token of a text."""

    routing: ClusterRouting
    reader: Reader

    @classmethod
    def read(cls, folder: Path, routing: ClusterRouting) -> ClusterRouter:
        """Read the clusterer and the tokenizer of a model's folder; raises `UserError` where they are missing."""
        encoder = TextEncoder.of_folder(folder)
        return cls(routing, Reader(Clusterer.read(folder), encoder.tokenizer, encoder.separator))

    def write(self, folder: Path) -> None:
        """Write what `read` reads; a tokenizer that is there stays."""
        self.reader.clusterer.write(folder)
        if not (folder / "tokenizer.json").exists():
            self.reader.tokenizer.save(str(folder / "tokenizer.json"))

    def only(self, experts: Sequence[int]) -> ClusterRouter:
        """Return the router of some of the experts."""
        routing = self.routing
        kept = tuple(routing.clusters[number] for number in experts)
        top_k = None if routing.top_k is None else min(routing.top_k, len(kept))
        return replace(self, routing=replace(routing, clusters=kept, top_k=top_k))

    def begin(self) -> RoutedText:
        """Return the empty text."""
        import numpy as np

        nothing = np.zeros((1, len(self.routing.clusters)))
        return RoutedText(self.reader.begin(), 0, (), self.routing.log_weights(nothing, np.array([False]))[0])

    def __call__(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, texts: Sequence[RoutedText] | None = None
    ) -> tuple[Tensor, list[RoutedText]]:
        """Return log weights after every token, (B, T, K), and the texts that may go on; masked tokens are not read."""
        import torch

        rows, grown = [], []
        for number, ids in enumerate(ids_BT.tolist()):
            real = [True] * len(ids) if mask_BT is None else mask_BT[number].bool().tolist()
            weights, text = self._row(ids, real, texts[number] if texts is not None else self.begin())
            rows.append(torch.from_numpy(weights).float())
            grown.append(text)
        return torch.stack(rows).to(ids_BT.device), grown

    def _row(
        self, ids: Sequence[int], real: Sequence[bool], before: RoutedText
    ) -> tuple[NDArray[np.float64], RoutedText]:
        import numpy as np

        pieces, places, pending, count = [], [], list(before.pending), before.count
        for place, (token, counts) in enumerate(zip(ids, real, strict=True)):
            if not counts:
                continue
            pending.append(token)
            count += 1
            if self.routing.due(count):
                pieces.append(pending)
                places.append(place)
                pending = []
        text, sums = self.reader.grow(before.text, pieces)
        calculated = self.routing.log_weights(*self.squared_distances(sums))
        which = np.zeros(len(ids), np.int64)
        which[places] = 1
        all_weights = np.concatenate([before.log_weights[None], calculated])
        return all_weights[which.cumsum()], RoutedText(text, count, tuple(pending), all_weights[-1])

    def squared_distances(
        self, sums_Nd: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return squared distances to the experts' centres, (N, K), and which texts have a known word."""
        points = unit_rows(sums_Nd)
        found = self.reader.clusterer.distances(points)[:, list(self.routing.clusters)]
        return found, (points != 0).any(axis=1)


def fitted_temperature(
    router: ClusterRouter, texts: Sequence[tuple[Sequence[int], NDArray[np.float64]]]
) -> float:
    """Return the temperature at which the experts together predict texts best.

    A text is its T + 1 tokens and log-probabilities of all but the first under each expert, (K, T).
    """
    import numpy as np
    from scipy.optimize import minimize_scalar

    squares, known, scores = [], [], []
    for tokens, scores_KT in texts:
        due = [count for count in range(1, len(tokens)) if router.routing.due(count)]
        pieces = [list(tokens[begin:end]) for begin, end in _spans(due)]
        _, sums = router.reader.grow(router.reader.begin(), pieces)
        one, is_known = router.squared_distances(sums)
        which = np.searchsorted(due, np.arange(1, len(tokens)), side="right") - 1
        squares.append(one[which])
        known.append(is_known[which])
        scores.append(scores_KT.T)
    squares_NK, known_N, scores_NK = np.concatenate(squares), np.concatenate(known), np.concatenate(scores)

    def loss(log_temperature: float) -> float:
        routing = replace(router.routing, temperature=float(np.exp(log_temperature)))
        joint = routing.log_weights(squares_NK, known_N) + scores_NK
        return -float(np.logaddexp.reduce(joint, axis=1).mean())

    grid = np.linspace(np.log(COLDEST), np.log(HOTTEST), STEPS)
    best = int(np.argmin([loss(one) for one in grid]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, STEPS - 1)])
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def _spans(ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip((0, *ends[:-1]), ends, strict=True) if ends else iter(())


def routing_as_json(routing: ClusterRouting) -> dict[str, Any]:
    """Return what an ensemble's configuration holds."""
    return {**asdict(routing), "clusters": list(routing.clusters)}


def routing_of_json(content: dict[str, Any]) -> ClusterRouting:
    """Return what `routing_as_json` wrote."""
    return ClusterRouting(**{**content, "clusters": tuple(content["clusters"])})
