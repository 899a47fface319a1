"""The streaming merge: reads, calculates and writes tensor by tensor, several at once, never a model in memory.

Memory does not grow with the number of layers: element-wise methods hold a few pieces of a tensor, the others the
same tensor of all experts; how much is worked on side by side has a limit.
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
from ...core.hooks.merging import MergeMethod, TensorGroup
from ...core.process.compute import available_cores
from ..sources.models import StoredTensor
from .reading import PIECE_NUMBERS, Reader
from .shards import ShardPlan
from .tensor_plan import TensorPlan
from .writing import Writer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..sources.tokenizers import VocabularyPlan

MOST_THREADS = 4
BESIDE_BYTES = 160 << 20
"""What other tensors may use beside the largest."""
Tell = Callable[[int], None]


@dataclass(frozen=True)
class EngineSettings:
    """How to run, which never changes the result."""

    threads: int | None = None
    """None: one per core, up to 4."""
    device: str = "cpu"
    """Where methods calculate: `cpu`, `cuda`, `cuda:1` ..."""
    piece_numbers: int = PIECE_NUMBERS
    """Numbers that are handled at a time where a method allows it."""


@dataclass(frozen=True)
class Written:
    """What came out, and what was read for it."""

    digests: dict[str, str]
    """Of every tensor of the output."""
    read: dict[TensorEntry, str]
    """Digest of every stored tensor that was read."""
    resumed: int
    """Tensors that an earlier try had completed."""


def run_merge(
    method: MergeMethod,
    shards: Sequence[ShardPlan],
    folder: Path,
    *,
    fingerprint: str,
    vocabulary: VocabularyPlan | None = None,
    round_to: str | None = None,
    settings: EngineSettings | None = None,
    tell: Tell = lambda done: None,
) -> Written:
    """Write the planned shards into `folder`, going on where an earlier try of the same fingerprint stopped.

    `tell` is called with the bytes written so far. Raises `UserError` for inputs that turn out damaged, a full
    disk, and methods that give a wrong shape.
    """
    how = settings or EngineSettings()
    with Reader(round_to, how.piece_numbers) as reader, Writer(folder, shards, fingerprint) as writer:
        resumed = len(writer.digests)
        calculator = Calculator(method, reader, vocabulary, how.device)
        todo = [one for shard in shards for one in shard.tensors if one.name not in writer.digests]
        done = sum(one.num_bytes for shard in shards for one in shard.tensors) - sum(
            one.num_bytes for one in todo
        )
        tell(done)
        _run(todo, calculator, writer, how.threads or min(available_cores(), MOST_THREADS), done, tell)
        writer.finish()
        reader.remember()
        return Written(dict(writer.digests), dict(reader.digests), resumed)


def _run(
    todo: Sequence[TensorPlan],
    calculator: Calculator,
    writer: Writer,
    threads: int,
    done: int,
    tell: Tell,
) -> None:
    queue = _Queue(todo, calculator.bytes_needed)
    progress = _Progress(done, tell)

    def work() -> None:
        with queue.stopping_on_error():
            while (one := queue.take()) is not None:
                region = writer.region(one, calculator.known_digest(one))
                for piece in calculator.bytes_of(one):
                    if queue.stopped:
                        return
                    region.write(piece)
                calculator.note_copied(one, region.digest())
                region.close()
                queue.give_back(one)
                progress.add(one.num_bytes)

    with ThreadPoolExecutor(max_workers=threads) as pool:
        workers = [pool.submit(work) for _ in range(threads)]
        try:
            for worker in workers:
                worker.result()
        finally:
            queue.stop()  # an interruption ends the others too


class Calculator:
    """Turns planned tensors into the bytes that are written: reads inputs, calls the method, rounds once."""

    def __init__(
        self,
        method: MergeMethod,
        reader: Reader,
        vocabulary: VocabularyPlan | None = None,
        device: str = "cpu",
    ) -> None:
        self._method, self._reader, self._vocabulary, self._device = method, reader, vocabulary, device
        self._in_torch = method.arrays == "torch" or device != "cpu"

    def bytes_needed(self, one: TensorPlan) -> int:
        """Return about how much memory one tensor takes while it is worked on."""
        width = 8 if any(stored.dtype == "F64" for stored in one.inputs) else 4
        if one.action != "merge" or self._goes_in_pieces(one):
            return (len(one.inputs) + 3) * self._reader.piece_numbers * width
        return (len(one.inputs) + 2) * one.num_numbers * width

    def bytes_of(self, one: TensorPlan) -> Iterator[Any]:
        """Yield the bytes of one tensor of the output, in pieces."""
        if one.action == "merge":
            yield from self._merged_bytes(one)
        elif one.action == "given":
            assert one.values is not None
            yield encode(one.values, one.dtype)
        else:
            if one.action == "agree":
                self._check_agreement(one)
            for stored in one.experts if one.action == "stack" else one.experts[:1]:
                yield from self._copied(stored, one)

    def known_digest(self, one: TensorPlan) -> str | None:
        """Return the digest of a tensor whose bytes are those of an untouched file that was hashed before."""
        for stored in one.experts[:1]:
            if self._is_same_bytes(stored, one):
                return self._reader.known_digest(stored)
        return None

    def note_copied(self, one: TensorPlan, digest: str) -> None:
        """Note what was read for a tensor whose bytes are its input's; raises `UserError` when they are not as promised."""
        for stored in one.experts[:1]:
            if self._is_same_bytes(stored, one):
                self._reader.note(stored, digest)

    def numbers_of(self, one: TensorPlan) -> NDArray[Any]:
        """Return one merged tensor as float32 (or float64), before it is rounded to the output's dtype."""
        if one.action != "merge":
            return self._reader.whole(one.experts[0])
        return self._on_whole(one)

    def _merged_bytes(self, one: TensorPlan) -> Iterator[Any]:
        if not self._goes_in_pieces(one):
            yield encode(self._on_whole(one), one.dtype)
            return
        readers = {stored: self._reader.pieces(stored) for stored in one.inputs}
        places = range(0, one.num_numbers, self._reader.piece_numbers)
        for _ in places:
            yield encode(self._call(one, {stored: next(each) for stored, each in readers.items()}), one.dtype)
        for each in readers.values():  # to its end, where the digest is checked
            next(each, None)

    def _goes_in_pieces(self, one: TensorPlan) -> bool:
        simple = not one.is_vocabulary and all(stored.adapter is None for stored in one.inputs)
        return self._method.elementwise and simple and not one.statistics

    def _on_whole(self, one: TensorPlan) -> NDArray[Any]:
        arrays = {stored: self._reader.whole(stored) for stored in one.inputs}
        if one.is_vocabulary:
            arrays = self._rearranged(one, arrays)
        return self._call(one, arrays)

    def _rearranged(
        self, one: TensorPlan, arrays: dict[StoredTensor, NDArray[Any]]
    ) -> dict[StoredTensor, NDArray[Any]]:
        """Return the inputs with the rows of the output's vocabulary."""
        assert self._vocabulary is not None
        stored = dict(zip(one.expert_names, one.experts, strict=True))
        if one.seed is not None and one.seed_name is not None:
            stored[one.seed_name] = one.seed
        found = self._vocabulary.rearranged({name: arrays[each] for name, each in stored.items()})
        return {each: found[name] for name, each in stored.items()}

    def _call(self, one: TensorPlan, arrays: dict[StoredTensor, NDArray[Any]]) -> NDArray[Any]:
        """Call the method on float arrays and check what it gives."""
        given: Any = self._as_tensors(arrays) if self._in_torch else arrays
        group = TensorGroup(
            name=one.name,
            experts=tuple(given[stored] for stored in one.experts),
            expert_names=one.expert_names,
            weights=one.weights,
            seed_or_none=given[one.seed] if one.seed is not None else None,
            statistics=self._statistics(one),
        )
        assert self._method.merge is not None
        merged: Any = self._method.merge(group, one.options)
        shape = group.experts[0].shape
        if tuple(merged.shape) != tuple(shape):
            raise UserError(
                f"merge method '{self._method.name}' made '{one.name}' {list(merged.shape)} of {list(shape)}"
            )
        return self._as_array(merged, one) if self._in_torch else merged

    def _statistics(self, one: TensorPlan) -> tuple[Any, ...]:
        read = {each: self._reader.whole(each) for each in one.statistics if each is not None}
        given = self._as_tensors(read) if self._in_torch else read
        return tuple(given[each] if each is not None else None for each in one.statistics)

    def _as_tensors(self, arrays: dict[StoredTensor, NDArray[Any]]) -> dict[StoredTensor, Any]:
        import torch

        return {stored: torch.from_numpy(array).to(self._device) for stored, array in arrays.items()}

    def _as_array(self, merged: Any, one: TensorPlan) -> NDArray[Any]:
        import torch

        width = torch.float64 if merged.dtype == torch.float64 else torch.float32
        array: NDArray[Any] = merged.detach().to("cpu", width).numpy()
        return array

    def _copied(self, stored: StoredTensor, one: TensorPlan) -> Iterator[Any]:
        if stored.dtype == one.dtype and stored.adapter is None:
            # hashing takes longer than copying, and what is written is hashed anyway
            yield from self._reader.raw(stored, hashed=not self._is_same_bytes(stored, one))
        elif stored.adapter is None:
            for piece in self._reader.pieces(stored):
                yield encode(piece, one.dtype)
        else:
            yield encode(self._reader.whole(stored), one.dtype)

    @staticmethod
    def _is_same_bytes(stored: StoredTensor, one: TensorPlan) -> bool:
        """Tell whether a tensor of the output has the very digest of this input."""
        return (
            one.action in ("copy", "agree")
            and stored.adapter is None
            and (stored.entry.dtype, stored.entry.shape) == (one.dtype, one.shape)
        )

    def _check_agreement(self, one: TensorPlan) -> None:
        """Raise `UserError` unless all inputs are the same."""
        for stored in one.inputs:
            for _ in self._reader.raw(stored):
                pass
        digests = {stored: self._reader.digests[stored.entry] for stored in one.inputs}
        first = one.inputs[0]
        for stored, digest in digests.items():
            if digest != digests[first]:
                floating = one.dtype in FLOATING
                why = (
                    "is taken from one model for all"
                    if floating
                    else f"holds {one.dtype} numbers, which are never averaged"
                )
                mend = "; drop the others' with --option discard=true" if floating else ""
                raise UserError(
                    f"tensor '{one.name}' {why}, and it differs between {first.entry.file} and {stored.entry.file}{mend}"
                )


class _Queue:
    """Hands out tensors, the largest that fits beside those that are being worked on; one alone always fits.

    Large ones first, so that threads do not wait for one of them at the end.
    """

    def __init__(self, todo: Sequence[TensorPlan], need: Callable[[TensorPlan], int]) -> None:
        self._left = sorted(todo, key=need, reverse=True)
        self._need = need
        self._limit = (need(self._left[0]) if self._left else 0) + BESIDE_BYTES
        self._used = 0
        self._changed = Condition()
        self.stopped = False

    def take(self) -> TensorPlan | None:
        """Return the next tensor to work on, waiting until there is room; None when there is none left."""
        with self._changed:
            while self._left and not self.stopped:
                for one in self._left:
                    if self._used == 0 or self._used + self._need(one) <= self._limit:
                        self._left.remove(one)
                        self._used += self._need(one)
                        return one
                self._changed.wait()
            return None

    def give_back(self, one: TensorPlan) -> None:
        """Free the room of a tensor that is done."""
        with self._changed:
            self._used -= self._need(one)
            self._changed.notify_all()

    def stop(self) -> None:
        """Let all threads end before their next piece."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()

    @contextmanager
    def stopping_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.stop()
            raise


class _Progress:
    """Adds up what several threads have written."""

    def __init__(self, done: int, tell: Tell) -> None:
        self._done, self._tell = done, tell
        self._lock = Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            self._tell(self._done)
