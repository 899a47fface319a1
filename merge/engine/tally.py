"""Counts of the elements of task vectors that a merge keeps, over all tensors."""

from __future__ import annotations

from threading import Lock

from ...core.hooks.merging import KeptElements


class Tally:
    """Thread-safe counts by expert."""

    def __init__(self) -> None:
        self.experts: dict[str, KeptElements] = {}
        self._lock = Lock()

    def add(self, expert: str, elements: KeptElements) -> None:
        """Add the elements of one tensor."""
        with self._lock:
            self.experts[expert] = self.experts.get(expert, KeptElements(0, 0, 0)) + elements
