"""Writes the files of a merge: tensors in any order, with a journal of complete tensors for resuming.

Headers are written first, which fixes the offset of each tensor. On resume, the tensors that the journal lists as
complete are hashed again, because the journal may have reached the disk before the data.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

from ...core.artefacts.files import os_errors_as_user_errors
from ...core.artefacts.json_lines import JsonLines
from ...core.artefacts.safetensors_io import INDEX_FILE, Checkpoint, TensorWriter, write_at
from ...core.errors import UserError
from ...core.reporting import SILENT, Reporter
from .shards import ShardPlan, index_of
from .tensor_plan import TensorPlan

JOURNAL_FILE = ".journal.jsonl"
FLUSH_BYTES = 64 << 20
_MEGABYTE = 1_000_000


class Writer:
    """Thread-safe writer of the output files, which reports the megabytes of complete tensors."""

    def __init__(
        self, folder: Path, shards: Sequence[ShardPlan], fingerprint: str, reporter: Reporter = SILENT
    ) -> None:
        self.digests: dict[str, str] = {}
        """Complete tensor -> digest."""
        self._folder, self._shards, self._fingerprint, self._reporter = folder, shards, fingerprint, reporter
        self._shard_of = {tensor.name: shard for shard in shards for tensor in shard.tensors}
        self._files: dict[str, int] = {}
        self._journal = JsonLines[dict[str, Any]](folder / JOURNAL_FILE, dict, durable=False)
        self._num_bytes = 0
        self._lock = Lock()
        self._flusher = _Flusher()

    def __enter__(self) -> Writer:
        """Open the files, keeping the verified tensors of an interrupted merge with the same fingerprint."""
        with os_errors_as_user_errors(self._folder):
            complete = self._resumable()
            if complete is None:
                self._journal.rewrite([{"fingerprint": self._fingerprint}])
            for shard in self._shards:
                self._open(shard, fresh=complete is None)
            self.digests = complete or {}
        self._report(
            sum(tensor.num_bytes for shard in self._shards for tensor in shard.tensors if tensor.name in self.digests)
        )
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

    def complete(self, tensor: TensorPlan, digest: str) -> None:
        """Record a tensor as complete."""
        with self._lock:
            self.digests[tensor.name] = digest
            self._journal.append({"tensor": tensor.name, "digest": digest})
            self._report(tensor.num_bytes)

    def finish(self) -> None:
        """Write the index file if there are several shards, and delete the journal."""
        with os_errors_as_user_errors(self._folder):
            self._flusher.stop()
        if len(self._shards) > 1:
            text = json.dumps(index_of(self._shards), indent=2) + "\n"
            with os_errors_as_user_errors(self._folder / INDEX_FILE):
                (self._folder / INDEX_FILE).write_text(text, encoding="utf-8")
        self._journal.path.unlink()

    def _report(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        total = sum(shard.num_bytes for shard in self._shards)
        self._reporter.progress("merging", self._num_bytes // _MEGABYTE, total // _MEGABYTE, "MB")

    def _open(self, shard: ShardPlan, *, fresh: bool) -> None:
        path = self._folder / shard.file
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0), 0o644)
        self._files[shard.file] = descriptor
        if fresh:
            write_at(descriptor, memoryview(shard.layout[0]), 0)
            os.ftruncate(descriptor, shard.num_bytes)

    def _resumable(self) -> dict[str, str] | None:
        """Return the verified tensors of the same merge by its journal; None if there is nothing to resume."""
        try:
            lines = self._journal.read()
        except UserError:  # a power cut may damage it
            return None
        if not lines or lines[0].get("fingerprint") != self._fingerprint:
            return None
        paths = [self._folder / shard.file for shard in self._shards]
        for path, shard in zip(paths, self._shards, strict=True):
            if not path.is_file() or path.stat().st_size != shard.num_bytes:
                return None
            with path.open("rb") as file:
                if file.read(len(shard.layout[0])) != shard.layout[0]:
                    return None
        checkpoint = Checkpoint(paths)
        digests = {line["tensor"]: line["digest"] for line in lines[1:] if "tensor" in line and "digest" in line}
        return {name: digest for name, digest in digests.items() if checkpoint.digest(name) == digest}


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


def fingerprint_of(content: Any) -> str:
    """Return the SHA-256 of JSON content that identifies a merge."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()
