"""An ensemble of experts distilled into one model of the seed's size, with controls, over several random seeds.

    python examples/distil/run.py --corpora FOLDER --seeds 0,1,2   # a folder for each domain: train.jsonl, valid.jsonl

Half of the budget goes to the seed, the rest in equal parts to the experts, as in the example `btm`. A student begins as the
seed and reads the text of all domains, for as many tokens as all experts together or for --longer times as many; its
control does the same without a teacher. Each random seed has a workspace of its own in --out; the same command resumes an
interrupted run. Prints bits per byte of test text, averaged over the domains; `rows.json` in each workspace has the
values of every domain.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import (
    differences_over_seeds,
    joined_text,
    results_over_seeds,
    table_over_seeds,
    train_seed_and_experts,
    write_config,
)

from expertctl import Workspace

TOGETHER = "together"
"""The domain with the text of all others."""
TEACHER = "ensemble"
REFERENCE = "no teacher"
STUDENTS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "distilled": {"objective": "distil", "objective_options": {"teacher": TEACHER}},
}


def main() -> None:
    options = parse(sys.argv[1:])
    results = results_over_seeds(options, one_seed)
    means = [{name: statistics.mean(row.values()) for name, row in rows.items()} for rows in results]
    order = list(means[0])
    print(table_over_seeds("bits per byte, mean over domains", order, means, options.seeds), end="\n\n")
    print(differences_over_seeds(REFERENCE, order, means), end="\n\n")
    print(differences_over_seeds(longer(REFERENCE), [longer(name) for name in STUDENTS], means))


def students(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the settings of training of the students and their controls, by row."""
    tokens = options.tokens // 2
    rows = {name: {**settings, "tokens": tokens} for name, settings in STUDENTS.items()}
    return rows | {longer(name): {**rows[name], "tokens": tokens * options.longer} for name in rows}


def longer(student: str) -> str:
    """Return the row of a student that reads more text."""
    return f"{student}, longer"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument(
        "--tokens", type=int, default=1_000_000, help="tokens of seed and experts (default: %(default)s)"
    )
    parser.add_argument("--longer", type=int, default=2, help="times as many tokens (default: %(default)s)")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("distil-runs"))
    return parser.parse_args(arguments)


def one_seed(root: Path, seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run the experiment with one random seed; return bits per byte by row and domain."""
    workspace, domains = make_workspace(root, seed, options)
    train_seed_and_experts(workspace, options.jobs, *domains)
    if not (workspace.generalists / TEACHER / "generalist.json").exists():
        workspace.merge(TEACHER, method="ensemble", experts=domains)
    train_seed_and_experts(workspace, options.jobs)  # and the students
    rows = {"seed": "seed", TEACHER: TEACHER, **{row: folder_name(row) for row in students(options)}}
    scores = workspace.evaluate(*rows.values(), domains=domains).scores
    return {
        row: {domain: score.values["bits_per_byte"] for domain, score in scores[model].items()}
        for row, model in rows.items()
    }


def folder_name(row: str) -> str:
    return row.replace(", ", "-").replace(" ", "-")


def make_workspace(root: Path, seed: int, options: argparse.Namespace) -> tuple[Workspace, list[str]]:
    """Return the workspace of a random seed, and the names of the domains."""
    folders = sorted(path for path in options.corpora.resolve().iterdir() if (path / "train.jsonl").exists())
    files = {path.name: {part: path / f"{part}.jsonl" for part in ("train", "valid")} for path in folders}
    together = joined_text(root, TOGETHER, list(files.values()))
    tokens = options.tokens // 2
    training = {"batch_size": 4, "learning_rate": 8e-3, "seed": seed}
    config = {
        "seed": {
            "preset": options.preset,
            "domains": list(files),
            "training": {"tokens": tokens, "schedule_end": 0.5},
        },
        "training": {"tokens": tokens // len(files), **training},
        "domains": {
            name: {part: str(path) for part, path in parts.items()}
            for name, parts in (*files.items(), (TOGETHER, together))
        },
        "experts": {name: {"domain": name} for name in files}
        | {folder_name(row): {"domain": TOGETHER, "training": settings} for row, settings in students(options).items()},
    }
    write_config(root, config)
    return Workspace(root), list(files)


if __name__ == "__main__":
    main()
