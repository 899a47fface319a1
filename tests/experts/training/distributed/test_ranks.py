"""Processes of one run that do not fit each other end with a line that says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_runs import TORCHRUN
from flexolmo_workspaces import make_flexolmo_workspace

from expertctl.core.errors import UserError
from expertctl.core.hooks.training import TrainablePart
from expertctl.experts.training.distributed.ranks import ALONE, Ranks
from expertctl.experts.training.distributed.replicas import laid_out, require_divisible

pytestmark = pytest.mark.slow


def test_a_process_with_other_settings_is_refused(tmp_path: Path) -> None:
    """Two machines whose folders differ, instead of one shared folder."""
    workspace = make_flexolmo_workspace(tmp_path / "0", owners=())
    workspace.branch("code", domain="means")
    shutil.copytree(tmp_path / "0", tmp_path / "1", symlinks=True)
    run = tmp_path / "1" / "experts" / "code" / "run.json"
    content = json.loads(run.read_text())
    content["training"]["learning_rate"] /= 2
    run.write_text(json.dumps(content))
    worker = f'{sys.executable} -m expertctl.experts.training.worker "{tmp_path}/$RANK/experts/code"'
    done = subprocess.run(
        [*TORCHRUN, "--nproc-per-node=2", "--no-python", "bash", "-c", worker],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode != 0
    messages = [json.loads(line).get("message", "") for line in done.stdout.splitlines() if line.startswith("{")]
    assert any(message.startswith("process 1 of 2 has a run, text or torch that differs") for message in messages)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_gradients_are_not_lost_by_sharding(register: str) -> None:
    module = torch.nn.Linear(2, 2)
    part = TrainablePart(module, dict(module.named_parameters()))
    getattr(module.weight, register)(lambda value: None)
    with pytest.raises(UserError, match="changes the gradient of 'weight', which sharding would undo"):
        laid_out(part, torch.device("cpu"), Ranks(0, 2), "fsdp", bfloat16=False)


def test_a_batch_is_shared_equally() -> None:
    require_divisible(6, Ranks(1, 3))
    with pytest.raises(UserError, match="batch_size is 4, which 3 processes cannot share equally"):
        require_divisible(4, Ranks(0, 3))


def test_a_process_alone_waits_for_nobody() -> None:
    ALONE.wait()
    ALONE.require_agreement("ab" * 32, "anything")
    assert ALONE.share([1.5, 2.0]) == [1.5, 2.0]
    with ALONE.main_first():
        assert ALONE.is_main
