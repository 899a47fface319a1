"""Benchmark of digests: bytes per CPU second of hash functions, on one thread.

    pip install blake3; python examples/benchmarks/hashing.py

Each function hashes the same random bytes in turn, `--rounds` times; prints medians and the ratio to sha256. blake3 is left
out where it is not installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from whole_numbers import at_least

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebibytes", type=at_least(1), default=64)
    parser.add_argument("--rounds", type=at_least(1), default=9)
    options = parser.parse_args()
    functions: dict[str, Callable[[bytes], Any]] = {"sha256": hashlib.sha256, "blake2b": hashlib.blake2b}
    if find_spec("blake3") is not None:
        functions["blake3"] = import_module("blake3").blake3
    data = os.urandom(options.mebibytes * MIB)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(options.rounds):
        for name, function in functions.items():
            begin = time.process_time()
            function(data).digest()
            seconds[name].append(time.process_time() - begin)
    speeds = {name: len(data) / statistics.median(values) for name, values in seconds.items()}
    print("| | GB per CPU second | ratio |\n|---|---:|---:|")
    for name, speed in speeds.items():
        print(f"| {name} | {speed / 1e9:.2f} | {speed / speeds['sha256']:.2f} |")


if __name__ == "__main__":
    main()
