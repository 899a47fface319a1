"""Streaming safetensors writer: tensors are written in pieces, so that no tensor has to fit into memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ....core.artefacts.files import os_errors_as_user_errors, partial_sibling
from ....core.artefacts.safetensors_io import digest_start, dtype_name, header_of_file, tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _Slot:
    """File range and running digest of one tensor."""

    dtype: str
    next: int
    """Offset of the next byte to write."""
    end: int
    digest: Any


class TensorStream:
    """Context manager that writes one safetensors file; the file appears under its name if the block succeeds."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self.path = path
        self._header, spans = header_of_file(shapes)
        self._slots = {
            name: _Slot(dtype, *spans[name], digest_start(dtype, tuple(shape)))
            for name, (dtype, shape) in shapes.items()
        }
        self._partial = partial_sibling(path)

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the complete tensors, by name."""
        return {name: slot.digest.hexdigest() for name, slot in self._slots.items() if slot.next == slot.end}

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __enter__(self) -> Self:
        with os_errors_as_user_errors(self.path):
            self._file = self._partial.open("wb", buffering=0)
            self._file.write(self._header)
        return self

    def add(self, name: str, piece: Tensor) -> None:
        """Write the next elements of a tensor, in row-major order; tensors may be interleaved in any order."""
        slot = self._slots[name]
        content = tensor_bytes(piece)
        dtype = dtype_name(piece.dtype)
        assert dtype == slot.dtype, f"announced {slot.dtype} for {name}, got {dtype}"
        assert slot.next + len(content) <= slot.end, f"{name} has more elements than announced"
        slot.digest.update(content)
        with os_errors_as_user_errors(self.path):
            while content:
                written = os.pwrite(self._file.fileno(), content, slot.next)
                content, slot.next = content[written:], slot.next + written

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with os_errors_as_user_errors(self.path):
            try:
                if error is None:
                    assert len(self.digests) == len(self._slots), "not every announced tensor is complete"
                    os.fsync(self._file.fileno())
                self._file.close()
                if error is None:
                    self._partial.replace(self.path)
            finally:
                self._file.close()
                self._partial.unlink(missing_ok=True)
