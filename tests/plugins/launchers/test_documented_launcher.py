"""The launcher of docs/launchers.md: a page of code that trains on a cluster."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fake_kubectl
import pytest
from inline_launching import inline_launching
from installed_plugin import installed_plugin

from expertctl.core.manifests.manifest import read_manifest
from expertctl.workspace import Workspace

PAGE = Path(__file__).parents[3] / "docs" / "launchers.md"
(CODE,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.clusters
def test_the_launcher_of_the_page_survives_a_failed_node(new_project: Callable[..., Workspace], tmp_path: Path) -> None:
    here, there = new_project("here"), new_project("there")
    with inline_launching():
        here.train("ant")
    environment = installed_plugin(tmp_path / "site", "kubernetes", CODE) | fake_kubectl.install(tmp_path / "cluster")
    command = [sys.executable, "-m", "expertctl.cli.main", "--json", "-w", str(there.root), "train", "ant"]
    options = ["--launcher", "kubernetes", "--launcher-option", "poll_seconds=0.2", "--launcher-option", "gpus=1"]
    done = subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["finished"] == ["ant"]
    assert "job job.batch/expertctl-ant-0 ended (BackoffLimitExceeded); submitted again as job" in done.stderr
    assert [path.stem for path in fake_kubectl.jobs(tmp_path / "cluster")] == ["expertctl-ant-0", "expertctl-ant-1"]
    assert read_manifest(there.experts / "ant").digest == read_manifest(here.experts / "ant").digest


def test_the_launcher_is_a_page_of_code() -> None:
    assert len(CODE.splitlines()) < 100
