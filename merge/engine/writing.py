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
from ...core.artefacts.safetensors_io import INDEX_FILE, digest_start, read_header
from .shards import ShardPlan, index_of
from .tensor_plan import TensorPlan

JOURNAL_FILE = ".journal.jsonl"
FLUSH_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20


class Writer:
    """Thread-safe writer of the output files."""

    def __init__(self, folder: Path, shards: Sequence[ShardPlan], fingerprint: str) -> None:
        self.digests: dict[str, str] = {}
        """Complete tensor -> digest."""
        self._folder, self._shards, self._fingerprint = folder, shards, fingerprint
        self._shard_of = {tensor.name: shard for shard in shards for tensor in shard.tensors}
        self._files: dict[str, int] = {}
        self._lock = Lock()
        self._journal: int | None = None
        self._flusher = _Flusher()

    def __enter__(self) -> Writer:
        """Open the files, keeping the verified tensors of an interrupted merge with the same fingerprint."""
        with os_errors_as_user_errors(self._folder):
            journaled = self._resumable()
            for shard in self._shards:
                self._open(shard, fresh=journaled is None)
            journal = self._folder / JOURNAL_FILE
            if journaled is None:
                journal.unlink(missing_ok=True)
            self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            if journaled is None:
                self._append({"fingerprint": self._fingerprint})
            self.digests = {
                name: digest for name, digest in (journaled or {}).items() if self._has_digest(name, digest)
            }
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # `finish` reports it, or another error is being raised
            self._flusher.stop()
        for descriptor in (*self._files.values(), *filter(None, [self._journal])):
            os.close(descriptor)
        self._files.clear()
        self._journal = None

    def region(self, tensor: TensorPlan, digest: str | None = None) -> Region:
        """Return the file region of one tensor, to be written sequentially; hashed unless `digest` is given."""
        shard = self._shard_of[tensor.name]
        begin, end = shard.layout[1][tensor.name]
        return Region(self, tensor, self._files[shard.file], (begin, end), digest)

    def complete(self, tensor: str, digest: str) -> None:
        """Record a tensor as complete."""
        with self._lock, os_errors_as_user_errors(self._folder / JOURNAL_FILE):
            self.digests[tensor] = digest
            self._append({"tensor": tensor, "digest": digest})

    def finish(self) -> None:
        """Write the index file if there are several shards, and delete the journal."""
        with os_errors_as_user_errors(self._folder):
            self._flusher.stop()
        if len(self._shards) > 1:
            text = json.dumps(index_of(self._shards), indent=2) + "\n"
            with os_errors_as_user_errors(self._folder / INDEX_FILE):
                (self._folder / INDEX_FILE).write_text(text, encoding="utf-8")
        (self._folder / JOURNAL_FILE).unlink()

    def _append(self, record: dict[str, Any]) -> None:
        assert self._journal is not None
        os.write(self._journal, (json.dumps(record) + "\n").encode())

    def _open(self, shard: ShardPlan, *, fresh: bool) -> None:
        path = self._folder / shard.file
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0), 0o644)
        self._files[shard.file] = descriptor
        if fresh:
            write_at(descriptor, memoryview(shard.layout[0]), 0)
            os.ftruncate(descriptor, shard.num_bytes)

    def _resumable(self) -> dict[str, str] | None:
        """Return the complete tensors in the journal of the same merge; None if there is nothing to resume."""
        lines = read_journal(self._folder)
        if not lines or lines[0].get("fingerprint") != self._fingerprint:
            return None
        for shard in self._shards:
            path = self._folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.num_bytes:
                return None
            with path.open("rb") as file:
                if file.read(len(shard.layout[0])) != shard.layout[0]:
                    return None
            read_header(path)
        return {line["tensor"]: line["digest"] for line in lines[1:] if "tensor" in line and "digest" in line}

    def _has_digest(self, name: str, digest: str) -> bool:
        """Return whether the bytes of a tensor in its file have this digest."""
        shard = self._shard_of.get(name)
        if shard is None:
            return False
        tensor = next(planned for planned in shard.tensors if planned.name == name)
        begin, end = shard.layout[1][name]
        state = digest_start(tensor.dtype, tensor.shape)
        for offset in range(begin, end, _PIECE_BYTES):
            state.update(os.pread(self._files[shard.file], min(_PIECE_BYTES, end - offset), offset))
        return state.hexdigest() == digest


class Region:
    """The region of one tensor in its file."""

    def __init__(
        self,
        writer: Writer,
        tensor: TensorPlan,
        descriptor: int,
        offsets: tuple[int, int],
        digest: str | None,
    ) -> None:
        self._writer, self._tensor, self._descriptor = writer, tensor, descriptor
        self._position, self._end = offsets
        self._digest = digest
        self._state = digest_start(tensor.dtype, tensor.shape)

    def write(self, content: Any) -> None:
        """Append the bytes of any buffer."""
        view = memoryview(content).cast("B") if not isinstance(content, memoryview) else content
        assert self._position + len(view) <= self._end, f"too many bytes for '{self._tensor.name}'"
        with os_errors_as_user_errors(self._writer._folder):
            write_at(self._descriptor, view, self._position)
        self._writer._flusher.wrote(self._descriptor, len(view))
        if self._digest is None:
            self._state.update(view)
        self._position += len(view)

    def digest(self) -> str:
        """Return the digest of the completely written tensor."""
        assert self._position == self._end, f"too few bytes for '{self._tensor.name}'"
        return self._digest or self._state.hexdigest()

    def close(self) -> None:
        """Record the tensor as complete."""
        self._writer.complete(self._tensor.name, self.digest())


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


def write_at(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all bytes at an offset of a file."""
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], offset + written)


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a merge's journal; an incomplete last line is ignored."""
    path = folder / JOURNAL_FILE
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


def fingerprint_of(content: Any) -> str:
    """Return the SHA-256 of JSON content that identifies a merge."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()
