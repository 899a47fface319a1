"""Who belongs to a federation: names and public keys, in a file of the coordinator's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ....core.artefacts.files import exclusive, read_json, write_json
from ....core.artefacts.layout import check_name
from ....core.errors import UserError, unknown_name
from ..protocol.keys import PublicKey

FORMAT = 1


@dataclass(frozen=True)
class Member:
    """An owner who was invited."""

    name: str
    key: PublicKey


class Members:
    """The members of one federation. Every call reads the file, so that several processes see the same."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, ...] = ()
        self._known: dict[str, Member] = {}

    def all(self) -> list[Member]:
        """Return them in order of their names."""
        return list(self._by_name().values())

    def _by_name(self) -> dict[str, Member]:
        """Return them by name, in its order; the file is read again only when it is another one."""
        if not self.path.is_file():
            return {}
        about = self.path.stat()
        seen = (about.st_ino, about.st_mtime_ns, about.st_size)
        if seen != self._seen:
            self._known = {member.name: member for member in self._read()}
            self._seen = seen
        return self._known

    def _read(self) -> list[Member]:
        content = read_json(self.path)
        try:
            found = [Member(name, PublicKey.parse(line)) for name, line in content["members"].items()]
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(
                f"{self.path} is damaged ({error}); restore it, or invite the owners again"
            ) from None
        return sorted(found, key=lambda member: member.name)

    def named(self, name: str) -> Member:
        """Return the member of that name; raises `UserError` that lists the choices."""
        members = self._by_name()
        if name not in members:
            raise unknown_name("member", name, members, listed_as="invited were")
        return members[name]

    def with_key(self, fingerprint: str) -> Member | None:
        """Return the member with that key, or None."""
        return next((member for member in self.all() if member.key.fingerprint == fingerprint), None)

    def add(self, name: str, key: PublicKey) -> Member:
        """Invite an owner; raises `UserError` for a name or a key that another has."""
        return self.add_all({name: key})[0]

    def add_all(self, keys: Mapping[str, PublicKey]) -> list[Member]:
        """Invite several owners at once, all or none; raises `UserError` as `add` does."""
        for name in keys:
            check_name(name, "a member")
        with exclusive(self.path.with_suffix(".lock"), "the list of members"):
            members = dict(self._by_name())
            names = {member.key: member.name for member in members.values()}
            for name, key in keys.items():
                if name in members and members[name].key != key:
                    raise UserError(
                        f"'{name}' was invited with another key ({members[name].key.fingerprint}); "
                        f"`expertctl federate remove {name}` first, or choose another name"
                    )
                if names.setdefault(key, name) != name:
                    raise UserError(f"'{names[key]}' has that key; each owner needs one of their own")
                members[name] = Member(name, key)
            self._write(list(members.values()))
        return [members[name] for name in keys]

    def remove(self, name: str) -> None:
        """Take a member out; what was accepted stays."""
        self.named(name)
        with exclusive(self.path.with_suffix(".lock"), "the list of members"):
            self._write([member for member in self.all() if member.name != name])

    def _write(self, members: list[Member]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lines = {member.name: member.key.line for member in members}
        write_json(self.path, {"format": FORMAT, "members": lines})
        self._seen = ()
