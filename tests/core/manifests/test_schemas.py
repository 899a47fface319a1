"""The shipped JSON Schemas are those of the records, and accept what the commands write."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import jsonschema
import pytest
from manifest_schemas import SCHEMA_NAMES, schema_of, shipped_schema

from expertctl.core.artefacts.files import json_text, read_json
from expertctl.workspace import Workspace

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", SCHEMA_NAMES)
def test_the_shipped_schema_is_that_of_the_records(name: str) -> None:
    """Mend with: python tests/goldens/schemas.py"""
    assert shipped_schema(name) == json_text(schema_of(name))


def test_the_page_describes_the_records_as_they_are() -> None:
    """Mend with: python tests/goldens/schemas.py"""
    script = runpy.run_path(str(ROOT / "tests" / "goldens" / "schemas.py"))
    assert (ROOT / "docs" / "manifests.md").read_text(encoding="utf-8") == script["page"]()


@pytest.mark.parametrize("name", SCHEMA_NAMES)
def test_a_schema_is_one(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema_of(name))


def test_the_manifests_of_a_workspace_are_valid(flexolmo_workspace: Workspace) -> None:
    manifests = [path for name in SCHEMA_NAMES for path in flexolmo_workspace.root.rglob(name)]
    assert {path.name for path in manifests} >= {"seed.json", "expert.json", "run.json"}
    for path in manifests:
        validate(path)


def test_an_unknown_field_is_refused(shared_workspace: Path) -> None:
    content = read_json(shared_workspace / "seed" / "seed.json") | {"colour": "red"}
    with pytest.raises(jsonschema.ValidationError, match="colour"):
        jsonschema.validate(content, json.loads(shipped_schema("seed.json")))


def validate(path: Path) -> None:
    jsonschema.validate(read_json(path), json.loads(shipped_schema(path.name)))
