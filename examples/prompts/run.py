"""Prompts for one domain after another: progressive prompts, one prompt that is tuned on, and a prompt per domain.

    python examples/prompts/run.py --corpora FOLDER --seeds 0,1,2   # a folder for each domain: train.jsonl, valid.jsonl

The seed is pretrained on the text of other domains. Then a prompt is trained on the first of four domains, and the others follow
one by one: `progressive` puts a new prompt before the frozen earlier ones (arXiv:2301.12314), `tuned on` goes on with the same
prompt, and `single` trains a prompt of its own for every domain. All have the same text and tokens for a domain. As in the
paper, the stack of prompts that ends with a domain's own is used for that domain; `progressive, last stack` uses the last one for
all domains. Each random seed has a workspace of its own in --out; the same command resumes an interrupted run. Prints bits
per byte of test text; `rows.json` in each workspace has the values of every domain after every stage.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import differences_over_seeds, results_over_seeds, table_over_seeds, write_config

from expertctl import Workspace

SINGLE, TUNED, PROGRESSIVE, LAST = "single", "tuned on", "progressive", "progressive, last stack"
Scores = dict[str, dict[str, dict[str, float]]]
"""Row -> stage -> domain -> bits per byte; stages are named after the domain that was trained on."""


def main() -> None:
    options = parse(sys.argv[1:])
    results: list[Scores] = results_over_seeds(options, one_seed)
    domains = list(results[0][TUNED])
    first, last = domains[0], domains[-1]
    by_stage = [
        {after(row, stage): result[row][stage][first] for row in (PROGRESSIVE, TUNED) for stage in domains}
        | {"seed": result["seed"][first][first], SINGLE: result[SINGLE][first][first]}
        for result in results
    ]
    order = ["seed", SINGLE, *(after(row, stage) for row in (PROGRESSIVE, TUNED) for stage in domains)]
    print(table_over_seeds(f"bits per byte on {first}", order, by_stage, options.seeds), end="\n\n")
    forgotten = [{row: forgetting(result[row], domains) for row in (PROGRESSIVE, LAST, TUNED)} for result in results]
    heading = f"forgetting of all domains but {last}, in percent"
    print(table_over_seeds(heading, (PROGRESSIVE, LAST, TUNED), forgotten, options.seeds), end="\n\n")
    at_end = [
        {row: statistics.mean(stages[last].values()) for row, stages in result.items() if row != "seed"}
        | {"seed": statistics.mean(result["seed"][first].values())}
        for result in results
    ]
    rows = ("seed", SINGLE, PROGRESSIVE, LAST, TUNED)
    print(
        table_over_seeds("bits per byte after the last stage, mean over domains", rows, at_end, options.seeds),
        end="\n\n",
    )
    print(differences_over_seeds(SINGLE, rows, at_end))


def after(row: str, stage: str) -> str:
    return f"{row}, after {stage}"


def forgetting(stages: dict[str, dict[str, float]], domains: list[str]) -> float:
    """Return by how many percent the loss of a domain is higher after the last stage than after its own, the mean over domains."""
    return statistics.mean(100 * (stages[domains[-1]][domain] / stages[domain][domain] - 1) for domain in domains[:-1])


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument(
        "--domains",
        type=lambda text: text.split(","),
        help="of prompts, in order (default: the first four); the seed is pretrained on all others",
    )
    parser.add_argument("--prompt", type=int, default=10, help="rows of a prompt (default: %(default)s)")
    parser.add_argument(
        "--context",
        type=int,
        default=64,
        help="tokens of a block; in few, a prompt tells what they do not (default: %(default)s)",
    )
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--seed-tokens", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=80_000, help="tokens of a stage (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.3, help="of prompts (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("prompts-runs"))
    return parser.parse_args(arguments)


def one_seed(root: Path, seed: int, options: argparse.Namespace) -> Scores:
    """Run the experiment with one random seed."""
    workspace, domains = make_workspace(root, seed, options)
    if not (workspace.layout.seed / "seed.json").exists():
        workspace.seed()
    for name in workspace.config.experts:  # each needs those before it
        if failed := workspace.train(name).failed:
            sys.exit(f"failed: {failed}")

    def bits(model: str, *on: str) -> dict[str, float]:
        scores = workspace.evaluate(model, domains=list(on)).scores[model]
        return {domain: score.values["bits_per_byte"] for domain, score in scores.items()}

    own = {domain: bits(expert(PROGRESSIVE, domains, domain), domain)[domain] for domain in domains}
    single = {domain: bits(expert(SINGLE, domains, domain), domain)[domain] for domain in domains}
    last = bits(expert(PROGRESSIVE, domains, domains[-1]), *domains)
    stages = {number: domains[: number + 1] for number in range(len(domains))}
    return {
        "seed": {domains[0]: bits("seed", *domains)},
        SINGLE: {stage: {domain: single[domain] for domain in stages[n]} for n, stage in enumerate(domains)},
        # the stack of a domain is the same in all later stages: its rows are frozen, and it has no others
        PROGRESSIVE: {stage: {domain: own[domain] for domain in stages[n]} for n, stage in enumerate(domains)},
        LAST: {**{domain: {domain: own[domain]} for domain in domains}, domains[-1]: last},
        TUNED: {stage: bits(expert(TUNED, domains, stage), *domains) for stage in domains},
    }


def expert(row: str, domains: list[str], domain: str) -> str:
    """Return the name of an expert; the first prompt is the same in all rows."""
    return f"{SINGLE if domain == domains[0] else row}-{domain}".replace(" ", "-")


def experts_of(domains: list[str], rows: int) -> dict[str, dict[str, Any]]:
    """Return the section `experts` of the project: all prompts, in the order of their training."""
    experts: dict[str, dict[str, Any]] = {}
    for number, domain in enumerate(domains):
        size, previous = {"tokens": rows}, domains[max(number - 1, 0)]
        experts[expert(SINGLE, domains, domain)] = {"domain": domain, "trains": "prompt", "options": size}
        if number:
            earlier = {"earlier": expert(PROGRESSIVE, domains, previous)}
            start = {"start": expert(TUNED, domains, previous)}
            experts |= {
                expert(PROGRESSIVE, domains, domain): {
                    "domain": domain,
                    "trains": "progressive_prompts",
                    "options": {**size, **earlier},
                },
                expert(TUNED, domains, domain): {"domain": domain, "trains": "prompt", "options": {**size, **start}},
            }
    return experts


def make_workspace(root: Path, seed: int, options: argparse.Namespace) -> tuple[Workspace, list[str]]:
    """Return the workspace of a random seed, and the names of the domains in order."""
    folders = sorted(path.parent for path in options.corpora.resolve().glob("*/train.jsonl"))
    names = [folder.name for folder in folders]
    domains = options.domains or names[:4]
    prompts = {"learning_rate": options.learning_rate, "weight_decay": 1e-5, "schedule_begin": 0.0}
    config = {
        "seed": {
            "preset": options.preset,
            "domains": [name for name in names if name not in domains],
            "training": {"tokens": options.seed_tokens, "learning_rate": 8e-3},
        },
        "training": {
            "tokens": options.tokens,
            "batch_size": 1024 // options.context,
            "sequence_length": options.context,
            "seed": seed,
        },
        "domains": {
            folder.name: {part: str(folder / f"{part}.jsonl") for part in ("train", "valid")} for folder in folders
        },
        "experts": {
            name: {**settings, "training": prompts} for name, settings in experts_of(domains, options.prompt).items()
        },
    }
    write_config(root, config)
    return Workspace(root), domains


if __name__ == "__main__":
    main()
