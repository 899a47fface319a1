"""Training on a GPU, where there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flexolmo_workspaces import make_flexolmo_workspace

from expertctl import Reporter, Workspace, verify
from expertctl.core.config.settings import LauncherConfig
from expertctl.experts.training.run import train_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
]
TRAINING = {"tokens": 20 * 4 * 32, "log_every": 1, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_flexolmo_workspace(tmp_path_factory.mktemp("gpu") / "workspace", owners=("prose",), trains="all")


def losses(workspace: Workspace, name: str, **settings: Any) -> list[float]:
    workspace.branch(name, domain="means", training=TRAINING | settings)
    run = workspace.layout.experts / name
    train_run(run, Reporter(), lambda: False)
    assert verify(run) == []
    return losses_in(run)


def losses_in(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_losses_are_those_of_a_cpu(workspace: Workspace) -> None:
    on_cpu = losses(workspace, "cpu", device="cpu")
    assert losses(workspace, "gpu", device="cuda", precision="float32") == pytest.approx(on_cpu, abs=1e-3)
    for name, settings in {
        "passes": {"precision": "bfloat16"},
        "pure": {"precision": "pure_bfloat16"},
        "thrifty": {"activation_checkpointing": True, "chunked_loss": True},
    }.items():
        assert losses(workspace, name, device="cuda", **settings) == pytest.approx(on_cpu, rel=0.05), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_have_the_losses_of_one(workspace: Workspace, strategy: str) -> None:
    alone = losses(workspace, f"alone-{strategy}", precision="float32")
    workspace.branch(strategy, domain="means", training=TRAINING | {"precision": "float32"})
    launcher = LauncherConfig(name="local", options={"nproc": 2, "strategy": strategy})
    workspace.train(strategy, launcher=launcher).raise_for_failures()
    assert losses_in(workspace.layout.experts / strategy) == pytest.approx(alone, abs=1e-3)
