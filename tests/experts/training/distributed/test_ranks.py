"""Processes of one run that do not fit each other end with a line that says so."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a workspace, called 0, whose expert `code` has not begun."""
    root = tmp_path_factory.mktemp("prepared")
    make_flexolmo_workspace(root / "0", owners=()).branch("code", domain="means")
    return root


def copied(prepared: Path, folder: Path) -> Path:
    """Copy the workspace twice, for two machines whose folders are not shared; return the run of the second."""
    for name in ("0", "1"):
        shutil.copytree(prepared / "0", folder / name, symlinks=True)
    return folder / "1" / "experts" / "code"


def messages_of(folder: Path, arguments: str = "", processes: int = 2) -> list[str]:
    """Return the errors of processes that train the expert each in its own workspace, `folder/RANK`; all have to fail."""
    worker = f'{sys.executable} -m expertctl.experts.training.worker "{folder}/$RANK/experts/code" {arguments}'
    done = subprocess.run(
        [*TORCHRUN, f"--nproc-per-node={processes}", "--no-python", "bash", "-c", worker],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode != 0
    output = done.stdout.replace("}{", "}\n{")  # two processes may write at once
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert all(line["event"] == "error" for line in lines)
    return [line["message"] for line in lines]


@pytest.mark.long
def test_processes_with_other_settings_are_refused(prepared: Path, tmp_path: Path) -> None:
    """Two machines whose folders differ, instead of one shared folder."""
    run = copied(prepared, tmp_path) / "run.json"
    content = json.loads(run.read_text())
    content["training"]["learning_rate"] /= 2
    run.write_text(json.dumps(content))
    messages = messages_of(tmp_path)
    assert messages
    assert all(message.startswith("process 1 of 2 does not have the main process's run, text") for message in messages)


@pytest.mark.long
def test_processes_with_other_strategies_are_refused(prepared: Path, tmp_path: Path) -> None:
    copied(prepared, tmp_path)
    messages = messages_of(tmp_path, '--strategy $([ "$RANK" = 0 ] && echo ddp || echo fsdp)')
    assert messages
    assert all("does not have the main process's run, text, strategy" in message for message in messages)


@pytest.mark.long
def test_a_process_without_the_folder_ends_all(prepared: Path, tmp_path: Path) -> None:
    shutil.rmtree(copied(prepared, tmp_path))
    messages = messages_of(tmp_path)
    assert messages
    assert all(message.endswith("run.json does not exist") for message in messages)


@pytest.mark.long
def test_processes_that_do_not_see_the_same_checkpoints_are_refused(prepared: Path, tmp_path: Path) -> None:
    """The second would begin again while the first resumes."""
    copied(prepared, tmp_path)
    (tmp_path / "0" / "experts" / "code" / ".training" / "step-00000001").mkdir(parents=True)
    messages = messages_of(tmp_path)
    assert messages
    assert all(
        message.startswith("process 1 of 2 does not have the main process's checkpoints") for message in messages
    )


@pytest.mark.long
def test_a_batch_that_processes_cannot_share_is_refused(prepared: Path, tmp_path: Path) -> None:
    copied(prepared, tmp_path)
    shutil.copytree(tmp_path / "0", tmp_path / "2", symlinks=True)
    messages = messages_of(tmp_path, processes=3)
    assert messages
    assert all("batch_size is 4, which 3 processes cannot share equally" in message for message in messages)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_never_meet_end_after_the_timeout(rank: int, prepared: Path) -> None:
    """One of two is not started: the first waits for it, the second finds nobody at the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "expertctl.experts.training.worker", str(prepared / "0/experts/code"), "--timeout", "3"],
        capture_output=True,
        text=True,
        timeout=200,
        env={
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        },
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["message"].startswith("the 2 processes of this run did not meet within 3 seconds")
    assert time.monotonic() - begun < 120  # most of it to import torch


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
    with pytest.raises(UserError, match=r"^as it is$"), ALONE.failing_together():
        raise UserError("as it is")
    ALONE.require_agreement(["ab"], "anything")
    assert ALONE.share([1.5, 2.0]) == [1.5, 2.0]
    with ALONE.main_first():
        assert ALONE.is_main


@pytest.mark.parametrize(("world", "status"), [("2", 3), ("1", -signal.SIGABRT)])
def test_one_of_several_processes_leaves_without_the_clean_up_of_the_interpreter(world: str, status: int) -> None:
    program = (
        "import atexit, os; from expertctl.experts.training.distributed.ranks import leave; "
        "atexit.register(os.abort); print('said', end=''); leave(3)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], env=os.environ | {"WORLD_SIZE": world}, capture_output=True, text=True
    )
    assert done.returncode == status
    assert done.stdout == "said"
