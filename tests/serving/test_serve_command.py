"""`expertctl serve` as a process: ready, served, stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from expertctl.cli.main import cli
from expertctl.core.errors import UserError
from expertctl.serving.guard import is_loopback
from expertctl.serving.server import read_token


@contextmanager
def served(
    *words: str, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Run the command until its line of JSON, which is given."""
    process = subprocess.Popen(
        [sys.executable, "-m", "expertctl.cli.main", "--json", "serve", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        assert process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            assert line, process.stderr.read() if process.stderr is not None else ""
            text += line
        yield process, json.loads(text)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_stop_lets_running_requests_finish(model_folder: Path) -> None:
    with served(str(model_folder), "--port", "0") as (process, content):
        assert content["models"] == [model_folder.name]
        body = {"model": model_folder.name, "prompt": "x", "max_tokens": 120, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", content["url"] + "/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(content["url"] + "/health")


@pytest.mark.slow
def test_requests_longer_than_the_grace_time_are_cut(model_folder: Path) -> None:
    with (
        served(str(model_folder), "--port", "0", "--grace-seconds", "0") as (process, content),
        socket.create_connection(("127.0.0.1", int(content["url"].rpartition(":")[2]))) as connection,
    ):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n"
        connection.sendall(head)  # and no body
        threading.Event().wait(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


@pytest.mark.slow
def test_a_token_from_the_environment(model_folder: Path) -> None:
    with served(str(model_folder), "--port", "0", "--host", "0.0.0.0", environment={"EXPERTCTL_TOKEN": "sesame"}) as (
        _,
        content,
    ):
        url = f"http://127.0.0.1:{content['url'].rpartition(':')[2]}/v1/models"
        assert content["token"] is True
        assert httpx.get(url, headers={"Host": "this.machine"}).status_code == 401
        headers = {"Host": "this.machine", "Authorization": "Bearer sesame"}
        assert httpx.get(url, headers=headers).status_code == 200


def test_a_port_that_is_taken(model_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(cli, ["serve", str(model_folder), "--port", port])
    assert isinstance(result.exception, UserError)
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in str(result.exception)


def test_other_machines_need_a_token(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPERTCTL_TOKEN", raising=False)
    result = CliRunner().invoke(cli, ["serve", str(model_folder), "--host", "0.0.0.0", "--port", "0"])
    assert isinstance(result.exception, UserError)
    assert "requests need a token" in str(result.exception)
    file = tmp_path / "token"
    file.write_text("")
    with pytest.raises(UserError, match="is empty"):
        read_token(file, "127.0.0.1")
    file.write_text("schlüssel\n", encoding="utf-8")
    with pytest.raises(UserError, match="printable ASCII"):
        read_token(file, "127.0.0.1")
    file.write_text(" sesame\n")
    assert read_token(file, "0.0.0.0") == "sesame"
    assert read_token(None, "127.0.0.1") is None


def test_models_of_the_same_name_are_refused(model_folder: Path) -> None:
    result = CliRunner().invoke(cli, ["serve", str(model_folder), str(model_folder)])
    assert isinstance(result.exception, UserError)
    assert "the same name" in str(result.exception)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("example.org", False),
    ],
)
def test_which_hosts_are_this_machine_only(host: str, local: bool) -> None:
    assert is_loopback(host) is local
