"""JSON Schemas of the files that describe artefacts, generated from the records that read them."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from pydantic import TypeAdapter

from expertctl.core.manifests.generalist import GeneralistConfig
from expertctl.core.manifests.manifest import CHECKSUM, ImportedSeed, Manifest
from expertctl.core.manifests.run import RunSpec
from expertctl.core.models.decoding.memories.manifest import MemoryManifest

CONFIGS: dict[str, Any] = {"seed": RunSpec | ImportedSeed, "expert": RunSpec | None, "generalist": GeneralistConfig}
"""What `config` holds in the manifest of each kind."""
SCHEMA_NAMES = ("seed.json", "expert.json", "generalist.json", "run.json", "memory.json")
CHECKSUM_FIELD = {"type": "string", "description": "sha256 of this file with the value left empty."}
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema_of(file_name: str) -> dict[str, Any]:
    """Return the JSON Schema of `seed.json`, `expert.json`, `generalist.json`, `run.json` or `memory.json`."""
    if file_name == "run.json":
        return {"$schema": DIALECT, "title": file_name, **TypeAdapter(RunSpec).json_schema()}
    if file_name == "memory.json":
        memory = TypeAdapter(MemoryManifest).json_schema()
        fields = {**memory["properties"], CHECKSUM: CHECKSUM_FIELD}
        return {"$schema": DIALECT, **memory, "title": file_name, "properties": fields}
    kind = file_name.removesuffix(".json")
    manifest = TypeAdapter(Manifest).json_schema()
    config = TypeAdapter(CONFIGS[kind]).json_schema()
    definitions = {**manifest.pop("$defs", {}), **config.pop("$defs", {})}
    properties = {
        **manifest["properties"],
        "kind": {"const": kind},
        "config": config,
        CHECKSUM: CHECKSUM_FIELD,
    }
    return {"$schema": DIALECT, **manifest, "title": file_name, "properties": properties, "$defs": definitions}


def shipped_schema(file_name: str) -> str:
    """Return the text of the schema that the package ships for a file."""
    return (files("expertctl.core.manifests") / "schemas" / file_name).read_text(encoding="utf-8")
