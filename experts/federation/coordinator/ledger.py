"""What was asked, delivered, accepted and refused: lines that are only ever added, so that no crash loses one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Literal, get_args

from ....core.artefacts.files import exclusive, readable_os_errors
from ....core.errors import UserError

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


@dataclass
class _Known:
    """What was read of a ledger so far."""

    file: int = 0
    """Number of the file, which changes when another takes its place."""
    offset: int = 0
    """Bytes that were read."""
    lines: int = 0
    entries: list[Entry] = field(default_factory=list)
    last: dict[str, Entry] = field(default_factory=dict)
    """The last line of each request."""
    of_owner: dict[str, dict[str, Entry]] = field(default_factory=dict)
    """The last line of each request of each owner."""
    accepted: set[tuple[str, str, str]] = field(default_factory=set)
    """(seed, recipe, owner)."""
    deliveries: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    """Digest of what was accepted -> (owner, seed)."""

    def take(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.last[entry.request] = entry
        self.of_owner.setdefault(entry.owner, {})[entry.request] = entry
        if entry.state == "accepted":
            self.accepted.add((entry.seed, entry.recipe, entry.owner))
            self.deliveries.setdefault(entry.delivery, set()).add((entry.owner, entry.seed))


class Ledger:
    """The ledger of one federation. Every call reads what was added to the file, so that several processes see the same.

    What was read before is kept: with ten thousand owners, reading it all for every delivery would take most of the time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = _Known()
        self._lock = Lock()

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
        return list(self._read().entries)

    def state(self, request: str) -> State | None:
        """Return how far a request has come, or None for one that was never made."""
        entry = self._read().last.get(request)
        return entry.state if entry is not None else None

    def states(self) -> dict[str, Entry]:
        """Return the last line of each request."""
        return dict(self._read().last)

    def states_of(self, owner: str) -> Mapping[str, Entry]:
        """Return the last line of each request that an owner was sent, in the order in which they were made."""
        return dict(self._read().of_owner.get(owner, {}))

    def missing(self, seed: str, recipe: str, owners: Iterable[str]) -> list[str]:
        """Return the owners from whom no expert of this seed and recipe was accepted, in their order."""
        accepted = self._read().accepted
        return [owner for owner in owners if (seed, recipe, owner) not in accepted]

    def deliverers(self, delivery: str) -> frozenset[tuple[str, str]]:
        """Return from whom, and made of which seed, something with this digest was accepted before, for whatever request."""
        return frozenset(self._read().deliveries.get(delivery, ()))

    def _read(self) -> _Known:
        """Read what was added since the last call, by whichever process."""
        with self._lock:
            if not self.path.is_file():
                self._known = _Known()
                return self._known
            with readable_os_errors(self.path), self.path.open("rb") as file:
                about = os.fstat(file.fileno())
                if about.st_ino != self._known.file or about.st_size < self._known.offset:
                    self._known = _Known(about.st_ino)
                if about.st_size > self._known.offset:
                    file.seek(self._known.offset)
                    self._take(file.read())
            return self._known

    def _take(self, added: bytes) -> None:
        """Take in lines; the last one only if all of it is there, since a kill may have cut it or another process writes it."""
        lines = added.splitlines(keepends=True)
        for number, line in enumerate(lines):
            if line.strip():
                entry = self._entry(line, last=number == len(lines) - 1)
                if entry is not None:
                    self._known.take(entry)
                elif number == len(lines) - 1:
                    return
            self._known.offset += len(line)
            self._known.lines += line.endswith(b"\n")

    def _entry(self, line: bytes, *, last: bool) -> Entry | None:
        """Read a line; None for one that was cut short, `UserError` for one that was damaged otherwise."""
        where = f"{self.path}:{self._known.lines + 1}"
        try:
            entry = Entry(**json.loads(line))
        except (ValueError, TypeError):
            if last or not line.rstrip().endswith(b"}"):
                return None
            raise UserError(f"{where} is damaged; restore the file from a copy") from None
        if entry.state not in get_args(State):
            raise UserError(f"{where} has the state '{entry.state}', which this version does not know")
        return entry
