"""`eval --choices`, `--generate`, `--suite` and `--intervals`: tables, JSON, and options that do not go together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

QUESTIONS = [
    {"question": f"Is {number} even?", "choices": ["yes", "no"], "answer": number % 2, "skills": skills}
    for number, skills in enumerate([["add"], ["odd"], ["add", "odd"]] * 2)
]
PROMPTS = [{"prompt": "def one():\n    return 1  #", "tests": "assert one() == 1", "stop": ["\n", "\r"]}]


@pytest.fixture
def questions(workspace: Path) -> Path:
    (workspace / "q.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    return workspace / "q.jsonl"


@pytest.mark.slow
def test_choices_of_all_kinds_of_models_are_tables_and_json(run: Any, questions: Path) -> None:
    words = ("eval", "seed", "code", "forest", "--choices", questions, "--shots", 1)
    out = run(*words).out
    lines = [line.split() for line in out.splitlines()]
    assert out.startswith("accuracy on 6 questions, 1 shot (95% interval; guessing: 0.500)")
    assert ["model", "direct", "length", "unconditional", "channel"] in lines
    assert {line[0] for line in lines if line} >= {"seed", "code", "forest", "add"}
    assert "forest - seed" in out
    assert "add + odd" in out
    content = run("--json", "--quiet", *words).json
    assert set(content) == {"questions", "shots", "chance", "models", "differences"}
    assert list(content["models"]) == ["seed", "code", "forest"]
    forest = content["models"]["forest"]
    assert set(forest["accuracy"]) == {"direct", "length", "unconditional", "channel"}
    assert all(0 <= own["low"] <= own["value"] <= own["high"] <= 1 for own in forest["accuracy"].values())
    assert len(forest["chosen"]["channel"]) == 6
    assert forest["skills"]["direct"]["pairs"][0]["skills"] == ["add", "odd"]
    assert len(content["differences"]) == 3 * 4


@pytest.mark.slow
def test_a_decoder_scores_choices_or_is_refused_by_name(run: Any, questions: Path) -> None:
    words = ("--json", "--quiet", "eval", "seed", "--choices", questions)
    plain = run(*words).json["models"]["seed"]["chosen"]
    option = ("--decoder", "experts_against_seed", "--decoder-option")
    assert run(*words, *option, "weights={code: 0.0}").json["models"]["seed"]["chosen"] == plain
    assert run(*words, *option, "weights={code: 5.0}").status == 0
    assert "decoder 'best_of' cannot score text" in run(*words, "--decoder", "best_of").error
    assert "decoder 'contrastive' cannot score text" in run(*words, "--decoder", "contrastive").error


@pytest.mark.slow
def test_answers_are_a_table_and_json(run: Any, workspace: Path) -> None:
    (workspace / "p.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)), encoding="utf-8")
    words = ("eval", "seed", "forest", "--generate", "p.jsonl", "--samples", 2, "--max-new-tokens", 4)
    assert "p.jsonl:1: its tests run a program that the model writes, which needs --run-code" in run(*words).error
    result = run(*words, "--run-code")
    assert "pass@1" in result.out
    assert "1.000 [0.025, 1.000]" in result.out
    content = run("--json", "--quiet", *words, "--run-code").json
    assert content["models"]["forest"]["rates"]["pass@2"]["value"] == 1
    assert content["models"]["seed"]["answers"][0]["right"] == [True, True]


def test_intervals_are_beside_the_figures(run: Any, workspace: Path) -> None:
    out = run("eval", "seed", "code", "--domains", "code,prose", "--intervals").out
    assert "bits per byte (95% interval over" in out
    assert "code - seed" in out
    content = run("--json", "--quiet", "eval", "seed", "code", "--domains", "code", "--intervals").json
    assert set(content) == {"domains", "models", "differences"}
    own = content["models"]["seed"]["intervals"]["domains"]["code"]
    assert own["low"] < own["value"] == content["models"]["seed"]["bits_per_byte"]["code"] < own["high"]
    (difference,) = content["differences"]
    assert (difference["model"], difference["other"]) == ("code", "seed")
    assert set(difference["domains"]) == {"code"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--choices", "q.jsonl", "--suite", "lm-eval:x"), "give only one of --choices, --suite"),
        (("--shots", "2"), "--shots needs --choices"),
        (("--samples", "2", "--choices", "q.jsonl"), "--samples needs --generate"),
        (("--run-code",), "--run-code needs --generate"),
        (("--tasks-folder", "x"), "--tasks-folder needs --suite"),
        (("--choices", "q.jsonl", "--domains", "code"), "--choices does not go with --domains"),
        (("--choices", "q.jsonl", "--intervals", "--nproc", "2"), "--choices does not go with --intervals, --nproc"),
        (("--choices", "none.jsonl"), "'none.jsonl' does not exist"),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(
    run: Any, questions: Path, words: tuple[str, ...], message: str
) -> None:
    result = run("eval", "seed", *words)
    assert result.status == 2
    assert message in result.err


def test_other_suites_and_bad_files_are_one_line(run: Any, questions: Path) -> None:
    assert "no suite 'helm:x'; write lm-eval:TASK" in run("eval", "seed", "--suite", "helm:x").error
    questions.write_bytes(b'{"question": "\xff"}\n')
    assert run("eval", "seed", "--choices", questions).error.startswith(f"{questions}:1: not UTF-8")


TASK = """
task: even
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/q.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_lm_eval_finds_the_accuracy_that_choices_finds(
    run: Any, questions: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "even.yaml").write_text(TASK.replace("FOLDER", str(questions.parent)))
    words = ("eval", "code", "forest", "--suite", "lm-eval:even", "--tasks-folder", tmp_path / "tasks")
    content = run("--json", "--quiet", *words).json
    assert content["suite"] == "lm-eval"
    ours = run("--json", "--quiet", "eval", "code", "forest", "--choices", questions).json["models"]
    for model in ("code", "forest"):
        found = content["models"][model]["results"]["even"]["acc,none"]
        assert found == pytest.approx(ours[model]["accuracy"]["direct"]["value"])
    assert run(*words).out.startswith("lm-eval (± standard error)\ntask  metric")
