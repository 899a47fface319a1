"""Write the JSON Schemas that the package ships, from the records as they are now.

python tests/goldens/schemas.py
"""

from __future__ import annotations

from pathlib import Path

from expertctl.core.artefacts.files import json_text
from expertctl.core.manifests.schemas import SCHEMA_NAMES, schema_of

FOLDER = Path(__file__).parents[2] / "core" / "manifests" / "schemas"

if __name__ == "__main__":
    for name in SCHEMA_NAMES:
        (FOLDER / name).write_text(json_text(schema_of(name)), encoding="utf-8")
