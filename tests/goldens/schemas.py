"""Write the JSON Schemas that the package ships and docs/manifests.md, from the records as they are now.

python tests/goldens/schemas.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expertctl.core.artefacts.files import json_text

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "helpers"))  # as pytest does

from manifest_schemas import SCHEMA_NAMES, schema_of  # noqa: E402

FOLDER = ROOT / "core" / "manifests" / "schemas"
PAGE = ROOT / "docs" / "manifests.md"
INTRODUCTION = """\
# Manifests

Every artefact has a manifest: `seed/seed.json`, `experts/NAME/expert.json` or `generalists/NAME/generalist.json`; a
[memory](commands/memories.md) has `memories/NAME/memory.json`, which has fields of its own. It
records parents, digests of all tensors and files, the resolved configuration, data statements, metrics and versions. A
run also has `run.json`, the specification that it was started with. Manifests never contain text of a corpus.

Fields that are not listed here are refused. None stands for `null`. The JSON Schemas are part of the package:

```python
from importlib.resources import files

schema = (files("expertctl.core.manifests") / "schemas" / "expert.json").read_text()
```

This page is generated from the records in `core/manifests/` by `python tests/goldens/schemas.py`.
"""


def page() -> str:
    """Return the text of docs/manifests.md."""
    seed, generalist, run, memory = (
        schema_of(name) for name in ("seed.json", "generalist.json", "run.json", "memory.json")
    )
    records = {**seed["$defs"], **generalist["$defs"], **run.get("$defs", {}), **memory["$defs"]}
    records |= {"RunSpec": run, "GeneralistConfig": generalist["properties"]["config"]}
    of_config = [{"$ref": f"#/$defs/{name}"} for name in ("RunSpec", "ImportedSeed", "GeneralistConfig")]
    properties = {
        **generalist["properties"],
        "kind": {"enum": ["seed", "expert", "generalist"]},
        "config": {
            "anyOf": of_config,
            "description": "Resolved configuration of the run, the import or the merge, including random seeds.",
        },
    }
    sections = [("seed.json, expert.json, generalist.json", {**generalist, "properties": properties})]
    sections += [("memory.json", memory)]
    sections += [(title, records[title]) for title in sorted(records)]
    return "\n".join([INTRODUCTION, *(line for title, schema in sections for line in section(title, schema))])


def section(title: str, schema: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that describe one record."""
    yield f"## {title}\n"
    if "description" in schema:
        yield " ".join(schema["description"].split()) + "\n"
    yield "| Field | Type | Meaning |\n|---|---|---|"
    for name, field in schema.get("properties", {}).items():
        meaning = " ".join(field.get("description", "").split())
        yield f"| `{name}` | {kind(field)} | {meaning} |"
    yield ""


def kind(field: dict[str, Any]) -> str:
    """Return the type of a field in words."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        return " or ".join(kind(choice) for choice in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array" and isinstance(field.get("items"), dict):
        return f"list of {kind(field['items'])}"
    if field.get("type") == "object" and isinstance(field.get("additionalProperties"), dict):
        return f"mapping to {kind(field['additionalProperties'])}"
    return {"object": "mapping", "array": "list"}.get(field.get("type", "any"), field.get("type", "any"))


if __name__ == "__main__":
    for name in SCHEMA_NAMES:
        (FOLDER / name).write_text(json_text(schema_of(name)), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
