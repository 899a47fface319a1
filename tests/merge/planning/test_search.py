"""Weight search: never worse than the start, deterministic, resumable from its log."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from expertctl.core.errors import UserError
from expertctl.core.models.loading import load_model
from expertctl.core.models.scoring import token_log_probs
from expertctl.merge.planning import search as search_module
from expertctl.workspace import Workspace

CONFIG = "training: {sequence_length: 16}\ndomains:\n  code: {path: text}\n  law: {path: other}\n"


@pytest.fixture
def ws(tmp_path: Path, new_workspace: Any) -> Workspace:
    folder = new_workspace(tmp_path / "ws", ("code", "law"), config=CONFIG)
    for name, step in (("text", 7), ("other", 3)):
        (folder / name).mkdir()
        for number in range(40):
            words = " ".join(str((number * step + place) % 23) for place in range(40))
            (folder / name / f"{number}.txt").write_text(f"{name} {number}: {words}\n")
    return Workspace(folder)


def log_of(ws: Workspace, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ws.root / "reports" / f"search-{name}.jsonl").read_text().splitlines()]


def settings(strategy: str, **more: Any) -> dict[str, Any]:
    return {"strategy": strategy, "trials": 9, "blocks": 3, **more}


@pytest.mark.parametrize("strategy", ["coordinate", "cma"])
@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
def test_a_search_is_never_worse_than_its_start_and_names_what_it_found(
    ws: Workspace, strategy: str, method: str
) -> None:
    manifest = ws.merge("m", method=method, search=settings(strategy))
    search = manifest.merged.search
    lines = log_of(ws, "m")
    assert search.trials == 9 == len(lines) - 1
    assert search.start_bits_per_byte == lines[1]["mean"]
    assert search.bits_per_byte == min(line["mean"] for line in lines[1:]) <= lines[1]["mean"]
    best = min(lines[1:], key=lambda line: line["mean"])
    assert search.weights == best["weights"]
    assert manifest.merged.fitted_on == ("code", "law")


def test_a_trials_score_is_that_of_the_written_model(ws: Workspace) -> None:
    manifest = ws.merge("m", method="average", weights={"code": 3, "law": 1}, search=settings("coordinate", trials=1))
    model, _ = load_model(ws.generalists / "m")
    values = []
    for text in ws.data.validation(["code", "law"]):
        chosen = [text.blocks.block(index * len(text.blocks) // 3) for index in range(3)]
        with torch.inference_mode():
            scores = [token_log_probs(model, torch.from_numpy(block)[None]) for block in chosen]
        nats = -sum(float(score.double().sum()) for score in scores) / sum(score.numel() for score in scores)
        values.append(nats / math.log(2) * text.blocks.num_targets / text.blocks.num_bytes)
    assert manifest.merged.search.bits_per_byte == pytest.approx(sum(values) / 2, rel=1e-5)


def test_layer_groups_give_gradients(ws: Workspace) -> None:
    manifest = ws.merge("m", method="average", search=settings("coordinate", layer_groups=2))
    assert all(len(weights) == 2 for weights in manifest.merged.search.weights.values())


def test_a_search_that_was_stopped_takes_its_trials_from_the_log(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ws.merge("whole", method="average", search=settings("cma"))
    real = search_module._Scorer.score
    asked: list[Any] = []

    def counted(self: Any, weights: Any) -> Any:
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(weights)
        return real(self, weights)

    monkeypatch.setattr(search_module._Scorer, "score", counted)
    with pytest.raises(KeyboardInterrupt):
        ws.merge("m", method="average", search=settings("cma"))
    asked.clear()
    monkeypatch.setattr(
        search_module._Scorer, "score", lambda self, weights: asked.append(weights) or real(self, weights)
    )
    resumed = ws.merge("m", method="average", search=settings("cma"))
    assert len(asked) == 9 - 4
    assert resumed.merged.search == whole.merged.search
    assert resumed.tensors == whole.tensors


def test_another_search_begins_anew(ws: Workspace) -> None:
    ws.merge("m", method="average", search=settings("coordinate"))
    first = log_of(ws, "m")
    ws.merge("m", method="average", search=settings("coordinate", blocks=2), force=True)
    assert log_of(ws, "m")[0] != first[0]


def test_there_has_to_be_text_and_weights(ws: Workspace, tmp_path: Path, new_workspace: Any) -> None:
    with pytest.raises(UserError, match=r"validation text and there is none|fitted on validation text"):
        Workspace(new_workspace(tmp_path / "bare", ("code",))).merge("m", method="average", search={"trials": 2})
    with pytest.raises(UserError, match="does not support --search"):
        ws.merge("m", method="ensemble", search={"trials": 2})
    with pytest.raises(UserError, match=r"search\.strategy"):
        ws.merge("m", method="average", search={"strategy": "random"})
