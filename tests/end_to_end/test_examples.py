"""The quickstart and the examples, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from expertctl import verify
from expertctl.core.manifests.schemas import SCHEMA_NAMES, shipped_schema

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(*words: str | Path) -> str:
    result = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def corpora(seeded_project: Path) -> Path:
    return seeded_project / "text"


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
    found = json.loads(run(*call))
    models = ["seed", "chance", "prose", "uniform-average", "posterior-average", "ensemble"]
    assert list(found["models"]) == models
    assert found["domains"] == ["chance", "prose"]
    folders = [*(tmp_path / "demo" / "experts").iterdir(), *(tmp_path / "demo" / "generalists").iterdir()]
    assert len(folders) == 5
    manifests = [path for name in SCHEMA_NAMES for path in (tmp_path / "demo").rglob(name)]
    assert {path.name for path in manifests} == {"seed.json", "expert.json", "run.json", "generalist.json"}
    for path in manifests:
        jsonschema.validate(json.loads(path.read_text()), json.loads(shipped_schema(path.name)))
    stamps = {}
    for folder in folders:
        assert verify(folder) == []
        stamps[folder] = (folder / "config.json").stat().st_mtime_ns if (folder / "config.json").exists() else 0
    assert json.loads(run(*call)) == found
    for folder, stamp in stamps.items():
        assert not stamp or (folder / "config.json").stat().st_mtime_ns == stamp


def test_the_branch_train_merge_example_prints_its_table(corpora: Path, tmp_path: Path) -> None:
    out = run(
        ROOT / "examples/btm/run.py",
        "--corpora",
        corpora,
        "--seeds",
        "0",
        "--tokens",
        "8192",
        "--out",
        tmp_path,
    )
    rows = {line.split("|")[1].strip(): line for line in out.splitlines() if line.startswith("| ")}
    assert {"dense", "random-split forest", "ensemble, cached prior", "posterior average, per target"} <= set(rows)
    scores = json.loads((tmp_path / "seed-0" / "rows.json").read_text())
    mean = sum(scores["seed"].values()) / 2
    assert f"{mean:.4f}" in rows["seed"]


def test_the_flexolmo_example_prints_its_tables(corpora: Path, tmp_path: Path) -> None:
    budgets = ("--seed-tokens", "8192", "--owner-tokens", "4096", "--tuning-tokens", "2048")
    call = (
        ROOT / "examples/flexolmo/run.py",
        "--corpora",
        corpora,
        "--seeds",
        "0",
        *budgets,
        "--out",
        tmp_path,
    )
    out = run(*call, "--no-ablations")
    rows = {line.split("|")[1].strip(): line for line in out.splitlines() if line.startswith("| ")}
    assert {"flexolmo", "flexolmo, router tuned on public text", "unrestricted mixture", "everybody"} <= set(rows)
    assert "flexolmo, no bias" not in rows
    scores = json.loads((tmp_path / "seed-0" / "rows.json").read_text())
    mean = sum(scores["flexolmo"].values()) / 2
    assert f"{mean:.4f}" in rows["flexolmo"]
    assert run(*call, "--no-ablations") == out


def test_the_stitching_example_prints_its_tables(corpora: Path, tmp_path: Path) -> None:
    budgets = ("--seed-tokens", "8192", "--expert-tokens", "4096", "--tuning-tokens", "2048")
    call = (
        ROOT / "examples/bts/run.py",
        "--corpora",
        corpora,
        "--domains",
        "chance,prose",
        "--seeds",
        "0",
        *budgets,
    )
    out = run(*call, "--out", tmp_path)
    found = json.loads((tmp_path / "seed-0" / "rows.json").read_text())
    assert found["scores"]["stitched"] == pytest.approx(found["scores"]["seed"], rel=1e-5)
    assert found["scores"]["stitched, trained"] != found["scores"]["seed"]
    assert found["costs"]["stitched, trained"]["trained"] > 0
    assert "| bits per byte, crossed text |" in out
    assert out.count("| stitched, trained |") == 3


def test_the_clusters_example_prints_its_tables(corpora: Path, tmp_path: Path) -> None:
    budgets = ("--seed-tokens", "8192", "--tokens", "8192", "--passage-bytes", "300")
    out = run(
        *(ROOT / "examples/cbtm/run.py", "--corpora", corpora, "--clusters", "2", "--seeds", "0"),
        *(*budgets, "--out", tmp_path),
    )
    found = json.loads((tmp_path / "seed-0" / "rows.json").read_text())
    sorted_by = found["clusters"]
    assert sorted_by["balanced k-means"]["purity"] > sorted_by["random"]["purity"]
    assert set(found["scores"]["clusters, top 1"]) == {"set-chance", "set-prose"}
    assert found["scores"]["clusters, top 1"] != found["scores"]["clusters, all"]
    assert found["temperatures"]["clusters, top 2"] == 0.1
    assert out.count("| dense, batch of an expert |") == 1


def test_the_training_benchmark_prints_its_tables() -> None:
    out = run(ROOT / "examples/benchmarks/training.py", "--rounds", "2", "--steps", "1", "--no-compile")
    assert "| expertctl |" in out
    assert "process to end of first step" in out


@pytest.mark.parametrize(
    ("benchmark", "words"),
    [
        ("mixture", ("--rounds", "0")),
        ("merging", ("--mergekit-rounds", "0")),
        ("privacy", ("--rounds", "-1")),
        ("stitching", ("--layers", "1")),
        ("training", ("--rounds", "1")),
        ("clustering", ("--points", "none")),
        ("federation_transfer", ("--megabytes", "0")),
    ],
)
def test_benchmarks_refuse_numbers_that_give_no_figure(benchmark: str, words: tuple[str, str]) -> None:
    call = (sys.executable, ROOT / "examples" / "benchmarks" / f"{benchmark}.py", *words)
    result = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert f"error: argument {words[0]}: '{words[1]}' is no whole number of" in result.stderr


def test_memory_of_a_discovery_stays_where_it_is_however_much_text_there_is() -> None:
    """200,000 documents; the sample that is held has 50,000."""
    sizes = (60_000, 200_000)
    told = run(
        ROOT / "examples" / "benchmarks" / "clustering.py",
        *("--only", "memory", "--letters", "150", "--sizes", ",".join(map(str, sizes))),
    )
    peaks = [float(line.split("|")[-2]) for line in told.splitlines()[2:4]]
    assert max(peaks) < 2000
    assert peaks[1] < 1.1 * peaks[0]
