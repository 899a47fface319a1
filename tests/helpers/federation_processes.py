"""Test helpers for a federation of real processes on loopback: a coordinator, owners, and a relay between them."""

from __future__ import annotations

import inspect
import json
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

from expertctl.core.artefacts.layout import Layout
from expertctl.experts.federation.coordinator.coordinator import Coordinator
from expertctl.experts.federation.owner.owner import Owner, OwnerSettings
from expertctl.experts.federation.protocol.keys import make_key
from expertctl.experts.federation.protocol.requests import ExpertRequest, Recipe
from expertctl.plugins.flower.processes.child import free_port

COMMAND = [sys.executable, "-m", "expertctl.cli.main"]
PATIENCE_S = 150.0


def wait_until(what: Callable[[], object], seconds: float = PATIENCE_S, why: Callable[[], str] = lambda: "") -> None:
    """Wait until a condition holds; fail after `seconds` and show `why`."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"timeout after {seconds:.0f} s\n{why()}"
        time.sleep(0.1)


class Process:
    """A running expertctl command, with its output in a log."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log, self.arguments = log, arguments
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*COMMAND, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def again(self) -> None:
        """Start the command again after its end."""
        self._start()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def wait(self, seconds: float = PATIENCE_S) -> int:
        """Return the exit status."""
        wait_until(lambda: self.process.poll() is not None, seconds, self.output)
        return self.process.returncode


class Federation:
    """A served workspace and its owners."""

    def __init__(self, root: Path, workspace: Path) -> None:
        self.root, self.workspace = root, workspace
        self.coordinator = Coordinator(Layout(workspace))
        self.port = free_port()
        self.owners: list[Process] = []
        listen = f"127.0.0.1:{self.port}"
        self.server = Process(root / "serve.log", "-w", str(workspace), "federate", "serve", "--listen", listen)
        self.wait_served()

    @property
    def ca(self) -> Path:
        return self.workspace / "federation" / "network" / "certificates" / "ca.crt"

    def wait_served(self, times: int = 1) -> None:
        wait_until(lambda: self.server.output().count("owners can join") >= times, why=self.server.output)

    def state(self, name: str) -> Path:
        return self.root / f"state-{name}"

    def owner(self, name: str, module: ModuleType, *, invited: bool = True) -> Owner:
        """Return a new owner with a key and with a module's source as its text."""
        owner = Owner(self.state(name))
        key = make_key(owner.state)
        text = self.root / f"{name}.jsonl"
        lines = inspect.getsource(module).splitlines()
        texts = ["\n".join(lines[begin : begin + 8]) for begin in range(0, min(len(lines), 400), 8)]
        text.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        owner.configure(OwnerSettings(text))
        if invited:
            self.coordinator.files.members.add(name, key.public)
        return owner

    def ask(self, name: str, recipe: Recipe, **until: float) -> ExpertRequest:
        deadline = datetime.now(UTC) + timedelta(**(until or {"hours": 2}))
        (request,) = self.coordinator.ask([name], recipe, deadline)
        return request

    def join(self, name: str, *, port: int | None = None, state: Path | None = None, once: bool = True) -> Process:
        log = self.root / f"join-{name}-{len(self.owners)}.log"
        arguments = [
            "federate",
            "join",
            "--server",
            f"127.0.0.1:{port or self.port}",
            "--ca",
            str(self.ca),
            "--yes",
        ]
        arguments += ["--state", str(state or self.state(name)), *(["--once"] if once else [])]
        self.owners.append(Process(log, *arguments))
        return self.owners[-1]

    def accepted(self) -> dict[str, str]:
        """Return the accepted experts, by owner."""
        entries = self.coordinator.files.ledger.states().values()
        return {entry.owner: entry.detail for entry in entries if entry.state == "accepted"}

    def limit_files(self, size: int) -> None:
        """Limit the size of files that the server writes, as if the disk were full; -1 for no limit."""
        _, hard = resource.prlimit(self.server.process.pid, resource.RLIMIT_FSIZE)
        soft = hard if size < 0 else size
        resource.prlimit(self.server.process.pid, resource.RLIMIT_FSIZE, (soft, hard))

    def close(self) -> None:
        for process in (*self.owners, self.server):
            process.stop()


class Relay:
    """TCP relay between owners and the coordinator, with optional throttling and connection cuts.

    With the server's certificate and key it decrypts and records the traffic.
    """

    def __init__(
        self,
        port: int,
        *,
        bytes_per_second: int = 0,
        cut_after: tuple[int, ...] = (),
        opened_by: tuple[Path, Path, Path] | None = None,
    ) -> None:
        self.up = 0
        self.cuts: list[int] = []
        self.seen = bytearray()
        self._upstream, self._speed, self._cut_after = port, bytes_per_second, list(cut_after)
        self._opened_by = opened_by
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._closing = False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._closing = True
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        try:
            client, server = self._joined(plain)
        except OSError:
            plain.close()
            return
        threads = [
            threading.Thread(target=self._hand_on, args=(client, server, True), daemon=True),
            threading.Thread(target=self._hand_on, args=(server, client, False), daemon=True),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client.close()
        server.close()

    def _joined(self, plain: socket.socket) -> tuple[socket.socket, socket.socket]:
        server = socket.create_connection(("127.0.0.1", self._upstream))
        if self._opened_by is None:
            return plain, server
        certificate, key, authority = self._opened_by
        inside = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        inside.load_cert_chain(certificate, key)
        outside = ssl.create_default_context(cafile=str(authority))
        return (
            inside.wrap_socket(plain, server_side=True),
            outside.wrap_socket(server, server_hostname="127.0.0.1"),
        )

    def _hand_on(self, source: socket.socket, target: socket.socket, upwards: bool) -> None:
        try:
            while data := source.recv(16 << 10):
                with self._lock:
                    if self._opened_by is not None:
                        self.seen += data
                    if upwards:
                        self.up += len(data)
                        if self._cut_after and self.up >= self._cut_after[0]:
                            self._cut_after.pop(0)
                            self.cuts.append(self.up)
                            break
                target.sendall(data)
                if self._speed and upwards:
                    time.sleep(len(data) / self._speed)
        except OSError:
            pass
        for side in (source, target):
            try:
                side.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


def distinctive_lines(path: Path) -> list[bytes]:
    """Return lines that occur only in an owner's text, verbatim and JSON-escaped."""
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    lines = {line.strip() for text in texts for line in text.splitlines()}
    long = sorted(line for line in lines if len(line) > 40 and len(re.findall(r"\w+", line)) >= 4)
    return [line.encode() for line in long] + [json.dumps(line)[1:-1].encode() for line in long]


def work_pid(owner: Owner, request: ExpertRequest) -> int:
    """Return the id of the training process."""
    return int((owner.run_folder(request) / "process.txt").read_text())


def kill_work(owner: Owner, request: ExpertRequest) -> None:
    os.kill(work_pid(owner, request), signal.SIGKILL)
