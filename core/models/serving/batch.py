"""A batch whose rows come and go between tokens. Shapes: B = rows, C = columns of the cache, V = vocabulary, K = experts.

The texts of all rows end in the last column; shorter ones have padding on the left, which attention does not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

import torch

from .caches import append_rows, can_append, drop_columns

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Mode = Literal["batched", "cached", "uncached"]
"""What a model supports: rows that join a batch, one text with a cache, or only whole texts without one."""
_MAX_ERROR, _MAX_ERROR_LOW_PRECISION = 1e-3, 0.05
"""Largest difference of logits between two ways to compute them, relative to their spread."""


@dataclass(frozen=True)
class Prediction:
    """A model's predictions of the next token."""

    logits: Tensor
    """(B, V)."""
    expert_weights: Tensor | None = None
    """Weight of each expert in these predictions, (B, K)."""
    expert_log_probs: Tensor | None = None
    """Log-probabilities of the next token under each expert, (B, K, V)."""

    def shares(self, row: int, token: int) -> list[float]:
        """Return each expert's share of a token: its weight times the probability that it gives the token, normalised."""
        assert self.expert_weights is not None
        assert self.expert_log_probs is not None
        joint_K = self.expert_weights[row].log() + self.expert_log_probs[row, :, token]
        shares: list[float] = joint_K.softmax(dim=0).tolist()
        return shares

    def take(self, row: int) -> Prediction:
        """Return the prediction of one row, (1, ...)."""
        weights, log_probs = self.expert_weights, self.expert_log_probs
        return Prediction(
            self.logits[row : row + 1],
            None if weights is None else weights[row : row + 1],
            None if log_probs is None else log_probs[row : row + 1],
        )


class Reader:
    """Calls a model with the arguments that its class takes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model
        self.device = model.device
        parameters = signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_cache = "past_key_values" in parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def read(
        self,
        ids: Sequence[Sequence[int]],
        *,
        cache: Any = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        keeps_cache: bool = True,
        with_experts: bool = False,
    ) -> tuple[Prediction, Any]:
        """Read tokens (B, T), which continue the text in a cache; return predictions and the new cache, None if none is kept."""
        arguments: dict[str, Any] = dict(self._last_only)
        if self._takes_cache:
            arguments |= {"past_key_values": cache, "use_cache": keeps_cache}
        if self._takes_positions and positions is not None:
            arguments["position_ids"] = positions
        if with_experts:
            arguments["output_expert_log_probs"] = True
        output = self._model(input_ids=torch.tensor(ids, device=self.device), attention_mask=mask, **arguments)
        weights = output.expert_weights[:, -1] if with_experts else None
        prediction = Prediction(output.logits[:, -1], weights, output.expert_log_probs if with_experts else None)
        return prediction, getattr(output, "past_key_values", None) if keeps_cache else None


class Batch:
    """The cache of some texts, and how many columns of each are padding."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._cache: Any = None
        self._columns = 0
        self._padding = torch.zeros(0, 1, dtype=torch.long, device=reader.device)
        """Columns of padding of each row, (B, 1)."""
        self._is_padded = False
        self._numbers = torch.arange(0, device=reader.device)

    def __len__(self) -> int:
        return len(self._padding)

    @property
    def has_cache(self) -> bool:
        """Whether the model keeps a cache."""
        return self._cache is not None

    @classmethod
    def of_texts(
        cls, reader: Reader, texts: Sequence[Sequence[int]], *, with_experts: bool = False
    ) -> tuple[Batch, Prediction]:
        """Read texts of equal length; return their batch and the predictions of the next tokens."""
        prediction, cache = reader.read(texts, with_experts=with_experts)
        batch = cls(reader)
        batch._cache, batch._columns = cache, len(texts[0])
        batch._padding = torch.zeros(len(texts), 1, dtype=torch.long, device=reader.device)
        return batch, prediction

    def can_append(self) -> bool:
        """Return whether texts can join the batch."""
        return len(self) == 0 or can_append(self._cache)

    def append(self, other: Batch) -> None:
        """Add the texts of another batch after those of this one."""
        if not len(self):
            self._cache = other._cache
        else:
            append_rows(self._cache, other._cache)
        columns = max(self._columns, other._columns)
        own, new = self._padding + (columns - self._columns), other._padding + (columns - other._columns)
        self._set(torch.cat([own, new]), columns)

    def keep(self, rows: Sequence[int]) -> None:
        """Remove all other rows, and the columns that are padding in the rest."""
        if not rows:
            self._cache = None
            self._set(self._padding[:0], 0)
            return
        self._cache.batch_select_indices(torch.tensor(rows, device=self._reader.device))
        padding = self._padding[list(rows)]
        if common := int(padding.min()):
            drop_columns(self._cache, common)
        self._set(padding - common, self._columns - common)

    def step(self, tokens: Sequence[int], *, with_experts: bool = False) -> Prediction:
        """Append one token to each text and return the predictions of the next ones."""
        mask = None
        if self._is_padded:
            if len(self._numbers) <= self._columns:
                self._numbers = torch.arange(2 * self._columns + 1, device=self._reader.device)
            mask = (self._numbers[: self._columns + 1] >= self._padding).long()
        prediction, self._cache = self._reader.read(
            [[token] for token in tokens],
            cache=self._cache,
            mask=mask,
            positions=self._columns - self._padding,
            with_experts=with_experts,
        )
        self._columns += 1
        return prediction

    def _set(self, padding_B1: Tensor, columns: int) -> None:
        self._padding, self._columns = padding_B1, columns
        self._is_padded = bool((padding_B1 > 0).any())


def supported_mode(model: PreTrainedModel) -> Mode:
    """Return the fastest way to generate that gives the logits of a plain forward pass, found by trying them.

    Families differ in how they number positions and mask padding, and models of other packages may do anything.
    """
    reader = Reader(model)
    size = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 100)
    long, short = ([(step * number + 3) % size for number in range(length)] for step, length in ((7, 12), (11, 5)))

    def expected(text: Sequence[int]) -> Tensor:
        return reader.read([text], keeps_cache=False)[0].logits[0]

    mode: Mode = "uncached"
    try:
        batch, _ = Batch.of_texts(reader, [long[:-2]])
        if not batch.has_cache or not _close(batch.step([long[-2]]).logits, [expected(long[:-1])]):
            return mode
        mode = "cached"
        other, _ = Batch.of_texts(reader, [short[:-2]])
        if not (batch.can_append() and other.can_append()):
            return mode
        batch.append(other)
        both = batch.step([long[-1], short[-2]])
        batch.keep([1])
        last = batch.step([short[-1]])
        if _close(both.logits, [expected(long), expected(short[:-1])]) and _close(last.logits, [expected(short)]):
            mode = "batched"
    except Exception:  # whatever a class does with arguments that it does not expect
        return mode
    return mode


def _close(logits_BV: Tensor, expected: Sequence[Tensor]) -> bool:
    limit = _MAX_ERROR if logits_BV.dtype in (torch.float32, torch.float64) else _MAX_ERROR_LOW_PRECISION
    wanted_BV = torch.stack(list(expected)).double()
    return bool((logits_BV.double() - wanted_BV).std() <= limit * wanted_BV.std())
