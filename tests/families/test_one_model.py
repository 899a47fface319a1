"""Training, averages, mixtures and routers of every family are as docs/families.md says."""

from __future__ import annotations

import pytest
from family_checks import CHECKS

from expertctl.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.families, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("column", ["Feed-forward trainer", "Average", "Mixture", "Router tuning"])
def test_a_family_does_what_the_page_says(
    workspace: Workspace, family: str, column: str, documented: dict[str, dict[str, str]]
) -> None:
    assert CHECKS[column](workspace) == documented[family][column]
