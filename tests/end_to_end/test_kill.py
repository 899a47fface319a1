"""What `kill -9` at any moment leaves: nothing harmed, and the same bytes in the end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expertctl import verify
from expertctl.workspace import Workspace

pytestmark = pytest.mark.slow

STAGED = {
    "stages": [{"share": 0.25, "sequence_length": 8}, {"share": 0.25, "sequence_length": 16}],
    "annealing": {"share": 0.2, "domains": {"prose": 1, "chance": 2}},
    "average": "ema",
}

TRAIN = "from expertctl.workspace import Workspace; r = Workspace({root!r}).train('prose'); assert not r.failed, r"
SEED = "from expertctl.workspace import Workspace; Workspace({root!r}).seed()"
MERGE = (
    "from expertctl.workspace import Workspace; "
    "Workspace({root!r}).merge('forest', method='ensemble', experts=['prose', 'chance'])"
)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of an artefact; logs tell the time and are left out."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("metrics.jsonl", "training.log")
    }


def start(code: str, root: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code.format(root=str(root))], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(code: str, root: Path) -> None:
    process = start(code, root)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def started_training(root: Path) -> subprocess.Popen[bytes]:
    """Start to train the expert and return when its first checkpoint is there."""
    process = start(TRAIN, root)
    while not list((root / "experts" / "prose" / ".training").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def kill_when(process: subprocess.Popen[bytes], root: Path, reached: str) -> bool:
    """Kill a process as soon as a file matches `reached`; return whether it was still running."""
    while process.poll() is None and not any(root.glob(reached)):
        time.sleep(0.001)
    was_running = process.poll() is None
    kill(process)
    return was_running


def worker_of(folder: Path) -> int | None:
    """Return the process id of the worker that trains in `folder`."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"expertctl.experts.training.worker" in words and str(folder).encode() in words:
            return int(entry.name)
    return None


def gone(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def branched(seeded_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("branched") / "project"
    shutil.copytree(seeded_project, root)
    workspace = Workspace(root)
    workspace.prepare()
    for name in ("prose", "chance"):
        workspace.branch(name, domain=name)
    return root


@pytest.fixture(scope="module")
def unbroken(branched: Path) -> dict[str, bytes]:
    run(TRAIN, branched)
    return contents(branched / "experts" / "prose")


def fresh(branched: Path, tmp_path: Path) -> Path:
    """Return a copy of the project in which the expert was branched and not trained."""
    root = tmp_path / "project"
    shutil.copytree(branched, root)
    keep = (root / "experts" / "prose" / "run.json").read_bytes()
    shutil.rmtree(root / "experts" / "prose")
    (root / "experts" / "prose").mkdir()
    (root / "experts" / "prose" / "run.json").write_bytes(keep)
    return root


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    branched: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    root = fresh(branched, tmp_path)
    folder = root / "experts" / "prose"
    moments = random.Random(0)
    reached = set()
    for _ in range(4):
        process = start(TRAIN, root)
        deadline = time.monotonic() + 120
        wanted = len(reached) * 4 + 2  # let it get further each time
        while process.poll() is None and time.monotonic() < deadline:
            done = [int(path.name[5:]) for path in (folder / ".training").glob("step-*")]
            if done and max(done) >= wanted:
                reached.add(max(done))
                break
            time.sleep(0.01)
        time.sleep(moments.random() * 0.1)
        worker = worker_of(folder)
        kill(process)
        assert worker is None or gone(worker, 10), "a worker outlived the command that started it"
    assert len(reached) >= 3
    run(TRAIN, root)
    assert contents(folder) == unbroken
    assert verify(folder) == []


def test_a_killed_worker_is_reported_and_the_same_command_goes_on(
    branched: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    root = fresh(branched, tmp_path)
    folder = root / "experts" / "prose"
    process = started_training(root)
    worker = worker_of(folder)
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"was killed by signal 9" in errors
    run(TRAIN, root)
    assert contents(folder) == unbroken


def test_an_interrupted_run_saves_its_state_and_goes_on(
    branched: Path, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    root = fresh(branched, tmp_path)
    folder = root / "experts" / "prose"
    process = started_training(root)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert list((folder / ".training").glob("step-*"))
    assert not (folder / "expert.json").exists()
    run(TRAIN, root)
    assert contents(folder) == unbroken


@pytest.fixture(scope="module")
def staged(branched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an expert that is branched and not trained, whose run has stages and anneals."""
    root = shutil.copytree(branched, tmp_path_factory.mktemp("staged") / "project")
    Workspace(root).branch("staged", domain="prose", training=STAGED)
    return root


@pytest.mark.long
def test_a_run_killed_in_every_stage_and_while_it_anneals_ends_with_the_same_bytes(
    staged: Path, tmp_path: Path
) -> None:
    train = TRAIN.replace("prose", "staged")
    whole, root = (shutil.copytree(staged, tmp_path / name) for name in ("whole", "killed"))
    run(train, whole)
    folder, reached = root / "experts" / "staged", []
    for wanted in (2, 7, 13, 18):
        process = start(train, root)
        while process.poll() is None:
            done = [int(path.name[5:]) for path in (folder / ".training").glob("step-*")]
            if done and max(done) >= wanted:
                reached.append(max(done))
                break
            time.sleep(0.005)
        worker = worker_of(folder)
        kill(process)
        assert worker is None or gone(worker, 10)
    assert len({sum(step >= begin for begin in (5, 10, 16)) for step in reached}) >= 3
    run(train, root)
    assert contents(folder) == contents(whole / "experts" / "staged")


@pytest.fixture(scope="module")
def trained(branched: Path, unbroken: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = shutil.copytree(branched, tmp_path_factory.mktemp("trained") / "project")
    assert not Workspace(root).train("chance").failed
    return root


@pytest.mark.parametrize(
    "reached", [".locks/*", "generalists/.forest*", "generalists/.forest*/experts/*", "*/.forest*/*.json"]
)
def test_a_killed_merge_leaves_nothing_or_everything(trained: Path, tmp_path: Path, reached: str) -> None:
    root = shutil.copytree(trained, tmp_path / "project")
    kill_when(start(MERGE, root), root, reached)
    folder = root / "generalists" / "forest"
    if folder.exists():
        assert verify(folder) == []
    else:
        run(MERGE, root)
    assert verify(folder) == []
    assert [path.name for path in (root / "generalists").iterdir() if path.name == "forest"] == ["forest"]


@pytest.mark.long
def test_a_seed_killed_in_every_phase_ends_with_the_same_bytes(seeded_project: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(seeded_project, root)
    shutil.rmtree(root / "seed")
    shutil.rmtree(root / "corpora")
    unbroken = shutil.copytree(root, tmp_path / "unbroken")
    run(SEED, unbroken)
    phases = ("seed", "corpora/*/*", "seed/run.json", "seed/.training/step-*", "seed/model.safetensors")
    killed = [kill_when(start(SEED, root), root, reached) for reached in phases]
    assert sum(killed) >= 3
    if not (root / "seed" / "seed.json").exists():
        run(SEED, root)
    assert contents(root / "seed") == contents(unbroken / "seed")
