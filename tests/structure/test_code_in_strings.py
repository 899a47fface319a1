"""Imports in scripts that are started as processes, and in pages, lead to what exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that modules import

FILES = sorted(
    path
    for folder in ("docs", "examples", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".md", ".sh") and path != Path(__file__)
)
IMPORT = re.compile(r"from (expertctl(?:\.\w+)*) import ((?:\w+(?: as \w+)?(?:, )?)+)")


def exists(module: str, name: str) -> bool:
    try:
        if hasattr(importlib.import_module(module), name):
            return True
        importlib.import_module(f"{module}.{name}")
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_of_the_package_leads_somewhere(path: Path) -> None:
    wrong = [
        f"{module}: {name}"
        for module, names in IMPORT.findall(path.read_text(encoding="utf-8"))
        for name in (part.split(" as ")[0].strip() for part in names.split(",") if part.strip())
        if not exists(module, name)
    ]
    assert wrong == []
