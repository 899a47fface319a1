"""Errors: exit statuses, one-line messages, and one JSON object in every case."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from expertctl.core.process.environment import LIBRARY_SETTINGS


def test_no_workspace(run: Any, tmp_path: Path) -> None:
    result = run("show", cwd=tmp_path)
    assert result.status == 1
    assert result.out == ""
    assert result.error == (
        f"no expertctl.yaml in {tmp_path} or its parents; create a workspace with `expertctl init {tmp_path}`"
    )


def test_the_workspace_is_found_from_a_folder_below_and_by_option(run: Any, workspace: Path, tmp_path: Path) -> None:
    here = run("--json", "show", cwd=workspace / "text").json
    assert here == run("-w", workspace, "--json", "show", cwd=tmp_path).json
    assert here == run("show", "--workspace", workspace, "--json", cwd=tmp_path).json
    assert here["workspace"] == str(workspace)


def test_bad_yaml_names_file_line_and_nearest_key(run: Any, workspace: Path) -> None:
    (workspace / "expertctl.yaml").write_text("domains: {}\ntrainin: {tokens: 3}\n", encoding="utf-8")
    result = run("show")
    assert result.status == 1
    assert result.error == (f"{workspace / 'expertctl.yaml'}:2: unknown key 'trainin' (did you mean 'training'?)")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "forst"], "no model 'forst' (did you mean 'forest'?)"),
        (["eval", "seed", "--domains", "prosa"], "no domain 'prosa' (did you mean 'prose'?)"),
        (["data", "prepare", "cod"], "no domain 'cod' (did you mean 'code'?)"),
        (["merge", "x"], "merge 'x' is not in expertctl.yaml; give its method: --method METHOD"),
        (["merge", "x", "--method", "ensmble"], "no merge method 'ensmble' (did you mean 'ensemble'?)"),
        (["merge", "x", "--method", "average", "--experts", "cde"], "no expert 'cde' (did you mean 'code'?)"),
        (
            ["merge", "x", "--method", "average", "--weights", "best"],
            "merge 'x': weights: input should be 'uniform' or 'posterior' (it is 'best')",
        ),
        (
            ["merge", "x", "--method", "ensemble", "--option", "topk=1"],
            "has no option 'topk' (did you mean 'top_k'?)",
        ),
        (["merge", "forest", "--method", "ensemble"], "exists already; use --force"),
        (
            ["branch", "law"],
            "expert 'law' is not in expertctl.yaml; give its domain: --domain DOMAIN",
        ),
        (["branch", "code", "--domain", "code"], "exists already; use --force"),
        (["branch", "seed", "--domain", "code"], "an expert cannot be called 'seed'"),
        (
            ["branch", "law", "--domain", "code", "--set", "lerning_rate=1"],
            "expert 'law': unknown key 'lerning_rate' in training (did you mean 'learning_rate'?)",
        ),
        (
            ["branch", "law", "--domain", "code", "--tokens", "0"],
            "expert 'law': training.tokens: input should be greater than 0 (it is 0)",
        ),
        (
            ["branch", "law", "--domain", "code", "--trains", "feed_forwrd"],
            "no trainer 'feed_forwrd' (did you mean",
        ),
        (
            ["branch", "law", "--domain", "code", "--from", "cod"],
            "no finished expert 'cod' (did you mean 'code'?)",
        ),
        (
            ["seed", "--from", "nowhere", "--force"],
            "nowhere has no config.json",
        ),
        (["generate", "forst", "x"], "no model 'forst' (did you mean 'forest'?)"),
        (["show", "forst"], "no model 'forst' (did you mean 'forest'?)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_are_one_line(words: list[str], said: str, run: Any, workspace: Path) -> None:
    result = run(*words)
    assert result.status == 1
    assert said in result.error
    assert len(result.err.strip().splitlines()) == 1
    assert result.out == ""
    in_json = run("--json", *words)
    assert in_json.status == 1
    assert in_json.json == {"error": result.error}


def test_training_an_unknown_expert_or_on_an_unknown_launcher(run: Any, workspace: Path) -> None:
    run("branch", "tax", "--domain", "code")
    assert "no expert 'taxx' (did you mean 'tax'?)" in run("train", "taxx").error
    assert "no launcher 'cluster'; installed: local" in run("train", "tax", "--launcher", "cluster").error


def test_an_unknown_tracker_stops_a_command_before_its_work(run: Any, workspace: Path) -> None:
    result = run("train", "tax", "--track", "tensorbord")
    assert "no tracker 'tensorbord' (did you mean 'tensorboard'?)" in result.error
    file = workspace / "expertctl.yaml"
    file.write_text(file.read_text() + "\ntracking: {wandb: {colour: red}}\n")
    for words in (["train", "--all"], ["seed", "--scratch", "--force"], ["merge", "m", "--method", "average"]):
        assert "tracker 'wandb' has no option 'colour'" in run(*words).error
    assert (workspace / "seed" / "seed.json").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train"], "name the experts to train, or give --all"),
        (["train", "code", "--all"], "name the experts to train, or give --all"),
        (["eval", "--require", "seed"], "is not a comparison"),
        (["merge", "x", "--weights", "a:0.5,b"], "'b' has no weight; write a:0.6,b:0.4"),
        (["merge", "x", "--weights", "a:x"], "'x' is not a number"),
        (["merge", "x", "--weights", "a:1,a:2"], "'a' is given twice"),
        (["merge", "x", "--option", "top_k"], "'top_k' is not KEY=VALUE"),
        (["merge", "x", "--experts", ","], "give at least one name"),
        (["branch", "x", "--tokens", "5", "--set", "tokens=6"], "'tokens' is set twice"),
        (["seed", "--from", "x", "--scratch"], "--from imports a model"),
        (["show", "-q", "-v"], "--quiet and --verbose exclude each other"),
        (["show", "--nonsense"], "--nonsense"),
        (["generate", "seed", "x", "--temperature", "-1"], "--temperature"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_exit_2_before_anything_is_looked_at(
    words: list[str], said: str, run: Any, tmp_path: Path
) -> None:
    result = run(*words, cwd=tmp_path)
    assert result.status == 2
    assert said in result.error
    assert result.out == ""
    assert said in run("--json", *words, cwd=tmp_path).json["error"]


def test_verbose_shows_where_an_error_arose(run: Any, tmp_path: Path) -> None:
    result = run("--verbose", "show", cwd=tmp_path)
    assert "Traceback" in result.err
    assert result.error.startswith("no expertctl.yaml")


def test_a_bug_keeps_its_traceback(run: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expertctl.workspace.generalists import Generalists

    def broken(self: Generalists, *arguments: object, **settings: object) -> None:
        raise ZeroDivisionError("our fault")

    monkeypatch.setattr(Generalists, "merge", broken)
    with pytest.raises(ZeroDivisionError, match="our fault"):
        run("merge", "x", "--method", "average")


def test_ctrl_c_is_one_line_and_130(run: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expertctl.workspace.generalists import Generalists

    def stopped(self: Generalists, *arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Generalists, "merge", stopped)
    result = run("--json", "merge", "x", "--method", "average")
    assert result.status == 130
    assert result.json == {"error": "interrupted; run the same command again"}
    assert result.error == "interrupted; run the same command again"


def test_a_reader_that_goes_away_is_no_error(workspace: Path) -> None:
    script = "import sys; from expertctl.cli.main import main; sys.exit(main(['--json', 'show', 'forest']))"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1
    process.stderr.close()


def test_library_settings_of_the_user_stay(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    run("--version")
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert set(LIBRARY_SETTINGS) <= set(os.environ)


@pytest.mark.slow
def test_ctrl_c_during_training_leaves_it_resumable(workspace: Path, run: Any) -> None:
    assert run("branch", "long", "--domain", "code", "--tokens", "2000000").status == 0
    script = "import sys; from expertctl.cli.main import main; sys.exit(main(['--json', 'train', 'long']))"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = workspace / "experts" / "long" / "metrics.jsonl"
    patience = time.monotonic() + 120
    while not metrics.is_file() and time.monotonic() < patience:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert '"interrupted": [\n    "long"\n  ]' in out
    assert err.strip().splitlines()[-1] == "Error: interrupted, state saved: long; rerun the same command to resume"
    assert run("--json", "show").json["unfinished"] == {"long": "expertctl train long"}


@pytest.mark.parametrize(
    "words",
    [
        ["show"],
        ["generate", "hello"],
        ["eval"],
        ["verify"],
        ["seed", "--force", "--from"],
        ["card"],
        ["reproduce"],
        ["init"],
    ],
    ids=" ".join,
)
def test_a_name_too_long_for_the_file_system_is_one_line(words: list[str], run: Any, workspace: Path) -> None:
    result = run(*words[:1], "x" * 300, *words[1:]) if words[0] == "generate" else run(*words, "x" * 300)
    assert result.status == 1
    assert len(result.err.strip().splitlines()) == 1
    assert "longer than the file system allows" in result.error


def test_a_name_that_leaves_no_room_for_its_lock_is_refused(run: Any, workspace: Path) -> None:
    assert "at most 180 characters" in run("merge", "x" * 230, "--method", "average").error
    assert run("merge", "x" * 180, "--method", "average").status == 0
