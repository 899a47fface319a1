"""An owner's Flower node: started with the owner's key, again on any exit, and only running what the owner's installation allows."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from ....core.errors import UserError
from ..processes.child import Child, environment, flower_command, free_port
from .guarded_client import STATE_SETTING, STATE_VARIABLE, write_shim

_CODE = re.compile(r"\[code: (2001|2004)\]")
REFUSED_S = 150.0
"""How long a node may be refused before it is said: a server that has just started does not know its members yet, and for a minute
after a node was killed it still counts as there."""


class SuperNode:
    """The supervised node. `tick()` is called every second or so."""

    def __init__(
        self, state: Path, server: str, authority: Path, key: Path, tell: Callable[[str], None]
    ) -> None:
        self._state, self._server, self._authority, self._key = state, server, authority, key
        self._tell = tell
        self._child = Child(state / "flower" / "supernode.log")
        self._refused_since: float | None = None
        self._environment = {
            **environment(state / "flower", write_shim(state)),
            STATE_VARIABLE: str(state.resolve()),
        }

    @property
    def pid(self) -> int | None:
        return self._child.pid

    def is_connected(self) -> bool:
        """Tell whether the server has let it in."""
        return self._child.runs and "SuperNode ID:" in self._child.said()

    def tick(self) -> None:
        """Start it where it does not run; raises `UserError` when the server has refused it for long."""
        status = self._child.ended()
        if status is not None:
            self._note_end(status)
        if self._child.is_due():
            self._start()
        if self._refused_since is not None and self.is_connected():
            self._refused_since = None

    def stop(self) -> None:
        """End it."""
        self._child.stop()

    def _note_end(self, status: int) -> None:
        found = _CODE.search(self._child.said())
        if found is None:
            self._tell(f"Flower's node ended with status {status}; it is started again")
            return
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        if now - self._refused_since > REFUSED_S:
            raise UserError(
                f"the coordinator's server refuses this key [{found[1]}]; it was taken out of the federation, or another "
                "process uses it: ask the coordinator, and run `join` in one place only"
            )

    def _start(self) -> None:
        settings = f"{STATE_SETTING}={json.dumps(str(self._state.resolve()))}"
        command = [flower_command("flower-supernode"), "--superlink", self._server]
        command += ["--root-certificates", str(self._authority.resolve())]
        command += ["--auth-supernode-private-key", str(self._key.resolve())]
        command += ["--host", "127.0.0.1", "--port", str(free_port())]
        command += ["--isolation", "subprocess", "--node-config", settings]
        self._child.start(command, self._environment)
