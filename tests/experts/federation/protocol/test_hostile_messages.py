"""Messages with hostile values in every field: refused in one line, or as harmless as any other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from federation_messages import PROGRESS, REQUEST, SIGNED
from hypothesis import given, settings
from hypothesis import strategies as st

from expertctl import UserError
from expertctl.core.artefacts.files import inside, require_regular
from expertctl.experts.federation.owner.owner import Owner
from expertctl.experts.federation.protocol.delivery import SignedStatement
from expertctl.experts.federation.protocol.keys import make_key
from expertctl.experts.federation.protocol.requests import ExpertRequest, Progress

MESSAGES: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "request": (ExpertRequest.of_json, REQUEST.as_json()),
    "delivery": (SignedStatement.of_json, SIGNED.as_json()),
    "progress": (Progress.of_json, PROGRESS.as_json()),
}
HOSTILE: tuple[Any, ...] = (
    *("/etc/passwd", "../../x", "..", ".", "~", "C:\\x", "a\0b", "\ud800", "a" * 300, "\x1b[2J", "a\n", "", " ", "é"),
    *(math.inf, math.nan, -math.inf, 1e308, 10**19, -1, -0.5, True, None),
    *([], {}, [[]], {"a": {"b": 1}}, ["x"] * 5000, {str(number): 0 for number in range(5000)}),
)


def places(content: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value of a JSON document."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (key,)
        yield from ((key, *rest) for rest in places(value))


def replaced(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(content)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return changed


def texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from texts(value)
    elif isinstance(content, list):
        for value in content:
            yield from texts(value)


@pytest.mark.parametrize("name", MESSAGES)
def test_a_hostile_value_in_any_field_is_refused_or_harmless(name: str) -> None:
    parse, content = MESSAGES[name]
    accepted, refusals = 0, []
    for place in places(content):
        for value in HOSTILE:
            try:
                message = parse(replaced(content, place, value))
            except UserError as error:
                refusals.append(str(error))
                continue
            accepted += 1
            written = message.as_json()
            assert parse(written) == message
            assert all(math.isfinite(number) for number in numbers(written))
            named = {key: value for key, value in written.items() if key not in ("recipe", "statement")}
            assert all(text.isprintable() and len(text) <= 300 for text in texts(named)), (place, value)
    assert not any("\n" in refusal for refusal in refusals)
    assert 0 < accepted < 200  # such as a longer text where any short text is allowed


def numbers(content: Any) -> Iterator[float]:
    if isinstance(content, int | float):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from numbers(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), value=JSON, name=st.sampled_from(sorted(MESSAGES)))
def test_any_json_in_any_place_is_a_message_or_a_user_error(data: st.DataObject, value: Any, name: str) -> None:
    parse, content = MESSAGES[name]
    place = data.draw(st.sampled_from(sorted(places(content), key=repr)))
    try:
        message = parse(replaced(content, place, value))
    except UserError:
        return
    assert parse(message.as_json()) == message


@pytest.mark.parametrize("owner", ["/home/me/workspace/experts/x", "../../x", "..", "seed", "a/b", "-x"])
def test_an_owner_acts_only_below_its_state(tmp_path: Path, owner: str) -> None:
    outside = tmp_path / "experts" / "x"
    outside.mkdir(parents=True)
    state = tmp_path / "state"
    key = make_key(state)
    content = {**REQUEST.as_json(), "key": key.public.fingerprint, "owner": owner}
    with pytest.raises(UserError, match="the field 'owner' of the request"):
        Owner(state).take(ExpertRequest.of_json(content))
    assert outside.is_dir()
    assert not (state / "requests").exists()


def test_an_owner_takes_requests_to_its_own_name_only(tmp_path: Path) -> None:
    key = make_key(tmp_path)
    content = {**REQUEST.as_json(), "key": key.public.fingerprint}
    Owner(tmp_path).take(ExpertRequest.of_json(content))
    other = ExpertRequest.of_json({**content, "owner": "site-b", "id": "f" * 16})
    with pytest.raises(UserError, match="for 'site-b', and this state folder is that of 'site-a'"):
        Owner(tmp_path).take(other)
    assert [request.owner for request in Owner(tmp_path).requests()] == ["site-a"]


@pytest.mark.parametrize("name", ["..", ".", "", "/etc", "a/b", "a\\b", "a\0", "x" * 256, "\ud800" * 100])
def test_a_path_from_names_stays_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is not the name of a file or folder"):
        inside(tmp_path, "runs", name)


def test_a_file_from_outside_is_neither_link_nor_pipe(tmp_path: Path) -> None:
    import os

    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    assert require_regular(tmp_path / "file") == tmp_path / "file"
    for name in ("link", "pipe", "."):
        with pytest.raises(UserError, match="not a regular file"):
            require_regular(tmp_path / name)
