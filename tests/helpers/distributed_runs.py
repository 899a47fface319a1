"""Trains runs of a workspace in several processes: `torchrun ... distributed_runs.py ROOT STRATEGY RUN...`, RUN such as experts/code.

Every process writes a line `ROOT/rank-N.jsonl` for each run: `{"run": RUN, "error": MESSAGE or null, "notes": [...]}`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TORCHRUN = (sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--max-restarts=0")


def train_together(
    root: Path, strategy: str, *runs: str, processes: int = 2, on_a_node: int | None = None, stop_after: int = 0
) -> None:
    """Train runs by torchrun, in processes that are started once; with `stop_after`, stop each after so many steps.

    The processes believe that `on_a_node` of them are on each node.
    """
    environment = {"OMP_NUM_THREADS": "1", "ON_A_NODE": str(on_a_node or processes)}
    command = [*TORCHRUN, f"--nproc-per-node={processes}", __file__, str(root), strategy, str(stop_after), *runs]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, "\n".join(
        line for line in done.stderr.splitlines() if "Error" in line or "rank" in line
    )[-6000:]


def records_of(root: Path, rank: int = 0) -> dict[str, dict[str, Any]]:
    """Return the last line of every run that a process wrote."""
    lines = (root / f"rank-{rank}.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["run"]: record for record in map(json.loads, lines)}


def losses_of(root: Path, run: str) -> list[float]:
    """Return the loss of every step, from `metrics.jsonl`."""
    lines = (root / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def main(root: Path, strategy: str, stop_after: int, *runs: str) -> None:
    import torch

    from expertctl import Reporter
    from expertctl.core.errors import Interrupted, UserError
    from expertctl.experts.training.distributed.ranks import joined, leave
    from expertctl.experts.training.run import train_run

    class Notes(Reporter):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def run_progressed(self, run: Path, record: Mapping[str, Any]) -> None:
            self.notes += record.get("notes", ())

    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["ON_A_NODE"]
    with joined(120) as ranks:
        if os.environ.get("FULL_DISK") == str(ranks.rank):  # files of this process cannot exceed 8 KB
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        for run in runs:
            steps, error, reporter = 0, None, Notes()

            def stopped() -> bool:
                nonlocal steps
                steps += 1
                return stop_after > 0 and steps == stop_after and ranks.rank == 1  # one process hears the signal first

            try:
                train_run(root / run, reporter, stopped, ranks, strategy)
            except (Interrupted, UserError) as raised:
                error = str(raised)
            with (root / f"rank-{ranks.rank}.jsonl").open("a") as file:
                file.write(json.dumps({"run": run, "error": error, "notes": reporter.notes}) + "\n")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
