"""A Slurm cluster of one machine: `sbatch`, `squeue`, `sacct`, `scancel`, `scontrol` and `srun` as programs on PATH.

Jobs are real processes. `faults.json` in the cluster's folder tells by the number of the job what happens to it once its run
has a new checkpoint: `preempt` (SIGTERM, time to save), `limit` (SIGUSR1 ahead of a time limit), `node` (everything is killed).
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "srun")
VARIABLE = "FAKE_SLURM"
END_OF_FAULT = {"preempt": "PREEMPTED", "node": "NODE_FAIL"}


class FakeSlurm:
    """The cluster, for tests; `environment` puts its commands on PATH."""

    def __init__(self, folder: Path, *, nodes: int = 8) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name in COMMANDS:
            program = folder / "bin" / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__)} {name} "$@"\n')
            program.chmod(0o755)
        (folder / "nodes").write_text(str(nodes))
        self.faults()

    def faults(self, **by_job: str) -> None:
        """Say what happens to jobs: `job_1="preempt"`."""
        (self.folder / "faults.json").write_text(json.dumps(by_job))

    def refuse(self, message: str) -> None:
        (self.folder / "refusal").write_text(message)

    @property
    def environment(self) -> dict[str, str]:
        return {VARIABLE: str(self.folder), "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def jobs(self) -> dict[int, dict[str, str]]:
        """Return name, state and command of every job that was ever submitted."""
        return {int(path.stem): json.loads(path.read_text()) for path in sorted(self.folder.glob("*.job"))}

    def kill_all(self) -> None:
        """End what still runs."""
        for number, job in self.jobs().items():
            if job["state"] in ("RUNNING", "PENDING"):
                _update(self.folder, number, "CANCELLED")
                _signal_job(job, signal.SIGKILL)


# --- the programs ---


def _job(folder: Path, number: int) -> dict[str, str]:
    return json.loads((folder / f"{number:06d}.job").read_text())


def _update(folder: Path, number: int, state: str, **values: object) -> dict[str, str]:
    path = folder / f"{number:06d}.job"
    job = (_job(folder, number) if path.is_file() else {}) | {"state": state, **values}
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(job))
    partial.replace(path)
    return job


def _signal_job(job: dict[str, str], number: int, *, everything: bool = True) -> None:
    with contextlib.suppress(KeyError, ProcessLookupError):
        (os.killpg if everything else os.kill)(int(job["pid"]), number)


def sbatch(folder: Path, arguments: list[str]) -> int:
    if (folder / "refusal").is_file():
        print(f"sbatch: error: {(folder / 'refusal').read_text()}", file=sys.stderr)
        print("sbatch: error: Batch job submission failed: Invalid partition name specified", file=sys.stderr)
        return 1
    settings = dict(word.removeprefix("--").partition("=")[::2] for word in arguments)
    for number in range(1, 1_000_000):
        try:
            (folder / f"{number:06d}.taken").open("x").close()
            break
        except FileExistsError:
            continue
    script = folder / f"{number:06d}.sh"
    script.write_text(sys.stdin.read())
    _update(folder, number, "PENDING", name=settings["job-name"], arguments=shlex.join(arguments), begun=0)
    subprocess.Popen(
        [sys.executable, "-S", __file__, "_node", str(number), settings["output"], settings["nodes"]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    print(f"{number};fake")
    return 0


def _node(folder: Path, arguments: list[str]) -> int:
    """Run a job to its end and do to it what `faults.json` says."""
    number, log, nodes = int(arguments[0]), Path(arguments[1]), arguments[2]
    while _running(folder) >= int((folder / "nodes").read_text()):
        if _job(folder, number)["state"] != "PENDING":
            return 0
        time.sleep(0.05)
    environment = {**os.environ, "SLURM_JOB_ID": str(number), "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": nodes}
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["bash", str(folder / f"{number:06d}.sh")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    job = _update(folder, number, "RUNNING", pid=process.pid)
    fault = json.loads((folder / "faults.json").read_text()).get(f"job_{number}")
    checkpoints = log.parent / ".training"
    before = set(checkpoints.glob("step-*"))
    while process.poll() is None:
        if fault and set(checkpoints.glob("step-*")) - before:
            if fault == "preempt":
                _signal_job(job, signal.SIGTERM)
            elif fault == "limit":
                _signal_job(job, signal.SIGUSR1, everything=False)
            else:
                _signal_job(job, signal.SIGKILL)
            process.wait()
        time.sleep(0.02)
    state = _job(folder, number)["state"]
    if state == "RUNNING":
        ended = "COMPLETED" if process.returncode == 0 else "FAILED"
        _update(folder, number, END_OF_FAULT.get(fault or "", ended) if process.returncode else ended)
    return 0


def _running(folder: Path) -> int:
    return sum(json.loads(path.read_text())["state"] == "RUNNING" for path in folder.glob("*.job"))


def _asked(arguments: list[str]) -> list[int]:
    (ids,) = (word.partition("=")[2].split(",") for word in arguments if word.startswith("--jobs="))
    return [int(job_id) for job_id in ids]


def squeue(folder: Path, arguments: list[str]) -> int:
    """Print those that have not ended; the queue forgets the others at once, which Slurm does after minutes."""
    queued = [number for number in _asked(arguments) if _job(folder, number)["state"] in ("PENDING", "RUNNING")]
    if not queued:
        print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
        return 1
    for number in queued:
        state = _job(folder, number)["state"]
        print(f"{number}|{state}|{'node7' if state == 'RUNNING' else ''}|None")
    return 0


def sacct(folder: Path, arguments: list[str]) -> int:
    for number in _asked(arguments):
        state = _job(folder, number)["state"]
        print(f"{number}|{state + ' by 1000' if state == 'CANCELLED' else state}|node7")
    return 0


def scancel(folder: Path, arguments: list[str]) -> int:
    settings = dict(word.removeprefix("--").partition("=")[::2] for word in arguments if word.startswith("--"))
    for job_id in (word for word in arguments if not word.startswith("--")):
        job = _job(folder, int(job_id))
        if job["state"] not in ("PENDING", "RUNNING") or job["state"] != settings.get("state", job["state"]):
            continue
        if "signal" in settings:
            number = getattr(signal, f"SIG{settings['signal']}")
            _signal_job(job, number, everything="batch" not in settings)
        else:
            _update(folder, int(job_id), "CANCELLED")
            _signal_job(job, signal.SIGTERM)
    return 0


def scontrol(folder: Path, arguments: list[str]) -> int:
    print("localhost")
    return 0


def srun(folder: Path, arguments: list[str]) -> int:
    """Start the command once for every node and forward signals, as srun does."""
    command = arguments[next(index for index, word in enumerate(arguments) if not word.startswith("--")) :]
    tasks = [
        subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node)})
        for node in range(int(os.environ["SLURM_NNODES"]))
    ]
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
    return max(abs(task.wait()) for task in tasks)


if __name__ == "__main__":
    program = {name: globals()[name] for name in (*COMMANDS, "_node")}[sys.argv[1]]
    sys.exit(program(Path(os.environ[VARIABLE]), sys.argv[2:]))
