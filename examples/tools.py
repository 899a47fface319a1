"""Helpers of the experiments: division of text into public and private documents, and tables over random seeds."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertctl import Workspace

PUBLIC = "public"


def divided_text(
    folder: Path, corpora: Path, public_share: float, owners: Sequence[str] | None = None
) -> dict[str, dict[str, Path]]:
    """Divide every owner's documents into public and private documents; return the files by domain and split.

    `corpora` has a folder for each owner, with `train.jsonl` and `valid.jsonl`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, Path]] = {PUBLIC: {}}
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
        files[source.name] = {"train": private, "valid": source / "valid.jsonl"}
    for part, lines in public.items():
        path = folder / f"{PUBLIC}-{part}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        files[PUBLIC][part] = path
    return files


def joined_text(folder: Path, name: str, parts: Sequence[Mapping[str, Path]]) -> dict[str, Path]:
    """Write the text of several domains as one domain's, for models that train on all of it; return its files."""
    files = {}
    for part in ("train", "valid"):
        files[part] = folder / f"{name}-{part}.jsonl"
        files[part].write_text("".join(domain[part].read_text(encoding="utf-8") for domain in parts), encoding="utf-8")
    return files


def results_over_seeds(
    options: argparse.Namespace, one_seed: Callable[[Path, int, argparse.Namespace], Any]
) -> list[Any]:
    """Run an experiment for each of `options.seeds` in a workspace of its own in `options.out`; return the results.

    Results that `rows.json` already has are not computed again.
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


def train_seed_and_experts(workspace: Workspace, jobs: int, *names: str) -> None:
    """Pretrain the seed and train the experts (default: all) that are not finished; exit if one fails."""
    if not (workspace.layout.seed / "seed.json").exists():
        workspace.seed()
    if failed := workspace.train(*names, jobs=jobs).failed:
        sys.exit(f"failed: {failed}")


def write_config(root: Path, config: Mapping[str, Any]) -> None:
    """Write a workspace's `expertctl.yaml`; exit if the workspace has one with other settings."""
    content = json.dumps(config, indent=2)  # JSON is YAML
    path = root / "expertctl.yaml"
    if path.exists() and path.read_text() != content:
        sys.exit(f"{path} is of other settings; name another --out")
    path.write_text(content)


def table_over_seeds(
    heading: str, rows: Sequence[str], results: Sequence[Mapping[str, float]], seeds: Sequence[int]
) -> str:
    """Return a table: a row per model, a column per random seed, mean and spread.

    A missing value is an empty cell; a model without any value is omitted.
    """
    heads = [*(f"seed {seed}" for seed in seeds), "mean", "std"]
    lines = [f"| {heading} | {' | '.join(heads)} |", "|---" + "|---:" * len(heads) + "|"]
    for name in rows:
        figures = [result.get(name) for result in results]
        values = [value for value in figures if value is not None]
        if not values:
            continue
        cells = [f"{value:.4f}" if value is not None else "" for value in figures]
        cells += [
            f"{statistics.mean(values):.4f}",
            f"{statistics.stdev(values):.4f}" if len(values) > 1 else "",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences_over_seeds(reference: str, rows: Sequence[str], results: Sequence[Mapping[str, float]]) -> str:
    """Return a table of each model's difference from `reference`: mean and 95% confidence interval of paired differences.

    Pairs have the same random seed. The interval is Student's t, which is wide for few seeds; with one seed there is none.
    """
    from scipy.stats import t

    lines = [f"| minus {reference} | mean difference | 95% interval |", "|---|---:|---:|"]
    for name in rows:
        pairs = [(result[name], result[reference]) for result in results if name in result and reference in result]
        if not pairs or name == reference:
            continue
        differences = [value - other for value, other in pairs]
        mean, interval = statistics.mean(differences), ""
        if len(differences) > 1:
            width = t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
            interval = f"{mean - width:+.4f} to {mean + width:+.4f}"
        lines.append(f"| {name} | {mean:+.4f} | {interval} |")
    return "\n".join(lines)
