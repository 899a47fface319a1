"""Which owners are there: noted by the process that serves, every few seconds, and read by whoever asks."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from threading import Lock

from ....core.artefacts.files import read_json, write_json
from ....core.errors import UserError

WRITE_AFTER = timedelta(seconds=5)
ONLINE_WITHIN = timedelta(seconds=45)
"""An owner's process says hello every ten seconds."""


class Presence:
    """When each owner was last heard, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self._heard: dict[str, datetime] | None = None
        self._written: datetime | None = None

    def note(self, owner: str, now: datetime) -> None:
        """Note that an owner was heard; the file follows at once for one that was away, else after some seconds."""
        with self._lock:
            if self._heard is None:
                self._heard = self.heard()
            before, self._heard[owner] = self._heard.get(owner), now
            is_new = before is None or now - before > ONLINE_WITHIN
            if is_new or self._written is None or now - self._written >= WRITE_AFTER:
                self._written = now
                content = {name: at.isoformat() for name, at in sorted(self._heard.items())}
                with suppress(UserError):  # a full disk must not keep an owner from what it came for
                    self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                    write_json(self._path, content)

    def heard(self) -> dict[str, datetime]:
        """Return when each owner was last heard, as the file says."""
        content = read_json(self._path) if self._path.is_file() else {}
        return {name: datetime.fromisoformat(at) for name, at in content.items()}
