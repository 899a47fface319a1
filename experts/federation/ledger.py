"""What was asked, delivered, accepted and refused: lines that are only ever added, so that no crash loses one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from ...core.errors import UserError
from ...core.files import exclusive, readable_os_errors

State = Literal["asked", "delivered", "accepted", "refused"]


@dataclass(frozen=True)
class Entry:
    """One line."""

    state: State
    request: str
    owner: str
    seed: str
    """Digest of the seed."""
    recipe: str
    """Digest of the recipe."""
    at: str
    """UTC, ISO 8601."""
    detail: str = ""
    """Name of the accepted expert, or why one was refused."""
    delivery: str = ""
    """Digest of what was delivered."""


class Ledger:
    """The ledger of one federation. Every call reads the file, so that several processes see the same."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, entry: Entry) -> None:
        """Add a line; when this returns, it is on the disk."""
        line = json.dumps(asdict(entry), sort_keys=True).encode() + b"\n"
        with exclusive(self.path.with_suffix(".lock"), "the ledger"), readable_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                if (
                    size and os.pread(descriptor, 1, size - 1) != b"\n"
                ):  # a kill cut the last line: it was never told
                    line = b"\n" + line
                os.write(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def entries(self) -> list[Entry]:
        """Return all lines, in order; one that a kill cut short is left out."""
        return list(self._read())

    def _read(self) -> Iterator[Entry]:
        if not self.path.is_file():
            return
        with readable_os_errors(self.path):
            lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError):
                if number >= len(lines) - 1 or not line.rstrip().endswith(b"}"):
                    continue  # cut short
                raise UserError(f"{self.path}:{number} is damaged; restore the file from a copy") from None
            if entry.state not in get_args(State):
                raise UserError(
                    f"{self.path}:{number} has the state '{entry.state}', which this version does not know"
                )
            yield entry

    def state(self, request: str) -> State | None:
        """Return how far a request has come, or None for one that was never made."""
        found: State | None = None
        for entry in self._read():
            if entry.request == request:
                found = entry.state
        return found

    def states(self) -> dict[str, Entry]:
        """Return the last line of each request."""
        return {entry.request: entry for entry in self._read()}

    def missing(self, seed: str, recipe: str, owners: Iterable[str]) -> list[str]:
        """Return the owners from whom no expert of this seed and recipe was accepted, in their order."""
        have = {
            entry.owner
            for entry in self._read()
            if entry.state == "accepted" and (entry.seed, entry.recipe) == (seed, recipe)
        }
        return [owner for owner in owners if owner not in have]

    def was_delivered(self, delivery: str) -> bool:
        """Tell whether something with this digest was accepted before, for whatever request."""
        return any(entry.state == "accepted" and entry.delivery == delivery for entry in self._read())
