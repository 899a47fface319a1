"""The streaming merge: reads, merges and writes several tensors at once, without loading whole models.

Memory does not grow with the number of layers: element-wise methods hold a few pieces of a tensor, other methods hold
one tensor of all experts, and the memory of concurrent tensors is limited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Lock
from typing import TYPE_CHECKING, Any

from ...core.artefacts.numeric import FLOATING, encode
from ...core.artefacts.safetensors_io import TensorEntry
from ...core.errors import UserError
from ...core.hooks.merging import TensorGroup, TensorMerge
from ...core.process.compute import available_cores
from ..sources.models import StoredTensor
from .reading import PIECE_NUMBERS, Reader
from .shards import ShardPlan
from .tensor_plan import TensorPlan
from .writing import Writer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..sources.tokenizers import VocabularyPlan

MAX_THREADS = 4
CONCURRENT_BYTES = 160 << 20
"""Memory limit of concurrent tensors, in addition to the largest tensor."""
Tell = Callable[[int], None]


@dataclass(frozen=True)
class EngineSettings:
    """Runtime settings, without an effect on the result."""

    threads: int | None = None
    """Number of threads; None: one per core, up to 4."""
    device: str = "cpu"
    """Device of the computation: `cpu`, `cuda`, `cuda:1` ..."""
    piece_numbers: int = PIECE_NUMBERS
    """Piece size of element-wise methods, in numbers."""


@dataclass(frozen=True)
class Written:
    """Digests of the written and read tensors."""

    digests: dict[str, str]
    """Output tensor -> digest."""
    read: dict[TensorEntry, str]
    """Stored tensor -> digest, of all tensors that were read."""
    resumed: int
    """Number of tensors completed by an earlier, interrupted merge."""


def run_merge(
    method: TensorMerge,
    shards: Sequence[ShardPlan],
    folder: Path,
    *,
    fingerprint: str,
    vocabulary: VocabularyPlan | None = None,
    round_to: str | None = None,
    settings: EngineSettings | None = None,
    tell: Tell = lambda done: None,
) -> Written:
    """Write the planned shards into `folder`, resuming an interrupted merge with the same fingerprint.

    `tell` is called with the number of bytes written so far. Raises `UserError` for damaged inputs, a full disk, and
    merge methods that return a wrong shape.
    """
    resolved_settings = settings or EngineSettings()
    with (
        Reader(round_to, resolved_settings.piece_numbers) as reader,
        Writer(folder, shards, fingerprint) as writer,
    ):
        resumed = len(writer.digests)
        calculator = Calculator(method, reader, vocabulary, resolved_settings.device)
        remaining = [tensor for shard in shards for tensor in shard.tensors if tensor.name not in writer.digests]
        done = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors) - sum(
            tensor.num_bytes for tensor in remaining
        )
        tell(done)
        _merge_tensors(
            remaining,
            calculator,
            writer,
            resolved_settings.threads or min(available_cores(), MAX_THREADS),
            done,
            tell,
        )
        writer.finish()
        reader.remember()
        return Written(dict(writer.digests), dict(reader.digests), resumed)


def _merge_tensors(
    tensors: Sequence[TensorPlan],
    calculator: Calculator,
    writer: Writer,
    threads: int,
    done: int,
    tell: Tell,
) -> None:
    queue = _Queue(tensors, calculator.bytes_needed)
    progress = _Progress(done, tell)

    def work() -> None:
        with queue.stopping_on_error():
            while (tensor := queue.take()) is not None:
                region = writer.region(tensor, calculator.known_digest(tensor))
                for piece in calculator.bytes_of(tensor):
                    if queue.stopped:
                        return
                    region.write(piece)
                calculator.note_copied(tensor, region.digest())
                region.close()
                queue.release(tensor)
                progress.add(tensor.num_bytes)

    with ThreadPoolExecutor(max_workers=threads) as pool:
        workers = [pool.submit(work) for _ in range(threads)]
        try:
            for worker in workers:
                worker.result()
        finally:
            queue.stop()  # an interruption also stops the other threads


class Calculator:
    """Computes the output bytes of planned tensors: reads inputs, calls the method, rounds once."""

    def __init__(
        self,
        method: TensorMerge,
        reader: Reader,
        vocabulary: VocabularyPlan | None = None,
        device: str = "cpu",
    ) -> None:
        self._method, self._reader, self._vocabulary, self._device = method, reader, vocabulary, device
        self._in_torch = method.arrays == "torch" or device != "cpu"

    def bytes_needed(self, tensor: TensorPlan) -> int:
        """Return the estimated memory for merging one tensor, in bytes."""
        width = 8 if any(stored.dtype == "F64" for stored in tensor.inputs) else 4
        if tensor.action != "merge" or self._is_piecewise(tensor):
            return (len(tensor.inputs) + 3) * self._reader.piece_numbers * width
        return (len(tensor.inputs) + 2) * tensor.num_numbers * width

    def bytes_of(self, tensor: TensorPlan) -> Iterator[Any]:
        """Yield the bytes of one output tensor in pieces."""
        if tensor.action == "merge":
            yield from self._merged_bytes(tensor)
        elif tensor.action == "computed":
            assert tensor.values is not None
            yield encode(tensor.values, tensor.dtype)
        else:
            if tensor.action == "require_equal":
                self._require_equal(tensor)
            for stored in tensor.experts if tensor.action == "stack" else tensor.experts[:1]:
                yield from self._copied_bytes(stored, tensor)

    def known_digest(self, tensor: TensorPlan) -> str | None:
        """Return the known digest of a tensor that is a copy of an unchanged, already hashed input; else None."""
        for stored in tensor.experts[:1]:
            if self._is_same_bytes(stored, tensor):
                return self._reader.known_digest(stored)
        return None

    def note_copied(self, tensor: TensorPlan, digest: str) -> None:
        """Record the digest of a copied input; raises `UserError` if it differs from the input's manifest."""
        for stored in tensor.experts[:1]:
            if self._is_same_bytes(stored, tensor):
                self._reader.note(stored, digest)

    def numbers_of(self, tensor: TensorPlan) -> NDArray[Any]:
        """Return one merged tensor as float32 (or float64), before rounding to the output dtype."""
        if tensor.action != "merge":
            return self._reader.read(tensor.experts[0])
        return self._merge_whole(tensor)

    def _merged_bytes(self, tensor: TensorPlan) -> Iterator[Any]:
        if not self._is_piecewise(tensor):
            yield encode(self._merge_whole(tensor), tensor.dtype)
            return
        readers = {stored: self._reader.pieces(stored) for stored in tensor.inputs}
        for _ in range(0, tensor.num_numbers, self._reader.piece_numbers):
            yield encode(self._call(tensor, {stored: next(pieces) for stored, pieces in readers.items()}), tensor.dtype)
        for pieces in readers.values():  # read to the end, where the digest is checked
            next(pieces, None)

    def _is_piecewise(self, tensor: TensorPlan) -> bool:
        simple = not tensor.is_vocabulary and all(stored.adapter is None for stored in tensor.inputs)
        return self._method.elementwise and simple and not tensor.statistics

    def _merge_whole(self, tensor: TensorPlan) -> NDArray[Any]:
        arrays = {stored: self._reader.read(stored) for stored in tensor.inputs}
        if tensor.is_vocabulary:
            arrays = self._rearrange_rows(tensor, arrays)
        return self._call(tensor, arrays)

    def _rearrange_rows(
        self, tensor: TensorPlan, arrays: dict[StoredTensor, NDArray[Any]]
    ) -> dict[StoredTensor, NDArray[Any]]:
        """Return the inputs with rows rearranged to the output vocabulary."""
        assert self._vocabulary is not None
        stored = dict(zip(tensor.expert_names, tensor.experts, strict=True))
        if tensor.seed is not None and tensor.seed_name is not None:
            stored[tensor.seed_name] = tensor.seed
        rearranged = self._vocabulary.rearrange({name: arrays[stored_tensor] for name, stored_tensor in stored.items()})
        return {stored_tensor: rearranged[name] for name, stored_tensor in stored.items()}

    def _call(self, tensor: TensorPlan, arrays: dict[StoredTensor, NDArray[Any]]) -> NDArray[Any]:
        """Call the method on float arrays and check the shape of its result."""
        inputs: Any = self._as_tensors(arrays) if self._in_torch else arrays
        group = TensorGroup(
            name=tensor.name,
            experts=tuple(inputs[stored] for stored in tensor.experts),
            expert_names=tensor.expert_names,
            weights=tensor.weights,
            seed_or_none=inputs[tensor.seed] if tensor.seed is not None else None,
            statistics=self._statistics(tensor),
        )
        assert self._method.merge is not None
        merged: Any = self._method.merge(group, tensor.options)
        shape = group.experts[0].shape
        if tuple(merged.shape) != tuple(shape):
            raise UserError(
                f"merge method '{self._method.name}' returned shape {list(merged.shape)} for tensor '{tensor.name}'; "
                f"expected {list(shape)}"
            )
        return self._as_array(merged) if self._in_torch else merged

    def _statistics(self, tensor: TensorPlan) -> tuple[Any, ...]:
        arrays = {stored: self._reader.read(stored) for stored in tensor.statistics if stored is not None}
        inputs = self._as_tensors(arrays) if self._in_torch else arrays
        return tuple(inputs[stored] if stored is not None else None for stored in tensor.statistics)

    def _as_tensors(self, arrays: dict[StoredTensor, NDArray[Any]]) -> dict[StoredTensor, Any]:
        import torch

        return {stored: torch.from_numpy(array).to(self._device) for stored, array in arrays.items()}

    @staticmethod
    def _as_array(merged: Any) -> NDArray[Any]:
        import torch

        width = torch.float64 if merged.dtype == torch.float64 else torch.float32
        array: NDArray[Any] = merged.detach().to("cpu", width).numpy()
        return array

    def _copied_bytes(self, stored: StoredTensor, tensor: TensorPlan) -> Iterator[Any]:
        if stored.dtype == tensor.dtype and stored.adapter is None:
            # hashing is slower than copying, and the output is hashed anyway
            yield from self._reader.raw(stored, hashed=not self._is_same_bytes(stored, tensor))
        elif stored.adapter is None:
            for piece in self._reader.pieces(stored):
                yield encode(piece, tensor.dtype)
        else:
            yield encode(self._reader.read(stored), tensor.dtype)

    @staticmethod
    def _is_same_bytes(stored: StoredTensor, tensor: TensorPlan) -> bool:
        """Return whether an output tensor has the same bytes as this input."""
        return (
            tensor.action in ("copy", "require_equal")
            and stored.adapter is None
            and (stored.entry.dtype, stored.entry.shape) == (tensor.dtype, tensor.shape)
        )

    def _require_equal(self, tensor: TensorPlan) -> None:
        """Raise `UserError` if the inputs differ."""
        for stored in tensor.inputs:
            for _ in self._reader.raw(stored):
                pass
        digests = {stored: self._reader.digests[stored.entry] for stored in tensor.inputs}
        first = tensor.inputs[0]
        for stored, digest in digests.items():
            if digest != digests[first]:
                floating = tensor.dtype in FLOATING
                reason = (
                    "is shared by all experts" if floating else f"has dtype {tensor.dtype}, which cannot be averaged"
                )
                hint = "; to use the first one, set --option discard=true" if floating else ""
                raise UserError(
                    f"tensor '{tensor.name}' {reason}, but differs between {first.entry.file} and {stored.entry.file}{hint}"
                )


class _Queue:
    """Schedules tensors by size: the largest tensor that fits into the remaining memory comes first.

    Starting with large tensors avoids threads that wait for one of them at the end. A single tensor always fits.
    """

    def __init__(self, tensors: Sequence[TensorPlan], bytes_needed: Callable[[TensorPlan], int]) -> None:
        self._remaining = sorted(tensors, key=bytes_needed, reverse=True)
        self._bytes_needed = bytes_needed
        self._limit = (bytes_needed(self._remaining[0]) if self._remaining else 0) + CONCURRENT_BYTES
        self._used = 0
        self._condition = Condition()
        self.stopped = False

    def take(self) -> TensorPlan | None:
        """Return the next tensor, waiting for free memory; None if no tensors are left."""
        with self._condition:
            while self._remaining and not self.stopped:
                for tensor in self._remaining:
                    if self._used == 0 or self._used + self._bytes_needed(tensor) <= self._limit:
                        self._remaining.remove(tensor)
                        self._used += self._bytes_needed(tensor)
                        return tensor
                self._condition.wait()
            return None

    def release(self, tensor: TensorPlan) -> None:
        """Release the memory of a finished tensor."""
        with self._condition:
            self._used -= self._bytes_needed(tensor)
            self._condition.notify_all()

    def stop(self) -> None:
        """Stop all threads before their next piece."""
        with self._condition:
            self.stopped = True
            self._condition.notify_all()

    @contextmanager
    def stopping_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.stop()
            raise


class _Progress:
    """Sums the bytes written by all threads."""

    def __init__(self, done: int, tell: Tell) -> None:
        self._done, self._tell = done, tell
        self._lock = Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            self._tell(self._done)
