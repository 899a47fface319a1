"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpora(seeded_project: Path) -> Path:
    """Text of two small domains, a subfolder each."""
    return seeded_project / "text"
