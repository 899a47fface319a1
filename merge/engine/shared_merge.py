"""A merge by several processes: each computes, hashes and writes one tensor at a time, at its place in the output files.

This process hands out the tensors, within the memory limit of the queue, and keeps the journal. Reading passes before the
merge, of methods with a survey, run in threads of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from pickle import PicklingError
from typing import Any

from ...core.artefacts.safetensors_io import TensorEntry
from ...core.hooks.merging import KeptElements, TensorMerge
from ...core.process.workers import Worker, with_workers
from ...core.reporting import Reporter
from ..sources.vocabularies.row_mapping import VocabularyPlan
from .actions import MergeTools, merge_tensor
from .output_files import OutputFiles
from .queueing import TensorQueue
from .reading import Reader
from .shards import ShardPlan
from .tally import Tally
from .tensor_plan import TensorPlan
from .writing import Writer


@dataclass(frozen=True)
class MergeJob:
    """What a process needs for any tensor of a merge."""

    method: TensorMerge
    vocabulary: VocabularyPlan | None
    device: str
    survey: Any
    reading: Mapping[str, Any]
    """Settings of the reader."""
    shards: tuple[ShardPlan, ...]
    folder: Path


@dataclass(frozen=True)
class Merged:
    """A tensor that a process has merged."""

    digest: str
    read: Mapping[TensorEntry, tuple[str, bool]]
    """Digests of tensors that were read, as `Reader.noted_since` returns them."""
    kept: Mapping[str, KeptElements]
    """What the method counted, by expert."""


def work_off(queue: TensorQueue, writer: Writer, merge: Callable[[TensorPlan], str | None]) -> None:
    """Merge tensors of the queue until it is empty or stopped; an error stops all threads."""
    try:
        while (tensor := queue.take()) is not None:
            digest = merge(tensor)
            if digest is None:
                return
            writer.complete(tensor, digest)
            queue.release(tensor)
    except BaseException:
        queue.stop()
        raise


def job_for_processes(
    tools: MergeTools, shards: Sequence[ShardPlan], folder: Path, reporter: Reporter
) -> MergeJob | None:
    """Return a job; None, with a note, if the method cannot be passed on to other processes."""
    job = MergeJob(
        tools.method, tools.vocabulary, tools.device, tools.survey, tools.reader.settings, tuple(shards), folder
    )
    try:
        ForkingPickler.dumps(job)
    except (PicklingError, AttributeError, TypeError):  # such as a function within a function
        reporter.say(f"merge method '{tools.method.name}' cannot be passed on to other processes, so one is used")
        return None
    return job


def merge_in_processes(job: MergeJob, queue: TensorQueue, tools: MergeTools, writer: Writer, count: int) -> None:
    """Merge all tensors of the queue in `count` processes; raises `UserError` if one of them ends."""

    def lane(worker: Worker) -> bool:
        def merge(tensor: TensorPlan) -> str:
            merged: Merged = worker.ask(tensor.name)
            tools.reader.add(merged.read)
            for expert, elements in merged.kept.items():
                tools.tally.add(expert, elements)
            return merged.digest

        work_off(queue, writer, merge)
        worker.ask(None)
        return False

    with_workers(count, lambda number: Worker(f"merge process {number + 1} of {count}", answer_tensors, (job,)), lane)


def answer_tensors(job: MergeJob) -> Callable[[str | None], Merged | None]:
    """Return what a process answers: to the name of a tensor what it has merged, to None nothing, once it has flushed."""
    tensors = {tensor.name: tensor for shard in job.shards for tensor in shard.tensors}
    reader = Reader(**job.reading)
    files = OutputFiles(job.folder, job.shards)
    files.__enter__()  # for the life of the process
    tools = MergeTools(job.method, reader, job.vocabulary, job.device, job.survey)

    def answer(name: str | None) -> Merged | None:
        if name is None:
            files.finish()
            return None
        num_known, tally = len(reader.digests), Tally()
        digest = merge_tensor(tensors[name], replace(tools, tally=tally), files)
        assert digest is not None
        return Merged(digest, reader.noted_since(num_known), tally.experts)

    return answer
