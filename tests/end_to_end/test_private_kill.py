"""A private run that is killed goes on with the same noise and the same account, and takes its key with it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expertctl import verify
from expertctl.core.manifests.manifest import read_manifest
from expertctl.workspace import Workspace

pytestmark = pytest.mark.slow

KEY = bytes(range(32))


def train(root: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "expertctl.experts.training.worker", str(root / "experts" / "clinic")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(root: Path) -> None:
    process = train(root)
    out, errors = _wait(process)
    assert process.returncode == 0, (out + errors).decode()


def _wait(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """Wait for a worker with its standard input held open, as the launcher does."""
    assert process.stdout is not None
    assert process.stderr is not None
    out, errors = process.stdout.read(), process.stderr.read()
    process.wait(timeout=60)
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()
    return out, errors


@pytest.fixture
def branched(project: Workspace) -> Path:
    project.prepare()
    project.branch("clinic", domain="prose", trains="feed_forward", dp={"epsilon": 8, "delta": 1e-4})
    return project.root


def with_key(root: Path, copy: Path) -> Path:
    """Copy a project, and give its run a key that is known here."""
    shutil.copytree(root, copy)
    state = copy / "experts" / "clinic" / ".training"
    state.mkdir()
    (state / "privacy.key").write_bytes(KEY)
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("metrics.jsonl", "training.log")
    }


@pytest.mark.long
@pytest.mark.parametrize("kept", [True, False])
def test_killed_twice_it_ends_with_the_same_bytes_and_the_same_account(
    branched: Path, tmp_path: Path, kept: bool
) -> None:
    unbroken = with_key(branched, tmp_path / "unbroken") / "experts" / "clinic"
    finish(unbroken.parents[1])
    root = with_key(branched, tmp_path / "killed") if kept else branched
    folder = root / "experts" / "clinic"
    for least in (2, 8):
        process = train(root)
        while process.poll() is None:
            steps = [int(path.name[5:]) for path in (folder / ".training").glob("step-*")]
            if steps and max(steps) >= least:
                break
            time.sleep(0.01)
        assert process.poll() is None, "it has to be killed on its way"
        key = (folder / ".training" / "privacy.key").read_bytes()
        os.kill(process.pid, signal.SIGKILL)
        _wait(process)
    assert (key == KEY) == kept
    finish(root)
    assert verify(folder) == []
    assert not (folder / ".training").exists()
    assert read_manifest(folder).data.privacy == read_manifest(unbroken).data.privacy
    same = contents(folder) == contents(unbroken)
    assert same == kept, "the same bytes with the same key, others with another"
    assert not any(key in content or key.hex().encode() in content for content in contents(folder).values())
