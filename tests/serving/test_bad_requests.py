"""Requests that are wrong, too large, too slow or not allowed: a status that says so, and the server goes on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import RunningServer, running_server

from expertctl.core.process import patient_protocol
from expertctl.serving.limits import Limits

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture(autouse=True)
def _lives_on(client: httpx.Client) -> Iterator[None]:
    yield
    body = {"model": "mixture", "prompt": "x", "max_tokens": 2}
    assert client.post(COMPLETIONS, json=body).status_code == 200


def message(response: httpx.Response, status: int) -> str:
    """Return the message of an error with this status, which has OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff{}", "not valid UTF-8 at byte 0"),
        (b"{", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"[" * 19_000, "too deeply"),
        (b'{"a":' * 3_000 + b"1" + b"}" * 3_000, "too deeply"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b'{"temperature": NaN}', "NaN is not JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_bodies_that_are_no_json_object(client: httpx.Client, body: bytes, reason: str) -> None:
    assert reason in message(client.post(COMPLETIONS, content=body), 400)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model": "mixtur"}, "did you mean 'mixture'?"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 101}, "max_tokens is 101, at most 100"),
        ({"prompt": "word " * 40, "max_tokens": 90}, "exceeds the model's 128 positions"),
        ({"prompt": [1, 99_999]}, "has only 300 rows"),
        ({"prompt": [-1]}, "-1"),
        ({"prompt": []}, "at least one"),
        ({"temperature": -1}, "temperature: "),
        ({"temperature": "hot"}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"n": 65}, "65 texts in one request, at most 64"),
        ({"logprobs": 21}, "at most 20"),
        ({"seed": 1 << 70}, "seed: "),
        ({"stop": ["x"] * 17}, "stop: "),
        ({"wihtout": ["law"]}, "wihtout: unknown field"),
        ({"decoder": "speculative"}, "the server was started with no decoder, not with 'speculative'"),
        ({"logit_bias": {"1": 5}}, "'logit_bias' is not supported"),
        ({"frequency_penalty": 0.5}, "'frequency_penalty' is not supported"),
        ({"without": ["lw"]}, "did you mean 'law'?"),
        ({"without": ["code", "law", "news"]}, "no expert is left"),
        ({"shares": True}, "request shares from an ensemble"),
    ],
)
def test_requests_that_the_server_cannot_fulfil(client: httpx.Client, fields: dict[str, Any], reason: str) -> None:
    body = {"model": "mixture", "prompt": "x", "max_tokens": 2, **fields}
    assert reason in message(client.post(COMPLETIONS, json=body), 404 if "model" in fields else 400)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages"),
        ([{"content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "only parts of type 'text'"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], "arguments are not valid JSON"),
    ],
)
def test_conversations_that_are_none(client: httpx.Client, messages: Any, reason: str) -> None:
    response = client.post("/v1/chat/completions", json={"model": "mixture", "messages": messages})
    assert reason in message(response, 400)


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    assert "/v2: Not Found" in message(client.get("/v2"), 404)
    assert "Method Not Allowed" in message(client.get(COMPLETIONS), 405)


def test_a_large_body_is_refused_before_it_is_sent(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {100 << 20}\r\n\r\n"
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(1000)


def test_a_large_body_of_unknown_length_is_refused(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    assert "larger than 20,000 bytes" in message(client.post(COMPLETIONS, content=chunks()), 413)


def test_a_body_that_drips_is_not_waited_for(server: RunningServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n".encode())
        answer, begin = b"", time.monotonic()
        connection.settimeout(0.3)
        while b" 408 " not in answer:
            assert time.monotonic() - begin < 10
            try:
                connection.sendall(b"x")
                answer += connection.recv(1000)
            except TimeoutError:
                continue


def test_headers_that_drip_are_not_waited_for(served_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_protocol, "HEADERS_S", 0.3)
    with (
        running_server([served_folders / "mixture"]) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection,
    ):
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with suppress(ConnectionResetError):
            assert connection.recv(100) == b""


def test_a_full_queue_is_answered_with_429(client: httpx.Client) -> None:
    body = {"model": "mixture", "prompt": ["x"] * 61, "max_tokens": 2}
    response = client.post(COMPLETIONS, json=body)
    assert "too many requests" in message(response, 429)
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_pages_of_others_do_not_reach_the_server(client: httpx.Client, headers: dict[str, str], status: int) -> None:
    response = client.get("/v1/models", headers=headers)
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers


def test_a_token_is_asked_for(served_folders: Path) -> None:
    with (
        running_server([served_folders / "mixture"], Limits(), token="sesame", template=None) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        assert client.get("/health").status_code == client.get("/").status_code == 200
        for path in ("/v1/models", "/metrics", "/nothing"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer sesam"}).status_code == 401
            assert client.get(path, headers={"Authorization": "Basic sesame"}).status_code == 401
        allowed = {"Authorization": "Bearer sesame"}
        assert client.get("/v1/models", headers=allowed).json()["data"][0]["chat"] is False
        body = {"model": "mixture", "messages": [{"role": "user", "content": "x"}]}
        response = client.post("/v1/chat/completions", json=body, headers=allowed)
        assert "has no chat template" in message(response, 400)


def test_metrics_count_requests_and_tokens(client: httpx.Client) -> None:
    def number(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))

    names = ("expertctl_tokens_total", "expertctl_request_seconds_count", "expertctl_first_token_seconds_count")
    before = [number(name) for name in names]
    body = {"model": "mixture", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
    assert client.post(COMPLETIONS, content=json.dumps(body)).status_code == 200
    assert [number(name) - earlier for name, earlier in zip(names, before, strict=True)] == [7, 1, 1]
    assert number("expertctl_running") == number("expertctl_waiting") == 0
