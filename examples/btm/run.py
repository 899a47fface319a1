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

from tools import differences_over_seeds, results_over_seeds, table_over_seeds, train_seed_and_experts, write_config

from expertctl import Workspace
from expertctl.experts.measures.evaluation import EvaluationTable
from expertctl.experts.text.bundled import BUNDLED

TARGET_AVERAGE = "posterior average, per target"
MERGES = {
    "uniform average": {"method": "average"},
    "ensemble, uniform prior": {"method": "ensemble", "options": {"prior": "uniform"}},
    "ensemble, updating prior": {"method": "ensemble", "options": {"prior": "updating"}},
    "ensemble, cached priors": {"method": "ensemble"},
    "ensemble, cached priors, last token": {"method": "ensemble", "options": {"posterior": "last_token"}},
    "ensemble, cached priors, top 2": {"method": "ensemble", "options": {"top_k": 2}},
    "ensemble, cached priors, top 1": {"method": "ensemble", "options": {"top_k": 1}},
}
KNOWN = {f"{name}, known domain": name for name in MERGES if "cached" in name}
"""Rows of ensembles that are told which domain they read."""
AT_HOME = "experts at home"
REFERENCE = "dense, same batch"
ORDER = (
    "seed",
    "best single expert",
    AT_HOME,
    "uniform average",
    TARGET_AVERAGE,
    "dense",
    "dense, same batch",
    "random-split forest",
    *(name for name in MERGES if name.startswith("ensemble")),
    *KNOWN,
)


def main() -> None:
    options = parse(sys.argv[1:])
    results = results_over_seeds(options, one_seed)
    means = [{name: statistics.mean(row.values()) for name, row in rows.items()} for rows in results]
    print(table_over_seeds("bits per byte, mean over domains", ORDER, means, options.seeds), end="\n\n")
    print(differences_over_seeds(REFERENCE, ORDER, means))


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
    train_seed_and_experts(workspace, options.jobs)
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
    rows = {row: bits_per_byte(table, model) for model, row in names.items()}
    known = workspace.evaluate(*(folders[base] for base in KNOWN.values()), known_domains=True)
    rows |= {row: bits_per_byte(known, folders[base]) for row, base in KNOWN.items()}
    experts = {name: rows[f"expert {name}"] for name in workspace.config.experts}
    best = min(experts.values(), key=lambda row: statistics.mean(row.values()))
    return rows | {"best single expert": best, AT_HOME: {name: row[name] for name, row in experts.items()}}


def bits_per_byte(table: EvaluationTable, model: str) -> dict[str, float]:
    return {domain: table.scores[model][domain].values["bits_per_byte"] for domain in table.domains}


def per_target_rows(workspace: Workspace) -> dict[str, dict[str, float]]:
    """Evaluate on each domain the average that is weighted by the cached prior of this domain."""
    row = {}
    for domain in workspace.config.domains:
        average = {"method": "average", "weights": "posterior", "fit_on": [domain]}
        folder = merged(workspace, f"{TARGET_AVERAGE} {domain}", average)
        row |= bits_per_byte(workspace.evaluate(folder, domains=[domain]), folder)
    return {TARGET_AVERAGE: row}


def merged(workspace: Workspace, name: str, settings: dict[str, object]) -> str:
    """Merge a generalist unless it exists; return the name of its folder."""
    folder = name.replace(", ", "-").replace(" ", "-")
    if not (workspace.generalists / folder / "generalist.json").exists():
        workspace.merge(folder, **settings)
    return folder


if __name__ == "__main__":
    main()
