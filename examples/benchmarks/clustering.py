"""Benchmark of clustering: speed of assignment, cost of balancing, memory for a large corpus.

    python examples/benchmarks/clustering.py [--corpora FOLDER]   # a folder of .jsonl files; default: the bundled corpora

Prints three tables: megabytes of text assigned per second and core; balanced and nearest-centre assignment of a million
points to 16 centres; peak memory of `data discover` by corpus size, each in a fresh process. One thread; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from whole_numbers import at_least

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

REPEATS = 5
CLUSTERS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path)
    parser.add_argument("--points", type=at_least(1), default=1_000_000)
    parser.add_argument("--sizes", type=lambda text: [int(part) for part in text.split(",")], default=[20_000, 200_000])
    parser.add_argument("--letters", type=at_least(1), default=1000, help="characters per document (memory table)")
    parser.add_argument(
        "--sample", type=at_least(1), default=50_000, help="documents to fit the clusters on (memory table)"
    )
    parser.add_argument("--only", choices=["speed", "balance", "memory"], help="print a single table")
    parser.add_argument("--discover", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.discover is not None:
        print(json.dumps(discover_here(options.discover, options.sample)))
        return
    texts = list(read_texts(options.corpora))
    tables = {
        "speed": lambda: speed_table(texts),
        "balance": lambda: balance_table(options.points),
        "memory": lambda: memory_table(passages(texts, options.letters), options.sizes, options.sample),
    }
    for name, table in tables.items():
        if options.only in (None, name):
            print(table(), end="\n\n")


def read_texts(corpora: Path | None) -> Iterator[str]:
    if corpora is None:
        from expertctl.experts.text.bundled import BUNDLED, read_bundled

        for name in BUNDLED:
            yield from read_bundled(name).train
        return
    for path in sorted(corpora.rglob("train.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["text"]


def seconds_of(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def speed_table(texts: list[str]) -> str:
    """Return the speed of assignment in megabytes per second, by document length."""
    from expertctl.core.text.clustering.clusterer import ClustererSettings, fit_clusterer

    lines = [
        f"| assignment to {CLUSTERS} centres | documents | mean bytes | MB/s per core |",
        "|---|---:|---:|---:|",
    ]
    for name, pieces in (("whole documents", texts), ("passages of 1,000 letters", passages(texts, 1000))):
        clusterer = fit_clusterer(pieces, ClustererSettings(clusters=CLUSTERS))
        looked_at = [piece[: clusterer.settings.characters] for piece in pieces]
        size = sum(len(piece.encode()) for piece in looked_at)
        list(clusterer.assign(pieces[:100]))  # tables of letters are made once
        took = seconds_of(lambda clusterer=clusterer, pieces=pieces: list(clusterer.assign(pieces)))
        lines.append(f"| {name} | {len(pieces):,} | {size // len(pieces):,} | {size / took / 1e6:.1f} |")
    return "\n".join(lines)


def passages(texts: list[str], letters: int) -> list[str]:
    return [text[begin : begin + letters] for text in texts for begin in range(0, len(text), letters)]


def balance_table(count: int) -> str:
    """Return time, cluster sizes and mean distance of balanced and nearest-centre assignment."""
    import numpy as np

    from expertctl.core.text.clustering.balanced_kmeans import balanced_assignment, squared_distances

    source = np.random.default_rng(0)
    shares = source.dirichlet(np.ones(CLUSTERS))
    means = source.normal(size=(CLUSTERS, 100))
    groups = source.choice(CLUSTERS, size=count, p=shares)
    points = (means[groups] + 2 * source.normal(size=(count, 100))).astype(np.float32)
    centres = points[source.choice(count, CLUSTERS, replace=False)]
    assignments = {}

    def plain() -> None:
        assignments["nearest centre"] = squared_distances(points, centres).argmin(axis=1)

    def balanced() -> None:
        assignments["balanced"] = balanced_assignment(squared_distances(points, centres))

    lines = [
        f"| {count:,} points, {CLUSTERS} centres | seconds | smallest, largest cluster, times the mean | mean squared distance |",
        "|---|---:|---:|---:|",
    ]
    for name, work in (("nearest centre", plain), ("balanced", balanced)):
        took = seconds_of(work, 3)
        sizes = np.bincount(assignments[name], minlength=CLUSTERS) * CLUSTERS / count
        distance = np.mean(((points - centres[assignments[name]]) ** 2).sum(axis=1))
        lines.append(f"| {name} | {took:.2f} | {sizes.min():.3f}, {sizes.max():.3f} | {distance:.2f} |")
    return "\n".join(lines)


def memory_table(pieces: list[str], sizes: list[int], sample: int) -> str:
    """Return peak memory and time of a discovery by number of documents, each measured in a fresh process."""
    lines = [
        "| `data discover`, one process | MB of text | seconds | peak memory, MB |",
        "|---|---:|---:|---:|",
    ]
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text.jsonl"
            with path.open("w", encoding="utf-8") as file:
                for number, piece in enumerate(islice(cycle(pieces), size)):
                    file.write(json.dumps({"text": f"{number} {piece}"}, ensure_ascii=False) + "\n")
            (Path(folder) / "expertctl.yaml").write_text("domains: {mixed: {path: text.jsonl}}\n")
            command = [sys.executable, __file__, "--discover", folder, "--sample", str(sample)]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            megabytes = path.stat().st_size / 1e6
            lines.append(f"| {size:,} documents | {megabytes:.0f} | {told['seconds']:.1f} | {told['peak']:.0f} |")
    return "\n".join(lines)


def discover_here(folder: Path, sample: int) -> dict[str, float]:
    from expertctl import DiscoverySettings, Workspace

    begin = time.perf_counter()
    Workspace(folder).discover("found", CLUSTERS, DiscoverySettings(sample=sample, jobs=1))
    return {"seconds": time.perf_counter() - begin, "peak": peak_megabytes()}


def peak_megabytes() -> float:
    """Return the peak memory of this process. (`getrusage` is no use: its peak starts at that of the parent process.)"""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
