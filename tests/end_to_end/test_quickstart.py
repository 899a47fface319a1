"""The quickstart, in small."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from manifest_schemas import SCHEMA_NAMES, shipped_schema
from scripts import run

from expertctl import verify

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_quickstart_tells_the_whole_story_and_goes_on_where_it_was(corpora: Path, tmp_path: Path) -> None:
    """With text this short the figures say nothing; what is made, and made once, does."""
    call = (
        "-m",
        "expertctl.cli.main",
        "--json",
        "quickstart",
        tmp_path / "demo",
        "--corpora",
        corpora,
        "--tokens",
        "20000",
    )
    report = json.loads(run(*call))
    models = ["seed", "chance", "prose", "uniform-average", "ensemble"]
    assert list(report["models"]) == models
    assert report["domains"] == ["chance", "prose"]
    folders = [*(tmp_path / "demo" / "experts").iterdir(), *(tmp_path / "demo" / "generalists").iterdir()]
    assert len(folders) == 4
    manifests = [path for name in SCHEMA_NAMES for path in (tmp_path / "demo").rglob(name)]
    assert {path.name for path in manifests} == {"seed.json", "expert.json", "run.json", "generalist.json"}
    for path in manifests:
        jsonschema.validate(json.loads(path.read_text()), json.loads(shipped_schema(path.name)))
    stamps = {}
    for folder in folders:
        assert verify(folder) == []
        stamps[folder] = (folder / "config.json").stat().st_mtime_ns if (folder / "config.json").exists() else 0
    assert json.loads(run(*call)) == report
    for folder, stamp in stamps.items():
        assert not stamp or (folder / "config.json").stat().st_mtime_ns == stamp
