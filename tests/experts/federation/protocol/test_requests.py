"""Requests and progress: round trips through JSON, and refusal of invalid content."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from expertctl import UserError
from expertctl.experts.federation.protocol.parts import FileParts
from expertctl.experts.federation.protocol.requests import ExpertRequest, Progress, Recipe, deadline_in, new_identifier

NOW = datetime(2030, 1, 1, tzinfo=UTC)
REQUEST = ExpertRequest(
    "0123456789abcdef",
    "site-a",
    f"SHA256:{'x' * 43}",
    "ab" * 32,
    (FileParts("config.json", 1, "0" * 64, ("0" * 64,)),),
    Recipe("flexolmo", {"embedding": "none"}, {"tokens": 100}, {"epsilon": 8.0, "delta": 1e-6}),
    NOW,
)


def test_stages_and_annealing_cannot_be_asked_of_owners() -> None:
    with pytest.raises(UserError, match=r"training.annealing cannot be asked of owners; leave it out"):
        Recipe("btm", training={"annealing": {"share": 0.5, "domains": ["public"]}})
    with pytest.raises(UserError, match=r"training.stages cannot be asked of owners; leave it out"):
        Recipe("flexolmo", training={"stages": [{"share": 0.5, "sequence_length": 16}]})
    assert Recipe("flexolmo", training={"stages": []}).training == {"stages": []}


def test_a_request_survives_a_json_round_trip() -> None:
    assert ExpertRequest.of_json(REQUEST.as_json()) == REQUEST
    assert ExpertRequest.of_json(REQUEST.as_json()).recipe.digest == REQUEST.recipe.digest
    assert Recipe("flexolmo").digest != REQUEST.recipe.digest


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"id": "../../etc"},
        {"id": "0" * 15},
        {"owner": 3},
        {"deadline": "tomorrow"},
        {"deadline": "2030-01-01T00:00:00"},
        {"seed_files": {}},
        {"seed_files": [{"name": "../x"}]},
        {"recipe": {}},
        {"recipe": {**Recipe("all").as_json(), "options": []}},
        {"more": 1},
    ],
)
def test_invalid_requests_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        ExpertRequest.of_json({**REQUEST.as_json(), **change})


@pytest.mark.parametrize("content", [None, [], "x", {}])
def test_content_that_is_not_an_object_is_refused(content: Any) -> None:
    with pytest.raises(UserError):
        ExpertRequest.of_json(content)


@pytest.mark.parametrize(
    ("text", "hours"), [("48h", 48), ("30m", 0.5), ("2d", 48), ("1d 12h", 36), ("1.5h", 1.5), ("90s", 0.025)]
)
def test_durations_are_parsed(text: str, hours: float) -> None:
    assert deadline_in(text, NOW) - NOW == timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "soon", "48", "h", "-3h", "3h later", "99999w"])
def test_invalid_durations_are_errors(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a duration|more than ten years"):
        deadline_in(text, NOW)


def test_identifiers_are_random() -> None:
    assert len({new_identifier() for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "change",
    [
        {"state": "asleep"},
        {"code": "rm -rf /"},
        {"loss": float("nan")},
        {"step": -1},
        {"loss": "low"},
        {"host": "x"},
    ],
)
def test_progress_holds_numbers_and_codes_only(change: dict[str, Any]) -> None:
    progress = Progress("training", 3, 10, 2.5, 7.0)
    assert Progress.of_json(progress.as_json()) == progress
    with pytest.raises(UserError):
        Progress.of_json({**progress.as_json(), **change})
