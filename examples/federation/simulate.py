"""Simulations of federations with 10 to 10,000 owners: the table of docs/simulation.md.

Run: python examples/federation/simulate.py [--sizes 10,100,1000,10000] [OPTION OF `expertctl federate simulate` ...]

Each size runs in a process of its own to measure its peak memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

HEADINGS = (
    "owners",
    "80% accepted after",
    "95% after",
    "accepted",
    "refused",
    "late",
    "never",
    "down",
    "up",
    "line in use, down / up",
    "events",
    "seconds (CPU)",
    "events a second",
    "peak memory",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="10,100,1000,10000", help="numbers of owners, separated by commas")
    arguments, options = parser.parse_known_args()
    print(f"| {' | '.join(HEADINGS)} |")
    print("|---:" * len(HEADINGS) + "|")
    for size in arguments.sizes.split(","):
        report = simulated(["--owners", size, *options])
        print(f"| {' | '.join(row(report))} |", flush=True)


def simulated(options: list[str]) -> dict[str, Any]:
    """Run one simulation as a command and return its report."""
    command = [sys.executable, "-m", "expertctl.cli.main", "federate", "simulate", *options, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def row(report: dict[str, Any]) -> list[str]:
    """Return a report's cells, in the order of the headings."""
    return [
        f"{report['owners']:,}",
        hours(report["hours_to_quorum"]),
        hours(report["hours_to"]["95%"]),
        f"{report['accepted']:,}",
        f"{sum(report['refused'].values()):,}",
        f"{report['late']:,}",
        f"{report['never']:,}",
        f"{report['bytes_down'] / 1e12:.2f} TB",
        f"{report['bytes_up'] / 1e12:.2f} TB",
        f"{report['line_hours_down']:.1f} / {report['line_hours_up']:.1f} h",
        f"{report['events']:,}",
        f"{report['seconds']:.0f} ({report['cpu_seconds']:.0f})",
        f"{report['events_per_second']:,.0f}",
        f"{report['peak_memory_bytes'] / 1e6:.0f} MB",
    ]


def hours(value: float | None) -> str:
    return "not reached" if value is None else f"{value:.1f} h"


if __name__ == "__main__":
    main()
