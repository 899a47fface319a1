"""A workspace with a seed and three experts, made without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def workspace(tmp_path: Path, new_workspace: Any) -> Path:
    made: Path = new_workspace(tmp_path / "ws", ("code", "law", "news"))
    return made
