"""Command line: differentially private experts and the extraction audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expertctl import Reporter
from expertctl.core.testing import tiny_model_folder
from expertctl.experts.training.run import train_run

BRANCH = ("branch", "clinic", "--domain", "code", "--trains", "feed_forward", "--dp")
BUDGET = "epsilon=8,delta=1e-3"
SMALL = ("--prefix", "8", "--continuation", "12", "--samples", "2", "--documents", "4")


def test_an_expert_is_branched_trained_and_shown(workspace: Path, run: Any) -> None:
    branched = run("--json", *BRANCH, f"{BUDGET},clip=0.5,noise=seeded", "--set", "batch_size=1").json
    assert branched["dp"] == {
        "epsilon": 8.0,
        "delta": 1e-3,
        "clip": 0.5,
        "accountant": "rdp",
        "noise": "seeded",
        "embedding_noise": None,
    }
    train_run(workspace / "experts" / "clinic", Reporter(), lambda: False)
    shown = run("show", "clinic").out
    assert "none: the noise is drawn from the random seed" in shown
    assert "documents" in shown
    assert "rounded" in shown
    content = run("--json", "show", "clinic").json
    assert content["data"]["privacy"]["clip"] == 0.5

    run(*BRANCH, BUDGET, "--set", "batch_size=1", "--force")
    train_run(workspace / "experts" / "clinic", Reporter(), lambda: False)
    assert "at delta 0.001 (rdp) for one block of 64 tokens, added or removed" in run("show", "clinic").out


def test_the_project_file_says_it_too_and_the_command_line_goes_before_it(workspace: Path, run: Any) -> None:
    with (workspace / "expertctl.yaml").open("a") as file:
        file.write("experts:\n  clinic: {domain: code, dp: {epsilon: 3, delta: 1e-4}}\n")
    assert run("--json", "branch", "clinic").json["dp"]["epsilon"] == 3.0
    given = run("--json", "branch", "clinic", "--dp", "epsilon=5,delta=1e-5", "--force").json["dp"]
    assert (given["epsilon"], given["delta"]) == (5.0, 1e-5)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("epsilon=8", "expert 'clinic': dp.delta: field required"),
        ("epsilon=8,delta=1e-6,accuracy=2", "unknown key 'accuracy' in dp; known here: "),
        ("epsilon=many,delta=1e-6", "dp.epsilon: input should be a valid number"),
    ],
)
def test_a_budget_that_is_none_is_one_clear_error(workspace: Path, run: Any, budget: str, message: str) -> None:
    result = run(*BRANCH, budget)
    assert result.status == 1
    assert message in result.error


@pytest.mark.parametrize("budget", ["epsilon", "epsilon=1,epsilon=2"])
def test_a_budget_that_cannot_be_read_is_wrong_usage(workspace: Path, run: Any, budget: str) -> None:
    assert run(*BRANCH, budget).status == 2


# --- the audit ---


def test_a_domain_is_tried_on_an_expert_and_its_seed(workspace: Path, run: Any) -> None:
    result = run("audit", "extraction", "code", "--data", "code", "--against", "seed", *SMALL)
    assert result.status == 0
    lines = result.out.splitlines()
    assert lines[0].split() == [
        "model",
        "documents",
        "extracted",
        "rate",
        "95",
        "%",
        "interval",
        "mean",
        "similarity",
        "largest",
    ]
    assert [line.split()[:3] for line in lines[1:3]] == [["code", "4", "0"], ["seed", "4", "0"]]
    assert "8 prompt tokens, 12 continuation tokens, 2 samples per document" in result.out
    assert "extracted from code, but not from seed: 0" in result.out


def test_the_report_as_json_holds_settings_and_no_text(workspace: Path, run: Any) -> None:
    report = run("--json", "audit", "extraction", "code", "--data", "text/code-train.jsonl", *SMALL).json
    assert (report["model"], report["documents"], report["extracted"], report["reference"]) == (
        "code",
        4,
        0,
        None,
    )
    assert report["rate"] == 0
    assert report["interval"][0] == 0
    assert 0 < report["interval"][1] < 0.6
    assert report["settings"]["top_k"] == 50
    assert report["settings"]["top_p"] == 0.95
    assert report["settings"]["threshold"] == 0.9
    assert "def " not in json.dumps(report)


def test_a_gate_looks_at_the_upper_end_of_the_interval(workspace: Path, run: Any) -> None:
    passed = run("audit", "extraction", "code", "--data", "code", *SMALL, "--at-most", "0.9")
    assert passed.status == 0
    failed = run("audit", "extraction", "code", "--data", "code", *SMALL, "--at-most", "0.01")
    assert failed.status == 3
    assert "the extraction rate is 0.0000 (95 % interval 0.0000 to 0.4899) and may exceed 0.01" in failed.error


def test_any_model_folder_can_be_audited_outside_of_a_workspace(tmp_path: Path, run: Any) -> None:
    model = tiny_model_folder(tmp_path / "model")
    text = tmp_path / "private.jsonl"
    text.write_text("".join(json.dumps({"body": f"{number} " * 30}) + "\n" for number in range(3)))
    result = run("--json", "audit", "extraction", model, "--data", text, "--text-field", "body", *SMALL, cwd=tmp_path)
    assert result.json["documents"] == 3


def test_data_that_is_nowhere_is_one_clear_error(workspace: Path, run: Any) -> None:
    result = run("audit", "extraction", "code", "--data", "cod")
    assert result.status == 1
    assert "no domain or path 'cod' (did you mean 'code'?)" in result.error
