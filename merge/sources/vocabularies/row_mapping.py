"""The rows of a merged embedding: where each of them comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SourceRow = tuple[str, int]
"""A model and one of its embedding rows."""


@dataclass(frozen=True)
class VocabularyPlan:
    """Plan to merge the vocabularies of several models into one."""

    source: Path
    """Folder of the output's tokenizer."""
    size: int
    """Number of embedding rows of the output."""
    rows: Mapping[str, tuple[int, ...]]
    """Model name -> source row of each output row, -1 if missing; only for models whose rows move."""
    fills: Mapping[int, tuple[SourceRow, ...]]
    """Output row -> rows whose mean is used by models that lack it; zeros if there are none."""
    shared: frozenset[int] = frozenset()
    """Output rows that all models take from `fills`, even if they have the row."""
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Tokens added to the tokenizer of `source` -> entry of tokenizer.json."""
    removed: Mapping[str, int] = field(default_factory=dict)
    """Tokens removed from the tokenizer of `source`, which have no embedding row there -> token id."""
    notes: tuple[str, ...] = ()

    def rearrange(self, tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the models' tensors, rearranged from (rows, ...) to (size, ...); rows that no model has are zero."""
        rearranged: dict[str, NDArray[Any]] = {}
        for name, tensor in tensors.items():
            rows = np.asarray(self.rows.get(name, range(self.size)))
            rows = np.where(rows < tensor.shape[0], rows, -1)
            is_present = (rows >= 0).reshape(-1, *[1] * (tensor.ndim - 1))
            rearranged[name] = np.where(is_present, tensor[np.maximum(rows, 0)], tensor.dtype.type(0))
        missing = {name: self._missing_rows(name, tensor.shape[0]) for name, tensor in tensors.items()}
        for row in sorted(set().union(self.shared, *missing.values())):
            present = [rearranged[name][row] for name in tensors if row not in missing[name]]
            value = self._filling(row, tensors, present)
            if value is None:
                continue  # padding that no model has stays zero
            for name in tensors:
                if row in self.shared or row in missing[name]:
                    rearranged[name][row] = value
        return rearranged

    def _filling(
        self, row: int, tensors: Mapping[str, NDArray[Any]], present: list[NDArray[Any]]
    ) -> NDArray[Any] | float | None:
        """Return the values of an output row for models that lack it; `present` holds the row in all other models."""
        sources = self.fills.get(row)
        if sources == ():
            return 0.0
        filled = [
            tensors[name][source]
            for name, source in sources or ()
            if name in tensors and source < tensors[name].shape[0]
        ]
        values = filled or present
        if not values:
            return None
        mean: NDArray[Any] = np.mean([value.astype("f8") for value in values], axis=0)
        return mean

    def _missing_rows(self, name: str, rows: int) -> set[int]:
        source_rows = self.rows.get(name)
        if source_rows is None:
            return set(range(rows, self.size))
        return {row for row, source_row in enumerate(source_rows) if source_row < 0 or source_row >= rows}
