"""Reads all tensors of a merge before the first one is merged, for methods with a `Survey`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any

from ...core.artefacts.numeric import FLOATING
from ...core.hooks.merging import Survey, TensorGroup, TensorMerge
from ...core.reporting import SILENT, Reporter
from .actions import MergeTools, MergeWhole, bytes_needed
from .queueing import TensorQueue
from .tensor_plan import TensorPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray

Sums = dict[str, "NDArray[Any]"]


def begin_survey(method: TensorMerge, tensors: Sequence[TensorPlan]) -> Any:
    """Return the first state of the survey that a merge needs, None if it needs none.

    Raises `UserError` for options that differ between tensors and must not.
    """
    merged = [tensor for tensor in tensors if tensor.action == "merge"]
    survey = method.survey
    if survey is None or not any(survey.is_needed(tensor.options) for tensor in merged):
        return None
    is_double = any(stored.dtype == "F64" for tensor in merged for stored in tensor.inputs)
    return survey.begin([(tensor.expert_names, tensor.options) for tensor in merged], is_double)


def run_survey(
    tensors: Sequence[TensorPlan], tools: MergeTools, *, threads: int = 1, reporter: Reporter = SILENT
) -> Any:
    """Return the result of the method's survey of the planned tensors; None if the merge needs none."""
    state, survey = begin_survey(tools.method, tensors), tools.method.survey
    if state is None or survey is None:
        return None
    sizes = _sizes(tensors)
    number = 0
    while not survey.is_complete(state):
        number += 1
        state = survey.advance(state, _pass(survey, state, tensors, tools, threads, reporter, number), sizes)
    return state


def survey_group(method: TensorMerge, group: TensorGroup, options: Any) -> TensorGroup:
    """Return a group with the result of the method's survey of this tensor alone."""
    survey = method.survey
    if survey is None or not survey.is_needed(options):
        return group
    is_double = "float64" in str(group.experts[0].dtype)
    state = survey.begin([(group.expert_names, options)], is_double)
    sizes = dict.fromkeys(group.expert_names, math.prod(group.experts[0].shape))
    while not survey.is_complete(state):
        state = survey.advance(state, survey.measure(group, state), sizes)
    return replace(group, survey=state)


def _sizes(tensors: Sequence[TensorPlan]) -> Mapping[str, int]:
    """Return the number of floating-point elements of each expert, in merged and in unchanged tensors."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.dtype in FLOATING and tensor.action in ("merge", "copy"):
            sizes.update(dict.fromkeys(tensor.expert_names, tensor.num_numbers))
    return sizes


def _pass(
    survey: Survey,
    state: Any,
    tensors: Sequence[TensorPlan],
    tools: MergeTools,
    threads: int,
    reporter: Reporter,
    number: int,
) -> Sums:
    """Read all merged tensors once and return the sums of what the survey measures."""
    merged = [tensor for tensor in tensors if tensor.action == "merge"]
    queue = TensorQueue(merged, lambda tensor: bytes_needed(tensor, tools.method))
    totals: Sums = {}
    progress = _Progress(reporter, f"reading, pass {number}", len(merged))
    lock = Lock()

    def work() -> None:
        try:
            while (tensor := queue.take()) is not None:
                action = MergeWhole(tensor, tools)
                measured = survey.measure(action.group(action.arrays()), state)
                with lock:
                    for name, counts in measured.items():
                        totals[name] = totals[name] + counts if name in totals else counts
                progress.advance()
                queue.release(tensor)
        except BaseException:
            queue.stop()
            raise

    _run(work, threads, queue)
    return totals


def _run(work: Callable[[], None], threads: int, queue: TensorQueue) -> None:
    with ThreadPoolExecutor(max_workers=threads) as pool:
        workers = [pool.submit(work) for _ in range(threads)]
        try:
            for worker in workers:
                worker.result()
        finally:
            queue.stop()  # an interruption also stops the other threads


class _Progress:
    """Reports the number of tensors that were read."""

    def __init__(self, reporter: Reporter, title: str, total: int) -> None:
        self._reporter, self._title, self._total = reporter, title, total
        self._done = 0
        self._lock = Lock()

    def advance(self) -> None:
        with self._lock:
            self._done += 1
            self._reporter.progress(self._title, self._done, self._total, "tensors")
