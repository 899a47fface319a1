"""The benchmarks, in small."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from scripts import run

pytestmark = [pytest.mark.slow, pytest.mark.long]

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
        ("serving", ("--clients", "0")),
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


def test_the_benchmark_of_few_bits_prints_its_table() -> None:
    pytest.importorskip("bitsandbytes")
    out = run(ROOT / "examples" / "benchmarks" / "quantised.py", "--preset", "tiny", "--tokens", "4000")
    rows = {line.split("|")[1].strip(): line.split("|")[2:6] for line in out.splitlines() if line.startswith("| ")}
    whole, small, smaller = ([float(cell) for cell in rows[name]] for name in ("float32", "int8", "nf4"))
    assert small[0] == pytest.approx(whole[0], rel=0.01)
    assert smaller[0] == pytest.approx(whole[0], rel=0.05)
    assert smaller[2] < small[2] < whole[2]


def test_the_benchmark_of_memories_prints_its_table() -> None:
    pytest.importorskip("faiss")
    path = ROOT / "examples" / "benchmarks" / "knn_search.py"
    out = run(path, *("--keys", "4000", "--width", "16", "--clusters", "50", "--queries", "32", "--k", "8"))
    rows = {line.split("|")[1].strip(): line.split("|") for line in out.splitlines() if line.startswith("| ")}
    assert {"exact", "ivf, float16", "ivf, int8", "ivf, pq"} < rows.keys()
    assert all(float(rows[name][6]) > 0.8 for name in rows if name.startswith("ivf"))


def test_the_benchmark_of_the_server_prints_its_tables_and_the_soak_leaks_nothing() -> None:
    path = ROOT / "examples" / "benchmarks" / "serving.py"
    out = run(path, *("--rounds", "1", "--tokens", "8", "--clients", "4", "--requests", "400"))
    assert "| at once, streamed |" in out  # and so no text was mixed with another
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[-5:]]
    assert [row[0] for row in rows] == ["80", "160", "240", "320", "400"]
    assert len({row[2] for row in rows}) == 1, "open files"
    assert len({row[3] for row in rows}) == 1, "threads"
    objects = [int(row[4].replace(",", "")) for row in rows]
    assert max(objects[1:]) - min(objects[1:]) < 1000
