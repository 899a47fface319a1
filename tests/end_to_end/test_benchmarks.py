"""The benchmarks, in small."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from scripts import run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_the_training_benchmark_prints_its_tables() -> None:
    out = run(ROOT / "examples/benchmarks/training.py", "--rounds", "2", "--steps", "1", "--no-compile")
    assert "| expertctl |" in out
    assert "process to end of first step" in out


def test_the_memory_benchmark_prints_its_tables() -> None:
    out = run(
        ROOT / "examples/benchmarks/training_memory.py", "--vocabulary", "20000", "--tokens", "512", "--layers", "1"
    )
    numbers = {
        line.split("|")[1].strip(): float(line.split("|")[2].replace(",", ""))
        for line in out.splitlines()
        if "MB" not in line and line.count("|") == 4 and "---" not in line
    }
    assert numbers["logits in pieces"] < numbers["whole logits"]
    assert numbers["tensor by tensor"] < numbers["gathered whole"]


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
def test_benchmarks_refuse_numbers_that_give_no_figure(
    benchmark: str, words: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(ROOT / "examples" / "benchmarks" / f"{benchmark}.py")
    monkeypatch.setattr(sys, "argv", [path, *words])
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    with pytest.raises(SystemExit) as refusal:
        runpy.run_path(path, run_name="__main__")
    assert refusal.value.code == 2
    assert f"error: argument {words[0]}: '{words[1]}' is no whole number of" in capsys.readouterr().err


def test_memory_of_a_discovery_stays_where_it_is_however_much_text_there_is() -> None:
    """120,000 documents, of which a sample of 10,000 is held."""
    sizes = (12_000, 120_000)
    told = run(
        ROOT / "examples" / "benchmarks" / "clustering.py",
        *("--only", "memory", "--letters", "150", "--sample", "10000", "--sizes", ",".join(map(str, sizes))),
    )
    peaks = [float(line.split("|")[-2]) for line in told.splitlines()[2:4]]
    assert max(peaks) < 2000
    assert peaks[1] < 1.05 * peaks[0]
