"""`expertctl federate simulate`: tables, JSON and errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from expertctl.cli.main import cli, main

SMALL = ["federate", "simulate", "--owners", "6", "--expert-size", "100MB", "--seed-size", "0"]


def test_a_small_federation_is_reported_as_tables_and_json(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    monkeypatch.chdir(tmp_path)  # no workspace is needed
    assert main([*SMALL, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["owners"] == 6
    assert report["needed"] == 5
    assert report["accepted"] + sum(report["refused"].values()) + report["late"] + report["never"] == 6
    assert report["bytes_down"] == 0
    assert report["bytes_up"] >= 100_000_000 * report["accepted"]
    assert main(SMALL) == 0
    out = capfd.readouterr().out
    assert "quorum" in out
    assert f"{report['hours_to_quorum']:.1f} h, 5 of 6" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--owners", "0"], 2, "0 is not in the range"),
        (["--quorum", "1.5"], 2, "1.5 is not in the range"),
        (["--deadline", "soon"], 1, "'soon' is not a duration"),
        (["--expert-size", "big"], 2, "'big' is not a size"),
        (["--tokens", "5GB"], 2, "'5GB' is not a number of tokens"),
        (["--deadline", "0h"], 1, "'0h' is not longer than 0 seconds"),
        (["--owners", "3", "--trace", "owners.csv"], 2, "use only one of the two"),
        (["--trace", "owners.csv"], 1, "owner 1: the row has no tokens_per_second"),
    ],
)
def test_invalid_simulations_are_one_line_errors(
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owners.csv").write_text("name\nclinic\n")
    assert main(["federate", "simulate", *arguments]) == status
    assert message in capfd.readouterr().err


def test_help_has_an_example() -> None:
    result = CliRunner().invoke(cli, ["federate", "simulate", "--help"])
    assert result.exit_code == 0
    assert "expertctl federate simulate --owners 1000" in result.output


@pytest.mark.slow
def test_the_example_prints_a_row_for_each_size() -> None:
    example = Path(__file__).parents[3] / "examples" / "federation" / "simulate.py"
    done = subprocess.run(
        [sys.executable, example, "--sizes", "2,4", "--seed-size", "0", "-q"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    heading, rule, *rows = done.stdout.splitlines()
    assert heading.startswith("| owners | 80% accepted after |")
    assert [row.split("|")[1].strip() for row in rows] == ["2", "4"]
    assert len({line.count("|") for line in (heading, rule, *rows)}) == 1
