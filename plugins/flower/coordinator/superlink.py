"""Flower's server: on loopback only, in memory, started again on any exit, and told again who belongs to the federation.

What has to outlive it (members, requests, experts) is in the coordinator's own files, so it may lose everything.
"""

from __future__ import annotations

import json
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ....core.artefacts.files import write_text
from ....core.errors import UserError
from ....experts.federation.coordinator.members import Member, Members
from ..processes.child import Child, environment, flower_command, free_port
from ..protocol.certificates import Certificates

CONNECTION = "here"
COMMAND_S = 120
SILENT_S = 30.0
SIGN_OF_LIFE = "app-alive"
"""A file that the app touches."""
APP = Path(__file__).parents[1] / "app"


class SuperLink:
    """The supervised server. `tick()` is called every second or so."""

    def __init__(
        self, folder: Path, certificates: Certificates, members: Members, tell: Callable[[str], None]
    ) -> None:
        self.folder, self._certificates, self._members, self._tell = folder, certificates, members, tell
        self.port = 0
        self.ready = False
        self._child = Child(folder / "superlink.log")
        self._registered: dict[str, str] = {}
        """Name -> node, of this life of the server."""
        self._lines: dict[str, str] = {}
        self._run = ""
        self._asked = 0.0
        self._environment = environment(folder / "flower")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._child.pid

    @property
    def registered(self) -> tuple[str, ...]:
        """Names of the members that it knows now."""
        return tuple(self._registered)

    def tick(self) -> None:
        """Start it where it does not run; tell it who joined and who left; keep the app running."""
        status = self._child.ended()
        if status is not None:
            self._forget()
            self._tell(f"Flower's server ended with status {status}; it is started again")
        if self._child.is_due():
            self._start()
        if self._child.runs and not self.ready:
            self.ready = self._is_healthy()
        if self.ready:
            self._register()
            self._keep_running()

    def stop(self) -> None:
        """End it."""
        self._child.stop()
        self._forget()

    def _forget(self) -> None:
        self.ready, self._run = False, ""
        self._registered.clear()
        self._lines.clear()

    def _start(self) -> None:
        self._forget()
        self.port = free_port()
        root = self._certificates.authority
        write_text(
            self.folder / "flower" / "config.toml",
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{self.address}"\n'
            f"root-certificates = {json.dumps(str(root.resolve()))}\n",
        )
        command = [flower_command("flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--isolation", "subprocess", "--disable-runtime-dependency-installation"]
        command += ["--enable-supernode-auth", "--ssl-ca-certfile", str(root)]
        command += ["--ssl-certfile", str(self._certificates.certificate)]
        command += ["--ssl-keyfile", str(self._certificates.key)]
        self._child.start(command, self._environment)

    def _is_healthy(self) -> bool:
        context = ssl.create_default_context(cafile=str(self._certificates.authority))
        try:
            with urllib.request.urlopen(
                f"https://{self.address}/health", timeout=5, context=context
            ) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _register(self) -> None:
        """Tell the server who was invited since the last look, and who was taken out."""
        members = {member.name: member for member in self._members.all()}
        for name in [
            name
            for name, line in self._lines.items()
            if name not in members or members[name].key.line != line
        ]:
            self._control("supernode", "unregister", self._registered[name], CONNECTION)
            del self._registered[name], self._lines[name]
        for name, member in members.items():
            if name not in self._registered:
                self._registered[name] = self._node_of(member)
                self._lines[name] = member.key.line

    def _node_of(self, member: Member) -> str:
        public = self.folder / "keys" / f"{member.name}.pub"
        public.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(public, f"{member.key.line}\n")
        found = self._control("supernode", "register", str(public), CONNECTION, "--name", member.name)
        return str(found["node-id"])

    def _keep_running(self) -> None:
        """Start the app that hands requests to owners, unless it runs."""
        if self._run and self._app_runs():
            return
        if self._run:
            self._tell("the app that hands out requests has ended; it is started again")
        self._run = ""
        settings = f"workspace={json.dumps(str(self.folder.parent.parent.resolve()))}"
        found = self._control("run", str(APP), CONNECTION, "--run-config", settings)
        self._run, self._asked = str(found["run-id"]), time.monotonic()

    def _app_runs(self) -> bool:
        """Tell whether the app has shown itself lately; only where it has not is Flower asked, which starts a process."""
        sign, now = self.folder / SIGN_OF_LIFE, time.monotonic()
        if sign.is_file() and time.time() - sign.stat().st_mtime < SILENT_S:
            return True
        if now - self._asked < SILENT_S:
            return True
        self._asked = now
        found = self._control("list", "--run-id", self._run, CONNECTION)
        return not str(found["runs"][0]["status"]).startswith("finished")

    def _control(self, *arguments: str) -> dict[str, Any]:
        """Run one command of Flower's client and return what it prints; raises `UserError` when it fails."""
        command = [flower_command("flwr"), *arguments, "--format", "json"]
        try:
            done = subprocess.run(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=COMMAND_S,
                cwd=self.folder,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"`flwr {arguments[0]}` did not answer in {COMMAND_S} s") from None
        content = _json_in(done.stdout)
        if done.returncode != 0 or not content.get("success", True):
            reason = (
                content.get("error-message") or (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            )
            raise UserError(f"`flwr {' '.join(arguments[:2])}` failed: {reason}")
        return content


def _json_in(text: str) -> dict[str, Any]:
    """Return the JSON object that stands in what a command printed, other lines being before it."""
    begin = text.find("{")
    try:
        content = json.loads(text[begin:]) if begin >= 0 else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
