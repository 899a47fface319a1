"""Reading tensors of a merge in pieces: each once, straight from its place in the file, hashed on the way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from ...core.artefacts.digest_cache import cached_digests, remember_digests
from ...core.artefacts.files import readable_os_errors
from ...core.artefacts.numeric import decode, encode, working_dtype
from ...core.artefacts.safetensors_io import DTYPES, TensorEntry, digest_start
from ...core.errors import UserError
from ..sources.models import StoredTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIECE_NUMBERS = 1 << 16
"""Numbers handled at a time: as float32 they stay in a core's cache, and allocating them costs no page faults."""


class Reader:
    """Reads tensors for any number of threads and keeps the digest of each that was read to its end."""

    def __init__(self, round_to: str | None = None, piece_numbers: int = PIECE_NUMBERS) -> None:
        self.digests: dict[TensorEntry, str] = {}
        self.piece_numbers = piece_numbers
        self._round_to = round_to
        self._files: dict[Path, int] = {}
        self._remembered: dict[Path, dict[str, str]] = {}
        self._hashed: set[TensorEntry] = set()
        self._lock = Lock()

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def raw(self, one: StoredTensor, *, hashed: bool = True) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in pieces, each valid until the next is asked for.

        Raises `UserError` when the file ends too early, and, after the last piece, when the bytes are not those
        that the folder's manifest speaks of; not `hashed`, that is the caller's to `note`.
        """
        entry = one.entry
        state = digest_start(entry.dtype, entry.shape) if hashed and self.known_digest(one) is None else None
        size = self.piece_numbers * DTYPES[entry.dtype][1]
        buffer = memoryview(bytearray(min(size, entry.num_bytes)))
        place = entry.begin
        while place < entry.end:
            piece = buffer[: min(size, entry.end - place)]
            self._fill(entry, piece, place)
            if state is not None:
                state.update(piece)
            place += len(piece)
            yield piece
        if state is not None:
            self.note(one, state.hexdigest())

    def pieces(self, one: StoredTensor) -> Iterator[NDArray[Any]]:
        """Yield the numbers of a tensor as flat float32 (or float64) pieces, each valid until the next; see `raw`."""
        import numpy as np

        count = DTYPES[one.dtype][1]
        scratch = np.empty(min(self.piece_numbers, max(one.entry.num_bytes // count, 1)), "<u4")
        for piece in self.raw(one):
            yield self._rounded(decode(piece, one.dtype, (len(piece) // count,), scratch))

    def whole(self, one: StoredTensor) -> NDArray[Any]:
        """Return all numbers of a tensor, as float32 (or float64), with its adapter's change."""
        import numpy as np

        numbers = np.empty(one.shape, working_dtype(one.dtype))
        flat = numbers.reshape(-1)
        begin = 0
        for piece in self.pieces(one):
            flat[begin : begin + piece.size] = piece
            begin += piece.size
        return self._rounded(one.adapter.apply(one.name, numbers)) if one.adapter is not None else numbers

    def _rounded(self, numbers: NDArray[Any]) -> NDArray[Any]:
        if self._round_to is None or self._round_to in ("F32", "F64"):
            return numbers
        return decode(encode(numbers, self._round_to), self._round_to, numbers.shape)

    def _fill(self, entry: TensorEntry, target: memoryview, place: int) -> None:
        filled = 0
        with readable_os_errors(entry.file):
            descriptor = self._descriptor(entry.file)
            while filled < len(target):
                count = os.preadv(descriptor, [target[filled:]], place + filled)
                if not count:
                    raise UserError(
                        f"{entry.file} is damaged: it ends within tensor '{entry.name}'; fetch it again"
                    )
                filled += count

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            return self._files[path]

    def remember(self) -> None:
        """Keep the digests of files without a manifest for later merges of the same files."""
        fresh: dict[Path, dict[str, str]] = {}
        for entry in self._hashed:
            fresh.setdefault(entry.file, {})[entry.name] = self.digests[entry]
        for file, digests in fresh.items():
            remember_digests(file, digests)

    def known_digest(self, one: StoredTensor) -> str | None:
        """Return the digest of a tensor that needs no hashing: it was hashed, or nothing checks it and its file is untouched."""
        entry = one.entry
        if one.expected is not None or entry in self.digests:
            return self.digests.get(entry)
        with self._lock:
            if entry.file not in self._remembered:
                self._remembered[entry.file] = cached_digests(entry.file)
            digest = self._remembered[entry.file].get(entry.name)
            if digest is not None:
                self.digests[entry] = digest
        return digest

    def note(self, one: StoredTensor, digest: str) -> None:
        """Take a digest as that of a tensor that was read; raises `UserError` when its manifest says another."""
        if one.expected is not None and digest != one.expected:
            raise UserError(
                f"tensor '{one.entry.name}' in {one.entry.file} was changed: it is not what its manifest says; restore "
                "or remake the folder"
            )
        with self._lock:
            self.digests[one.entry] = digest
            if one.expected is None:
                self._hashed.add(one.entry)
