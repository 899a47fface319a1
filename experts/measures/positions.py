"""Loss by position: bits per token in buckets of a window, which show what a model makes of a longer context.

Windows do not overlap, so that tokens at all positions are scored. The first bucket has some positions, the second as many, and
each later one as many as all before it. Shapes: B = windows, T = tokens of a window.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING

from ...core.errors import UserError
from ...core.hooks.evaluation import Division, Evaluator, Metric, Score
from ...core.models.scoring import token_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...core.text.token_store import TokenWindows, Windows

Sums = tuple[float, int]
"""Loss in nats, and number of scored tokens."""


@dataclass(frozen=True)
class Bucket:
    """The tokens at some positions of their windows; position 0 is predicted from one token."""

    begin: int
    end: int
    """The position after the last."""
    bits_per_token: float | None
    """None without a scored token."""
    tokens: int
    """Number of scored tokens."""

    @property
    def title(self) -> str:
        return f"{self.begin:,}-{self.end - 1:,}"


@dataclass(frozen=True)
class PositionScore(Score):
    """Bits per token of a text, and in each bucket."""

    buckets: tuple[Bucket, ...] = ()


def position_evaluator(scorer: Evaluator, first: int) -> Evaluator:
    """Return an evaluator of loss by position in batches as large as another's; `first` is the size of the first bucket.

    Raises `UserError` if the other one does not read a text in batches.
    """
    if first < 1:
        raise UserError(f"the first bucket of positions has at least one, not {first}")
    if scorer.division is None:
        raise UserError(f"evaluator '{scorer.name}' scores a text as a whole, so there is no loss by position")
    division = Division(
        scorer.division.batch_size, functools.partial(sums_by_bucket, first), functools.partial(position_score, first)
    )
    metrics = (Metric("bits_per_token", "bits per token"),)
    return Evaluator("positions", "bits per token by position", metrics, division.evaluate, division)


def bucket_ends(first: int, length: int) -> list[int]:
    """Return the position after the last of each bucket of a window of `length` tokens."""
    ends = [first]
    while ends[-1] < length:
        ends.append(2 * ends[-1])
    return [*ends[:-1], length]


def sums_by_bucket(first: int, model: PreTrainedModel, windows: Windows) -> list[Sums]:
    """Return the summed loss of the targets that windows score, and their number, in each bucket."""
    import torch

    scores_BT = token_log_probs(model, torch.from_numpy(windows.tokens).to(model.device)).double()
    scored_BT = torch.from_numpy(windows.scored).to(model.device)
    losses_T = -scores_BT.masked_fill(~scored_BT, 0.0).sum(dim=0)
    counts_T = scored_BT.sum(dim=0)
    ends = [0, *bucket_ends(first, len(losses_T))]
    return [(float(losses_T[begin:end].sum()), int(counts_T[begin:end].sum())) for begin, end in pairwise(ends)]


def position_score(first: int, windows: TokenWindows, partials: Sequence[Sequence[Sums]]) -> PositionScore:
    """Return the score of a text from the sums of its batches."""
    ends = bucket_ends(first, windows.context)
    buckets, losses = [], []
    for begin, end, sums in zip([0, *ends], ends, zip_longest(*partials, fillvalue=(0.0, 0)), strict=False):
        loss, count = math.fsum(loss for loss, _ in sums), sum(count for _, count in sums)
        buckets.append(Bucket(begin, end, loss / count / math.log(2) if count else None, count))
        losses.append(loss)
    tokens = sum(bucket.tokens for bucket in buckets)
    bits = math.fsum(losses) / math.log(2) / max(tokens, 1)
    return PositionScore({"bits_per_token": bits}, tokens, tuple(buckets))
