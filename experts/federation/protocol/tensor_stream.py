"""Writing safetensors files in pieces, several tensors and files at once: for results of which no tensor has to be in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ....core.artefacts.files import partial_sibling, readable_os_errors
from ....core.artefacts.safetensors_io import digest_start, dtype_name, header_of_file, tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _Place:
    """Where a tensor is being written."""

    kind: str
    next: int
    end: int
    digest: Any


class TensorStream:
    """One safetensors file that is being written; it appears under its name when the block ends without an error."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self.path = path
        self._header, places = header_of_file(shapes)
        self._places = {
            name: _Place(kind, *places[name], digest_start(kind, tuple(shape)))
            for name, (kind, shape) in shapes.items()
        }
        self._partial = partial_sibling(path)

    @property
    def digests(self) -> dict[str, str]:
        """Of the tensors that are complete."""
        return {
            name: place.digest.hexdigest() for name, place in self._places.items() if place.next == place.end
        }

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __enter__(self) -> Self:
        with readable_os_errors(self.path):
            self._file = self._partial.open("wb", buffering=0)
            self._file.write(self._header)
        return self

    def add(self, name: str, piece: Tensor) -> None:
        """Write the next numbers of a tensor, in row-major order; tensors may be written in any order, and in turn."""
        place = self._places[name]
        content = tensor_bytes(piece)
        got = dtype_name(piece.dtype)
        assert got == place.kind, f"announced {place.kind} for {name}, got {got}"
        assert place.next + len(content) <= place.end, f"there is more of {name} than was announced"
        place.digest.update(content)
        with readable_os_errors(self.path):
            while content:
                written = os.pwrite(self._file.fileno(), content, place.next)
                content, place.next = content[written:], place.next + written

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with readable_os_errors(self.path):
            try:
                if error is None:
                    assert len(self.digests) == len(self._places), (
                        "not every tensor was written that was announced"
                    )
                    os.fsync(self._file.fileno())
                self._file.close()
                if error is None:
                    self._partial.replace(self.path)
            finally:
                self._file.close()
                self._partial.unlink(missing_ok=True)
