"""A workspace of three experts with so little to train that starting their processes takes longest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm

from expertctl.workspace import Workspace

EXPERTS = ("ant", "bee", "fox")


@pytest.fixture
def new_project(tmp_path: Path, new_workspace: Callable[..., Path]) -> Callable[..., Workspace]:
    """Makes workspaces of the same experts, with a checkpoint after every step."""

    def make(name: str, **training: object) -> Workspace:
        lines = [json.dumps({"text": f"The fox number {number} jumps over the lazy dog. " * 9}) for number in range(40)]
        (tmp_path / "text.jsonl").write_text("\n".join(lines))
        settings = {"tokens": 32 * 40, "sequence_length": 16, "batch_size": 2, "checkpoint_seconds": 0, "log_every": 1}
        config = {
            "training": {**settings, **training},
            "domains": {"text": {"path": str(tmp_path / "text.jsonl")}},
            "experts": {expert: {"domain": "text", "training": {"seed": seed}} for seed, expert in enumerate(EXPERTS)},
        }
        return Workspace(new_workspace(tmp_path / name, [], config=json.dumps(config)))

    return make


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    cluster = FakeSlurm(tmp_path / "slurm")
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.kill_all()
