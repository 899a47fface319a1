"""Records the output files of a merge: tensors in any order, with a journal of complete tensors for resuming.

Headers are written first, which fixes the offset of each tensor. On resume, the tensors that the journal lists as
complete are hashed again, because the journal may have reached the disk before the data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from ...core.artefacts.files import os_errors_as_user_errors
from ...core.artefacts.json_lines import JsonLines
from ...core.artefacts.safetensors_io import INDEX_FILE, Checkpoint
from ...core.errors import UserError
from ...core.reporting import SILENT, Reporter
from .output_files import OutputFiles
from .shards import ShardPlan, index_of
from .tensor_plan import TensorPlan

JOURNAL_FILE = ".journal.jsonl"
_MEGABYTE = 1_000_000


class Writer:
    """Thread-safe record of the output files, which reports the megabytes of complete tensors."""

    def __init__(
        self, folder: Path, shards: Sequence[ShardPlan], fingerprint: str, reporter: Reporter = SILENT
    ) -> None:
        self.digests: dict[str, str] = {}
        """Complete tensor -> digest."""
        self.files = OutputFiles(folder, shards)
        self._folder, self._shards, self._fingerprint, self._reporter = folder, shards, fingerprint, reporter
        self._journal = JsonLines[dict[str, Any]](folder / JOURNAL_FILE, dict, durable=False)
        self._num_bytes = 0
        self._lock = Lock()

    def __enter__(self) -> Writer:
        """Open the files, keeping the verified tensors of an interrupted merge with the same fingerprint."""
        with os_errors_as_user_errors(self._folder):
            complete = self._resumable()
            if complete is None:
                self._journal.rewrite([{"fingerprint": self._fingerprint}])
                for shard in self._shards:
                    self._create(shard)
            self.digests = complete or {}
        self.files.__enter__()
        self._report(
            sum(tensor.num_bytes for shard in self._shards for tensor in shard.tensors if tensor.name in self.digests)
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self.files.__exit__(*exception)

    def complete(self, tensor: TensorPlan, digest: str) -> None:
        """Record a tensor as complete."""
        with self._lock:
            self.digests[tensor.name] = digest
            self._journal.append({"tensor": tensor.name, "digest": digest})
            self._report(tensor.num_bytes)

    def finish(self) -> None:
        """Write the index file if there are several shards, and delete the journal."""
        self.files.finish()
        if len(self._shards) > 1:
            text = json.dumps(index_of(self._shards), indent=2) + "\n"
            with os_errors_as_user_errors(self._folder / INDEX_FILE):
                (self._folder / INDEX_FILE).write_text(text, encoding="utf-8")
        self._journal.path.unlink()

    def _report(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        total = sum(shard.num_bytes for shard in self._shards)
        self._reporter.progress("merging", self._num_bytes // _MEGABYTE, total // _MEGABYTE, "MB")

    def _create(self, shard: ShardPlan) -> None:
        path = self._folder / shard.file
        path.unlink(missing_ok=True)  # a process of a killed merge may still have the old file open
        with path.open("xb") as file:
            file.write(shard.layout[0])
            file.truncate(shard.num_bytes)

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


def fingerprint_of(content: Any) -> str:
    """Return the SHA-256 of JSON content that identifies a merge."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()
