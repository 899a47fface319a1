"""Beam search over scores that are not log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from .rows import Combine, DecodingRow, RowsModel


class SummedScores(RowsModel):
    """Rows whose combined logits are scores that beams sum as they are; transformers would normalise them at each token."""

    _log_sums: Tensor

    def __init__(self, base: PreTrainedModel, rows: Sequence[DecodingRow], combine: Combine) -> None:
        """See `RowsModel`."""

        def combine_and_remember(logits: Sequence[Tensor]) -> Tensor:
            scores = combine(logits)
            self._log_sums = scores[:, -1].logsumexp(dim=-1, keepdim=True)
            return scores

        super().__init__(base, rows, combine_and_remember)

    def generate(self, *arguments: Any, logits_processor: Any = None, **named: Any) -> Any:
        """Generate as transformers does, with the scores of the last `forward` in place of their log-softmax."""
        processors = LogitsProcessorList([*(logits_processor or ()), _Unnormalised(self)])
        return super().generate(*arguments, logits_processor=processors, **named)


class _Unnormalised(LogitsProcessor):
    """Adds the sum that a log-softmax has divided by; without beams, a constant that changes nothing."""

    def __init__(self, model: SummedScores) -> None:
        self._model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self._model._log_sums.to(scores.device)
