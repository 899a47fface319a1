"""A workspace per family, and what docs/families.md says of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from family_checks import CHECKS, family_workspace
from tiny_families import FAMILIES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from expertctl.workspace import Workspace

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    if request.param not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("this version of transformers does not have the family")
    return str(request.param)


@pytest.fixture(scope="module")
def workspace(family: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    root = tmp_path_factory.mktemp(family)
    yield family_workspace(root / "ws", family)
    shutil.rmtree(root)


@pytest.fixture(scope="session")
def documented() -> dict[str, dict[str, str]]:
    """The table of docs/families.md: family -> column -> cell."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    head = next(cells for cells in rows if cells[0] == "Family")
    assert head == ["Family", *CHECKS]
    families = [cells for cells in rows if cells[0].startswith("`") and len(cells) == len(head)]
    return {name.strip("`"): dict(zip(CHECKS, cells, strict=True)) for name, *cells in families}
