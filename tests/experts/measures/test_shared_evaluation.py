"""Evaluation by several processes: the figures of one process, or a clear error."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_experts import write_expert
from reporters import Recorder

from expertctl import Division, Evaluator, Metric, Score, TokenWindows, UserError, Windows, Workspace
from expertctl.core.hooks.manager import PluginManager
from expertctl.core.text.token_store import EncodedDocument, TokenStore, write_part
from expertctl.experts.measures import shared_evaluation


@pytest.fixture(scope="module")
def workspace(seeded_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The project with two experts, an ensemble, and one whose prior learns from the text that it scores."""
    workspace = Workspace(shutil.copytree(seeded_project, tmp_path_factory.mktemp("evaluated") / "project"))
    for number, name in enumerate(workspace.config.domains):
        write_expert(workspace.root, name, seed=number)
    workspace.merge("forest", method="ensemble")
    workspace.merge("learner", method="ensemble", options={"prior": "updating"})
    return workspace


def figures(workspace: Workspace, *models: str, **settings: Any) -> str:
    return json.dumps(workspace.evaluate(*models, **settings).as_json())


def count_windows(windows: TokenWindows, partials: Sequence[int]) -> Score:
    """Score a text by the numbers of windows in its batches, which depend on their order."""
    return Score({"order": float(sum(place * number for place, number in enumerate(partials, 1)))}, sum(partials))


def batch_of_three(model: Any, windows: TokenWindows) -> int:
    return 3


def num_windows(model: Any, batch: Windows) -> int:
    return len(batch.tokens)


DIVISION = Division(batch_of_three, num_windows, count_windows)
METRICS = (Metric("order", "order"),)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Callable[[Division | None], None]:
    """Replaces the evaluator by one that counts windows, with or without a division."""
    offer = PluginManager.offer

    def install(division: Division | None) -> None:
        evaluator = Evaluator("perplexity", "", METRICS, DIVISION.evaluate, division)
        monkeypatch.setattr(
            PluginManager, "offer", lambda self, kind, name: evaluator if kind is Evaluator else offer(self, kind, name)
        )

    return install


@pytest.mark.slow
def test_figures_do_not_depend_on_the_number_of_processes(workspace: Workspace) -> None:
    models = ("seed", "forest", "learner")
    settings: dict[str, Any] = {"stride": 8, "known_domains": True}
    recorder = Recorder()
    shared = figures(workspace, *models, nproc=3, reporter=recorder, **settings)
    assert shared == figures(workspace, *models, **settings)
    task, done, total = recorder.steps[-1]
    assert (task, done) == ("evaluating", total)
    assert sorted(recorder.steps) == recorder.steps, "progress only grows"


def test_an_evaluator_that_can_be_divided_is(workspace: Workspace, counting: Callable[[Division | None], None]) -> None:
    counting(DIVISION)
    recorder = Recorder()
    shared = figures(workspace, "seed", nproc=2, stride=1, reporter=recorder)
    assert len(recorder.steps) > 2
    assert shared == figures(workspace, "seed", stride=1)


def test_an_evaluator_that_cannot_be_divided_runs_in_one_process_with_a_note(
    workspace: Workspace, counting: Callable[[Division | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    counting(None)
    recorder = Recorder()
    monkeypatch.setattr(shared_evaluation, "Worker", None)
    assert figures(workspace, "seed", nproc=2, reporter=recorder) == figures(workspace, "seed")
    assert "evaluator 'perplexity' scores a text as a whole, so only one process is used" in recorder.lines


def killed(model: Any, windows: TokenWindows) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("dead processes do not go on")


def test_a_process_that_is_killed_while_it_opens_a_model_is_an_error(
    workspace: Workspace, counting: Callable[[Division | None], None]
) -> None:
    counting(Division(killed, num_windows, count_windows))
    with pytest.raises(UserError, match=r"^evaluation process \d of 2 was killed by signal 9") as error:
        workspace.evaluate("seed", stride=1, nproc=2)
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()


def test_a_model_that_only_the_processes_load_and_cannot_is_an_error(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(workspace.layout.seed, tmp_path / "damaged")
    for name in ("seed.json", "run.json"):
        (folder / name).unlink()
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers + 1, "layer_types": None}))
    monkeypatch.setattr("expertctl.core.models.loading._from_pretrained", None)  # this process cannot load it
    with pytest.raises(UserError, match=rf"damaged has no tensor 'model.layers.{layers}.") as error:
        workspace.evaluate(str(folder), nproc=2)
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()


def test_a_text_of_one_window_starts_no_process(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_evaluation, "Worker", None)
    monkeypatch.setattr(shared_evaluation.EvaluationJob, "num_windows", 1)
    assert figures(workspace, "seed", nproc=2) == figures(workspace, "seed")


def test_processes_and_models_at_the_same_time_are_refused(workspace: Workspace) -> None:
    with pytest.raises(UserError, match="give either nproc or jobs"):
        workspace.evaluate("seed", nproc=2, jobs=2)


def test_more_processes_than_gpus_are_refused(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"^each of 3 processes needs a GPU, and this machine has 2; give at most 2$"):
        workspace.evaluate("seed", nproc=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("part")
    ids = np.random.default_rng(0).integers(1, 50, 700).tolist()
    documents = [EncodedDocument("a" * 70, ids[begin : begin + 70]) for begin in range(0, 700, 70)]
    write_part(folder, documents, separator=0, vocabulary=50)
    return TokenStore(folder)


@settings(deadline=None)  # busy machines
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 9), st.lists(st.integers(0, 800), max_size=4))
def test_pieces_hold_the_batches_of_the_whole_text(
    text: TokenStore, context: int, stride: int, size: int, cuts: list[int]
) -> None:
    windows = TokenWindows(text, context, min(stride, context))
    whole = list(windows.batches(size))
    ends = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    pieces = [batch for begin, end in itertools.pairwise(ends) for batch in windows.batches(size, begin, end)]
    assert len(pieces) == len(whole)
    for piece, batch in zip(pieces, whole, strict=True):
        np.testing.assert_array_equal(piece.tokens, batch.tokens)
        np.testing.assert_array_equal(piece.scored, batch.scored)
