"""`eval` and `generate`."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from expertctl.core.models import loading


def test_eval_prints_the_contract(run: Any, workspace: Path) -> None:
    result = run("--json", "--quiet", "eval")
    table = result.json
    assert set(table) == {"domains", "models"}
    assert table["domains"] == ["code", "prose"]
    assert list(table["models"]) == ["seed", "code", "prose", "forest"]
    for scores in table["models"].values():
        assert set(scores) == {"bits_per_byte", "perplexity", "tokens", "text"}
        assert all(list(values) == ["code", "prose"] for values in scores.values())
    assert result.err == ""


def test_eval_takes_any_model_folder(run: Any, workspace: Path, model_folder: Path) -> None:
    table = run("--json", "eval", "seed", str(model_folder), "--domains", "code", "--jobs", "1").json
    assert table["models"]["seed"] == table["models"][str(model_folder)]  # the seed is a copy of it


def test_eval_of_a_broken_model_is_valid_json_all_the_same(
    run: Any, workspace: Path, model_folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    out = run("--json", "eval", "seed", broken, "--domains", "code").out
    models = json.loads(out, parse_constant=pytest.fail)["models"]
    assert models[str(broken)]["bits_per_byte"] == {"code": None}
    assert models["seed"]["bits_per_byte"]["code"] > 0


def test_eval_reads_no_folder_twice_to_check_it(run: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    check = loading.require_intact

    def noted(folder: Path) -> Any:
        checked.append(folder.name)
        return check(folder)

    monkeypatch.setattr(loading, "require_intact", noted)
    assert run("eval", "code", "prose", "seed", "--domains", "code").status == 0
    assert sorted(checked) == ["code", "prose", "seed"]
    checked.clear()
    assert run("branch", "tax", "--domain", "code", "--from", "auto").status == 0
    assert sorted(checked) == ["code", "prose", "seed"]


def test_eval_refuses_a_damaged_model_before_any_is_scored(run: Any, workspace: Path) -> None:
    (workspace / "experts" / "prose" / "notes.txt").write_text("mine", encoding="utf-8")
    result = run("-v", "eval", "code", "prose")
    assert result.status == 1
    assert "file notes.txt was added" in result.error
    assert result.out == ""


def test_eval_marks_the_best_of_each_column_and_cuts_nothing_off(run: Any, workspace: Path) -> None:
    long = "a-name-that-is-much-longer-than-any-terminal-is-wide-" + "x" * 60
    run("-q", "merge", long, "--method", "average")
    lines = run("eval", "seed", long).out.splitlines()
    assert lines[0] == "bits per byte (lower is better, * best)"
    assert lines[1].split() == ["model", "code", "prose", "mean"]
    assert lines[3].split()[0] == long
    marks = [[cell.endswith("*") for cell in line.split()[1:]] for line in lines[2:4]]
    assert [sum(column) for column in zip(*marks, strict=True)] == [1, 1, 1]
    assert "perplexity per token (lower is better, * best)" in lines


def test_a_gate_that_does_not_hold_is_exit_3_after_the_table(run: Any, workspace: Path) -> None:
    means = {
        name: sum(scores["bits_per_byte"].values())
        for name, scores in run("--json", "eval", "code", "prose").json["models"].items()
    }
    low, high = sorted(means, key=means.__getitem__)
    assert run("eval", "code", "prose", "--require", f"{low} < {high}").status == 0
    failed = run("--json", "eval", "code", "prose", "--require", f"{low}<{high}", "--require", f"{high} < {low}")
    assert failed.status == 3
    assert set(failed.json) == {"domains", "models"}
    assert failed.error.startswith(f"{high} < {low} does not hold: ")


def test_a_gate_on_a_model_that_is_not_scored_is_refused_first(run: Any, workspace: Path) -> None:
    result = run("eval", "seed", "--require", "sed < forest")
    assert result.status == 1
    assert result.error == "no model 'sed' (did you mean 'seed'?); evaluated here: seed"


def test_generate_is_the_same_for_the_same_seed(run: Any, workspace: Path) -> None:
    first = run("generate", "forest", "def ", "--max-new-tokens", "12", "--seed", "3")
    assert first.status == 0
    assert first.out.startswith("def ")
    assert first.err == ""
    again = run("generate", "forest", "def ", "--max-new-tokens", "12", "--seed", "3")
    other = run("generate", "forest", "def ", "--max-new-tokens", "12", "--seed", "4")
    assert first.out == again.out != other.out


def test_no_library_says_anything_in_a_process_of_its_own(workspace: Path) -> None:
    script = "import sys; from expertctl.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "generate", "forest", "def", "--max-new-tokens", "2", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.startswith("def")


def test_generate_works_on_a_folder_without_a_workspace(run: Any, model_folder: Path, tmp_path: Path) -> None:
    result = run("generate", model_folder, "The", "--temperature", "0", "--max-new-tokens", "3", cwd=tmp_path)
    assert result.status == 0
    assert result.out.startswith("The")


def test_generate_reads_the_prompt_from_standard_input(
    run: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Größe: "))
    content = run("--json", "generate", "seed", "-", "--max-new-tokens", "4").json
    assert content["prompt"] == "Größe: "
    assert "".join(token["text"] for token in content["prompt_tokens"]) == "Größe: "
    assert "".join(token["text"] for token in content["tokens"]) == content["text"]
    assert len(content["tokens"]) <= 4
    assert content["experts"] == []
    assert all(token["experts"] is None for token in content["tokens"])


def test_show_experts_gives_each_token_its_shares(run: Any, workspace: Path) -> None:
    content = run("--json", "generate", "forest", "def area", "--max-new-tokens", "8", "--show-experts").json
    assert content["experts"] == ["code", "prose"]
    assert content["prompt_tokens"][0]["experts"] is None  # predicted from nothing
    for token in content["prompt_tokens"][1:] + content["tokens"]:
        assert set(token["experts"]) == {"code", "prose"}
        assert sum(token["experts"].values()) == pytest.approx(1, abs=1e-5)


def test_show_experts_marks_by_number_where_there_is_no_colour(run: Any, workspace: Path) -> None:
    arguments = ("generate", "forest", "def area", "--max-new-tokens", "8", "--show-experts")
    tokens = run("--json", *arguments).json
    shares = [token["experts"] for token in tokens["prompt_tokens"] + tokens["tokens"] if token["experts"]]
    carried = sum(share["code"] > share["prose"] for share in shares)
    lines = run(*arguments).out.splitlines()
    assert lines[-2:] == [f"[1] code: {carried} tokens", f"[2] prose: {len(shares) - carried} tokens"]
    assert "\x1b" not in "".join(lines)


def test_show_experts_needs_a_model_that_has_some(run: Any, workspace: Path) -> None:
    result = run("generate", "code", "x", "--show-experts")
    assert result.status == 1
    assert "request shares from an ensemble" in result.error


def test_generate_works_on_an_ensemble_that_runs_a_part_of_its_experts(run: Any, workspace: Path) -> None:
    run("merge", "narrow", "--method", "ensemble", "--option", "top_k=1", "--option", "every=2")
    content = run("--json", "generate", "narrow", "def", "--max-new-tokens", "6", "--show-experts").json
    assert sorted(content["tokens"][-1]["experts"].values()) == [0, 1]


def test_a_prompt_may_be_empty_but_not_too_long(run: Any, workspace: Path) -> None:
    assert run("generate", "seed", "", "--max-new-tokens", "2").status == 0
    result = run("generate", "seed", "def " * 100)
    assert result.status == 1
    assert "exceeds the model's 128 positions" in result.error


@pytest.mark.parametrize("option", [("--context", "64"), ("--known-domains",), ("--evaluator", "other")])
def test_a_comparison_takes_no_option_that_it_would_ignore(run: Any, workspace: Path, option: tuple[str, ...]) -> None:
    result = run("eval", "forest", "--against", "seed", *option)
    assert result.status == 2
    assert "only --domains, --jobs and --nproc" in result.err
