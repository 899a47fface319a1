"""Experts of discovered clusters, compared with a dense model and experts of random splits, over several random seeds.

    python examples/cbtm/run.py --corpora FOLDER --seeds 0,1,2   # a folder for each set of text: train.jsonl, valid.jsonl

The seed is pretrained on a share of all text. The rest is mixed without labels and clustered, and an expert is trained on
each cluster; all experts together get as many tokens as the dense model (Cluster-Branch-Train-Merge, arXiv:2303.14177).
The labels are used only to measure the purity of clusters and bits per byte on each corpus. Temperatures and priors are
fitted on one half of the validation text; every model is evaluated on the other half. Each random seed has a workspace
of its own in --out; the same command resumes an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import PUBLIC, differences_over_seeds, divided_text, results_over_seeds, table_over_seeds, write_config

from expertctl import DiscoverySettings, Workspace
from expertctl.core.text.clustering.clusterer import ClustererSettings, fit_clusterer

MIXED = "mixed"
FOUND = "found"
"""The set of clusters that experts are trained on."""
SORTED = ("balanced k-means", "k-means", "random")
TOP = (1, 2, 4, None)
TEMPERATURE = 0.1
"""Of the paper's evaluation; one row has a temperature fitted on validation text."""
ENSEMBLES = {
    **{
        f"clusters, {'all' if top is None else f'top {top}'}": {
            "mixer": "clusters",
            "temperature": TEMPERATURE,
            "top_k": top,
        }
        for top in TOP
    },
    "clusters, all, temperature fitted": {"mixer": "clusters"},
    "clusters, posterior of the text": {"prior": "cached"},
}
BASELINES = {
    "random splits, posterior of the text": "random-split",
    "dense, steps of an expert": "dense",
    "dense, batch of an expert": "dense-same-batch",
}
ORDER = ("seed", "best single expert", *BASELINES, *ENSEMBLES)
REFERENCE = "dense, batch of an expert"


def swept(clusters: int) -> str:
    """Return the row of another number of clusters."""
    return f"{clusters} clusters, all"


def main() -> None:
    options = parse(sys.argv[1:])
    results = results_over_seeds(options, one_seed)
    for measure, heading in (
        ("purity", "purity of clusters"),
        ("balance", "largest cluster, times the mean"),
    ):
        measures = [{name: cluster[measure] for name, cluster in result["clusters"].items()} for result in results]
        print(table_over_seeds(heading, SORTED, measures, options.seeds), end="\n\n")
    scores = [{name: statistics.mean(row.values()) for name, row in result["scores"].items()} for result in results]
    order = (*ORDER, *map(swept, options.sweep))
    print(table_over_seeds("bits per byte, mean over the sets", order, scores, options.seeds), end="\n\n")
    print(differences_over_seeds(REFERENCE, order, scores), end="\n\n")
    temperatures = [result["temperatures"] for result in results]
    print(table_over_seeds("temperature", tuple(ENSEMBLES), temperatures, options.seeds))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--clusters", type=int, default=6)
    parser.add_argument(
        "--sweep",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[2, 9],
        help="further numbers of clusters, each with experts of its own for the same budget",
    )
    parser.add_argument("--passage-bytes", type=int, default=2000, help="size of a passage in bytes")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--public-share", type=float, default=0.3, help="share of public documents in every corpus")
    parser.add_argument("--seed-tokens", type=int, default=1_500_000)
    parser.add_argument("--tokens", type=int, default=1_800_000, help="token budget of all experts together")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("cbtm-runs"))
    return parser.parse_args(arguments)


def one_seed(root: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run the experiment with one random seed; return cluster figures, bits per byte by row and corpus, and temperatures."""
    workspace, labels = make_workspace(root, seed, options)
    sets_of_clusters = {FOUND: options.clusters, **{f"{FOUND}{clusters}": clusters for clusters in options.sweep}}
    for name, clusters in sets_of_clusters.items():
        if not (root / "clusters" / name / "clusters.json").exists():
            workspace.discover(name, clusters, DiscoverySettings(domains=[MIXED], seed=seed))
    if not (workspace.layout.seed / "seed.json").exists():
        workspace.seed()
    train(workspace, FOUND, options.jobs)
    baselines = {
        "dense": workspace.baselines.dense,
        "dense-same-batch": partial(workspace.baselines.dense, same_batch=True),
        "random-split": partial(workspace.baselines.random_split, jobs=options.jobs),
    }
    for name, make in baselines.items():  # before there are further experts, whose tokens they would get too
        if not any((workspace.layout.baselines / name).glob("*.json")):
            make()
    for name in sets_of_clusters:
        train(workspace, name, options.jobs)
    experts = experts_of(workspace, FOUND)
    ensembles = {
        row: settings for row, settings in ENSEMBLES.items() if (settings.get("top_k") or 0) <= options.clusters
    }
    folders = {row: row.replace(", ", "-").replace(" ", "-") for row in ensembles}
    for row, settings in ensembles.items():
        if not (workspace.generalists / folders[row] / "generalist.json").exists():
            given = {key: value for key, value in settings.items() if value is not None}
            fitted_on = {"fit_on": [f"{FOUND}-{number}" for number in range(options.clusters)]}
            workspace.merge(folders[row], method="ensemble", experts=experts, options=given, **fitted_on)
    for name, clusters in list(sets_of_clusters.items())[1:]:
        folders[swept(clusters)] = f"clusters-{name}"
        if not (workspace.generalists / folders[swept(clusters)] / "generalist.json").exists():
            settings = {"mixer": "clusters", "temperature": TEMPERATURE}
            workspace.merge(
                folders[swept(clusters)], method="ensemble", experts=experts_of(workspace, name), options=settings
            )
    sets = [name for name in workspace.config.domains if name.startswith("set-")]
    named = {"seed": "seed", **BASELINES, **folders}
    table = workspace.evaluate(*named.values(), *experts, domains=sets)
    scores = {
        model: {domain: score.values["bits_per_byte"] for domain, score in row.items()}
        for model, row in table.scores.items()
    }
    best = min(experts, key=lambda name: statistics.mean(scores[name].values()))
    return {
        "clusters": figures(labels, options.clusters, seed),
        "scores": {row: scores[model] for row, model in (*named.items(), ("best single expert", best))},
        "temperatures": {
            row: read_json(workspace.generalists / folders[row] / "config.json")["mixer_settings"]["temperature"]
            for row, settings in ensembles.items()
            if settings.get("mixer") == "clusters"
        },
    }


def train(workspace: Workspace, clusters: str, jobs: int) -> None:
    """Train an expert on each cluster of a set, unless there are such experts."""
    if not experts_of(workspace, clusters):
        workspace.experts.branch_clusters(clusters, force=True)
    failed = workspace.train(jobs=jobs).failed
    if failed:
        sys.exit(f"failed: {failed}")


def experts_of(workspace: Workspace, clusters: str) -> list[str]:
    return [name for name in workspace.layout.finished_experts() if name.startswith(f"{clusters}-")]


def make_workspace(root: Path, seed: int, options: argparse.Namespace) -> tuple[Workspace, dict[str, str]]:
    """Return the workspace of a random seed, and the corpus of each training document."""
    text = divided_text(root / "text", options.corpora, options.public_share)
    domains, labels = {PUBLIC: text.pop(PUBLIC)}, {}
    mixed: dict[str, list[str]] = {"train": [], "valid": []}
    for name, parts in text.items():
        lines = {part: passages(path, options.passage_bytes) for part, path in parts.items()}
        fitted, measured = lines["valid"][::2], lines["valid"][1::2]
        mixed["train"] += lines["train"]
        mixed["valid"] += fitted
        labels |= {json.loads(line)["text"]: name for line in lines["train"]}
        path = root / "text" / f"set-{name}.jsonl"
        path.write_text("\n".join(measured) + "\n", encoding="utf-8")
        domains[f"set-{name}"] = {"train": path, "valid": path, "test": path}  # only measured on
    domains[MIXED] = {}
    for part, lines in mixed.items():
        random.Random(seed).shuffle(lines)
        path = root / "text" / f"{MIXED}-{part}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        domains[MIXED][part] = path
    config = {
        "seed": {
            "preset": options.preset,
            "domains": [PUBLIC],
            "training": {"tokens": options.seed_tokens, "schedule_end": 0.5, "learning_rate": 8e-3},
        },
        "training": {
            "tokens": options.tokens,
            "batch_size": 4,
            "learning_rate": options.learning_rate,
            "seed": seed,
        },
        "domains": {name: {part: str(path) for part, path in parts.items()} for name, parts in domains.items()},
    }
    write_config(root, config)
    return Workspace(root), labels


def passages(path: Path, bytes_each: int) -> list[str]:
    """Return the text of a corpus as documents of similar size: long documents split between lines, short ones joined."""
    documents, piece, size = [], [], 0
    for record in path.read_text(encoding="utf-8").splitlines():
        for line in json.loads(record)["text"].split("\n"):
            piece.append(line)
            size += len(line.encode()) + 1
            if size >= bytes_each:
                documents.append("\n".join(piece))
                piece, size = [], 0
    if piece:
        documents.append("\n".join(piece))
    return [json.dumps({"text": text}, ensure_ascii=False) for text in documents]


def figures(texts: dict[str, str], clusters: int, seed: int) -> dict[str, dict[str, float]]:
    """Return purity and balance of three clusterings; `texts` maps each text to its label."""
    source = random.Random(seed)
    kinds = dict(zip(SORTED, (True, False, None), strict=True))
    quality = {}
    for name, balanced in kinds.items():
        if balanced is None:
            chosen: Iterable[int] = [source.randrange(clusters) for _ in texts]
        else:
            settings = ClustererSettings(clusters=clusters, balanced=balanced, seed=seed)
            chosen = fit_clusterer(list(texts), settings).assign(texts)
        members: list[list[str]] = [[] for _ in range(clusters)]
        for cluster, label in zip(chosen, texts.values(), strict=True):
            members[cluster].append(label)
        quality[name] = purity_and_balance(members)
    return quality


def purity_and_balance(clusters: list[list[str]]) -> dict[str, float]:
    """Return the share of documents with their cluster's most frequent label, and the size of the largest cluster relative to the mean."""
    total = sum(map(len, clusters))
    leading = sum(max(Counter(members).values(), default=0) for members in clusters)
    return {"purity": leading / total, "balance": max(map(len, clusters)) * len(clusters) / total}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
