"""Append-only ledger of a federation: an entry for each request, delivery, acceptance and refusal."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Literal, get_args

from ....core.artefacts.files import exclusive, os_errors_as_user_errors
from ....core.errors import UserError

State = Literal["asked", "delivered", "accepted", "refused"]


@dataclass(frozen=True)
class Entry:
    """One line of the ledger."""

    state: State
    request: str
    """Identifier of the request."""
    owner: str
    seed: str
    """Digest of the seed."""
    recipe: str
    """Digest of the recipe."""
    at: str
    """Time in UTC, ISO 8601."""
    detail: str = ""
    """Deadline of a request, name of an accepted expert, or reason of a refusal."""
    delivery: str = ""
    """Digest of the delivered expert."""


@dataclass
class _LedgerCache:
    """The entries read so far, with indices."""

    inode: int = 0
    """Inode of the file; another one means that the file was replaced."""
    offset: int = 0
    """Bytes read."""
    lines: int = 0
    """Lines read."""
    entries: list[Entry] = field(default_factory=list)
    last: dict[str, Entry] = field(default_factory=dict)
    """Latest entry by request."""
    of_owner: dict[str, dict[str, Entry]] = field(default_factory=dict)
    """Latest entry by owner and request."""
    accepted: set[tuple[str, str, str]] = field(default_factory=set)
    """(seed, recipe, owner) of accepted experts."""
    deliveries: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    """Digest of an accepted expert -> (owner, seed) pairs."""

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.last[entry.request] = entry
        self.of_owner.setdefault(entry.owner, {})[entry.request] = entry
        if entry.state == "accepted":
            self.accepted.add((entry.seed, entry.recipe, entry.owner))
            self.deliveries.setdefault(entry.delivery, set()).add((entry.owner, entry.seed))


class Ledger:
    """The ledger of one federation; every call reads new lines of the file, so that several processes agree.

    Entries are cached: with ten thousand owners, reading the whole file for every delivery would dominate the run time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cache = _LedgerCache()
        self._lock = Lock()

    def add(self, entry: Entry) -> None:
        """Append an entry and flush it to disk."""
        line = json.dumps(asdict(entry), sort_keys=True).encode() + b"\n"
        with exclusive(self.path.with_suffix(".lock"), "the ledger"), os_errors_as_user_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    line = b"\n" + line  # a kill cut the last line short; nobody has acted on it
                os.write(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def entries(self) -> list[Entry]:
        """Return all entries, in order, without lines that a kill cut short."""
        return list(self._read().entries)

    def state(self, request: str) -> State | None:
        """Return the state of a request, or None if there is no such request."""
        entry = self._read().last.get(request)
        return entry.state if entry is not None else None

    def states(self) -> dict[str, Entry]:
        """Return the latest entry of each request."""
        return dict(self._read().last)

    def states_of(self, owner: str) -> Mapping[str, Entry]:
        """Return the latest entry of each of an owner's requests, in the order of the requests."""
        return dict(self._read().of_owner.get(owner, {}))

    def missing(self, seed: str, recipe: str, owners: Iterable[str]) -> list[str]:
        """Return the owners, in their order, without an accepted expert for this seed and recipe."""
        accepted = self._read().accepted
        return [owner for owner in owners if (seed, recipe, owner) not in accepted]

    def accepted_from(self, delivery: str) -> frozenset[tuple[str, str]]:
        """Return the (owner, seed) pairs for which an expert with this digest was accepted."""
        return frozenset(self._read().deliveries.get(delivery, ()))

    def _read(self) -> _LedgerCache:
        """Read the lines that any process has added since the last call."""
        with self._lock:
            if not self.path.is_file():
                self._cache = _LedgerCache()
                return self._cache
            with os_errors_as_user_errors(self.path), self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._cache.inode or status.st_size < self._cache.offset:
                    self._cache = _LedgerCache(status.st_ino)
                if status.st_size > self._cache.offset:
                    file.seek(self._cache.offset)
                    self._parse(file.read())
            return self._cache

    def _parse(self, content: bytes) -> None:
        """Parse new lines; an incomplete last line waits, since another process may be writing it."""
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines):
            if line.strip():
                entry = self._entry(line, last=number == len(lines) - 1)
                if entry is not None:
                    self._cache.add(entry)
                elif number == len(lines) - 1:
                    return
            self._cache.offset += len(line)
            self._cache.lines += line.endswith(b"\n")

    def _entry(self, line: bytes, *, last: bool) -> Entry | None:
        """Parse a line; None if it was cut short, `UserError` if it is damaged otherwise."""
        where = f"{self.path}:{self._cache.lines + 1}"
        try:
            entry = Entry(**json.loads(line))
        except (ValueError, TypeError):
            if last or not line.rstrip().endswith(b"}"):
                return None
            raise UserError(f"{where} is damaged; restore the file from a copy") from None
        if entry.state not in get_args(State):
            raise UserError(f"{where} has the state '{entry.state}', which this version does not know")
        return entry
