"""Decoders: repetition and likelihood of contrastive decoding, and loss along a long stream with attention sinks.

    python examples/decoding/run.py --corpora FOLDER --seeds 0,1,2   # a folder for each domain: train.jsonl, valid.jsonl

The seed is pretrained on a share of the text of all domains. Half of a domain's other documents train an expert, half a judge from
the same seed, which scores what the expert generates. Prompts are beginnings of test passages. rep-4 is the share of a
continuation's four-grams that occurred in it before, in percent. The stream is the domain's test text in one piece, which the
expert reads token by token. Each random seed has a workspace of its own in --out; the same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

from expertctl import Sampling, Workspace, load_model
from expertctl.core.models.decoding.opening import DecoderChoice, check_decoder
from expertctl.core.models.scoring import continuation_log_probs, token_log_probs

CONTRASTIVE = {"decoder": "contrastive", "decoder_options": {"amateur": "seed"}}
REASONING = {"decoder": "contrastive", "decoder_options": {"amateur": "seed", "form": "reasoning"}}
GENERATED: dict[str, tuple[Sampling, dict[str, Any]]] = {
    "greedy": (Sampling(temperature=0), {}),
    "contrastive": (Sampling(temperature=0), CONTRASTIVE),
    "contrastive, reasoning": (Sampling(temperature=0), REASONING),
    "beams": (Sampling(temperature=0, beams=5), {}),
    "contrastive, beams": (Sampling(temperature=0, beams=5), CONTRASTIVE),
    "sampled, top-p 0.95": (Sampling(temperature=1, top_p=0.95), {}),
}
SINKS = 4
Pair = tuple[list[int], list[int]]


def main() -> None:
    options = parse(sys.argv[1:])
    results = results_over_seeds(options, one_seed)
    for heading in ("rep-4 in percent", "judge's nats per token"):
        rows = [result[heading] for result in results]
        print(table_over_seeds(heading, [*GENERATED, "test text"], rows, options.seeds), end="\n\n")
        print(differences_over_seeds("greedy", [*GENERATED], rows), end="\n\n")
    streams = [result["nats per token"] for result in results]
    print(table_over_seeds("nats per token of the stream", [*streams[0]], streams, options.seeds))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--domain", default="speeches", help="domain of expert and judge (default: %(default)s)")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--public-share", type=float, default=0.3, help="share of text that the seed is pretrained on")
    parser.add_argument("--seed-tokens", type=int, default=400_000)
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens of expert and judge (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--window", type=int, default=256, help="tokens of the cache, as many as in training")
    parser.add_argument("--stream", type=int, default=2048, help="tokens of the stream (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("decoding-runs"))
    return parser.parse_args(arguments)


def one_seed(root: Path, seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run the experiment with one random seed."""
    workspace = make_workspace(root, seed, options)
    train_seed_and_experts(workspace, options.jobs)
    _, tokenizer = load_model(workspace.layout.experts / "expert")
    texts = [tokenizer(text)["input_ids"] for text in test_documents(root)]
    passages = list(itertools.islice(passages_of(texts, options.prompt_tokens + options.new_tokens), options.prompts))
    written = [(ids[: options.prompt_tokens], ids[options.prompt_tokens :]) for ids in passages]
    prompts = [tokenizer.decode(prompt) for prompt, _ in written]
    continued = {row: generated(workspace, prompts, row, seed, options.new_tokens) for row in GENERATED}
    continued["test text"] = written
    judge, _ = load_model(workspace.layout.experts / "judge")
    nats = {
        row: -math.fsum(continuation_log_probs(judge, pairs)) / sum(len(target) for _, target in pairs)
        for row, pairs in continued.items()
    }
    repeated = {row: statistics.mean(repetition(target) for _, target in pairs) for row, pairs in continued.items()}
    stream = list(itertools.islice(itertools.chain.from_iterable(texts), options.stream + 1))
    return {
        "rep-4 in percent": repeated,
        "judge's nats per token": nats,
        "nats per token": along_the_stream(workspace, tokenizer, stream, options.window),
    }


def passages_of(texts: list[list[int]], size: int) -> Iterator[list[int]]:
    """Yield the passages of documents, each inside one document, the first ones of all documents first."""
    for begin in range(0, max(map(len, texts)), size):
        yield from (ids[begin : begin + size] for ids in texts if begin + size <= len(ids))


def generated(workspace: Workspace, prompts: list[str], row: str, seed: int, count: int) -> list[Pair]:
    """Return prompts and the expert's continuations, in tokens; all are generated in one batch."""
    sampling, decoder = GENERATED[row]
    sampling = dataclasses.replace(sampling, max_new_tokens=count, seed=seed)
    generations = workspace.generate_batch("expert", prompts, sampling, **decoder)
    return [
        ([token.id for token in generation.prompt], [token.id for token in generation.continuation])
        for generation in generations
    ]


def repetition(tokens: list[int], length: int = 4) -> float:
    """Return the share of n-grams that occurred before, in percent."""
    grams = [tuple(tokens[begin : begin + length]) for begin in range(len(tokens) - length + 1)]
    return 100 * (1 - len(set(grams)) / len(grams)) if grams else 0.0


def along_the_stream(workspace: Workspace, tokenizer: Any, stream: list[int], window: int) -> dict[str, float]:
    """Return the expert's mean loss in parts of a stream, by what is left in the cache."""
    import torch

    model, _ = load_model(workspace.layout.experts / "expert")
    caches = {
        "sinks and window": {"sinks": SINKS, "window": window - SINKS},
        "plain window": {"sinks": 0, "window": window},
    }
    models = {"everything": model} | {
        row: check_decoder(DecoderChoice("sinks", options)).open(model, tokenizer).model
        for row, options in caches.items()
    }
    bounds = [0, *(bound for power in range(16) if (bound := window * 2**power) < len(stream) - 1), len(stream) - 1]
    losses: dict[str, float] = {}
    for row, wrapped in models.items():
        with torch.inference_mode():
            nats = -token_log_probs(wrapped, torch.tensor([stream]))[0]
        for begin, end in itertools.pairwise(bounds):
            losses[f"{row}, tokens {begin} to {end - 1}"] = float(nats[begin:end].mean())
    return losses


def test_documents(root: Path) -> list[str]:
    lines = (root / "text" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def make_workspace(root: Path, seed: int, options: argparse.Namespace) -> Workspace:
    """Return the workspace of a random seed; every second validation document of the domain is for testing."""
    text = divided_text(root / "text", options.corpora, options.public_share)
    files = text[options.domain]
    trained = files["train"].read_text(encoding="utf-8").splitlines()
    held_out = files["valid"].read_text(encoding="utf-8").splitlines()
    parts = {"expert": trained[::2], "judge": trained[1::2], "valid": held_out[::2], "test": held_out[1::2]}
    paths = {name: root / "text" / f"{name}.jsonl" for name in parts}
    for name, lines in parts.items():
        paths[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    ours = {"valid": str(paths["valid"]), "test": str(paths["test"])}
    config = {
        "seed": {"preset": options.preset, "domains": [PUBLIC], "training": {"tokens": options.seed_tokens}},
        "training": {"tokens": options.tokens, "batch_size": 4, "learning_rate": 8e-3, "seed": seed},
        "domains": {
            PUBLIC: {part: str(path) for part, path in text[PUBLIC].items()},
            **{name: {"train": str(paths[name]), **ours} for name in ("expert", "judge")},
        },
        "experts": {
            "expert": {"domain": "expert"},
            "judge": {"domain": "judge", "training": {"seed": seed + 100}},
        },
    }
    write_config(root, config)
    return Workspace(root)


if __name__ == "__main__":
    main()
