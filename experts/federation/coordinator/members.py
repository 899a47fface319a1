"""Members of a federation: their names, their public keys, and when each was last heard from; files of the coordinator."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from threading import Lock

from ....core.artefacts.files import exclusive, read_json, write_json
from ....core.artefacts.layout import check_name
from ....core.errors import UserError, unknown_name
from ..protocol.keys import PublicKey

FORMAT = 1
WRITE_AFTER = timedelta(seconds=5)
"""Shortest time between two writes for owners who are online."""
ONLINE_WITHIN = timedelta(seconds=45)
"""An owner is online if heard within this time; its process sends a hello every ten seconds."""


@dataclass(frozen=True)
class Member:
    """An invited owner."""

    name: str
    key: PublicKey


class Members:
    """The members of one federation; every call checks the file, so that several processes agree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file_stamp: tuple[int, ...] = ()
        self._cache: dict[str, Member] = {}

    def all(self) -> list[Member]:
        """Return the members, sorted by name."""
        return list(self._by_name().values())

    def _by_name(self) -> dict[str, Member]:
        """Return the members by name, sorted; reads the file only after a change."""
        if not self.path.is_file():
            return {}
        status = self.path.stat()
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        if stamp != self._file_stamp:
            content = read_json(self.path)
            try:
                members = {name: Member(name, PublicKey.parse(line)) for name, line in content["members"].items()}
            except (KeyError, AttributeError, TypeError) as error:
                raise UserError(f"{self.path} is damaged ({error}); restore it, or invite the owners again") from None
            self._cache, self._file_stamp = dict(sorted(members.items())), stamp
        return self._cache

    def get(self, name: str) -> Member:
        """Return a member by name; raises `UserError` that lists the members."""
        members = self._by_name()
        if name not in members:
            raise unknown_name("member", name, members, listed_as="members")
        return members[name]

    def find_by_key(self, fingerprint: str) -> Member | None:
        """Return the member whose key has this fingerprint, or None."""
        return next((member for member in self.all() if member.key.fingerprint == fingerprint), None)

    def add(self, name: str, key: PublicKey) -> Member:
        """Invite an owner; raises `UserError` if another member has the name or the key."""
        return self.add_all({name: key})[0]

    def add_all(self, keys: Mapping[str, PublicKey]) -> list[Member]:
        """Invite several owners, all or none; raises `UserError` as `add` does."""
        for name in keys:
            check_name(name, "a member")
        with exclusive(self.path.with_suffix(".lock"), "the list of members"):
            members = dict(self._by_name())
            names = {member.key: member.name for member in members.values()}
            for name, key in keys.items():
                if name in members and members[name].key != key:
                    raise UserError(
                        f"'{name}' was invited with another key ({members[name].key.fingerprint}); "
                        f"run `expertctl federate remove {name}` first, or choose another name"
                    )
                if names.setdefault(key, name) != name:
                    raise UserError(f"'{names[key]}' has that key; each owner needs a key of its own")
                members[name] = Member(name, key)
            self._write(list(members.values()))
        return [members[name] for name in keys]

    def replace_key(self, old: Member, key: PublicKey) -> Member:
        """Give a member another key; raises `UserError` if it was removed or changed meanwhile, or another member has it."""
        name = old.name
        with exclusive(self.path.with_suffix(".lock"), "the list of members"):
            members = dict(self._by_name())
            if members.get(name) != old:
                raise UserError(f"'{name}' was removed or has another key by now; its key is not replaced")
            if any(member.key == key and member.name != name for member in members.values()):
                raise UserError("another member has that key; each owner needs a key of its own")
            members[name] = Member(name, key)
            self._write(list(members.values()))
        return members[name]

    def remove(self, name: str) -> None:
        """Remove a member; accepted experts stay."""
        self.get(name)
        with exclusive(self.path.with_suffix(".lock"), "the list of members"):
            self._write([member for member in self.all() if member.name != name])

    def _write(self, members: list[Member]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lines = {member.name: member.key.line for member in members}
        write_json(self.path, {"format": FORMAT, "members": lines})
        self._file_stamp = ()


class Presence:
    """The time when each owner was last heard from, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self._heard: dict[str, datetime] | None = None
        self._written: datetime | None = None

    def note(self, owner: str, now: datetime) -> None:
        """Record that an owner was heard; the file is updated at once if the owner was offline, else within seconds."""
        with self._lock:
            if self._heard is None:
                self._heard = self.heard()
            previous, self._heard[owner] = self._heard.get(owner), now
            was_offline = previous is None or now - previous > ONLINE_WITHIN
            if was_offline or self._written is None or now - self._written >= WRITE_AFTER:
                self._written = now
                content = {name: at.isoformat() for name, at in sorted(self._heard.items())}
                with suppress(UserError):  # a full disk must not fail the owner's request
                    self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                    write_json(self._path, content)

    def heard(self) -> dict[str, datetime]:
        """Return when each owner was last heard from, by name."""
        content = read_json(self._path) if self._path.is_file() else {}
        return {name: datetime.fromisoformat(at) for name, at in content.items()}
