"""Checkpoints of which every process writes its rows: resumed by others, verified, and complete or not there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from distributed_runs import losses_of, records_of, train_together
from flexolmo_workspaces import make_flexolmo_workspace
from safetensors.torch import save_file

from expertctl import Reporter, verify
from expertctl.core.errors import Interrupted, UserError
from expertctl.experts.training.distributed.parts import JoinedParts, part_name
from expertctl.experts.training.run import train_run

STEPS = 28
TRAINING = {"tokens": STEPS * 6 * 32, "batch_size": 6, "log_every": 1, "learning_rate": 5e-3, "checkpoint_seconds": 1e6}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with runs that have not begun; one process trains the run `alone`."""
    root = tmp_path_factory.mktemp("prepared") / "workspace"
    workspace = make_flexolmo_workspace(root, owners=())
    sharded = {**TRAINING, "sharded_checkpoints": True}
    workspace.branch("alone", domain="means", training=TRAINING)
    workspace.branch("sharded", domain="means", training=sharded)
    quick = {"background_checkpoints": True, "checkpoint_seconds": 0}
    workspace.branch("background", domain="means", training={**sharded, **quick})
    train_run(root / "experts/alone", Reporter(), lambda: False)
    return root


def files_of(root: Path, run: str) -> list[str]:
    """Return the files of the newest checkpoint."""
    folder = sorted((root / "experts" / run / ".training").glob("step-*"))[-1]
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.long
def test_rows_are_read_by_other_numbers_of_processes_and_strategies(prepared: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(prepared, tmp_path / "workspace", symlinks=True))
    runs = ("experts/sharded", "experts/background")
    train_together(root, "fsdp", *runs, processes=3, stop_after=7)
    parts = [f"{kind}-{rank:05d}-of-00003.safetensors" for kind in ("optimiser", "weights") for rank in range(3)]
    for run in ("sharded", "background"):
        assert files_of(root, run) == sorted([*parts, "random-00000-of-00003.safetensors", "state.json"])
    train_together(root, "fsdp", *runs, processes=2, stop_after=7)
    assert "weights-00001-of-00002.safetensors" in files_of(root, "sharded")
    train_together(root, "ddp", *runs, stop_after=7)
    assert "weights.safetensors" in files_of(root, "sharded")  # of which every process has all
    train_together(root, "fsdp", *runs, stop_after=4)
    for run in runs:
        train_run(root / run, Reporter(), lambda: False)
        assert losses_of(root, run) == pytest.approx(losses_of(root, "experts/alone"), abs=1e-4), run
        assert len(losses_of(root, run)) == STEPS
        assert verify(root / run) == []


@pytest.mark.slow
@pytest.mark.long
def test_a_changed_part_is_refused_by_all_processes_and_kept(prepared: Path, tmp_path: Path) -> None:
    root, run = Path(shutil.copytree(prepared, tmp_path / "workspace", symlinks=True)), "experts/sharded"
    train_together(root, "fsdp", run, stop_after=3)
    (changed,) = (root / run).glob(".training/step-*/weights-00001-of-00002.safetensors")
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    train_together(root, "fsdp", run)
    messages = {records_of(root, rank)[run]["error"] for rank in range(2)}
    assert all("is damaged" in message and "delete it to resume from the start" in message for message in messages)
    assert all("weights-00001-of-00002.safetensors was changed" in message for message in messages)
    with pytest.raises(UserError, match=r"weights-00001-of-00002\.safetensors was changed"):
        train_run(root / run, Reporter(), lambda: False)
    changed.unlink()
    with pytest.raises(UserError, match="is damaged"):
        train_run(root / run, Reporter(), lambda: False)


@pytest.mark.slow
@pytest.mark.long
def test_all_processes_end_if_one_cannot_write_and_the_checkpoint_before_stays(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run = Path(shutil.copytree(prepared, tmp_path / "workspace", symlinks=True)), "experts/sharded"
    train_together(root, "fsdp", run, stop_after=3)
    monkeypatch.setenv("FULL_DISK", "1")
    train_together(root, "fsdp", run, stop_after=3)
    assert "no space left" in records_of(root, 1)[run]["error"]
    assert records_of(root, 0)[run]["error"].startswith("process 1 of 2: no space left")
    assert [path.name for path in (root / run / ".training").iterdir()] == ["step-00000003"]
    monkeypatch.delenv("FULL_DISK")
    seen = [0]

    def stopped() -> bool:
        seen[0] += 1
        return seen[0] == 1

    with pytest.raises(Interrupted, match="stopped at step 4"):
        train_run(root / run, Reporter(), stopped)


def test_rows_of_files_are_joined_in_their_order(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.arange(21.0).reshape(7, 3),
        "one": torch.tensor(4.0),
        "short": torch.ones(1, 2).bfloat16(),
    }
    rows = [{"matrix": tensors["matrix"][:4], "one": tensors["one"], "short": tensors["short"]}]
    rows += [{"matrix": tensors["matrix"][4:6]}, {"matrix": tensors["matrix"][6:]}]
    paths = [tmp_path / f"{part_name('weights', index, 3)}.safetensors" for index in range(3)]
    for path, part in zip(paths, rows, strict=True):
        save_file({name: tensor.contiguous() for name, tensor in part.items()}, path)
    joined = JoinedParts(paths)
    assert list(joined) == sorted(tensors)
    assert dict(joined.shapes()) == {"matrix": ("F32", (7, 3)), "one": ("F32", ()), "short": ("BF16", (1, 2))}
    for name, tensor in tensors.items():
        assert torch.equal(joined.read(name), tensor)
    for begin in range(21):
        for end in range(begin + 1, 22):
            assert torch.equal(joined.span("matrix", begin, end), torch.arange(float(begin), float(end)))
    with pytest.raises(UserError, match="no tensor 'matrx'"):
        joined.read("matrx")
