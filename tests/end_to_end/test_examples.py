"""The examples, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts import run_here

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


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
    out = run_here(*call, "--no-ablations")
    rows = {line.split("|")[1].strip(): line for line in out.splitlines() if line.startswith("| ")}
    assert {"flexolmo", "flexolmo, router tuned on public text", "unrestricted mixture", "everybody"} <= set(rows)
    assert "flexolmo, no bias" not in rows
    scores = json.loads((tmp_path / "seed-0" / "rows.json").read_text())
    mean = sum(scores["flexolmo"].values()) / 2
    assert f"{mean:.4f}" in rows["flexolmo"]
    assert run_here(*call, "--no-ablations") == out


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
    out = run_here(*call, "--out", tmp_path)
    rows = json.loads((tmp_path / "seed-0" / "rows.json").read_text())
    assert rows["scores"]["stitched"] == pytest.approx(rows["scores"]["seed"], rel=1e-5)
    assert rows["scores"]["stitched, trained"] != rows["scores"]["seed"]
    assert rows["costs"]["stitched, trained"]["trained"] > 0
    assert "| bits per byte, crossed text |" in out
    assert out.count("| stitched, trained |") == 5


def test_the_clusters_example_prints_its_tables(corpora: Path, tmp_path: Path) -> None:
    budgets = ("--seed-tokens", "8192", "--tokens", "8192", "--passage-bytes", "300", "--sweep", "3")
    out = run_here(
        *(ROOT / "examples/cbtm/run.py", "--corpora", corpora, "--clusters", "2", "--seeds", "0"),
        *(*budgets, "--out", tmp_path),
    )
    rows = json.loads((tmp_path / "seed-0" / "rows.json").read_text())
    sorted_by = rows["clusters"]
    assert sorted_by["balanced k-means"]["purity"] > sorted_by["random"]["purity"]
    assert set(rows["scores"]["clusters, top 1"]) == {"set-chance", "set-prose"}
    assert rows["scores"]["clusters, top 1"] != rows["scores"]["clusters, all"]
    assert rows["temperatures"]["clusters, top 2"] == 0.1
    assert set(rows["scores"]["3 clusters, all"]) == {"set-chance", "set-prose"}
    assert out.count("| dense, batch of an expert |") == 1


def test_the_example_of_rounds_prints_its_table(corpora: Path, tmp_path: Path) -> None:
    out = run_here(
        *(ROOT / "examples/federation/rounds.py", "--corpora", corpora, "--owners", "chance,prose", "--seeds", "0"),
        *("--seed-tokens", "8192", "--owner-tokens", "2048", "--rounds", "1,2", "--out", tmp_path),
    )
    rows = json.loads((tmp_path / "seed-0" / "rows.json").read_text())
    few, many = "1 rounds, learning rate 1, momentum 0", "2 rounds, learning rate 1, momentum 0"
    assert {"seed", "experts at home", "flexolmo", few, many} <= set(rows)
    assert rows[few] != rows[many]
    mean = sum(rows[few].values()) / 2
    assert f"{mean:.4f}" in out
    assert f"| minus {few} |" in out


def test_the_branch_train_merge_example_prints_its_table(corpora: Path, tmp_path: Path) -> None:
    out = run_here(
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
    table = out.split("\n\n")[0]
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| ")}
    assert {"dense", "random-split forest", "ensemble, cached priors", "posterior average, per target"} <= set(rows)
    scores = json.loads((tmp_path / "seed-0" / "rows.json").read_text())
    mean = sum(scores["seed"].values()) / 2
    assert f"{mean:.4f}" in rows["seed"]
