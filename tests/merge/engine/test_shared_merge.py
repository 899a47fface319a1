"""Merges by several processes: the bytes of one process, and nothing half-done."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from reporters import Recorder
from toy_models import engine_merge, random_tensors, recipe, write_model

from expertctl import MergeRun, UserError, Workspace
from expertctl.core.errors import Interrupted
from expertctl.core.hooks.merging import TensorGroup, TensorMerge
from expertctl.merge.engine.calculator import EngineSettings, Written
from expertctl.merge.engine.shared_merge import job_for_processes

TWO = EngineSettings(workers=2, piece_numbers=5)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors*")}


def both(what: Any, root: Path, **how: Any) -> tuple[Written, Written]:
    """Return what one process and two write, after a comparison of their files."""
    one = engine_merge(what, root / "one", settings=EngineSettings(threads=1), **how)
    two = engine_merge(what, root / "two", settings=TWO, **how)
    assert contents(root / "one") == contents(root / "two")
    return one, two


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("linear", {}),
        ("ties", {"density": 0.4, "trim": "model"}),
        pytest.param("dare_ties", {"density": 0.5}, marks=pytest.mark.slow),
        pytest.param("slerp", {"from_seed": False}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_write_the_bytes_and_digests_of_one(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    names = ("base", "a", "b")
    models = {
        name: write_model(tmp_path / name, random_tensors(seed, layers=4, dtype=torch.bfloat16))
        for seed, name in enumerate(names)
    }
    if method == "linear":
        del models["base"]
    one, two = both(
        recipe(method, models, seed="base" if "base" in models else None, options=options), tmp_path, shard_bytes=200
    )
    assert two.digests == one.digests
    assert two.read == one.read
    assert two.kept == one.kept
    assert bool(two.kept) == (method == "ties"), "counted where the method counts"
    assert not multiprocessing.active_children()


def test_an_error_in_a_process_keeps_its_traceback_or_its_line(tmp_path: Path) -> None:
    models = {name: write_model(tmp_path / name, random_tensors(seed)) for seed, name in enumerate("ab")}
    bad = TensorMerge("bad", "", merge=cut, uses_seed=False)
    with pytest.raises(UserError, match=r"^merge method 'bad' returned shape"):
        engine_merge(recipe("bad", models), tmp_path / "out", method=bad, settings=TWO)
    broken = TensorMerge("broken", "", merge=fail, uses_seed=False)
    with pytest.raises(RuntimeError, match=r"(?s)merge process . of 2 failed:.*ZeroDivisionError: a bug"):
        engine_merge(recipe("broken", models), tmp_path / "out", method=broken, settings=TWO)


def cut(group: TensorGroup, options: Any) -> Any:
    return group.experts[0][:1]


def fail(group: TensorGroup, options: Any) -> Any:
    raise ZeroDivisionError("a bug")


def test_a_method_that_cannot_be_passed_on_runs_in_one_process_with_a_note(tmp_path: Path) -> None:
    models = {name: write_model(tmp_path / name, random_tensors(seed)) for seed, name in enumerate("ab")}
    inner = TensorMerge("inner", "", merge=lambda group, _: group.experts[0], uses_seed=False, elementwise=True)
    one, two = both(recipe("inner", models), tmp_path, method=inner)
    assert one.digests == two.digests
    recorder = Recorder()
    assert job_for_processes(tools_of(inner), [], tmp_path, recorder) is None
    assert recorder.lines == ["merge method 'inner' cannot be passed on to other processes, so one is used"]


def tools_of(method: TensorMerge) -> Any:
    from expertctl.merge.engine.actions import MergeTools
    from expertctl.merge.engine.reading import Reader

    return MergeTools(method, Reader())


class AtFirst(Recorder):
    """Kills the processes, or interrupts this one, once the first tensor is complete."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self.number = number
        self.is_done = False

    def progress(self, task: str, done: int, total: int | None = None, unit: str = "") -> None:
        children = [process.pid for process in multiprocessing.active_children() if process.pid is not None]
        if self.is_done or not children:  # before the processes begin
            return
        self.is_done = True
        if self.number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGINT)
        else:
            for child in children:
                os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_merge_that_is_stopped_is_resumed_to_the_same_bytes(
    shared_workspace: Path, tmp_path: Path, number: signal.Signals
) -> None:
    workspace = Workspace(shutil.copytree(shared_workspace, tmp_path / "workspace"))
    workspace.merge("whole", method="linear")
    folder = workspace.generalists.folder
    expected, message = {
        signal.SIGKILL: (UserError, r"^merge process \d of 2 was killed by signal 9 \(SIGKILL\); if memory ran out"),
        signal.SIGINT: (Interrupted, r"^interrupted; the written part of .* is kept"),
    }[number]
    with pytest.raises(expected, match=message):
        workspace.merge("again", method="linear", run=MergeRun(settings=TWO, reporter=AtFirst(number)))
    assert not multiprocessing.active_children()
    assert not (folder / "again").exists()
    recorder = Recorder()
    workspace.merge("again", method="linear", run=MergeRun(settings=TWO, resume=True, reporter=recorder))
    assert any(line.startswith("resuming: ") for line in recorder.lines)
    assert contents(folder / "again") == contents(folder / "whole")
    assert not (folder / ".again.unfinished").exists()
