"""Worker processes: their standard input may be at its end, every exit has a reason, and warnings arrive."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expertctl.workspace import Workspace

pytestmark = pytest.mark.slow

WORKER = [sys.executable, "-m", "expertctl.experts.training.worker"]
CLI = [sys.executable, "-m", "expertctl.cli.main"]
DOCS = Path(__file__).parents[3] / "docs" / "plugins.md"
NOISY = """
import expertctl

@expertctl.hookimpl
def expert_finished(event):
    raise RuntimeError("cannot reach the dashboard")
"""


@pytest.fixture
def workspace(tmp_path: Path, new_workspace: object) -> Workspace:
    lines = [json.dumps({"text": f"The fox number {number} jumps over the lazy dog. " * 9}) for number in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    config = {
        "training": {"tokens": 512, "sequence_length": 16, "batch_size": 2},
        "domains": {"fox": {"path": str(tmp_path / "text.jsonl")}},
        "experts": {"fox": {"domain": "fox"}},
    }
    root: Path = new_workspace(tmp_path / "workspace", [], config=json.dumps(config))  # type: ignore[operator]
    return Workspace(root)


def installed(folder: Path, name: str, code: str) -> dict[str, str]:
    """Install a plugin into a folder; return an environment in which Python finds it."""
    folder.mkdir()
    (folder / f"plugin_of_{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[expertctl]\n{name} = plugin_of_{name}\n")
    return {**os.environ, "PYTHONPATH": str(folder), "EXPERTCTL_PLUGINS": name}


def test_a_worker_without_standard_input_trains_to_the_end(workspace: Workspace) -> None:
    workspace.branch("fox")
    command = [*WORKER, str(workspace.layout.experts / "fox")]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"event": "finished"}


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
    environment = installed(tmp_path / "site", "serial", code)
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
    environment = installed(tmp_path / "site", "noisy", NOISY)
    workspace.branch("fox")
    begin = time.monotonic()
    done = subprocess.run(
        [*CLI, "train", "fox"], cwd=workspace.root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot reach the dashboard") == 1, (done.stderr, time.monotonic() - begin)
