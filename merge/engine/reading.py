"""Reads the input tensors of a merge in pieces and computes their digests while reading."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ...core.artefacts.digest_cache import cached_digests, remember_digests
from ...core.artefacts.files import os_errors_as_user_errors
from ...core.artefacts.numeric import DTYPES, decode, encode, is_finite, working_dtype
from ...core.artefacts.safetensors_io import TensorEntry, digest_start
from ...core.errors import UserError
from ..sources.models import StoredTensor

PIECE_NUMBERS = 1 << 18
"""Piece size, in numbers. Threads take turns between numpy's calls, which smaller pieces make more of (`docs/log.md`)."""


class Reader:
    """Thread-safe reader that keeps the digest of every tensor that was read completely.

    With `finite`, it raises `UserError` for NaN and infinity.
    """

    def __init__(
        self, round_to: str | None = None, piece_numbers: int = PIECE_NUMBERS, *, finite: bool = False
    ) -> None:
        self.digests: dict[TensorEntry, str] = {}
        self.piece_numbers = piece_numbers
        self._round_to = round_to
        self._finite = finite
        self._files: dict[Path, int] = {}
        self._cached: dict[Path, dict[str, str]] = {}
        self._newly_hashed: set[TensorEntry] = set()
        self._lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that the reader was made with."""
        return {"round_to": self._round_to, "piece_numbers": self.piece_numbers, "finite": self._finite}

    def raw(self, stored: StoredTensor, *, hashed: bool = True) -> Iterator[memoryview]:
        """Yield the bytes of a tensor in pieces; each piece is valid until the next one is requested.

        Raises `UserError` for a truncated file and, after the last piece, if the digest differs from the manifest. With
        `hashed=False`, the caller has to compute the digest and call `note`.
        """
        entry = stored.entry
        state = digest_start(entry.dtype, entry.shape) if hashed and self.known_digest(stored) is None else None
        for piece in entry.pieces(self._descriptor(entry.file), self.piece_numbers * DTYPES[entry.dtype].num_bytes):
            if state is not None:
                state.update(piece)
            if self._finite and not is_finite(piece, entry.dtype):
                raise _not_finite(entry.name, entry.file)
            yield piece
        if state is not None:
            self.note(stored, state.hexdigest())

    def pieces(self, stored: StoredTensor) -> Iterator[NDArray[Any]]:
        """Yield the numbers of a tensor as flat float32 (or float64) pieces; see `raw`."""
        item_bytes = DTYPES[stored.dtype].num_bytes
        scratch = np.empty(min(self.piece_numbers, max(stored.entry.num_bytes // item_bytes, 1)), "<u4")
        for piece in self.raw(stored):
            numbers = decode(piece, stored.dtype, (len(piece) // item_bytes,), scratch)
            yield numbers if stored.dtype == self._round_to else self._round(numbers)

    def read(self, stored: StoredTensor) -> NDArray[Any]:
        """Return a whole tensor as float32 (or float64): dequantized, with its adapter applied, and perturbed."""
        numbers = np.empty(stored.shape, working_dtype(stored.dtype))
        flat = numbers.reshape(-1)
        begin = 0
        for piece in self.pieces(stored):
            flat[begin : begin + piece.size] = piece
            begin += piece.size
        if stored.is_plain:
            return numbers
        if stored.scales is not None:
            numbers = stored.scales.apply(numbers)
            self._require_finite(numbers, stored.name, stored.scales.entry.file)
        if stored.adapter is not None:
            numbers = stored.adapter.apply(stored.name, numbers)
            self._require_finite(numbers, stored.name, stored.adapter.checkpoint.files[0])
        if stored.perturbation is not None:
            numbers = stored.perturbation.apply(numbers)
        return self._round(numbers)

    def _require_finite(self, numbers: NDArray[Any], tensor: str, file: Path) -> None:
        if self._finite and not np.isfinite(numbers).all():
            raise _not_finite(tensor, file)

    def _round(self, numbers: NDArray[Any]) -> NDArray[Any]:
        if self._round_to is None or self._round_to in ("F32", "F64"):
            return numbers
        return decode(encode(numbers, self._round_to), self._round_to, numbers.shape)

    def _descriptor(self, path: Path) -> int:
        with self._lock, os_errors_as_user_errors(path):
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            return self._files[path]

    def noted_since(self, count: int) -> dict[TensorEntry, tuple[str, bool]]:
        """Return the digests after the first `count`, and whether each was computed and belongs to no manifest."""
        noted = itertools.islice(self.digests.items(), count, None)
        return {entry: (digest, entry in self._newly_hashed) for entry, digest in noted}

    def add(self, noted: Mapping[TensorEntry, tuple[str, bool]]) -> None:
        """Add the digests that another reader noted."""
        with self._lock:
            for entry, (digest, is_new) in noted.items():
                self.digests[entry] = digest
                if is_new:
                    self._newly_hashed.add(entry)

    def remember(self) -> None:
        """Cache the digests of files without a manifest for later merges."""
        for file in {entry.file for entry in self._newly_hashed}:
            hashed = {entry.name: self.digests[entry] for entry in self._newly_hashed if entry.file == file}
            remember_digests(file, hashed)

    def known_digest(self, stored: StoredTensor) -> str | None:
        """Return the digest of a tensor if it is known: computed before, or cached for an unchanged file without manifest."""
        entry = stored.entry
        if stored.expected is not None or entry in self.digests:
            return self.digests.get(entry)
        with self._lock:
            if entry.file not in self._cached:
                self._cached[entry.file] = cached_digests(entry.file)
            digest = self._cached[entry.file].get(entry.name)
            if digest is not None:
                self.digests[entry] = digest
        return digest

    def note(self, stored: StoredTensor, digest: str) -> None:
        """Record the digest of a tensor; raises `UserError` if it differs from the manifest."""
        if stored.expected is not None and digest != stored.expected:
            raise UserError(
                f"tensor '{stored.entry.name}' in {stored.entry.file} was changed: its digest differs from the manifest; restore "
                "or recreate the folder"
            )
        with self._lock:
            self.digests[stored.entry] = digest
            if stored.expected is None:
                self._newly_hashed.add(stored.entry)


def _not_finite(tensor: str, file: Path) -> UserError:
    return UserError(
        f"tensor '{tensor}' contains NaN or infinity according to {file}; a merge would spread them to its result "
        "(override: --allow-nonfinite)"
    )
