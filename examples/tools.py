"""What the measured examples share: text divided into public and private, and tables over random seeds."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PUBLIC = "public"


def divided_text(
    folder: Path, corpora: Path, public_share: float, owners: Sequence[str] | None = None
) -> dict[str, dict[str, Path]]:
    """Divide every owner's documents into public and private ones; return the files by domain and part.

    `corpora` has a folder for each owner, with `train.jsonl` and `valid.jsonl`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Path]] = {PUBLIC: {}}
    public: dict[str, list[str]] = {"train": [], "valid": []}
    for source in sorted(path for path in corpora.resolve().iterdir() if (path / "train.jsonl").exists()):
        if owners is not None and source.name not in owners:
            continue
        lines = (source / "train.jsonl").read_text(encoding="utf-8").splitlines()
        count = round(len(lines) * public_share)
        stride = len(lines) / count
        chosen = {int(number * stride) for number in range(count)}  # evenly over the file
        public["train"] += [line for number, line in enumerate(lines) if number in chosen]
        private = folder / f"{source.name}.jsonl"
        kept = [line for number, line in enumerate(lines) if number not in chosen]
        private.write_text("\n".join(kept) + "\n", encoding="utf-8")
        held_out = (source / "valid.jsonl").read_text(encoding="utf-8").splitlines()
        public["valid"] += held_out[:: max(len(held_out) // 20, 1)]
        found[source.name] = {"train": private, "valid": source / "valid.jsonl"}
    for part, lines in public.items():
        path = folder / f"{PUBLIC}-{part}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        found[PUBLIC][part] = path
    return found


def results_over_seeds(
    options: argparse.Namespace, one_seed: Callable[[Path, int, argparse.Namespace], Any]
) -> list[Any]:
    """Carry an example out for each of `options.seeds`, in a workspace of its own below `options.out`; return what it gives.

    What is finished stands in `rows.json` and is not done again.
    """
    results = []
    for seed in options.seeds:
        print(f"random seed {seed}", file=sys.stderr)
        root = options.out.resolve() / f"seed-{seed}"
        rows = root / "rows.json"
        root.mkdir(parents=True, exist_ok=True)
        if not rows.exists():
            rows.write_text(json.dumps(one_seed(root, seed, options), indent=2) + "\n")
        results.append(json.loads(rows.read_text()))
    return results


def write_config(root: Path, config: Mapping[str, Any]) -> None:
    """Write a workspace's `expertctl.yaml`; ends the example where one of other settings is there."""
    content = json.dumps(config, indent=2)  # JSON is YAML
    path = root / "expertctl.yaml"
    if path.exists() and path.read_text() != content:
        sys.exit(f"{path} is of other settings; name another --out")
    path.write_text(content)


def table_over_seeds(
    heading: str, rows: Sequence[str], results: Sequence[Mapping[str, float]], seeds: Sequence[int]
) -> str:
    """Return a table: a row for each model, a column for each random seed, mean and spread over them.

    A model that a random seed has no figure for is left empty there; one without any is left out.
    """
    heads = [*(f"seed {seed}" for seed in seeds), "mean", "std"]
    lines = [f"| {heading} | {' | '.join(heads)} |", "|---" + "|---:" * len(heads) + "|"]
    for name in rows:
        found = [result.get(name) for result in results]
        values = [value for value in found if value is not None]
        if not values:
            continue
        cells = [f"{value:.4f}" if value is not None else "" for value in found]
        cells += [
            f"{statistics.mean(values):.4f}",
            f"{statistics.stdev(values):.4f}" if len(values) > 1 else "",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
