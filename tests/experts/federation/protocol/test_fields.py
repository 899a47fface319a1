"""Records from outside: an unknown or missing field is refused, and the error names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from federation_messages import FILE, PROGRESS, RECIPE, REQUEST, ROUND, SIGNED, STATEMENT

from expertctl import UserError
from expertctl.experts.federation.protocol.delivery import SignedStatement, Statement
from expertctl.experts.federation.protocol.parts import FileParts
from expertctl.experts.federation.protocol.requests import ExpertRequest, Progress, Recipe, RoundOf


@pytest.mark.parametrize(
    ("parse", "content", "record"),
    [
        (ExpertRequest.of_json, REQUEST.as_json(), "the request"),
        (Recipe.of_json, RECIPE.as_json(), "the recipe"),
        (RoundOf.of_json, asdict(ROUND), "the round of a request"),
        (FileParts.of_json, FILE.as_json(), "a file entry"),
        (Progress.of_json, PROGRESS.as_json(), "a progress message"),
        (Statement.of_json, STATEMENT.as_json(), "the statement of a delivery"),
        (SignedStatement.of_json, SIGNED.as_json(), "the delivery"),
    ],
)
def test_unknown_and_missing_fields_are_named(
    parse: Callable[[Any], object], content: dict[str, Any], record: str
) -> None:
    parse(content)
    with pytest.raises(UserError, match=f"^{record} has an unknown field 'extra'; install the same version"):
        parse({**content, "extra": 1})
    first = next(iter(content))
    with pytest.raises(UserError, match=f"^{record} has no field '{first}'; install the same version"):
        parse({name: value for name, value in content.items() if name != first})
    with pytest.raises(UserError, match=f"^{record} is not a JSON object"):
        parse([content])


def test_a_nested_record_is_checked_as_well() -> None:
    content = REQUEST.as_json()
    content["seed_files"][0]["mode"] = 0o777
    with pytest.raises(UserError, match="a file entry has an unknown field 'mode'"):
        ExpertRequest.of_json(content)
