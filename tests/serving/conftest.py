"""One server for all tests of the HTTP interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import RunningServer, running_server

from expertctl.serving.limits import Limits
from expertctl.workspace import Workspace


@pytest.fixture(scope="session")
def served_folders(tmp_path_factory: pytest.TempPathFactory, new_workspace: Any) -> Path:
    """Folder of the generalists `ensemble` and `mixture` of the experts code, law and news."""
    root: Path = new_workspace(tmp_path_factory.mktemp("served") / "workspace")
    workspace = Workspace(root)
    experts = ["code", "law", "news"]
    workspace.merge("ensemble", method="ensemble", experts=experts, options={"prior": "uniform"})
    workspace.merge("mixture", method="btx", experts=experts)
    return root / "generalists"


@pytest.fixture(scope="session")
def server(served_folders: Path) -> Iterator[RunningServer]:
    limits = Limits(body_bytes=20_000, body_seconds=1.0, max_tokens=100, waiting=60, variants=3)
    with running_server([served_folders / "ensemble", served_folders / "mixture"], limits) as running:
        yield running
