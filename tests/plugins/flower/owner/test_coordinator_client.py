"""The coordinator's answers at the owner: unknown and missing fields are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from federation_messages import SIGNED

from expertctl import UserError
from expertctl.experts.federation.owner.owner import Owner
from expertctl.experts.federation.protocol.requests import Progress
from expertctl.plugins.flower.owner.coordinator_client import CoordinatorClient
from expertctl.plugins.flower.processes.child import backoff_s

HELLO = {"name": "site-a", "open": ["0123456789abcdef"], "more": False}


@pytest.mark.parametrize(
    ("call", "answer", "message"),
    [
        (CoordinatorClient.hello, {**HELLO, "motd": "hi"}, "has an unknown field 'motd'"),
        (CoordinatorClient.hello, {"name": "site-a", "open": []}, "has no field 'more'"),
        (CoordinatorClient.hello, {**HELLO, "open": [1]}, "has the wrong type"),
        (CoordinatorClient.hello, [], "is not a coordinator's"),
        (lambda client: client.finish("1"), {"state": "judging", "eta": 3}, "has an unknown field 'eta'"),
        (lambda client: client.finish("1"), {"refusal": "NORM", "detail": "x"}, "unknown field 'detail'"),
        (lambda client: client.finish("1"), {}, "has neither a state nor a refusal"),
        (lambda client: client.finish("1"), {"state": "done"}, "has the wrong type"),
        (lambda client: client.finish("1"), {"state": ["judging"]}, "has the wrong type"),
        (lambda client: client.begin("1", SIGNED), {"missing": {"../x": [0]}}, "has the wrong type"),
        (lambda client: client.begin("1", SIGNED), {"missing": {"x": ["0"]}}, "has the wrong type"),
        (lambda client: client.begin("1", SIGNED), {"missing": None}, "has the wrong type"),
        (lambda client: client.begin("1", SIGNED), {"missing": {"x": [0.5]}}, "has the wrong type"),
        (lambda client: client.progress("1", Progress("waiting")), {"ok": True}, "unknown field 'ok'"),
    ],
)
def test_unexpected_answers_are_refused(
    hub: Any,
    new_owner: Callable[[str], Owner],
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[CoordinatorClient], object],
    answer: Any,
    message: str,
) -> None:
    client = hub.client(new_owner("site-a"))
    monkeypatch.setattr(client, "_send", lambda *request: json.dumps(answer).encode())
    with pytest.raises(UserError, match=message):
        call(client)


def test_the_back_off_grows_to_half_a_minute() -> None:
    pauses = [backoff_s(failures) for failures in range(1, 20)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (1.0, 30.0)
