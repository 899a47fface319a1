"""Search of the nearest keys of memories. Shapes: Q = queries, N = keys, k = neighbours, d = width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....artefacts.files import os_errors_as_user_errors
from ....errors import UserError
from ....reporting import SILENT, Reporter
from .manifest import INDEX_FILE, KEYS_FILE, VALUES_FILE, MemoryManifest, read_memory

QUERIES_AT_ONCE = 512
KEYS_AT_ONCE = 1 << 15
MEMORY_OF_KEYS = 1 << 28
"""Keys of so many bytes in float32 are kept in memory; larger files are read again for every search."""
CANDIDATES = {"float16": 1, "int8": 2, "pq": 8}
"""Neighbours by the codes of an index, for each neighbour that is kept by its true distance."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest keys of queries, nearest first; places without one have an infinite distance."""

    distances: Tensor
    """Squared Euclidean distances in float32, (Q, k)."""
    tokens: Tensor
    """The tokens behind those keys, (Q, k), int64."""

    def to(self, device: torch.device) -> Neighbours:
        """Return them on a device."""
        return Neighbours(self.distances.to(device), self.tokens.to(device))


class Datastore:
    """The keys and tokens of one memory, on disk, and the search among them."""

    def __init__(self, folder: Path, *, probes: int | None = None, reporter: Reporter = SILENT) -> None:
        """Open a memory; without faiss, all keys are compared, which is said.

        Raises `UserError` for missing or truncated files.
        """
        self.folder = folder
        self.manifest: MemoryManifest = read_memory(folder)
        shape = (self.manifest.keys, self.manifest.width)
        self.keys: NDArray[np.float16] = _mapped(folder / KEYS_FILE, np.float16, shape)
        self.values: NDArray[np.int32] = _mapped(folder / VALUES_FILE, np.int32, shape[:1])
        self.index = self._open_index(probes, reporter)
        self._cached: list[tuple[Tensor, Tensor]] | None = None

    def _open_index(self, probes: int | None, reporter: Reporter) -> Any:
        record = self.manifest.index
        if record.kind == "exact" and record.codes == "float16":
            return None
        if not has_faiss():
            reporter.say(
                f"memory '{self.manifest.name}': faiss is not installed, so all {self.manifest.keys:,} keys are compared; "
                "pip install 'expertctl[memory]' searches its index"
            )
            return None
        return open_index(self.folder / INDEX_FILE, probes or record.probes)

    def search(self, queries_Qd: Tensor, k: int) -> Neighbours:
        """Return the `k` nearest keys of queries, (Q, d) in float32 on a CPU, or all keys if there are fewer."""
        k = min(k, self.manifest.keys)
        # a place of padding may hold anything
        queries_Qd = queries_Qd.nan_to_num(0.0, 0.0, 0.0)
        parts = [self._numbers(part, k) for part in torch.split(queries_Qd, QUERIES_AT_ONCE)]
        numbers = torch.cat(parts) if parts else torch.zeros(0, k, dtype=torch.long)
        return self._measured(queries_Qd, numbers, k)

    def _numbers(self, queries_Qd: Tensor, k: int) -> Tensor:
        """Return the numbers of keys among which the nearest are, (Q, at least k); -1 for none."""
        if self.index is None:
            return self._compare_all(queries_Qd, k)
        count = min(k * CANDIDATES[self.manifest.index.codes], self.manifest.keys)
        return torch.from_numpy(self.index.search(queries_Qd.numpy(), count)[1])

    def _compare_all(self, queries_Qd: Tensor, k: int) -> Tensor:
        count = min(k + 8, self.manifest.keys)  # rounding may exchange neighbours of nearly the same distance
        best = torch.full((len(queries_Qd), 0), 0.0)
        numbers = torch.zeros((len(queries_Qd), 0), dtype=torch.long)
        begin = 0
        for keys_Nd, squares_N in self._chunks():
            nearness = torch.addmm(squares_N, queries_Qd, keys_Nd.T, beta=-0.5)  # q k - k k / 2
            values, places = nearness.topk(min(count, len(keys_Nd)), dim=1)
            best, numbers = torch.cat((best, values), dim=1), torch.cat((numbers, places + begin), dim=1)
            if best.shape[1] > count:
                best, order = best.topk(count, dim=1)
                numbers = numbers.gather(1, order)
            begin += len(keys_Nd)
        return numbers

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the keys in float32 and their squared lengths, from memory if they are few."""
        if self._cached is None and 4 * self.keys.size <= MEMORY_OF_KEYS:
            self._cached = list(self._read_chunks())
        yield from self._read_chunks() if self._cached is None else self._cached

    def _read_chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for begin in range(0, len(self.keys), KEYS_AT_ONCE):
            keys = torch.from_numpy(self.keys[begin : begin + KEYS_AT_ONCE].astype(np.float32))
            yield keys, (keys**2).sum(dim=1)

    def _measured(self, queries_Qd: Tensor, numbers: Tensor, k: int) -> Neighbours:
        """Return the nearest of numbered keys by the distances of the stored keys."""
        distances = torch.full(numbers.shape, torch.inf)
        for row, (query, found) in enumerate(zip(queries_Qd, numbers.numpy(), strict=True)):
            kept = found >= 0
            keys = torch.from_numpy(self.keys[found[kept]].astype(np.float32))
            distances[row, torch.from_numpy(kept)] = ((keys - query) ** 2).sum(dim=1)
        distances, order = distances.sort(dim=1, stable=True)
        numbers = numbers.gather(1, order)[:, :k]
        tokens = torch.from_numpy(self.values[numbers.clamp(min=0).numpy()].astype(np.int64))
        return Neighbours(distances[:, :k], tokens)


def search_all(stores: Sequence[Datastore], queries_Qd: Tensor, k: int) -> Neighbours:
    """Return the `k` nearest keys of several memories together."""
    found = [store.search(queries_Qd, k) for store in stores]
    distances, order = torch.cat([one.distances for one in found], dim=1).sort(dim=1, stable=True)
    tokens = torch.cat([one.tokens for one in found], dim=1).gather(1, order)
    return Neighbours(distances[:, :k], tokens[:, :k])


def has_faiss() -> bool:
    """Return whether faiss can be imported."""
    from importlib.util import find_spec

    return find_spec("faiss") is not None


def open_index(path: Path, probes: int | None) -> Any:
    """Open an index of faiss, its lists mapped; raises `UserError` for a file that is none."""
    import faiss

    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise UserError(
            f"{path} is not an index that faiss {faiss.__version__} reads ({error!s:.80}); build the memory again"
        ) from None
    if probes is not None and hasattr(index, "nprobe"):
        index.nprobe = probes
    return index


def _mapped(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with os_errors_as_user_errors(path):
        if not path.is_file() or path.stat().st_size != expected:
            raise UserError(f"{path} is missing or has not {expected:,} bytes; build the memory again")
        return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", shape=shape)
