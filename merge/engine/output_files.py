"""The open output files of a merge: the place of each tensor, and flushing to the disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, Self

from ...core.artefacts.files import os_errors_as_user_errors
from ...core.artefacts.safetensors_io import TensorWriter
from .shards import ShardPlan
from .tensor_plan import TensorPlan

FLUSH_BYTES = 64 << 20


class OutputFiles:
    """Thread-safe access to existing output files, which several processes may have open."""

    def __init__(self, folder: Path, shards: Sequence[ShardPlan]) -> None:
        self._folder, self._shards = folder, shards
        self._shard_of = {tensor.name: shard for shard in shards for tensor in shard.tensors}
        self._files: dict[str, int] = {}
        self._flusher = _Flusher()

    def __enter__(self) -> Self:
        with os_errors_as_user_errors(self._folder):
            for shard in self._shards:
                self._files[shard.file] = os.open(self._folder / shard.file, os.O_RDWR)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # `finish` reports it, or another error is being raised
            self._flusher.stop()
        for descriptor in self._files.values():
            os.close(descriptor)

    def region(self, tensor: TensorPlan, digest: str | None = None) -> TensorWriter:
        """Return the file region of one tensor, to be written sequentially; hashed unless `digest` is given."""
        shard = self._shard_of[tensor.name]
        span = shard.layout[1][tensor.name]
        return TensorWriter(self._files[shard.file], tensor.name, tensor.dtype, tensor.shape, span, digest)

    def write(self, region: TensorWriter, content: Any) -> None:
        """Append the bytes of any buffer to a region."""
        with os_errors_as_user_errors(self._folder):
            self._flusher.wrote(region.descriptor, region.write(content))

    def finish(self) -> None:
        """Wait for the flushing; raises `UserError` if it failed."""
        with os_errors_as_user_errors(self._folder):
            self._flusher.stop()


class _Flusher:
    """Flushes written data to the disk in the background, to avoid waiting for the disk at the end."""

    def __init__(self) -> None:
        self._unflushed: dict[int, int] = {}
        self._lock = Lock()
        self._wake, self._stopped = Event(), False
        self._thread: Thread | None = None
        self._failed: OSError | None = None

    def wrote(self, descriptor: int, num_bytes: int) -> None:
        with self._lock:
            self._unflushed[descriptor] = self._unflushed.get(descriptor, 0) + num_bytes
            if self._unflushed[descriptor] < FLUSH_BYTES:
                return
            if self._thread is None:
                self._thread = Thread(target=self._work, daemon=True)
                self._thread.start()
        self._wake.set()

    def stop(self) -> None:
        """Wait until no flush is running, so that files can be closed; raises the `OSError` of a failed flush."""
        self._stopped = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        if self._failed is not None:
            raise self._failed

    def _work(self) -> None:
        while self._wake.wait() and not self._stopped:
            self._wake.clear()
            with self._lock:
                full = [file_descriptor for file_descriptor, size in self._unflushed.items() if size >= FLUSH_BYTES]
                self._unflushed.update(dict.fromkeys(full, 0))
            for descriptor in full:
                try:
                    os.fdatasync(descriptor)
                except OSError as error:  # the system reports it only once
                    self._failed = error
                    return
