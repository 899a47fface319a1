"""Intervals of bits per byte: what the figure would be on other documents like those of the test text.

Units are documents, which are resampled with replacement; of a text with few documents, stretches as long as the stride of
its windows. Two models are compared on the same units. Shapes: N = scored tokens in the order of the text, U = units.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...core.errors import UserError
from ...core.hooks.evaluation import Division, Evaluator, Score
from ...core.models.loading import tokenizer_folder
from ...core.models.scoring import scored_log_probs
from ...core.text.tokenizer import TextEncoder
from .suites.intervals import Bootstrap, Interval, interval_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from ...core.text.token_store import TokenStore, TokenWindows, Windows

FEWEST = 10
"""Fewer units say nothing about others."""
SCORER = "perplexity"
TOKENS_AT_A_TIME = 1 << 16
BITS_PER_LOST_BYTE = 8
Partial = tuple[float, int, Any]


@dataclass(frozen=True)
class TokenScore(Score):
    """A score with what it is a sum of."""

    losses: Any = None
    """Loss of each scored token in nats, float32, (N,)."""


@dataclass(frozen=True)
class Units:
    """Bits and bytes of each unit of a text; their sums give its bits per byte."""

    kind: Literal["documents", "windows"]
    bits: NDArray[np.float64]
    sizes: NDArray[np.float64]
    """UTF-8 bytes."""

    def resampled(self, seed: int) -> NDArray[np.float64]:
        """Return bits per byte of each resample, the same resamples for all with this number of units."""
        import numpy as np

        sums = Bootstrap(len(self.bits), seed=seed).sums(np.stack([self.bits, self.sizes], axis=1))
        ratios: NDArray[np.float64] = sums[:, 0] / sums[:, 1]
        return ratios

    def is_paired_with(self, other: Units) -> bool:
        """Return whether both are the same units: all documents of a domain, or the windows of one tokenizer."""
        same = self.kind == other.kind and len(self.bits) == len(other.bits)
        return same and (self.kind == "documents" or bool((self.sizes == other.sizes).all()))


@dataclass(frozen=True)
class DomainIntervals:
    """Intervals of all models on all domains; None for a text with too few units, and for models on different ones."""

    scores: Mapping[str, Mapping[str, float]]
    """Model -> domain -> bits per byte."""
    units: Mapping[str, Mapping[str, Units | None]]

    @property
    def domains(self) -> list[str]:
        return list(next(iter(self.units.values())))

    def of(self, model: str, domain: str) -> Interval | None:
        """Return bits per byte on a domain with its interval."""
        units = self.units[model][domain]
        return None if units is None else interval_of(self.scores[model][domain], units.resampled(self._seed(domain)))

    def mean(self, model: str) -> Interval | None:
        """Return the mean over domains, which are resampled apart from each other."""
        return self._mean([model], lambda values: values[0])

    def difference(self, model: str, other: str, domain: str | None = None) -> Interval | None:
        """Return bits per byte of a model minus that of another, on a domain or (None) the mean over domains."""
        domains = self.domains if domain is None else [domain]
        pairs = [(self.units[model][name], self.units[other][name]) for name in domains]
        if any(left is None or right is None or not left.is_paired_with(right) for left, right in pairs):
            return None
        return self._mean([model, other], lambda values: values[0] - values[1], domains)

    def _mean(self, models: Sequence[str], combine: Any, domains: Sequence[str] | None = None) -> Interval | None:
        names = self.domains if domains is None else domains
        value, resampled = 0.0, 0.0
        for name in names:
            units = [self.units[model][name] for model in models]
            if any(own is None for own in units):
                return None
            value += combine([self.scores[model][name] for model in models]) / len(names)
            resampled += combine([own.resampled(self._seed(name)) for own in units if own is not None]) / len(names)
        return interval_of(value, resampled)  # type: ignore[arg-type]  # an array once a domain was added

    def _seed(self, domain: str) -> int:
        return self.domains.index(domain)

    def as_json(self) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
        """Return for each model its intervals by domain and their mean, and the differences of every two models."""
        models: dict[str, dict[str, Any]] = {}
        for model, by_domain in self.units.items():
            domains: dict[str, Any] = {}
            for domain, units in by_domain.items():
                kind = {} if units is None else {"units": units.kind, "number": len(units.bits)}
                own = _json(self.of(model, domain))
                domains[domain] = None if own is None else {**own, **kind}
            models[model] = {"domains": domains, "mean": _json(self.mean(model))}
        names = list(self.units)
        differences = [
            {
                "model": model,
                "other": other,
                "domains": {domain: _json(self.difference(model, other, domain)) for domain in self.domains},
                "mean": _json(self.difference(model, other)),
            }
            for number, other in enumerate(names)
            for model in names[number + 1 :]
        ]
        return models, differences


def _json(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval.as_json()


def token_evaluator(scorer: Evaluator) -> Evaluator:
    """Return an evaluator with the same values that keeps the loss of each token; raises `UserError` for another scorer."""
    if scorer.name != SCORER or scorer.division is None:
        raise UserError(
            f"intervals are those of evaluator '{SCORER}'; leave out either them or evaluator '{scorer.name}'"
        )
    merge = functools.partial(_merged, scorer.division)
    division = Division(scorer.division.batch_size, token_losses, merge)
    return Evaluator(scorer.name, scorer.summary, scorer.metrics, division.evaluate, division)


def token_losses(model: PreTrainedModel, windows: Windows) -> Partial:
    """Return the summed loss of the targets that windows score, their number, and the loss of each."""
    scores, scored = scored_log_probs(model, windows)
    losses = (-scores[scored]).float().cpu().numpy()
    return -float(scores.masked_fill(~scored, 0.0).sum()), int(scored.sum()), losses


def _merged(division: Division, windows: TokenWindows, partials: Sequence[Partial]) -> TokenScore:
    import numpy as np

    score = division.merge_scores(windows, [(loss, count) for loss, count, _ in partials])
    return TokenScore(score.values, score.tokens, np.concatenate([losses for _, _, losses in partials]))


def intervals_of(
    models: Mapping[str, Path],
    windows: Mapping[tuple[str, str], TokenWindows],
    scores: Mapping[str, Mapping[str, Score]],
) -> DomainIntervals:
    """Return the intervals of models (name -> folder) on the texts, (model, domain) -> windows, that gave these scores."""
    units = {
        model: {
            domain: units_of(windows[model, domain], score, tokenizer_folder(folder))
            for domain, score in scores[model].items()
        }
        for model, folder in models.items()
    }
    values = {
        model: {domain: score.values["bits_per_byte"] for domain, score in by_domain.items()}
        for model, by_domain in scores.items()
    }
    return DomainIntervals(values, units)


def units_of(windows: TokenWindows, score: Score, tokenizer: Path) -> Units | None:
    """Return the units of a text: documents, or windows where there are few; None if there are few of those, too.

    Bytes of a unit are those that its tokens give back, in proportion if that is not all of the text; lost bytes, at 8 bits
    each, are shared out in the same way.
    """
    import numpy as np

    assert isinstance(score, TokenScore), "the evaluator keeps the loss of each token"
    tokens_N, units_N = scored_tokens(windows.store)
    assert len(tokens_N) == len(score.losses), "every token of the text is scored once"
    kind: Literal["documents", "windows"] = "documents"
    if len(np.unique(units_N)) < FEWEST:
        kind, units_N = "windows", np.arange(len(tokens_N)) // windows.stride
    count = int(units_N.max(initial=-1)) + 1
    if count < FEWEST or not np.isfinite(score.losses).all():
        return None
    losses_U = np.bincount(units_N, weights=score.losses.astype(np.float64), minlength=count)
    bytes_U = _decoded_bytes(TextEncoder.of_folder(tokenizer), tokens_N, units_N, count)
    bytes_U *= windows.num_bytes / bytes_U.sum()
    lost_U = bytes_U * windows.lost_bytes / windows.num_bytes
    return Units(kind, losses_U / math.log(2) + BITS_PER_LOST_BYTE * lost_U, bytes_U)


def scored_tokens(store: TokenStore) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the tokens of a part that windows score, (N,), and the number of the document of each, (N,)."""
    import numpy as np

    tokens = store.read(0, len(store))
    is_text = ~np.isin(tokens, store.part.markers)
    if not store.has_conversations:
        documents = np.cumsum(tokens == store.part.markers[0]) - 1
        is_text[:1] = False  # nothing comes before the first token
        return tokens[is_text], documents[is_text]
    ends = store.ends
    documents = np.searchsorted(ends, np.arange(len(tokens)), side="right")
    is_text &= store.counted(0, len(store))
    is_text[np.concatenate(([0], ends[:-1]))] = False
    if store.part.has_pairs:  # of which the first is scored
        is_text &= documents % 2 == 0
        documents //= 2
    return tokens[is_text], documents[is_text]


def _decoded_bytes(
    encoder: TextEncoder, tokens_N: NDArray[np.int64], units_N: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Return the UTF-8 bytes of the text of each unit's tokens, (U,)."""
    import numpy as np

    borders = np.searchsorted(units_N, np.arange(count + 1))
    sizes, begin = np.zeros(count), 0
    while begin < count:
        end = max(int(np.searchsorted(borders, borders[begin] + TOKENS_AT_A_TIME)) - 1, begin + 1)
        end = min(end, count)
        rows = [tokens_N[borders[unit] : borders[unit + 1]].tolist() for unit in range(begin, end)]
        texts = encoder.tokenizer.decode_batch(rows, skip_special_tokens=False)
        sizes[begin:end] = [len(text.encode("utf-8", errors="surrogatepass")) for text in texts]
        begin = end
    return sizes
