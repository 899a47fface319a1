"""Writing several safetensors files at once, a tensor at a time: for results that come in pairs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ...core.files import partial_sibling, readable_os_errors
from ...core.safetensors_io import digest_start, dtype_name, header_of_file, tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor


class TensorStream:
    """One safetensors file that is being written; it appears under its name when the block ends without an error."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self.path = path
        self.digests: dict[str, str] = {}
        """Of the tensors written so far."""
        self._expected: Iterator[tuple[str, tuple[str, tuple[int, ...]]]] = iter(shapes.items())
        self._count = len(shapes)
        self._header, _ = header_of_file(shapes)
        self._partial = partial_sibling(path)

    def __enter__(self) -> Self:
        with readable_os_errors(self.path):
            self._file = self._partial.open("wb")
            self._file.write(self._header)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, in the order that was announced."""
        expected, (kind, shape) = next(self._expected)
        got = (name, dtype_name(tensor.dtype), tuple(tensor.shape))
        assert got == (expected, kind, tuple(shape)), f"announced {expected} {kind} {shape}, got {got}"
        content = tensor_bytes(tensor)
        digest = digest_start(kind, tuple(shape))
        digest.update(content)
        self.digests[name] = digest.hexdigest()
        with readable_os_errors(self.path):
            self._file.write(content)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with readable_os_errors(self.path):
            try:
                if error is None:
                    assert len(self.digests) == self._count, "not every tensor was written that was announced"
                    self._file.flush()
                    os.fsync(self._file.fileno())
                self._file.close()
                if error is None:
                    self._partial.replace(self.path)
            finally:
                self._file.close()
                self._partial.unlink(missing_ok=True)
