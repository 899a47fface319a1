"""The examples, in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts import run_here

pytestmark = [pytest.mark.slow, pytest.mark.long]

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


def test_the_distillation_example_prints_its_tables(corpora: Path, tmp_path: Path) -> None:
    call = (ROOT / "examples/distil/run.py", "--corpora", corpora, "--seeds", "0", "--tokens", "8192")
    out = run_here(*call, "--out", tmp_path)
    scores = json.loads((tmp_path / "seed-0" / "rows.json").read_text())
    assert {"seed", "ensemble", "no teacher", "distilled", "no teacher, longer", "distilled, longer"} == set(scores)
    assert scores["distilled"] != scores["no teacher"]
    assert f"| distilled | {sum(scores['distilled'].values()) / 2:.4f} |" in out
    assert "| minus no teacher, longer |" in out
    assert run_here(*call, "--out", tmp_path) == out


def test_the_infilling_example_prints_its_tables(corpora: Path, tmp_path: Path) -> None:
    budgets = ("--seed-tokens", "4096", "--tokens", "4096", "--holes", "5", "--passage", "64")
    call = (ROOT / "examples/infill/run.py", "--corpora", corpora, "--domain", "prose", "--seeds", "0", *budgets)
    out = run_here(*call, "--out", tmp_path)
    bits = json.loads((tmp_path / "seed-0" / "rows.json").read_text())["bits of a hidden token"]
    assert all(0 < value < 16 for value in bits.values())
    assert len(set(bits.values())) == 4
    assert f"| infilling, text before and behind | {bits['infilling, text before and behind']:.4f} |" in out
    assert "| bits per byte, left to right | seed 0 |" in out


def test_the_example_of_prompts_prints_its_tables(corpora: Path, tmp_path: Path) -> None:
    budgets = ("--seed-tokens", "8192", "--tokens", "8192", "--prompt", "4")
    call = (
        ROOT / "examples/prompts/run.py",
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
    assert rows["progressive"]["prose"]["chance"] == rows["single"]["chance"]["chance"]
    assert rows["tuned on"]["prose"]["chance"] != rows["tuned on"]["chance"]["chance"]
    assert f"| tuned on, after prose | {rows['tuned on']['prose']['chance']:.4f} |" in out
    assert "| progressive | 0.0000 |" in out
    assert "| minus single |" in out
    assert run_here(*call, "--out", tmp_path) == out


def test_the_example_of_decoding_prints_its_tables(corpora: Path, tmp_path: Path) -> None:
    budgets = (
        "--seed-tokens",
        "8192",
        "--tokens",
        "8192",
        "--prompts",
        "3",
        "--prompt-tokens",
        "8",
        "--new-tokens",
        "16",
    )
    call = (ROOT / "examples/decoding/run.py", "--corpora", corpora, "--domain", "prose", "--seeds", "0", *budgets)
    out = run_here(*call, "--window", "16", "--stream", "40", "--out", tmp_path)
    rows = json.loads((tmp_path / "seed-0" / "rows.json").read_text())
    assert rows["judge's nats per token"]["contrastive"] != rows["judge's nats per token"]["greedy"]
    assert f"| greedy | {rows['rep-4 in percent']['greedy']:.4f} |" in out
    stream = rows["nats per token"]
    assert stream["plain window, tokens 0 to 15"] == pytest.approx(stream["everything, tokens 0 to 15"], rel=1e-4)
    assert stream["plain window, tokens 32 to 39"] != pytest.approx(stream["everything, tokens 32 to 39"], rel=1e-4)
