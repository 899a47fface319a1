"""The streaming merge: reads, merges and writes several tensors at once, without loading whole models.

Memory does not grow with the number of layers: element-wise methods hold a few pieces of a tensor, other methods hold
one tensor of all experts, and the memory of concurrent tensors is limited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ...core.artefacts.safetensors_io import TensorEntry
from ...core.hooks.merging import KeptElements, TensorMerge
from ...core.process.compute import available_cores
from ...core.reporting import SILENT, Reporter
from ..sources.vocabularies.row_mapping import VocabularyPlan
from .actions import MergeTools, bytes_needed, merge_tensor
from .queueing import TensorQueue
from .reading import PIECE_NUMBERS, Reader
from .shards import ShardPlan
from .shared_merge import job_for_processes, merge_in_processes, work_off
from .surveying import run_survey
from .tensor_plan import TensorPlan
from .writing import Writer

MAX_THREADS = 4


@dataclass(frozen=True)
class EngineSettings:
    """Runtime settings, without an effect on the result."""

    threads: int | None = None
    """Number of threads; None: one per core, up to 4."""
    device: str = "cpu"
    """Device of the computation: `cpu`, `cuda`, `cuda:1` ..."""
    piece_numbers: int = PIECE_NUMBERS
    """Piece size of element-wise methods, in numbers."""
    workers: int = 1
    """Number of processes; several merge one tensor at a time each, and `threads` then only read for surveys."""

    allow_nonfinite: bool = False
    """Merge inputs that contain NaN or infinity."""

    @property
    def num_threads(self) -> int:
        return self.threads or min(available_cores(), MAX_THREADS)

    @property
    def num_tensors(self) -> int:
        """Number of tensors that are merged at the same time."""
        return self.workers if self.workers > 1 else self.num_threads


@dataclass(frozen=True)
class Written:
    """Digests of the written and read tensors."""

    digests: dict[str, str]
    """Output tensor -> digest."""
    read: dict[TensorEntry, str]
    """Stored tensor -> digest, of all tensors that were read."""
    resumed: int
    """Number of tensors completed by an earlier, interrupted merge."""
    kept: Mapping[str, KeptElements]
    """Elements of each expert's task vector that this run kept, of methods that count them."""


def run_merge(
    method: TensorMerge,
    shards: Sequence[ShardPlan],
    folder: Path,
    *,
    fingerprint: str,
    vocabulary: VocabularyPlan | None = None,
    round_to: str | None = None,
    settings: EngineSettings | None = None,
    reporter: Reporter = SILENT,
) -> Written:
    """Write the planned shards into `folder`, resuming an interrupted merge with the same fingerprint.

    Raises `UserError` for damaged inputs, a full disk, and merge methods that return a wrong shape.
    """
    settings = settings or EngineSettings()
    with (
        Reader(round_to, settings.piece_numbers, finite=not settings.allow_nonfinite) as reader,
        Writer(folder, shards, fingerprint, reporter) as writer,
    ):
        resumed = len(writer.digests)
        tools = MergeTools(method, reader, vocabulary, settings.device)
        planned = [tensor for shard in shards for tensor in shard.tensors]
        remaining = [tensor for tensor in planned if tensor.name not in writer.digests]
        survey = run_survey(planned, tools, threads=settings.num_threads, reporter=reporter) if remaining else None
        tools = replace(tools, survey=survey)
        queue = TensorQueue(remaining, lambda tensor: bytes_needed(tensor, method, settings.piece_numbers))
        job = job_for_processes(tools, shards, folder, reporter) if settings.workers > 1 and remaining else None
        if job is not None:
            merge_in_processes(job, queue, tools, writer, min(settings.workers, len(remaining)))
        else:
            _merge_here(queue, tools, writer, settings.num_threads)
        writer.finish()
        reader.remember()
        kept = tools.tally.experts
        if method.survey is not None and survey is not None:
            kept = {**kept, **method.survey.kept(survey)}
        return Written(dict(writer.digests), dict(reader.digests), resumed, kept)


def _merge_here(queue: TensorQueue, tools: MergeTools, writer: Writer, threads: int) -> None:
    """Merge all tensors of the queue in threads of this process."""

    def merge(tensor: TensorPlan) -> str | None:
        return merge_tensor(tensor, tools, writer.files, lambda: queue.stopped)

    with ThreadPoolExecutor(max_workers=threads) as pool:
        workers = [pool.submit(work_off, queue, writer, merge) for _ in range(threads)]
        try:
            for worker in workers:
                worker.result()
        finally:
            queue.stop()  # an interruption also stops the other threads
