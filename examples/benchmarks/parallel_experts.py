"""Benchmark of training on two cores: two experts apart, and one model by two processes (data parallel, FSDP).

    python examples/benchmarks/parallel_experts.py [--preset small] [--steps 60] [--rounds 3]

Every row trains by `expertctl train` in a fresh workspace, each process on one core; rows alternate for a number of rounds. Given are
medians of tokens per second, from the lines of `metrics.jsonl` after the first, so that start-up does not count, and of their
ratios to one expert on one core in the same round. Needs two cores that nothing else uses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from whole_numbers import at_least

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import yaml

from expertctl import Workspace
from expertctl.core.config.settings import LauncherConfig

BATCH, LENGTH = 8, 256
ROWS = {
    "one expert, one core": (("first",), {}),
    "two experts at once, a core each": (("first", "second"), {}),
    "one model, two processes, data parallel": (("first",), {"nproc": 2}),
    "one model, two processes, FSDP": (("first",), {"nproc": 2, "strategy": "fsdp"}),
}


def main() -> None:
    options = parse(sys.argv[1:])
    rates: dict[str, list[float]] = {row: [] for row in ROWS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_workspace(root, options)
        for _ in range(options.rounds):
            for row, (names, launcher) in ROWS.items():
                rates[row].append(tokens_per_second(Workspace(root), names, launcher))
    alone = next(iter(rates.values()))
    print("| | tokens per second | times one expert |\n|---|---:|---:|")
    for row, found in rates.items():
        ratio = statistics.median(rate / base for rate, base in zip(found, alone, strict=True))
        print(f"| {row} | {statistics.median(found):,.0f} | {ratio:.2f} |")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("tiny", "small"), default="small")
    parser.add_argument("--steps", type=at_least(3), default=60)
    parser.add_argument("--rounds", type=at_least(1), default=3)
    return parser.parse_args(arguments)


def make_workspace(root: Path, options: argparse.Namespace) -> None:
    training = {"sequence_length": LENGTH, "batch_size": BATCH, "device": "cpu", "checkpoint_seconds": 1e6}
    steps = {"tokens": options.steps * BATCH * LENGTH, "log_every": 1, "validate_every": 10**6}
    config = {
        "seed": {"preset": options.preset, "training": {"tokens": BATCH * LENGTH, **training}},
        "training": training | steps,
        "domains": {"first": {"bundled": "python"}, "second": {"bundled": "cpp"}},
        "experts": {name: {"domain": name} for name in ("first", "second")},
    }
    (root / "expertctl.yaml").write_text(yaml.safe_dump(config))
    Workspace(root).seed()


def tokens_per_second(workspace: Workspace, names: tuple[str, ...], launcher: dict[str, object]) -> float:
    """Train experts anew, at the same time, and return the sum of their tokens per second."""
    for name in names:
        workspace.branch(name, force=True)
    result = workspace.train(*names, jobs=len(names), launcher=LauncherConfig(name="local", options=launcher))
    result.raise_for_failures()
    total = 0.0
    for name in names:
        lines = map(json.loads, (workspace.layout.experts / name / "metrics.jsonl").read_text().splitlines())
        total += statistics.median([line["tokens_per_second"] for line in lines if "tokens_per_second" in line][1:])
    return total


if __name__ == "__main__":
    main()
