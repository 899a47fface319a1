"""Branch-Train-Merge and its controls at the same token budget, over several random seeds.

    python examples/btm/run.py                                  # the bundled corpora
    python examples/btm/run.py --corpora FOLDER --seeds 0,1,2   # a folder for each domain: train.jsonl, valid.jsonl

Half of the budget goes to the seed, the rest in equal parts to the experts; every control gets the same budget.
Each random seed has a workspace of its own in --out; the same command resumes an interrupted run.
Prints a table of bits per byte, averaged over the domains; `rows.json` in each workspace has the values of every domain.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import results_over_seeds, write_config

from expertctl import Workspace
from expertctl.core.manifests.manifest import read_manifest
from expertctl.experts.text.bundled import BUNDLED

TARGET_AVERAGE = "posterior average, per target"
# With the prior that was fitted for the average of the same target: `given` saves fitting it again.
TARGET_ENSEMBLES = {
    "ensemble, cached prior per target": {"prior": "given"},
    "ensemble, cached per target, top 2": {"prior": "given", "top_k": 2},
    "ensemble, cached per target, top 1": {"prior": "given", "top_k": 1},
}
MERGES = {
    "uniform average": {"method": "average"},
    "posterior average": {"method": "average", "weights": "posterior"},
    "ensemble, uniform prior": {"method": "ensemble", "options": {"prior": "uniform"}},
    "ensemble, updating prior": {"method": "ensemble", "options": {"prior": "updating"}},
    "ensemble, cached prior": {"method": "ensemble"},
    "ensemble, cached prior, last token": {"method": "ensemble", "options": {"posterior": "last_token"}},
}
ORDER = (
    "seed",
    "best single expert",
    "uniform average",
    "posterior average",
    TARGET_AVERAGE,
    "dense",
    "dense, same batch",
    "random-split forest",
    *(name for name in MERGES if name.startswith("ensemble")),
    *TARGET_ENSEMBLES,
)


def main() -> None:
    options = parse(sys.argv[1:])
    results = results_over_seeds(options, one_seed)
    print(markdown(results, options.seeds))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, help="default: the bundled corpora")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=2_000_000, help="total token budget (default: %(default)s)")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("btm-runs"))
    return parser.parse_args(arguments)


def one_seed(root: Path, seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run the experiment with one random seed; return bits per byte by row and domain."""
    workspace = make_workspace(root, seed, options)
    if not (workspace.layout.seed / "seed.json").exists():
        workspace.seed()
    require(workspace.train(jobs=options.jobs).failed)
    workspace.baselines.dense()
    workspace.baselines.dense(same_batch=True)
    workspace.baselines.random_split(jobs=options.jobs)
    return shared_rows(workspace) | per_target_rows(workspace)


def make_workspace(root: Path, seed: int, options: argparse.Namespace) -> Workspace:
    domains = domains_of(options.corpora)
    training = {"batch_size": 4, "learning_rate": 8e-3, "seed": seed}
    config = {
        "seed": {"preset": options.preset, "training": {"tokens": options.tokens // 2, "schedule_end": 0.5}},
        "training": {"tokens": options.tokens // 2 // len(domains), **training},
        "domains": domains,
        "experts": {name: {"domain": name} for name in domains},
    }
    root.mkdir(parents=True, exist_ok=True)
    write_config(root, config)
    return Workspace(root)


def domains_of(corpora: Path | None) -> dict[str, dict[str, str]]:
    if corpora is None:
        return {name: {"bundled": name} for name in BUNDLED}
    folders = sorted(path for path in corpora.resolve().iterdir() if (path / "train.jsonl").exists())
    return {path.name: {part: str(path / f"{part}.jsonl") for part in ("train", "valid")} for path in folders}


def require(failed: object) -> None:
    if failed:
        sys.exit(f"failed: {failed}")


def shared_rows(workspace: Workspace) -> dict[str, dict[str, float]]:
    """Evaluate the models that do not depend on a target domain: seed, experts, generalists, controls."""
    folders = {name: merged(workspace, name, settings) for name, settings in MERGES.items()}
    names = {
        "seed": "seed",
        "dense": "dense",
        "dense-same-batch": "dense, same batch",
        "random-split": "random-split forest",
        **{expert: f"expert {expert}" for expert in workspace.config.experts},
        **{folder: name for name, folder in folders.items()},
    }
    table = workspace.evaluate(*names)
    rows = {
        row: {domain: table.scores[model][domain].values["bits_per_byte"] for domain in table.domains}
        for model, row in names.items()
    }
    experts = [rows[f"expert {name}"] for name in workspace.config.experts]
    return rows | {"best single expert": min(experts, key=lambda row: statistics.mean(row.values()))}


def per_target_rows(workspace: Workspace) -> dict[str, dict[str, float]]:
    """Evaluate the models made for each target domain, with priors fitted on its validation text."""
    rows: dict[str, dict[str, float]] = {name: {} for name in (TARGET_AVERAGE, *TARGET_ENSEMBLES)}
    for domain in workspace.config.domains:
        average = {"method": "average", "weights": "posterior", "fit_on": [domain]}
        folders = {TARGET_AVERAGE: merged(workspace, f"{TARGET_AVERAGE} {domain}", average)}
        merged_average = read_manifest(workspace.generalists / folders[TARGET_AVERAGE]).merged
        assert merged_average is not None
        for name, options in TARGET_ENSEMBLES.items():
            settings = {"method": "ensemble", "weights": dict(merged_average.weights), "options": options}
            folders[name] = merged(workspace, f"{name} {domain}", settings)
        table = workspace.evaluate(*folders.values(), domains=[domain])
        for name, folder in folders.items():
            rows[name][domain] = table.scores[folder][domain].values["bits_per_byte"]
    return rows


def merged(workspace: Workspace, name: str, settings: dict[str, object]) -> str:
    """Merge a generalist unless it exists; return the name of its folder."""
    folder = name.replace(", ", "-").replace(" ", "-")
    if not (workspace.generalists / folder / "generalist.json").exists():
        workspace.merge(folder, **settings)
    return folder


def markdown(results: list[dict[str, dict[str, float]]], seeds: list[int]) -> str:
    """Return the table: a row per model, a column per random seed, mean and spread."""
    heads = [*(f"seed {seed}" for seed in seeds), "mean", "std"]
    lines = [
        f"| bits per byte, mean over domains | {' | '.join(heads)} |",
        "|---" + "|---:" * len(heads) + "|",
    ]
    for name in ORDER:
        means = [statistics.mean(result[name].values()) for result in results]
        spread = statistics.stdev(means) if len(means) > 1 else 0.0
        cells = [*(f"{value:.4f}" for value in means), f"{statistics.mean(means):.4f}", f"{spread:.4f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
