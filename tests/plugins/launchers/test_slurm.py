"""The `slurm` launcher on a cluster of real processes: preempted, limited, lost, cancelled; never two jobs for a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FakeSlurm
from inline_launching import inline_launching
from reporters import Recorder

from expertctl import Job, JobState, UserError, verify
from expertctl.core.config.settings import LauncherConfig
from expertctl.core.manifests.manifest import read_manifest
from expertctl.core.manifests.run import JOB_FOLDER, METRICS_FILE, STATE_FOLDER
from expertctl.plugins.launchers import slurm as plugin
from expertctl.plugins.launchers.slurm import SlurmOptions, job_script, sbatch_arguments
from expertctl.workspace import Workspace

CLI = [sys.executable, "-m", "expertctl.cli.main"]
SLURM = LauncherConfig(name="slurm", options={"poll_seconds": 0.2})
LONG = 32 * 100_000
"""Tokens of a run that does not end by itself within a test."""
MakeProject = Callable[..., Workspace]


class Starts(Recorder):
    """Records the step at which each job of a run started."""

    def __init__(self) -> None:
        super().__init__()
        self.by_run: dict[str, list[int]] = {}

    def run_progressed(self, run: Path, record: Mapping[str, Any]) -> None:
        if record["event"] == "started":
            self.by_run.setdefault(run.name, []).append(record["step"])


def logged_steps(run: Path) -> list[int]:
    records = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    return [record["step"] for record in records if "loss" in record]


def digests(workspace: Workspace) -> dict[str, str]:
    return {folder.name: read_manifest(folder).digest for folder in workspace.layout.experts.iterdir()}


def wait_for(condition: Callable[[], Any], what: str) -> None:
    ends = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < ends, f"waited in vain for {what}"
        time.sleep(0.05)


def has_checkpoint(workspace: Workspace, name: str) -> Callable[[], bool]:
    return lambda: any((workspace.experts / name / STATE_FOLDER).glob("step-*"))


@pytest.mark.long
@pytest.mark.slow
def test_stopped_jobs_are_submitted_again_and_nothing_is_trained_twice(
    new_project: MakeProject, slurm: FakeSlurm
) -> None:
    slurm.faults(job_1="preempt", job_2="limit", job_3="node")
    here, there = new_project("here"), new_project("there")
    with inline_launching():
        assert here.train().finished == ("ant", "bee", "fox")
    starts = Starts()
    assert there.train(launcher=SLURM, reporter=starts).finished == ("ant", "bee", "fox")
    assert digests(there) == digests(here)
    assert sorted(job["name"] for job in slurm.jobs().values()) == sorted(
        2 * ["expertctl-ant", "expertctl-bee", "expertctl-fox"]
    )
    for name in ("ant", "bee", "fox"):
        first, second = starts.by_run[name]
        assert first == 0 < second
        assert logged_steps(there.experts / name) == list(range(1, 41))
        verify(there.experts / name)
        assert not (there.experts / name / JOB_FOLDER).exists()
    assert sum("submitted again as job" in line for line in starts.lines) == 3


@pytest.mark.slow
@pytest.mark.clusters
def test_two_commands_at_once_submit_a_run_once(new_project: MakeProject, slurm: FakeSlurm) -> None:
    slurm.faults(job_1="preempt")
    workspace = new_project("there")
    options = ["--launcher", "slurm", "--launcher-option", "poll_seconds=0.2"]
    command = [*CLI, "--json", "-w", str(workspace.root), "train", "ant", *options]
    commands = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in commands:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert json.loads(output)["finished"] == ["ant"]
    assert len(slurm.jobs()) == 2


@pytest.mark.slow
@pytest.mark.clusters
def test_detached_jobs_are_shown_followed_and_cancelled(new_project: MakeProject, slurm: FakeSlurm) -> None:
    workspace = new_project("there", tokens=LONG)
    result = workspace.train("ant", "bee", launcher=SLURM, jobs=1, detach=True)
    assert (result.submitted, result.waiting, result.finished) == ({"ant": "1"}, ("bee",), ())
    wait_for(has_checkpoint(workspace, "ant"), "a checkpoint")
    shown = json.loads(run(workspace, "--json", "show", "ant").stdout)
    assert shown | {"submitted_at": ""} == {
        "name": "ant",
        "launcher": "slurm",
        "job": "1",
        "state": "running",
        "node": "node7",
        "reason": "RUNNING",
        "submitted_at": "",
        "attempt": 1,
        "log": str(workspace.experts / "ant" / "training.log"),
    }
    for refused in (["train", "ant"], ["branch", "ant", "--force"], ["remove", "ant"]):
        done = run(workspace, *refused)
        assert done.returncode == 1
        assert "job 1 of launcher 'slurm' trains 'ant'; follow it with" in done.stderr
    following = subprocess.Popen(
        [
            *CLI,
            "-w",
            str(workspace.root),
            "train",
            "ant",
            "--launcher",
            "slurm",
            "--launcher-option",
            "poll_seconds=0.2",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert following.stderr is not None
    assert following.stderr.readline().startswith("ant: job 1 was submitted ")
    following.send_signal(signal.SIGINT)
    errors = following.communicate(timeout=120)[1]
    assert following.returncode == 130, errors
    assert "cancelling 1; waiting until their state is saved" in errors
    assert "interrupted, state saved: ant" in errors
    assert {job["state"] for job in slurm.jobs().values()} == {"FAILED"}  # status 130, without a signal of Slurm's
    assert has_checkpoint(workspace, "ant")()
    assert "unfinished" in run(workspace, "show").stdout


@pytest.mark.slow
@pytest.mark.clusters
def test_pending_jobs_are_cancelled_and_start_again_later(new_project: MakeProject, slurm: FakeSlurm) -> None:
    (slurm.folder / "nodes").write_text("0")
    workspace = new_project("there")
    command = [*CLI, "-w", str(workspace.root), "train", "ant", "--launcher", "slurm"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(slurm.jobs, "a job")
        wait_for((workspace.experts / "ant" / JOB_FOLDER / "job.json").is_file, "the job's file")
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert slurm.jobs()[1]["state"] == "CANCELLED"
    (slurm.folder / "nodes").write_text("1")
    assert workspace.train("ant", launcher=SLURM, detach=True).submitted == {"ant": "2"}


@pytest.mark.slow
def test_a_user_who_cancels_a_job_gets_no_new_one(new_project: MakeProject, slurm: FakeSlurm) -> None:
    workspace = new_project("there", tokens=LONG)

    def cancel() -> None:
        wait_for(has_checkpoint(workspace, "ant"), "a checkpoint")
        subprocess.run(["scancel", "1"], check=True)

    thread = threading.Thread(target=cancel)
    thread.start()
    assert workspace.train("ant", launcher=SLURM).interrupted == ("ant",)
    thread.join()
    assert len(slurm.jobs()) == 1


@pytest.mark.slow
def test_an_error_of_the_worker_is_not_tried_again(new_project: MakeProject, slurm: FakeSlurm) -> None:
    workspace = new_project("there", device="cuda:99")
    failed = workspace.train("ant", launcher=SLURM).failed
    assert "device 'cuda:99' is not available" in failed["ant"]
    assert len(slurm.jobs()) == 1
    broken = LauncherConfig(name="slurm", options={"poll_seconds": 0.2, "setup": ["no-such-command || exit 5"]})
    failed = workspace.train("ant", launcher=broken).failed
    assert failed["ant"].startswith("its job 2 ended (FAILED) before training began: ")
    assert "no-such-command: command not found" in failed["ant"]
    assert len(slurm.jobs()) == 2


def test_a_refused_job_is_one_line_and_leaves_the_run(new_project: MakeProject, slurm: FakeSlurm) -> None:
    slurm.refuse("invalid partition specified: gpux")
    workspace = new_project("there")
    done = run(workspace, "train", "ant", "--launcher", "slurm", "--launcher-option", "partition=gpux")
    assert (done.returncode, done.stderr) == (
        1,
        "Error: ant: sbatch failed: error: invalid partition specified: gpux; error: Batch job submission failed: "
        "Invalid partition name specified\n",
    )
    assert (workspace.experts / "ant" / "run.json").is_file()


def test_without_slurm_nothing_is_begun(new_project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin.shutil, "which", lambda command: None)
    with pytest.raises(UserError, match="launcher 'slurm' needs the command `sbatch`; run this on a login node"):
        new_project("there").train("ant", launcher="slurm")


@pytest.mark.slow
@pytest.mark.clusters
def test_two_nodes_train_a_run_together_and_save_their_state(new_project: MakeProject, slurm: FakeSlurm) -> None:
    slurm.faults(job_1="limit")
    workspace = new_project("there")
    starts = Starts()
    config = LauncherConfig(name="slurm", options={"poll_seconds": 0.2, "nodes": 2})
    assert workspace.train("ant", launcher=config, reporter=starts).finished == ("ant",)
    first, second = starts.by_run["ant"]
    assert first == 0 < second
    assert logged_steps(workspace.experts / "ant") == list(range(1, 41))


# --- what is submitted ---

JOB = Job(Path("/ws/experts/law"), Path("/ws/experts/law/training.log"), Path("/ws/experts/law/.job/r.jsonl"))


def test_options_become_arguments_of_sbatch() -> None:
    options = SlurmOptions(
        partition="gpu",
        account="lab",
        qos="long",
        constraint="a100",
        minutes=240,
        nodes=2,
        gpus_per_node=8,
        cpus_per_task=16,
        mem="64G",
        signal_seconds=60,
        arguments=("--exclusive",),
    )
    assert sbatch_arguments(options, JOB) == [
        "--parsable",
        "--no-requeue",
        "--job-name=expertctl-law",
        "--output=/ws/experts/law/training.log",
        "--open-mode=append",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--signal=B:USR1@60",
        "--partition=gpu",
        "--account=lab",
        "--qos=long",
        "--constraint=a100",
        "--time=240",
        "--gpus-per-node=8",
        "--cpus-per-task=16",
        "--mem=64G",
        "--exclusive",
    ]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            SlurmOptions(setup=("module load cuda",)),
            ["module load cuda\nexec env ", "worker /ws/experts/law --records "],
        ),
        (SlurmOptions(gpus_per_node=4, strategy="fsdp"), ["--standalone --nproc-per-node=4 ", "--strategy fsdp"]),
        (SlurmOptions(nodes=2, nproc=3), ["exec srun ", "--nproc-per-node=3 ", "--nnodes=2 --rdzv-backend=c10d "]),
    ],
)
def test_the_job_becomes_the_process_that_gets_the_signals(options: SlurmOptions, parts: list[str]) -> None:
    script = job_script(options, JOB)
    assert script.startswith("#!/bin/bash\n")
    assert all(part in script for part in parts), script
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_states_come_from_the_queue_and_then_from_the_accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(command: list[str], stdin: str = "") -> str:
        if command[0] == "squeue":
            return "1|PENDING||Priority\n2|COMPLETING|n1|None\n99|RUNNING|n1|None\n"
        assert "--jobs=3,4,5,6,7" in command
        return "3|CANCELLED by 1000|n2\n4|TIMEOUT|n2\n5|OUT_OF_MEMORY|n2\n6|NODE_FAIL|n[1-2]\n"

    monkeypatch.setattr(plugin.shutil, "which", lambda command: command)
    monkeypatch.setattr(plugin, "_run", answer)
    assert plugin.states([str(number) for number in range(1, 8)]) == {
        "1": JobState("pending", None, "Priority"),
        "2": JobState("running", "n1", "COMPLETING"),
        "3": JobState("cancelled", "n2", "CANCELLED"),
        "4": JobState("lost", "n2", "TIMEOUT"),
        "5": JobState("ended", "n2", "OUT_OF_MEMORY"),
        "6": JobState("lost", "n[1-2]", "NODE_FAIL"),
    }


@pytest.mark.parametrize(
    ("error", "is_down"), [("Invalid job id specified", False), ("Unable to contact slurm controller", True)]
)
def test_a_cluster_that_does_not_answer_is_not_taken_for_one_without_the_job(
    monkeypatch: pytest.MonkeyPatch, error: str, is_down: bool
) -> None:
    def answer(command: list[str], stdin: str = "") -> str:
        raise UserError(f"{command[0]} failed: {error}")

    monkeypatch.setattr(plugin.shutil, "which", lambda command: command)
    monkeypatch.setattr(plugin, "_run", answer)
    if is_down:
        with pytest.raises(UserError, match="squeue failed: Unable to contact"):
            plugin.states(["1"])
    else:
        assert plugin.states(["1"]) == {}


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("printf '\\377\\376'", "sbatch printed '\ufffd\ufffd' and not the number of a job"),
        ("printf '\\377\\n' >&2; exit 1", "sbatch failed: \ufffd"),
        ("kill -9 $$", "sbatch failed: status -9"),
        ("exit 3", "sbatch failed: status 3"),
        ("exec sleep 60", r"sbatch did not answer within 0.5 seconds"),
    ],
)
def test_a_command_that_misbehaves_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(plugin, "COMMAND_TIMEOUT_S", 0.5)
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(UserError, match=f"^{said}$"):
        plugin.submit(SlurmOptions(), Job(tmp_path, tmp_path / "log", tmp_path / "records"))


@pytest.mark.parametrize("options", [{"nodes": 0}, {"restarts": -1}, {"poll_seconds": 0}, {"minutes": 0}])
def test_impossible_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} is "):
        SlurmOptions(**options)


def run(workspace: Workspace, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, "-w", str(workspace.root), *words], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
