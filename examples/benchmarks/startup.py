"""Benchmark of start-up: CPU seconds of short commands, beside what they cannot avoid importing.

    python examples/benchmarks/startup.py --workspace quickstart      # a workspace that `expertctl quickstart` made

Each command runs in a fresh process, in turn, `--rounds` times; prints the median of user and system time together, and its
ratio to importing torch with a model class of transformers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from whole_numbers import at_least

PYTHON = (sys.executable, "-c")
EXPERTCTL = (sys.executable, "-P", "-m", "expertctl.cli.main")
REFERENCE = "import torch and a model class"
COMMANDS = {
    "import torch": (*PYTHON, "import torch"),
    REFERENCE: (*PYTHON, "import torch; from transformers import LlamaForCausalLM"),
    "expertctl --help": (*EXPERTCTL, "--help"),
    "generate, 1 token, one model": (*EXPERTCTL, "generate", "seed", "def", "--max-new-tokens", "1"),
    "generate, 1 token, ensemble": (*EXPERTCTL, "generate", "ensemble", "def", "--max-new-tokens", "1"),
    "generate, 40 tokens, ensemble": (*EXPERTCTL, "generate", "ensemble", "def", "--max-new-tokens", "40"),
    "eval, one model, one domain": (*EXPERTCTL, "eval", "seed", "--domains", "manual"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--rounds", type=at_least(1), default=5)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.rounds):
        for name, command in COMMANDS.items():
            seconds[name].append(cpu_seconds(command, options.workspace))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print("| | CPU seconds | ratio |\n|---|---:|---:|")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} | {median / medians[REFERENCE]:.2f} |")


def cpu_seconds(command: tuple[str, ...], folder: Path) -> float:
    """Return the user and system time of a command; raises `CalledProcessError` if it fails."""
    before = os.times()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


if __name__ == "__main__":
    main()
