"""Owner presence: when the serving process last heard from each owner, in a file that any process can read."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from threading import Lock

from ....core.artefacts.files import read_json, write_json
from ....core.errors import UserError

WRITE_AFTER = timedelta(seconds=5)
"""Shortest time between two writes for owners who are online."""
ONLINE_WITHIN = timedelta(seconds=45)
"""An owner is online if heard within this time; its process sends a hello every ten seconds."""


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
