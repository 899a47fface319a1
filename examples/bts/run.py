"""Stitching compared with other merges of the same experts, over several random seeds.

    python examples/bts/run.py --corpora FOLDER --seeds 0,1,2   # a folder for each domain: train.jsonl, valid.jsonl

The seed is pretrained on a share of the text of all domains; all parameters of each expert are trained on the rest of its
domain. Then stitches, a BTX mixture and a FlexOlmo router are trained on the same number of tokens each; the control is the
seed, trained on as many tokens of the same text. Each random seed has a workspace of its own in --out; the same command
resumes an interrupted run. One table is of text that alternates between passages of two domains.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import (
    PUBLIC,
    differences_over_seeds,
    divided_text,
    joined_text,
    results_over_seeds,
    table_over_seeds,
    train_seed_and_experts,
    write_config,
)

from expertctl import TuningSettings, Workspace
from expertctl.core.config.settings import DomainConfig
from expertctl.experts.text.corpora import domain_documents

CROSSED = "crossed"
"""The domain whose documents hold two domains; only measured on."""
PASSAGE_LETTERS = 300
STITCHED = "stitched"
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform average": ("dense", {"method": "average"}),
    "ensemble, cached prior": ("dense", {"method": "ensemble"}),
    "btx": ("dense", {"method": "btx"}),
    "btx, ridge router": ("dense", {"method": "btx", "options": {"router": "ridge"}}),
    "flexolmo": ("flex", {"method": "flexolmo"}),
    "flexolmo, ridge router": ("flex", {"method": "flexolmo", "options": {"router": "ridge"}}),
    STITCHED: ("dense", {"method": "stitch"}),
}
TUNED = {
    "btx, trained": ("btx", "mixture", 2e-3),
    "flexolmo, router trained": ("flexolmo", "router", 2e-3),
    "stitched, trained": (STITCHED, "stitches", 4e-3),
}
"""Row -> (what it is trained from, what of it trains, at which peak learning rate), on text of all domains."""
MORE_TEXT = "seed, as much more text"
"""Control of the rows that train after the merge: the seed itself, on as many tokens of the same text."""
AT_HOME = "experts at home"
ORDER = ("seed", MORE_TEXT, "best single expert", AT_HOME, *MERGES, *TUNED)
TOGETHER = "together"
"""The domain with the text of all others, for the control."""


def main() -> None:
    options = parse(sys.argv[1:])
    results = results_over_seeds(options, one_seed)
    for what, pick in (("own domains, mean", own_mean), (f"{CROSSED} text", lambda row: row[CROSSED])):
        rows_ = [{name: pick(row) for name, row in result["scores"].items()} for result in results]
        print(table_over_seeds(f"bits per byte, {what}", ORDER, rows_, options.seeds), end="\n\n")
        print(differences_over_seeds(MORE_TEXT, ORDER, rows_), end="\n\n")
    print(costs_table(results))


def own_mean(row: dict[str, float]) -> float:
    return statistics.mean(value for name, value in row.items() if name != CROSSED)


def parse(arguments: list[str]) -> argparse.Namespace:
    def split(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument(
        "--domains",
        type=split,
        default=["python", "scripture", "speeches", "metamath"],
        help="names of folders in --corpora",
    )
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--public-share", type=float, default=0.3, help="share of public documents in every domain")
    parser.add_argument("--seed-tokens", type=int, default=2_000_000)
    parser.add_argument("--expert-tokens", type=int, default=600_000)
    parser.add_argument("--tuning-tokens", type=int, default=400_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("bts-runs"))
    return parser.parse_args(arguments)


def one_seed(root: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run the experiment with one random seed; return bits per byte and costs by row."""
    workspace = make_workspace(root, seed, options)
    train_seed_and_experts(workspace, options.jobs)
    folders = {}
    for row, (kind, settings) in MERGES.items():
        folders[row] = row.replace(", ", "-").replace(" ", "-")
        if not (workspace.generalists / folders[row] / "generalist.json").exists():
            experts = [f"{kind}-{domain}" for domain in options.domains]
            workspace.merge(folders[row], experts=experts, **settings)
    for row, (base, trains, rate) in TUNED.items():
        folders[row] = row.replace(", ", "-").replace(" ", "-")
        if not (workspace.generalists / folders[row] / "generalist.json").exists():
            training = {"tokens": options.tuning_tokens, "learning_rate": rate}
            domains = [PUBLIC, *options.domains]
            workspace.tune(folders[row], folders[base], TuningSettings(trains, domains, training=training))
    experts = [f"dense-{domain}" for domain in options.domains]
    table = workspace.evaluate("seed", TOGETHER, *experts, *folders.values(), domains=[*options.domains, CROSSED])
    scores = {
        model: {domain: score.values["bits_per_byte"] for domain, score in row.items()}
        for model, row in table.scores.items()
    }
    best = min(experts, key=lambda name: own_mean(scores[name]))
    named = {"seed": "seed", MORE_TEXT: TOGETHER, "best single expert": best, **folders}
    at_home = {domain: scores[f"dense-{domain}"][domain] for domain in options.domains}
    crossed = statistics.mean(scores[expert][CROSSED] for expert in experts)  # no expert is at home there
    return {
        "scores": {row: scores[model] for row, model in named.items()} | {AT_HOME: {**at_home, CROSSED: crossed}},
        "costs": {row: costs(workspace, model, row in TUNED) for row, model in named.items()},
    }


def costs(workspace: Workspace, model: str, trained: bool) -> dict[str, float]:
    """Return total, active and trained parameters, and scored tokens per second."""
    import torch

    from expertctl import load_model

    network, _ = load_model(workspace.layout.artefact(model), dtype="float32")
    tokens = torch.randint(0, 1000, (4, 256), generator=torch.Generator().manual_seed(0))
    seconds = []
    with torch.inference_mode():
        for _ in range(6):
            begin = time.perf_counter()
            network(input_ids=tokens, use_cache=False)
            seconds.append(time.perf_counter() - begin)
    unique = {parameter.data_ptr(): parameter.numel() for parameter in network.parameters()}
    moved = moving_parameters(network, model) if trained else 0
    return {
        "total": sum(unique.values()),
        "active": sum(unique.values()) - idle_parameters(network),
        "trained": moved,
        "tokens_per_second": tokens.numel() / statistics.median(seconds[1:]),
    }


def idle_parameters(network: Any) -> int:
    """Return the number of parameters that are inactive for a token: those of experts it is not routed to."""
    config = network.config
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if not count:
        return 0  # every member of an ensemble or a stitched model works on every token
    inside = sum(parameter.numel() for name, parameter in network.named_parameters() if ".experts." in name)
    return inside - inside * int(config.num_experts_per_tok) // int(count)


def moving_parameters(network: Any, model: str) -> int:
    """Return the number of parameters that the tuning of a row trains."""
    patterns = {"stitched-trained": "stitches.", "flexolmo-router-trained": ".mlp.gate."}
    wanted = patterns.get(model, "")
    return sum(parameter.numel() for name, parameter in network.named_parameters() if wanted in name)


def costs_table(results: list[dict[str, Any]]) -> str:
    """Return parameters and speed by row, for the first random seed."""
    lines = [
        "| | parameters | active at a token | trained after the merge | tokens per second in scoring |",
        "|---|---:|---:|---:|---:|",
    ]
    for row, cost in results[0]["costs"].items():
        lines.append(
            f"| {row} | {int(cost['total']):,} | {int(cost['active']):,} | {int(cost['trained']):,} | "
            f"{int(cost['tokens_per_second']):,} |"
        )
    return "\n".join(lines)


def make_workspace(root: Path, seed: int, options: argparse.Namespace) -> Workspace:
    text = divided_text(root / "text", options.corpora, options.public_share, options.domains)
    text[TOGETHER] = joined_text(root / "text", TOGETHER, list(text.values()))
    text[CROSSED] = crossed_text(root / "text", options.corpora, options.domains)
    training = {"batch_size": 4, "learning_rate": 4e-3, "seed": seed}
    config = {
        "seed": {
            "preset": options.preset,
            "domains": [PUBLIC],
            "training": {"tokens": options.seed_tokens, "schedule_end": 0.5, "learning_rate": 8e-3},
        },
        "training": {"tokens": options.expert_tokens, **training},
        "domains": {name: {part: str(path) for part, path in parts.items()} for name, parts in text.items()},
        "experts": {
            f"{kind}-{domain}": {"domain": domain, "trains": trains}
            for kind, trains in (("dense", "all"), ("flex", "flexolmo"))
            for domain in options.domains
        }
        | {TOGETHER: {"domain": TOGETHER, "training": {"tokens": options.tuning_tokens}}},
    }
    write_config(root, config)
    return Workspace(root)


def crossed_text(folder: Path, corpora: Path, domains: list[str]) -> dict[str, Path]:
    """Write documents with alternating passages of two domains' test text, which no other part of the experiment reads."""
    held_out = {
        domain: list(
            domain_documents(
                DomainConfig(**{part: f"{domain}/{part}.jsonl" for part in ("train", "valid")}), corpora, "test"
            )
        )
        for domain in domains
    }
    lines = []
    for number, first in enumerate(domains):
        second = domains[(number + 1) % len(domains)]
        for left, other in zip(held_out[first][:20], held_out[second][:20], strict=False):
            pieces = []
            for begin in range(0, min(len(left), len(other), 4 * PASSAGE_LETTERS), PASSAGE_LETTERS):
                pieces += [left[begin : begin + PASSAGE_LETTERS], other[begin : begin + PASSAGE_LETTERS]]
            lines.append(json.dumps({"text": "\n".join(pieces)}, ensure_ascii=False))
    path = folder / f"{CROSSED}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"train": path, "valid": path, "test": path}  # only measured on


if __name__ == "__main__":
    main()
