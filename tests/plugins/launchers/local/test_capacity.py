"""How many runs fit on a machine: cores, GPUs that go round, and memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reporters import Recorder

from expertctl.core.artefacts.safetensors_io import Checkpoint
from expertctl.core.manifests.run import read_run
from expertctl.plugins.launchers.local import capacity, processes
from expertctl.plugins.launchers.local.capacity import (
    fitting_jobs,
    gpu_shares,
    memory_need,
    memory_problems,
    shared_gpus,
)
from expertctl.plugins.launchers.local.options import LocalOptions
from expertctl.workspace import Workspace

MakeProject = Callable[..., Workspace]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that this machine is another one."""

    def pretend(cores: int = 64, gpus: str = "", memory: int | None = None) -> None:
        monkeypatch.setattr(capacity, "available_cores", lambda: cores)
        monkeypatch.setattr(capacity, "visible_gpus", lambda: tuple(filter(None, gpus.split(","))))
        monkeypatch.setattr(capacity, "available_memory", lambda: memory)

    return pretend


def branched(workspace: Workspace) -> list[Path]:
    return [workspace.experts / workspace.branch(name).name for name in ("ant", "bee", "fox")]


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 4))
def test_gpus_are_shared_as_evenly_as_they_go_round(gpu_count: int, jobs: int, nproc: int) -> None:
    gpus = [f"GPU-{number}" for number in range(gpu_count)]
    shares = gpu_shares(gpus, jobs, nproc)
    assert len(shares) == jobs
    if not gpus:
        assert shares == [None] * jobs
        return
    sets = [tuple((share or "").split(",")) for share in shares]
    assert all(len(chosen) == min(nproc, gpu_count) for chosen in sets)
    uses = [sets.count(chosen) for chosen in set(sets)]
    assert max(uses) - min(uses) <= 1
    assert all(not set(one) & set(other) for one in set(sets) for other in set(sets) if one != other)
    assert len(set(sets)) == min(jobs, max(gpu_count // nproc, 1))


@pytest.mark.parametrize(
    ("there", "options", "jobs"),
    [
        ({"cores": 2}, {}, 2),
        ({"cores": 64}, {}, 3),
        ({"cores": 1}, {"nproc": 2}, 1),
        ({"cores": 4}, {"nproc": 2}, 2),
        ({"gpus": "0,1"}, {}, 2),
        ({"gpus": "0,1,2,3"}, {"nproc": 2}, 2),
        ({"gpus": "0"}, {"nproc": 2}, 1),
        ({"memory": 1}, {}, 1),
    ],
)
def test_as_many_runs_as_the_machine_has_room_for(
    new_project: MakeProject,
    machine: Callable[..., None],
    there: dict[str, object],
    options: dict[str, int],
    jobs: int,
) -> None:
    runs = branched(new_project("here"))
    machine(**there)
    assert fitting_jobs(runs, LocalOptions(**options)) == jobs


def test_runs_use_threads_and_memory(new_project: MakeProject, machine: Callable[..., None]) -> None:
    runs = branched(new_project("here", threads=4))
    need = memory_need(runs[0], read_run(runs[0]), (), LocalOptions())
    machine(cores=9)
    assert fitting_jobs(runs, LocalOptions()) == 2
    machine(memory=2 * need)
    assert fitting_jobs(runs, LocalOptions()) == 2


def test_a_run_that_names_its_gpu_keeps_it(new_project: MakeProject, machine: Callable[..., None]) -> None:
    workspace = new_project("here")
    runs = branched(workspace)
    machine(gpus="0,1")
    assert shared_gpus(runs, 2, LocalOptions()) == ["0", "1"]
    assert shared_gpus(runs, 1, LocalOptions()) == [None]
    workspace.branch("ant", force=True, training={"device": "cuda:1"})
    assert shared_gpus(runs, 2, LocalOptions()) == [None, None]


def test_the_need_counts_weights_gradients_and_moments(new_project: MakeProject) -> None:
    workspace = new_project("here")
    (run, *_) = branched(workspace)
    shapes = Checkpoint.of_folder(workspace.layout.seed).shapes()
    sizes = {name: 4 * prod(shape) for name, (_, shape) in shapes.items()}
    everything = sum(sizes.values())
    spec = read_run(run)
    assert memory_need(run, spec, (), LocalOptions()) == 4 * everything
    assert memory_need(run, spec, (), LocalOptions(nproc=2)) == 8 * everything
    assert memory_need(run, spec, (), LocalOptions(nproc=2, strategy="fsdp")) == 4 * everything  # its rows each
    assert memory_need(run, spec, ("0",), LocalOptions()) == 0
    workspace.branch("ant", force=True, trains="model.norm.weight")
    part = memory_need(run, read_run(run), (), LocalOptions())
    assert part == everything + 3 * sizes["model.norm.weight"]


def test_a_run_that_cannot_fit_is_refused_and_the_others_train(
    new_project: MakeProject, machine: Callable[..., None]
) -> None:
    workspace = new_project("here")
    runs = branched(workspace)
    need = memory_need(runs[0], read_run(runs[0]), (), LocalOptions())
    workspace.branch("bee", force=True, trains="model.norm.weight")
    machine(memory=need - 1)
    errors, warning = memory_problems(runs, 1, LocalOptions())
    assert [run.name for run in errors] == ["ant", "fox"]
    assert errors[runs[0]].startswith("training needs at least 0.0 GB of memory for weights")
    assert warning is None
    machine(memory=2 * need - 1)
    errors, warning = memory_problems([runs[0], runs[2]], 2, LocalOptions())
    assert errors == {}
    assert warning is not None
    assert warning.startswith("2 runs at a time may need ")
    assert memory_problems(runs, 1, LocalOptions(check_memory=False)) == ({}, None)
    machine(memory=1)
    result = workspace.train()
    assert set(result.failed) == {"ant", "bee", "fox"}


def test_damaged_runs_and_models_are_left_to_their_workers(
    new_project: MakeProject, machine: Callable[..., None]
) -> None:
    workspace = new_project("here")
    runs = branched(workspace)
    machine(cores=2, gpus="0,1", memory=1)
    (runs[0] / "run.json").write_text("{}")
    (workspace.layout.seed / "model.safetensors").write_bytes(b"damaged")
    assert memory_problems(runs, 2, LocalOptions()) == ({}, None)
    machine(cores=2, memory=1)
    assert memory_problems(runs, 2, LocalOptions()) == ({}, None)
    assert fitting_jobs(runs, LocalOptions()) == 2
    assert shared_gpus(runs, 2, LocalOptions()) == [None, None]


def test_every_process_gets_a_gpu_that_is_free(
    new_project: MakeProject, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs at a time, held until both have begun, never see the same GPU."""
    runs = branched(new_project("here"))
    machine(gpus="GPU-a,GPU-b")
    seen: list[str | None] = []
    lock, both = threading.Lock(), threading.Event()

    def pretend(self: object, run: Path, gpus: str | None) -> tuple[processes.LaunchResult, bool]:
        with lock:
            seen.append(gpus)
            if len(seen) == 2:
                both.set()
        assert both.wait(timeout=30)
        return processes.LaunchResult(run, None), False

    monkeypatch.setattr(processes._WorkerProcesses, "_train", pretend)
    results = processes.train_in_processes(runs, 2, Recorder(), LocalOptions())
    assert [result.error for result in results] == [None, None, None]
    assert set(seen[:2]) == {"GPU-a", "GPU-b"}
    assert seen[2] in ("GPU-a", "GPU-b")
