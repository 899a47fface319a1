"""`kubectl create`, `get jobs` and `delete` as a program on PATH whose Jobs are processes of this machine.

The first pod is killed by SIGKILL once its run has a checkpoint, as on a node that fails.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

VARIABLE = "FAKE_KUBERNETES"


def install(folder: Path) -> dict[str, str]:
    """Write the program; return the environment that puts it on PATH."""
    (folder / "bin").mkdir(parents=True)
    program = folder / "bin" / "kubectl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__)} "$@"\n')
    program.chmod(0o755)
    return {VARIABLE: str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def jobs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.job"))


def create(folder: Path) -> None:
    content = json.loads(sys.stdin.read())
    name = f"{content['metadata']['generateName']}{len(jobs(folder))}"
    (folder / f"{name}.job").write_text(json.dumps({"ready": 1}))
    (container,) = content["spec"]["template"]["spec"]["containers"]
    subprocess.Popen(
        [sys.executable, "-S", __file__, "pod", name, *container["command"]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    print(f"job.batch/{name}")


def pod(folder: Path, name: str, command: list[str]) -> None:
    process = subprocess.Popen(command, start_new_session=True)
    run = Path(command[4]).parent  # beside its log
    is_first = jobs(folder)[0].stem == name
    while process.poll() is None:
        if is_first and list(run.glob(".training/step-*")):
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.02)
    kind = "Complete" if process.returncode == 0 else "Failed"
    reason = "CompletionsReached" if process.returncode == 0 else "BackoffLimitExceeded"
    status = {"conditions": [{"type": kind, "status": "True", "reason": reason}]}
    partial = folder / f"{name}.partial"
    partial.write_text(json.dumps(status))
    partial.replace(folder / f"{name}.job")


def main(folder: Path, words: list[str]) -> None:
    if words[0] == "create":
        create(folder)
    elif words[0] == "pod":
        pod(folder, words[1], words[2:])
    else:
        items = [{"metadata": {"name": path.stem}, "status": json.loads(path.read_text())} for path in jobs(folder)]
        print(json.dumps({"items": items}))


if __name__ == "__main__":
    main(Path(os.environ[VARIABLE]), sys.argv[1:])
