"""Append-only ledger of a federation: an entry for each request, delivery, acceptance and refusal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from threading import Lock
from typing import Any, Literal, get_args

from ....core.artefacts.files import exclusive
from ....core.artefacts.json_lines import JsonLines
from ....core.errors import UserError
from .ledger_chain import LedgerChain

State = Literal["asked", "delivered", "accepted", "refused", "withdrawn", "invited", "rotated", "removed"]
"""State of a request, or what happened to a member: `invited`, `rotated` (it has another key) and `removed`."""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger."""

    state: State
    request: str
    """Identifier of the request; empty for a member's own entries, as are seed and recipe."""
    owner: str
    seed: str
    """Digest of the seed."""
    recipe: str
    """Digest of the recipe."""
    at: str
    """Time in UTC, ISO 8601."""
    detail: str = ""
    """Deadline of a request, name of an accepted expert, reason of a refusal, or fingerprint of a member's key."""
    delivery: str = ""
    """Digest of the delivered expert."""
    public_loss: Mapping[str, float] | None = None
    """Losses on public text of an accepted expert and of its seed, in nats per token: `expert`, `seed`; None if not measured."""

    def __post_init__(self) -> None:
        if self.state not in get_args(State):
            raise UserError(f"the ledger has the state '{self.state}', which this version does not know")


class Ledger:
    """The ledger of one federation; every call reads new lines of the file, so that several processes agree.

    Entries and their indices are cached: with ten thousand owners, reading the whole file for every delivery would
    dominate the run time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = JsonLines(path, _entry_of, mode=0o600)
        self.chain = LedgerChain(path)
        self._index = _Index([])
        self._lock = Lock()

    def add(self, entry: Entry) -> None:
        """Append an entry and flush it to disk."""
        with exclusive(self.path.with_suffix(".lock"), "the ledger"):
            self._file.append(self.chain.signed(dict(sorted(asdict(entry).items()))))

    def entries(self) -> list[Entry]:
        """Return all entries, in order, without lines that a kill cut short."""
        return list(self._read().entries)

    def state(self, request: str) -> State | None:
        """Return the state of a request, or None if there is no such request."""
        entry = self._read().last.get(request)
        return entry.state if entry is not None else None

    def refusals(self, request: str) -> int:
        """Return how often deliveries for a request were refused since the owner was last asked."""
        return self._read().refusals.get(request, 0)

    def states(self) -> dict[str, Entry]:
        """Return the latest entry of each request."""
        return dict(self._read().last)

    def removed_members(self) -> list[Entry]:
        """Return the entries of members that were removed and not invited again with the same key, in order."""
        latest: dict[tuple[str, str], Entry] = {}
        for entry in self._read().entries:
            if entry.state in ("invited", "removed"):
                latest.pop((entry.owner, entry.detail), None)
                latest[entry.owner, entry.detail] = entry
        return [entry for entry in latest.values() if entry.state == "removed"]

    def known_keys(self) -> set[str]:
        """Return the fingerprints of all keys that members have had."""
        return {entry.detail for entry in self._read().entries if entry.state in ("invited", "rotated", "removed")}

    def accepted_names(self) -> set[str]:
        """Return the names of all accepted experts."""
        return {entry.detail for entry in self._read().entries if entry.state == "accepted"}

    def public_losses(self) -> dict[str, Mapping[str, float]]:
        """Return the losses on public text of accepted experts, by the expert's digest; without those that were not measured."""
        entries = (entry for entry in self._read().entries if entry.state == "accepted")
        return {entry.delivery: entry.public_loss for entry in entries if entry.public_loss is not None}

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

    def _read(self) -> _Index:
        """Index the entries that any process has added since the last call."""
        with self._lock:
            entries = self._file.read()
            if entries is not self._index.entries:  # the file was replaced
                self._index = _Index(entries)
            for entry in entries[self._index.count :]:
                self._index.add(entry)
            return self._index


def _entry_of(content: dict[str, Any]) -> Entry:
    return Entry(**{name: value for name, value in content.items() if name in _FIELDS})


_FIELDS = frozenset(field.name for field in fields(Entry))
"""Fields that this version knows; a newer one may have written others, which `LedgerChain` checks too."""


@dataclass
class _Index:
    entries: Sequence[Entry]
    """All entries of the file."""
    count: int = 0
    """Number of entries in the indices below."""
    last: dict[str, Entry] = field(default_factory=dict)
    """Latest entry by request."""
    of_owner: dict[str, dict[str, Entry]] = field(default_factory=dict)
    """Latest entry by owner and request."""
    accepted: set[tuple[str, str, str]] = field(default_factory=set)
    """(seed, recipe, owner) of accepted experts."""
    deliveries: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    """Digest of an accepted expert -> (owner, seed) pairs."""
    refusals: dict[str, int] = field(default_factory=dict)
    """Number of refusals by request, since it was last asked."""

    def add(self, entry: Entry) -> None:
        self.count += 1
        if not entry.request:
            return
        self.last[entry.request] = entry
        self.of_owner.setdefault(entry.owner, {})[entry.request] = entry
        if entry.state in ("asked", "refused"):
            self.refusals[entry.request] = self.refusals.get(entry.request, 0) + 1 if entry.state == "refused" else 0
        if entry.state == "accepted":
            self.accepted.add((entry.seed, entry.recipe, entry.owner))
            self.deliveries.setdefault(entry.delivery, set()).add((entry.owner, entry.seed))
