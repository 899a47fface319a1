"""Rounds of a shared model compared with merges and with training in one place, over several random seeds.

    python examples/federation/rounds.py --corpora FOLDER --seeds 0,1,2   # a folder for each owner: train.jsonl, valid.jsonl

The seed is pretrained on a share of the text of all owners; each owner has the rest of its own, and trains on as many tokens
in every row. Rounds differ in the outer optimiser's learning rate and Nesterov momentum, and in the number of rounds that the
tokens are divided into. Each random seed has a workspace of its own in --out; the same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import (
    PUBLIC,
    differences_over_seeds,
    divided_text,
    results_over_seeds,
    table_over_seeds,
    train_seed_and_experts,
    write_config,
)

from expertctl import Workspace
from expertctl.experts.federation.judging.round_weights import AveragingRules
from expertctl.experts.federation.owner.inner_training import InnerTraining
from expertctl.experts.federation.rounds.round_loop import OwnerTask, run_rounds
from expertctl.experts.federation.rounds.rounds import RoundPlan, Rounds


@dataclass(frozen=True)
class Outer:
    """Outer optimiser and number of rounds of one row."""

    learning_rate: float
    momentum: float
    rounds: int

    @property
    def row(self) -> str:
        return f"{self.rounds} rounds, learning rate {self.learning_rate:g}, momentum {self.momentum:g}"


SWEEP = {0.0: (0.7, 1.0, 1.3), 0.5: (0.4, 0.7), 0.9: (0.1, 0.2, 0.4, 0.7)}
"""Learning rates by momentum. With 1 and no momentum, the outer step is the owners' mean change, as in FedAvg; DiLoCo has
0.7 and 0.9."""
SWEEP_OF_MORE = {0.0: (1.0,), 0.9: (0.1, 0.2, 0.7)}
"""With the larger number of rounds."""
MERGES = {
    "uniform average": ("dense", "average"),
    "ensemble, cached priors": ("dense", "ensemble"),
    "flexolmo": ("flex", "flexolmo"),
}
AT_HOME = "experts at home"
CONTROLS = {"dense": "one place, an owner's number of steps", "dense-same-batch": "one place, an owner's batch size"}


def main() -> None:
    options = parse(sys.argv[1:])
    results = results_over_seeds(options, one_seed)
    means = [{name: statistics.mean(row.values()) for name, row in rows.items()} for rows in results]
    order = ("seed", AT_HOME, *MERGES, *(outer.row for outer in swept(options)), *CONTROLS.values())
    print(table_over_seeds("bits per byte, mean over owners", order, means, options.seeds), end="\n\n")
    print(differences_over_seeds(Outer(1.0, 0.0, options.rounds[0]).row, order, means))


def swept(options: argparse.Namespace) -> list[Outer]:
    """Return the outer optimisers that are compared."""
    few, many = options.rounds
    return [
        Outer(rate, momentum, rounds)
        for rounds, sweep in ((few, SWEEP), (many, SWEEP_OF_MORE))
        for momentum, rates in sweep.items()
        for rate in rates
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument(
        "--owners",
        type=lambda text: text.split(","),
        default=["python", "scripture", "speeches"],
        help="names of folders in --corpora",
    )
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--public-share", type=float, default=0.3, help="share of public documents of every owner")
    parser.add_argument("--seed-tokens", type=int, default=400_000)
    parser.add_argument("--owner-tokens", type=int, default=200_000)
    parser.add_argument(
        "--rounds",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[5, 20],
        help="two numbers of rounds that the tokens are divided into",
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("rounds-runs"))
    return parser.parse_args(arguments)


def one_seed(root: Path, seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run the experiment with one random seed; return bits per byte by row and owner."""
    workspace = make_workspace(root, seed, options)
    train_seed_and_experts(workspace, options.jobs)
    owners = options.owners
    dense = [f"dense-{owner}" for owner in owners]
    workspace.baselines.dense(experts=dense)
    workspace.baselines.dense(experts=dense, same_batch=True)
    names = {"seed": "seed", **{expert: expert for expert in dense}, **CONTROLS}
    for row, (kind, method) in MERGES.items():
        if not (workspace.generalists / method / "generalist.json").exists():
            workspace.merge(method, method=method, experts=[f"{kind}-{owner}" for owner in owners])
        names[method] = row
    names |= {str(trained_in_rounds(workspace, outer, owners)): outer.row for outer in swept(options)}
    table = workspace.evaluate(*names, domains=owners)
    rows = {
        row: {owner: table.scores[model][owner].values["bits_per_byte"] for owner in owners}
        for model, row in names.items()
    }
    return rows | {AT_HOME: {owner: rows.pop(f"dense-{owner}")[owner] for owner in owners}}


def make_workspace(root: Path, seed: int, options: argparse.Namespace) -> Workspace:
    text = divided_text(root / "text", options.corpora, options.public_share, options.owners)
    config = {
        "seed": {
            "preset": options.preset,
            "domains": [PUBLIC],
            "training": {"tokens": options.seed_tokens, "learning_rate": 8e-3},
        },
        "training": {"tokens": options.owner_tokens, "batch_size": 4, "learning_rate": 4e-3, "seed": seed},
        "domains": {name: {part: str(path) for part, path in parts.items()} for name, parts in text.items()},
        "experts": {
            f"{kind}-{owner}": {"domain": owner, "trains": trains}
            for kind, trains in (("dense", "all"), ("flex", "flexolmo"))
            for owner in options.owners
        },
    }
    write_config(root, config)
    return Workspace(root)


def trained_in_rounds(workspace: Workspace, outer: Outer, owners: list[str]) -> Path:
    """Train the shared model unless it exists; return its folder."""
    root = workspace.root / "rounds" / outer.row.replace(", ", "-").replace(" ", "-")
    model = root / "model"
    if model.exists():
        return model
    config, seed = workspace.config.training, workspace.layout.seed
    rules = AveragingRules(learning_rate=outer.learning_rate, momentum=outer.momentum)
    plan = RoundPlan(owners=tuple(owners), recipe="diloco", rules=rules)
    rounds = Rounds.begin(root / "rounds", seed / "model.safetensors", plan, datetime.now(UTC))
    texts = {text.name: workspace.data.blocks(text, "train") for text in workspace.data.prepare(owners)}

    def train_owner(task: OwnerTask) -> int:
        steps = config.steps // outer.rounds
        return InnerTraining(root / "state" / task.owner, seed, texts[task.owner], config, steps)(task)

    run_rounds(rounds, train_owner, outer.rounds)
    model.mkdir()
    for file in (seed / "config.json", *seed.glob("tokenizer*")):
        shutil.copy(file, model)
    shutil.copy(rounds.open.shared, model)
    return model


if __name__ == "__main__":
    main()
