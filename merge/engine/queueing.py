"""Order and memory of tensors that several threads work on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Condition

from .tensor_plan import TensorPlan

CONCURRENT_BYTES = 160 << 20
"""Memory limit of concurrent tensors, in addition to the largest tensor."""


class TensorQueue:
    """Schedules tensors by size: the largest tensor that fits into the remaining memory comes first.

    Starting with large tensors avoids threads that wait for one of them at the end. A single tensor always fits.
    """

    def __init__(self, tensors: Sequence[TensorPlan], size: Callable[[TensorPlan], int]) -> None:
        self._remaining = sorted(tensors, key=size, reverse=True)
        self._size = size
        self._limit = (size(self._remaining[0]) if self._remaining else 0) + CONCURRENT_BYTES
        self._used = 0
        self._condition = Condition()
        self.stopped = False

    def take(self) -> TensorPlan | None:
        """Return the next tensor, waiting for free memory; None if no tensors are left."""
        with self._condition:
            while self._remaining and not self.stopped:
                for tensor in self._remaining:
                    if self._used == 0 or self._used + self._size(tensor) <= self._limit:
                        self._remaining.remove(tensor)
                        self._used += self._size(tensor)
                        return tensor
                self._condition.wait()
            return None

    def release(self, tensor: TensorPlan) -> None:
        with self._condition:
            self._used -= self._size(tensor)
            self._condition.notify_all()

    def stop(self) -> None:
        with self._condition:
            self.stopped = True
            self._condition.notify_all()
