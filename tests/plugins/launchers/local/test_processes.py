"""Worker processes: every exit has a reason, and warnings arrive."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from installed_plugin import installed_plugin
from reporters import Recorder

from expertctl.core.config.settings import LauncherConfig
from expertctl.core.manifests.run import STATE_FOLDER
from expertctl.plugins.flower.processes.child import free_port
from expertctl.workspace import Workspace

pytestmark = pytest.mark.slow

WORKER = [sys.executable, "-m", "expertctl.experts.training.worker"]
CLI = [sys.executable, "-m", "expertctl.cli.main"]
DOCS = Path(__file__).parents[4] / "docs" / "plugins.md"
NOISY = """
import expertctl

@expertctl.hookimpl
def expert_finished(event):
    raise RuntimeError("cannot reach the dashboard")
"""


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory, new_workspace: Callable[..., Path]) -> Path:
    """A workspace with a seed; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("seeded")
    lines = [json.dumps({"text": f"The fox number {number} jumps over the lazy dog. " * 9}) for number in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    config = {
        "training": {"tokens": 512, "sequence_length": 16, "batch_size": 2},
        "domains": {"fox": {"path": str(folder / "text.jsonl")}},
        "experts": {"fox": {"domain": "fox"}},
    }
    root = new_workspace(folder / "workspace", [], config=json.dumps(config))
    Workspace(root).data.prepare(["fox"])
    return root


@pytest.fixture
def workspace(tmp_path: Path, seeded: Path) -> Workspace:
    return Workspace(shutil.copytree(seeded, tmp_path / "workspace"))


def test_a_worker_on_a_leash_says_why_it_leaves(workspace: Workspace) -> None:
    workspace.branch("fox", training={"tokens": 10_000_000})
    watched, held = os.pipe()
    command = [*WORKER, str(workspace.layout.experts / "fox"), "--leash", str(watched)]
    with subprocess.Popen(
        command, pass_fds=(watched,), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(watched)
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["event"] == "started"
        os.close(held)
        assert process.wait(timeout=30) == 1
        assert "the process that started this training is gone" in process.stderr.read()


def test_the_launcher_of_the_documentation_leaves_json_alone(workspace: Workspace, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (code,) = (block for block in blocks if "def launchers" in block)
    environment = installed_plugin(tmp_path / "site", "serial", code)
    workspace.branch("fox")
    command = [*CLI, "--json", "train", "fox", "--launcher", "serial", "--launcher-option", "nice=1"]
    done = subprocess.run(
        command,
        cwd=workspace.root,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["finished"] == ["fox"]
    assert (workspace.layout.experts / "fox" / "expert.json").is_file()


def test_warnings_of_plugins_in_the_worker_are_shown_once(workspace: Workspace, tmp_path: Path) -> None:
    environment = installed_plugin(tmp_path / "site", "noisy", NOISY)
    workspace.branch("fox")
    begin = time.monotonic()
    done = subprocess.run(
        [*CLI, "train", "fox"], cwd=workspace.root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot reach the dashboard") == 1, (done.stderr, time.monotonic() - begin)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_ahead_of_a_time_limit_saves_the_state(workspace: Workspace, number: signal.Signals) -> None:
    run = longer(workspace, 4000, checkpoint_seconds=1e6)
    with subprocess.Popen([*WORKER, str(run)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while json.loads(process.stdout.readline())["event"] != "progress":
            pass
        process.send_signal(number)
        outcome = json.loads(process.communicate(timeout=60)[0].splitlines()[-1])
    assert outcome["event"] == "interrupted"
    assert process.returncode == 130
    assert len(list(run.glob(f"{STATE_FOLDER}/step-*"))) == 1


def test_a_run_stops_at_its_time_limit_and_goes_on_later(workspace: Workspace) -> None:
    run = longer(workspace, 200_000, checkpoint_seconds=1e6)
    launcher = LauncherConfig(name="local", options={"minutes": 0.001})  # a step is done all the same
    assert workspace.train("fox", launcher=launcher).interrupted == ("fox",)
    (first,) = run.glob(f"{STATE_FOLDER}/step-*")
    assert workspace.train("fox", launcher=launcher).interrupted == ("fox",)
    assert max(run.glob(f"{STATE_FOLDER}/step-*")) > first


# --- one run in several processes ---


def longer(workspace: Workspace, steps: int, **training: object) -> Path:
    """Branch an expert with so many steps, and a checkpoint after each."""
    settings = {"tokens": 32 * steps, "checkpoint_seconds": 0, "log_every": 1, **training}
    workspace.branch("fox", training=settings)
    return workspace.layout.experts / "fox"


def ranks_of(run: Path) -> list[int]:
    """Return the process numbers of the ranks that train a run, without torchrun's own."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if str(run).encode() in command and b"torch.distributed.run" not in command:
                found.append(int(folder.name))
    return found


@pytest.mark.long
def test_a_killed_rank_leads_to_the_same_end(workspace: Workspace, tmp_path: Path) -> None:
    """kill -9 of one of two processes: the launcher starts both again from the last checkpoint."""
    expected = longer(workspace, 30)
    other = Workspace(shutil.copytree(workspace.root, tmp_path / "other"))
    together = {"name": "local", "options": {"nproc": 2}}
    assert workspace.train("fox", launcher=LauncherConfig(**together)).finished == ("fox",)
    run, said = other.layout.experts / "fox", Recorder()
    killed = threading.Thread(target=kill_one_after_checkpoint, args=(run,))
    killed.start()
    assert other.train("fox", launcher=LauncherConfig(**together), reporter=said).finished == ("fox",)
    killed.join()
    assert any("starting again from the last checkpoint" in line for line in said.lines), said.lines
    assert (run / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def kill_one_after_checkpoint(run: Path) -> None:
    ends = time.monotonic() + 120
    while time.monotonic() < ends and not list(run.glob(f"{STATE_FOLDER}/step-000000[01][3-9]*")):
        time.sleep(0.02)
    os.kill(max(ranks_of(run)), signal.SIGKILL)


def test_several_processes_stop_together_and_go_on(workspace: Workspace) -> None:
    run = longer(workspace, 4000)
    command = [*CLI, "-w", str(workspace.root), "train", "fox", "--nproc", "2", "--strategy", "fsdp"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        ends = time.monotonic() + 120
        while time.monotonic() < ends and not list(run.glob(f"{STATE_FOLDER}/step-*")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted, state saved: fox" in error
    assert ranks_of(run) == []
    assert list(run.glob(f"{STATE_FOLDER}/step-*"))


def test_an_error_of_several_processes_is_one_line(workspace: Workspace) -> None:
    longer(workspace, 10, batch_size=3)
    done = workspace.train("fox", launcher=LauncherConfig(name="local", options={"nproc": 2}))
    assert "training.batch_size is 3, which 2 processes cannot share equally" in done.failed["fox"]


def test_the_processes_end_with_the_command_that_started_them(workspace: Workspace) -> None:
    run = longer(workspace, 4000)
    command = [*CLI, "-w", str(workspace.root), "train", "fox", "--nproc", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        ends = time.monotonic() + 120
        while time.monotonic() < ends and not list(run.glob(f"{STATE_FOLDER}/step-*")):
            time.sleep(0.05)
        assert len(ranks_of(run)) == 2
        process.kill()
    ends = time.monotonic() + 60
    while time.monotonic() < ends and ranks_of(run):
        time.sleep(0.1)
    assert ranks_of(run) == []


def test_processes_that_do_not_meet_end_with_a_reason(workspace: Workspace) -> None:
    run = longer(workspace, 10)
    environment = {
        **os.environ,
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    done = subprocess.run(
        [*WORKER, str(run), "--timeout", "3"], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    message = json.loads(done.stdout.splitlines()[-1])["message"]
    assert message.startswith("the 2 processes of this run did not meet within 3 seconds")
