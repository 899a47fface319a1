"""What is wrong with the input, as a user meets it: one line, a status that is not zero, nothing earlier harmed."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from expertctl import verify
from expertctl.cli.main import main
from expertctl.core.process.environment import LIBRARY_SETTINGS
from expertctl.workspace import Workspace

pytestmark = pytest.mark.slow

LIMIT = 200_000  # bytes a file may grow to where the disk is said to be full


def expertctl(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in this process."""
    words = ["--workspace", str(root), *arguments]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = main(words)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def expertctl_on_a_full_disk(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, in which no file may grow beyond `LIMIT` bytes."""
    return subprocess.run(
        [sys.executable, "-m", "expertctl.cli.main", "--workspace", str(root), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT)),
    )


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back what `main` sets in the environment."""
    for name, value in LIBRARY_SETTINGS.items():
        monkeypatch.setenv(name, value)


def the_error(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one error line of a command that failed as it should."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert result.returncode == 1, result
    assert "Traceback" not in result.stderr
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def trained(seeded_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained") / "project"
    shutil.copytree(seeded_project, root)
    workspace = Workspace(root)
    for name in ("prose", "chance"):
        workspace.branch(name, domain=name)
    assert not workspace.train(jobs=2).failed
    return root


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "project")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", "forest", "--method", "average"),
        ("eval", "prose"),
        ("generate", "prose", "hello"),
        ("verify", "prose"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_flipped_bit_in_an_expert_is_noticed_by_every_command(copied: Path, arguments: tuple[str, ...]) -> None:
    flip(copied / "experts" / "prose" / "model.safetensors", -1000)
    result = expertctl(copied, *arguments)
    assert result.returncode == 1
    assert "was changed" in result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    assert not (copied / "generalists").exists() or not list((copied / "generalists").iterdir())


def test_a_flipped_bit_in_the_seed_stops_training(copied: Path) -> None:
    flip(copied / "seed" / "model.safetensors", -1000)
    assert expertctl(copied, "branch", "late", "--domain", "prose").returncode == 0
    assert "seed is not what its manifest says" in the_error(expertctl(copied, "train", "late"))


def test_a_truncated_expert_is_noticed(copied: Path) -> None:
    path = copied / "experts" / "prose" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    assert "model.safetensors is damaged" in the_error(expertctl(copied, "eval", "prose", "chance"))


def test_a_half_written_checkpoint_is_named(copied: Path) -> None:
    folder = copied / "experts" / "late" / ".training" / "step-00000004"
    assert expertctl(copied, "branch", "late", "--domain", "prose").returncode == 0
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"\x10")
    error = the_error(expertctl(copied, "train", "late"))
    assert "step-00000004 is damaged" in error
    assert "delete it to resume from the start" in error


def test_an_empty_corpus_is_named(copied: Path) -> None:
    (copied / "text" / "prose" / "train.jsonl").write_text("")
    error = the_error(expertctl(copied, "data", "prepare"))
    assert "domain 'prose' has no documents in its train part" in error


def test_invalid_json_names_file_and_line(copied: Path) -> None:
    path = copied / "text" / "prose" / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], lines[4][:-3], *lines[5:]]))
    assert "train.jsonl:5: " in the_error(expertctl(copied, "data", "prepare", "prose"))


def test_an_unknown_expert_lists_the_known(copied: Path) -> None:
    error = the_error(expertctl(copied, "merge", "forest", "--method", "average", "--experts", "prose,chanse"))
    assert "no expert 'chanse' (did you mean 'chance'?); finished: chance, prose" in error


def test_a_full_disk_while_training_loses_nothing(copied: Path) -> None:
    assert expertctl(copied, "branch", "late", "--domain", "prose").returncode == 0
    error = the_error(expertctl_on_a_full_disk(copied, "train", "late"))
    assert "no space left while writing" in error
    assert expertctl(copied, "train", "late").returncode == 0
    assert verify(copied / "experts" / "late") == []


def test_a_full_disk_while_merging_leaves_the_old_generalist(copied: Path) -> None:
    Workspace(copied).merge("soup", method="average")
    before = (copied / "generalists" / "soup" / "model.safetensors").read_bytes()
    error = the_error(expertctl_on_a_full_disk(copied, "merge", "soup", "--method", "average", "--force"))
    assert "no space left while writing" in error
    assert (copied / "generalists" / "soup" / "model.safetensors").read_bytes() == before
    assert verify(copied / "generalists" / "soup") == []
    assert {path.name for path in (copied / "generalists").iterdir()} == {"soup", ".soup.unfinished"}
    resumed = expertctl(copied, "merge", "soup", "--method", "average", "--force", "--resume")
    assert resumed.returncode == 0
    assert (copied / "generalists" / "soup" / "model.safetensors").read_bytes() == before
    assert [path.name for path in (copied / "generalists").iterdir()] == ["soup"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; tests/core covers refusals")
def test_a_read_only_workspace_is_named(copied: Path) -> None:
    copied.chmod(0o555)
    try:
        assert "no permission to access" in the_error(expertctl(copied, "merge", "soup", "--method", "average"))
    finally:
        copied.chmod(0o755)


def test_two_trainings_of_one_expert_do_not_meet(copied: Path) -> None:
    from filelock import FileLock

    assert expertctl(copied, "branch", "late", "--domain", "prose").returncode == 0
    with FileLock(Workspace(copied).layout.lock("run-late")):
        error = the_error(expertctl(copied, "train", "late"))
    assert "another process is working on expert 'late'" in error


def test_errors_are_json_when_json_is_asked_for(copied: Path) -> None:
    result = expertctl(copied, "--json", "eval", "nobody")
    assert result.returncode == 1
    assert "no model 'nobody'" in json.loads(result.stdout)["error"]
