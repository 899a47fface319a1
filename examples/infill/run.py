"""Filling holes: experts trained with and without the objective `infill`, over several random seeds.

    python examples/infill/run.py --corpora FOLDER --seeds 0,1,2   # a folder for each domain: train.jsonl, valid.jsonl

The seed reads all domains. Two experts of one domain read as many tokens, one with moved spans and one without. From passages of
test text, a span is hidden (up to an eighth of the passage), the same for every row; given are the bits of each hidden
token. Controls show the plain expert the text behind the hole too, in front of the text before it, and the infilling expert the text
behind another hole. Each random seed has a workspace of its own in --out; the same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import differences_over_seeds, results_over_seeds, table_over_seeds, train_seed_and_experts, write_config

from expertctl import Workspace, load_model
from expertctl.core.text.tokenizer import TextEncoder

MASK, END = "<|mask:0|>", "<|endofmask|>"
ONE_SPAN = {"most_spans": 1, "rate": 2.0}
EXPERTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "infilling": {"objective": "infill", "objective_options": ONE_SPAN},
    "suffix-first": {"objective": "infill", "objective_options": {**ONE_SPAN, "order": "suffix_first"}},
}
REFERENCE = "plain, text before"
ROWS = {
    REFERENCE: ("plain", "before"),
    "plain, text behind and then before": ("plain", "behind, before"),
    "infilling, text before": ("infilling", "before"),
    "infilling, text before and behind": ("infilling", "moved"),
    "infilling, text before, another's behind": ("infilling", "moved, another's"),
    "suffix first, text before": ("suffix-first", "before"),
    "suffix first, text before and behind": ("suffix-first", "suffix first"),
    "suffix first, text before, another's behind": ("suffix-first", "suffix first, another's"),
}
"""Row -> expert, and the order in which it reads a passage."""


def main() -> None:
    options = parse(sys.argv[1:])
    results = results_over_seeds(options, one_seed)
    holes = [result["bits of a hidden token"] for result in results]
    print(table_over_seeds("bits of a hidden token", list(ROWS), holes, options.seeds), end="\n\n")
    print(differences_over_seeds(REFERENCE, list(ROWS), holes), end="\n\n")
    first = [result["bits of the first hidden token"] for result in results]
    print(table_over_seeds("bits of the first hidden token", list(ROWS), first, options.seeds), end="\n\n")
    text = [result["bits per byte"] for result in results]
    print(table_over_seeds("bits per byte, left to right", list(text[0]), text, options.seeds))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--domain", default="python", help="domain of the experts (default: %(default)s)")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--seed-tokens", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=1_500_000, help="tokens of an expert (default: %(default)s)")
    parser.add_argument("--holes", type=int, default=500)
    parser.add_argument(
        "--passage",
        type=int,
        default=253,
        help="tokens of a passage; with two masks and the end, 253 is a block of training",
    )
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("infill-runs"))
    return parser.parse_args(arguments)


def one_seed(root: Path, seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run the experiment with one random seed; return bits of a hidden token, and bits per byte, by row."""
    workspace = make_workspace(root, seed, options)
    train_seed_and_experts(workspace, options.jobs)
    scores = workspace.evaluate("seed", *EXPERTS, domains=[options.domain]).scores
    encoder = TextEncoder.of_folder(workspace.layout.seed)
    passages = holes(encoder, root / "text" / "test.jsonl", options.passage, options.holes)
    bits = {row: bits_of_holes(workspace, encoder, expert, order, passages) for row, (expert, order) in ROWS.items()}
    return {
        "bits of a hidden token": {row: sum(map(sum, rows)) / sum(map(len, rows)) for row, rows in bits.items()},
        "bits of the first hidden token": {
            row: statistics.mean(hole[0] for hole in rows) for row, rows in bits.items()
        },
        "bits per byte": {name: row[options.domain].values["bits_per_byte"] for name, row in scores.items()},
    }


def make_workspace(root: Path, seed: int, options: argparse.Namespace) -> Workspace:
    """Return the workspace of a random seed; every second document of the domain's validation text is for testing."""
    folders = sorted(path for path in options.corpora.resolve().iterdir() if (path / "train.jsonl").exists())
    domains = {path.name: {part: str(path / f"{part}.jsonl") for part in ("train", "valid")} for path in folders}
    held_out = Path(domains[options.domain]["valid"]).read_text(encoding="utf-8").splitlines()
    (root / "text").mkdir(exist_ok=True)
    for part, lines in {"valid": held_out[::2], "test": held_out[1::2]}.items():
        path = root / "text" / f"{part}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        domains[options.domain][part] = str(path)
    config = {
        "seed": {
            "preset": options.preset,
            "tokens": [MASK, END],
            "training": {"tokens": options.seed_tokens, "schedule_end": 0.5},
        },
        "training": {"tokens": options.tokens, "batch_size": 4, "learning_rate": 8e-3, "seed": seed},
        "domains": domains,
        "experts": {name: {"domain": options.domain, "training": settings} for name, settings in EXPERTS.items()},
    }
    write_config(root, config)
    return Workspace(root)


@dataclass(frozen=True)
class Hole:
    """Token ids of a passage with a hidden span."""

    before: list[int]
    hidden: list[int]
    behind: list[int]


def holes(encoder: TextEncoder, path: Path, length: int, number: int) -> list[Hole]:
    """Return passages of a file, each inside one document, with a span hidden in the middle half; always the same."""
    source = random.Random(0)
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    passages = [
        ids[begin : begin + length]
        for ids in encoder.encode(texts)
        for begin in range(0, len(ids) - length + 1, length)
    ]
    found = []
    for passage in source.sample(passages, min(number, len(passages))):
        begin = source.randrange(length // 4, length * 5 // 8)
        end = begin + source.randint(length // 32, length // 8)
        found.append(Hole(passage[:begin], passage[begin:end], passage[end:]))
    return found


def bits_of_holes(
    workspace: Workspace, encoder: TextEncoder, expert: str, order: str, passages: list[Hole]
) -> list[list[float]]:
    """Return the bits of each hidden token of each passage."""
    import torch

    model, _ = load_model(workspace.layout.experts / expert)
    mask = encoder.tokenizer.token_to_id(MASK)
    separator = encoder.separator
    bits = []
    with torch.inference_mode():
        for number, hole in enumerate(passages):
            other = passages[number - 1].behind
            shown = {
                "before": [separator, *hole.before],
                "behind, before": [separator, *hole.behind, separator, *hole.before],
                "moved": [*hole.before, mask, *hole.behind, mask],
                "moved, another's": [*hole.before, mask, *other, mask],
                "suffix first": [mask, *hole.behind, mask, *hole.before],
                "suffix first, another's": [mask, *other, mask, *hole.before],
            }[order]
            logits = model(input_ids=torch.tensor([[*shown, *hole.hidden]])).logits[0, len(shown) - 1 : -1]
            nats = torch.nn.functional.cross_entropy(logits, torch.tensor(hole.hidden), reduction="none")
            bits.append((nats / math.log(2)).tolist())
    return bits


if __name__ == "__main__":
    main()
