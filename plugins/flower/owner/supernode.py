"""Supervisor of an owner's Flower node (SuperNode): restarts it on any exit and lets it run only allowed app bundles."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from ....core.reporting import Reporter
from ..processes.child import Child, environment, flower_command, free_port
from .guarded_client import STATE_SETTING, STATE_VARIABLE, write_shim

_REFUSAL_CODE = re.compile(r"\[code: (2001|2004)\]")
REFUSED_S = 150.0
"""Seconds of refusals before they are reported: a new server process must first register its members, and it counts a killed node as connected
for a minute."""


class SuperNode:
    """The supervised node; call `tick` about once a second."""

    def __init__(self, state: Path, server: str, authority: Path, key: Path, reporter: Reporter) -> None:
        self._state, self._server, self._authority, self._key = state, server, authority, key
        self._reporter = reporter
        self._child = Child(state / "flower" / "supernode.log")
        self._refused_since: float | None = None
        self._has_told = False
        self._environment = {**environment(state / "flower", write_shim(state)), STATE_VARIABLE: str(state.resolve())}

    def tick(self) -> None:
        """Start the node if it does not run; an owner waits for as long as the server refuses it."""
        status = self._child.poll()
        if status is not None:
            self._handle_exit(status)
        if self._child.is_due():
            self._start()
        if self._child.is_running and "SuperNode ID:" in self._child.recent_output():  # the server accepts the node
            self._refused_since, self._has_told = None, False

    def stop(self) -> None:
        """Stop the node."""
        self._child.stop()

    def _handle_exit(self, status: int) -> None:
        refusal = _REFUSAL_CODE.search(self._child.recent_output())
        if refusal is None:
            self._reporter.say(f"Flower's node ended with status {status}; restarting it")
            return
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        if now - self._refused_since > REFUSED_S and not self._has_told:
            self._has_told = True
            self._reporter.say(
                f"the coordinator's server has refused this key for {REFUSED_S:.0f} s [{refusal[1]}]; trying again until it has "
                "registered all members (if that takes longer, ask the coordinator to restart `serve`)"
            )

    def _start(self) -> None:
        settings = f"{STATE_SETTING}={json.dumps(str(self._state.resolve()))}"
        command = [flower_command("flower-supernode"), "--superlink", self._server]
        command += ["--root-certificates", str(self._authority.resolve())]
        command += ["--auth-supernode-private-key", str(self._key.resolve())]
        command += ["--host", "127.0.0.1", "--port", str(free_port())]
        command += ["--isolation", "subprocess", "--node-config", settings]
        self._child.start(command, self._environment)
