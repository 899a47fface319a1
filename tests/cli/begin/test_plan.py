"""`plan`: tables and JSON of what training needs, without a workspace if a size is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from expertctl.experts.scaling import calibration
from expertctl.experts.scaling.step_model import StepModel

MODEL = ("--size", "7b", "--tokens", "1e11", "--devices", "64")


def test_every_method_has_a_row_for_every_number_of_devices(run: Any, tmp_path: Path) -> None:
    result = run("--json", "plan", *MODEL[:-1], "64,512", cwd=tmp_path)
    assert result.json["shape"]["parameters"] == 6_738_415_616
    found = [(plan["method"], plan["devices"]) for plan in result.json["plans"]]
    assert len(found) == len(set(found)) == 14
    table = run("plan", *MODEL, cwd=tmp_path).out.splitlines()
    assert "TB sent by a node" in table[1]
    assert [line.split()[0] for line in table[2:]] == [
        *("data", "fsdp", "diloco", "branch-train-merge", "flexolmo", "branch-train-mix", "branch-train-stitch")
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "9b"), "no size '9b'; known: "),
        ((*MODEL, "--hardware", "h10"), "no hardware 'h10'"),
        ((*MODEL, "--link", "wifi"), "no link 'wifi'"),
        ((*MODEL, "--experts", "7"), "64 devices cannot be shared equally by 7 experts"),
        ((*MODEL, "--tokens", "1e31"), "tokens is 1e+31; give a number above 0, at most 1e+30"),
        ((), "no expertctl.yaml in"),
    ],
)
def test_what_has_no_plan_is_one_line(words: tuple[str, ...], message: str, run: Any, tmp_path: Path) -> None:
    result = run("plan", *words, cwd=tmp_path)
    assert result.status == 1
    assert message in result.error


@pytest.mark.parametrize("devices", ["0", "8,x", "8,,9"])
def test_numbers_of_devices_are_whole(devices: str, run: Any, tmp_path: Path) -> None:
    result = run("plan", *MODEL, "--devices", devices, cwd=tmp_path)
    assert result.status == 2
    assert "are no whole numbers above 0" in result.err


@pytest.mark.parametrize(("name", "number"), [("--tokens", "inf"), ("--batch-tokens", "nan"), ("--seed-share", "nan")])
def test_numbers_are_finite(name: str, number: str, run: Any, tmp_path: Path) -> None:
    result = run("plan", *MODEL, name, number, cwd=tmp_path)
    assert result.status == 2
    assert f"Invalid value for '{name}': {number} is not a finite number." in result.err


def test_a_size_and_a_folder_exclude_each_other(run: Any, tmp_path: Path) -> None:
    assert run("plan", *MODEL, "--model", tmp_path, cwd=tmp_path).status == 2


def test_steps_here_follow_the_settings_of_the_workspace(
    run: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = StepModel({"matrix products": 1e-11}, {"process": 4e8, "weights, gradients, moments": 16.0})
    monkeypatch.setattr(calibration, "calibrated", lambda reporter: model)
    result = run("--json", "plan", "--here", cwd=workspace).json
    shape = result["shape"]
    assert result["step_seconds"] == pytest.approx(1e-11 * 6 * 128 * shape["multiplied"])
    assert result["peak_bytes"] == pytest.approx(4e8 + 16 * shape["parameters"])
    assert result["hours"] == pytest.approx(result["step_seconds"] * (1000 // 128) / 3600)


def test_steps_here_are_the_mean_over_stages(run: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StepModel({"attention": 1e-9, "update": 1e-8}, {"process": 4e8})
    monkeypatch.setattr(calibration, "calibrated", lambda reporter: model)
    config = workspace / "expertctl.yaml"
    text = config.read_text().replace(
        "sequence_length: 64", "sequence_length: 64, stages: [{share: 0.3, sequence_length: 16}]"
    )
    config.write_text(text)
    result = run("--json", "plan", "--here", cwd=workspace).json
    shape = result["shape"]
    length = (2 * 16 + 5 * 64) / 7  # 7 steps, of which 0.3 are 2
    attention = 1e-9 * 128 * length * shape["hidden"] * shape["layers"]
    assert result["step_seconds"] == pytest.approx(attention + 1e-8 * shape["parameters"])
    config.write_text(text.replace("sequence_length: 16", "sequence_length: 48"))
    assert "cannot be cut into blocks of 48" in run("plan", "--here", cwd=workspace).error
