"""The `ray` launcher on a local cluster; skipped where Ray, which has hundreds of megabytes, is not installed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from inline_launching import inline_launching

from expertctl import UserError
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.run import STATE_FOLDER
from expertctl.plugins.launchers import ray as plugin
from expertctl.plugins.launchers.ray import RayOptions
from expertctl.workspace import Workspace

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


def workers_of(run: Path) -> list[int]:
    """Return the processes that train a run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"expertctl.experts.training.worker" in words and str(run).encode() in words:
            found.append(int(folder.name))
    return found


def started_command(workspace: Workspace, *words: str) -> subprocess.Popen[str]:
    """Start to train with Ray and return when there is a checkpoint."""
    command = [sys.executable, "-m", "expertctl.cli.main", "--json", "-w", str(workspace.root)]
    process = subprocess.Popen(
        [*command, "train", *words, "--launcher", "ray"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run = workspace.experts / words[0]
    ends = time.monotonic() + 240
    while not list((run / STATE_FOLDER).glob("step-0000001*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends
        time.sleep(0.02)
    return process


@needs_ray
@pytest.mark.slow
@pytest.mark.clusters
def test_a_killed_worker_ends_with_the_same_digest(new_project: Callable[..., Workspace]) -> None:
    here, there = new_project("here", tokens=32 * 60), new_project("there", tokens=32 * 60)
    with inline_launching():
        here.train("ant")
    process = started_command(there, "ant")
    for number in workers_of(there.experts / "ant"):
        os.kill(number, signal.SIGKILL)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert json.loads(output)["finished"] == ["ant"]
    assert errors.count("submitted again as job") == 1
    assert read_manifest(there.experts / "ant").digest == read_manifest(here.experts / "ant").digest


@needs_ray
@pytest.mark.slow
@pytest.mark.clusters
def test_ctrl_c_saves_the_state_and_leaves_no_process(new_project: Callable[..., Workspace]) -> None:
    workspace = new_project("there", tokens=32 * 100_000)
    process = started_command(workspace, "ant")
    process.send_signal(signal.SIGINT)
    try:
        errors = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "interrupted, state saved: ant" in errors
    assert workers_of(workspace.experts / "ant") == []


def test_a_node_without_the_workspace_says_so(tmp_path: Path) -> None:
    said = plugin.train(["false"], str(tmp_path / "experts" / "law"), str(tmp_path / "log"))
    assert said.startswith("node ")
    assert "does not have" in said
    assert "keep the workspace on storage that all nodes share" in said


def test_without_ray_nothing_is_begun(new_project: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"launcher 'ray' needs Ray, which is not installed: pip install 'expertctl\[ray\]'"
    ):
        plugin.scheduler(RayOptions())


def test_ray_cannot_detach(new_project: Callable[..., Workspace]) -> None:
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    with pytest.raises(UserError, match="runs of launcher 'ray' end with the command that starts them"):
        new_project("there").train("ant", launcher="ray", detach=True)
