"""Supervisor of Flower's server (SuperLink): runs it on loopback, restarts it on any exit and registers the members.

The server keeps its state in memory only; members, requests and experts are in the coordinator's files.
"""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from ....core.artefacts.files import write_text
from ....core.errors import UserError
from ....core.reporting import Reporter
from ....experts.federation.coordinator.members import Members
from ..processes.child import COMMAND_S, Child, environment, flower_command, free_port, last_line, run_flwr
from ..protocol.certificates import Certificates

CONNECTION = "here"
"""Name of the connection in Flower's configuration."""
RETRY_S = 60.0
"""Seconds after which a member whose registration failed is tried again."""
SILENT_S = 30.0
"""Seconds without a heartbeat after which Flower is asked whether the app still runs."""
HEARTBEAT_FILE = "app-alive"
"""File that the app touches while it runs."""
APP = Path(__file__).parents[1] / "app"


class SuperLink:
    """The supervised server; call `tick` about once a second."""

    def __init__(self, folder: Path, certificates: Certificates, members: Members, reporter: Reporter) -> None:
        self.folder, self._certificates, self._members, self._reporter = folder, certificates, members, reporter
        self.port = 0
        self.ready = False
        self._child = Child(folder / "superlink.log")
        self._registered: dict[str, tuple[str, str]] = {}
        """Member name -> public key and node id, for the running server process."""
        self._unregistered: set[str] = set()
        """Public keys that the running server process has unregistered, and does not register again."""
        self._retry_at: dict[str, float] = {}
        """When members whose registration failed are tried again."""
        self._run_id = ""
        self._checked_at = 0.0
        """When the app was started or Flower was last asked about it."""
        self._environment = environment(folder / "flower")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def tick(self) -> None:
        """Start the server and the app if they do not run, and update the registered members."""
        status = self._child.poll()
        if status is not None:
            self._reset()
            self._reporter.say(f"Flower's server ended with status {status}; restarting it")
        if self._child.is_due():
            self._start()
        if self._child.is_running and not self.ready:
            self.ready = self._is_healthy()
        if self.ready:
            self._update_registrations()
            self._ensure_app()

    def restart(self) -> None:
        """Stop the server; the next `tick` starts it again, with the certificate that is there then."""
        self._reporter.say("restarting Flower's server")
        self.stop()

    def stop(self) -> None:
        """Stop the server."""
        self._child.stop()
        self._reset()

    def _reset(self) -> None:
        self.ready, self._run_id = False, ""
        for known in (self._registered, self._unregistered, self._retry_at):
            known.clear()

    def _start(self) -> None:
        self._reset()
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
            response = httpx.get(f"https://{self.address}/health", timeout=5, verify=context, trust_env=False)
            return response.status_code == 200
        except httpx.HTTPError:
            return False

    def _update_registrations(self) -> None:
        """Register new members and unregister those that were removed or have another key."""
        keys = {member.name: member.key.line for member in self._members.all()}
        gone = [name for name, (line, _) in self._registered.items() if keys.get(name) != line]
        now = time.monotonic()
        new = {
            name: line
            for name, line in keys.items()
            if (name not in self._registered or name in gone) and now >= self._retry_at.get(name, 0.0)
        }
        if not gone and not new:
            return
        if self._unregistered & set(new.values()):
            self._reporter.say(
                "restarting Flower's server, which registers the key of a removed member only after that"
            )
            self._child.stop()
            self._reset()
            return
        result = self._register(new, [self._registered[name][1] for name in gone])
        for name in gone:
            self._unregistered.add(self._registered.pop(name)[0])
        for name, node in result["registered"].items():
            self._registered[name] = (new[name], str(node))
        for name, reason in result["failed"].items():
            self._retry_at[name] = now + RETRY_S
            self._reporter.say(f"'{name}' cannot be registered ({reason}); the others can join, and it is tried again")

    def _register(self, members: Mapping[str, str], nodes: Sequence[str]) -> dict[str, dict[str, str]]:
        """Register members by their keys and unregister nodes, in one process; raises `UserError` if it fails."""
        command = [sys.executable, "-P", "-m", f"{__package__}.registering", CONNECTION]
        try:
            done = subprocess.run(
                command,
                input=json.dumps({"register": members, "unregister": nodes}),
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=COMMAND_S + len(members),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UserError("Flower's server did not register the members in time") from None
        content: dict[str, dict[str, str]] = _json_in(done.stdout)
        if done.returncode != 0 or not {"registered", "failed"} <= content.keys():
            raise UserError(f"members cannot be registered at Flower's server: {last_line(done.stderr)}")
        return content

    def _ensure_app(self) -> None:
        """Start the app that sends requests to owners, unless it runs."""
        if self._run_id and self._is_app_running():
            return
        if self._run_id:
            self._reporter.say("the app that sends requests has ended; restarting it")
        self._run_id = ""
        settings = f"workspace={json.dumps(str(self.folder.parent.parent.resolve()))}"
        output = self._flwr("run", str(APP), CONNECTION, "--run-config", settings)
        self._run_id, self._checked_at = str(output["run-id"]), time.monotonic()

    def _is_app_running(self) -> bool:
        """Return whether the app runs, by its heartbeat or, if that is old, by asking Flower, which starts a process."""
        heartbeat, now = self.folder / HEARTBEAT_FILE, time.monotonic()
        if heartbeat.is_file() and time.time() - heartbeat.stat().st_mtime < SILENT_S:
            return True
        if now - self._checked_at < SILENT_S:
            return True
        self._checked_at = now
        output = self._flwr("list", "--run-id", self._run_id, CONNECTION)
        return not str(output["runs"][0]["status"]).startswith("finished")

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        """Run a `flwr` command and return its JSON output; raises `UserError` if it fails."""
        result = run_flwr(*arguments, "--format", "json", environment=self._environment, folder=self.folder)
        content = _json_in(result.stdout)
        if result.returncode != 0 or not content.get("success", True):
            reason = content.get("error-message") or last_line(result.stderr)
            raise UserError(f"`flwr {' '.join(arguments[:2])}` failed: {reason}")
        return content


def _json_in(text: str) -> dict[str, Any]:
    """Return the JSON object in a command's output, which may follow other lines; empty if there is none."""
    begin = text.find("{")
    try:
        content = json.loads(text[begin:]) if begin >= 0 else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
