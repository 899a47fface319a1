"""Ensembles and stitched models of every family are as docs/families.md says.

They are in a file of their own, which pytest-xdist gives to another process.
"""

from __future__ import annotations

import pytest
from family_checks import CHECKS

from expertctl.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.families, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("column", ["Ensemble", "Stitched"])
def test_a_family_does_what_the_page_says(
    workspace: Workspace, family: str, column: str, documented: dict[str, dict[str, str]]
) -> None:
    assert CHECKS[column](workspace) == documented[family][column]
