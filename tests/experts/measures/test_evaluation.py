"""How models read the text that they are evaluated on, and which of them are ranked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from reporters import Recorder
from toy_tokenizers import tokenizer

from expertctl import UserError, Workspace
from expertctl.core.hooks.evaluation import Evaluator
from expertctl.core.hooks.manager import PluginManager


@pytest.fixture
def forgetful(project: Workspace, model_folder: Path, tmp_path: Path) -> str:
    """A model whose tokenizer knows few of the project's letters."""
    folder = shutil.copytree(model_folder, tmp_path / "forgetful")
    tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<unk>"}))
    return str(folder)


def test_a_model_pretrained_here_is_read_in_windows_as_long_as_it_has_seen(
    project: Workspace, model_folder: Path
) -> None:
    texts = project.evaluate("seed", str(model_folder), domains=["prose"]).texts
    assert (texts["seed"]["prose"].context, texts["seed"]["prose"].stride) == (32, 16)
    assert texts["seed"]["prose"].part == "test"
    assert texts[str(model_folder)]["prose"].context == 128, "the positions of a model that others made"
    longer = project.evaluate("seed", domains=["prose"], context=64, stride=8).texts["seed"]["prose"]
    assert (longer.context, longer.stride) == (64, 8)


def test_models_whose_tokenizers_keep_different_shares_are_not_ranked(project: Workspace, forgetful: str) -> None:
    recorder = Recorder()
    table = project.evaluate("seed", forgetful, domains=["prose"], reporter=recorder)
    metric = table.metrics[0]
    assert table.best("prose", metric) is table.best_mean(metric) is None
    assert table.texts["seed"]["prose"].coverage == 1
    assert table.texts[forgetful]["prose"].coverage < 0.9
    assert any(line.startswith(f"{forgetful}: domain 'prose': the tokenizer loses") for line in recorder.lines)


def test_a_comparison_of_such_models_is_refused_before_any_is_scored(
    project: Workspace, forgetful: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("scored")

    offer = PluginManager.offer
    stopped = Evaluator("perplexity", "", (), refuse)  # type: ignore[arg-type]
    monkeypatch.setattr(
        PluginManager, "offer", lambda self, kind, name: stopped if kind is Evaluator else offer(self, kind, name)
    )
    with pytest.raises(UserError, match=r"cannot be ranked on 'prose'.*leave the domain out with --domains"):
        project.evaluate("seed", forgetful, domains=["prose"], ranked=[("seed", forgetful)])


def test_text_that_is_too_short_for_a_test_part_is_named(project: Workspace) -> None:
    (project.root / "text" / "two.jsonl").write_text('{"text": "one document"}\n{"text": "and another"}\n')
    content = json.loads((project.root / "expertctl.yaml").read_text())
    content["domains"]["two"] = {"path": "text/two.jsonl"}
    (project.root / "expertctl.yaml").write_text(json.dumps(content))
    recorder = Recorder()
    table = Workspace(project.root).evaluate("seed", domains=["prose", "two"], known_domains=True, reporter=recorder)
    assert table.texts["seed"]["two"].part == "valid"
    assert "which merges may be fitted on: two" in recorder.lines[0]
    assert "no model has a prior for prose, two" in recorder.lines[-1]
