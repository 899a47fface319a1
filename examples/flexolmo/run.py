"""FlexOlmo compared with other uses of the same owners' text, over several random seeds.

    python examples/flexolmo/run.py --corpora FOLDER --seeds 0,1,2   # a folder for each owner: train.jsonl, valid.jsonl

A share of the documents of every owner is public; the seed is pretrained on the public documents of all owners. Each owner then
trains on its private documents, all for the same number of tokens. Each random seed has a workspace of its own in --out;
the same command resumes an interrupted run. Prints bits per byte averaged over the owners' test text; `rows.json` in
each workspace has the values of every owner.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
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
from expertctl.merge.mixture.changing import Change
from expertctl.merge.remaking.expert_changes import change_experts

KINDS: dict[str, dict[str, Any]] = {
    "flex": {"trains": "flexolmo"},
    "dense": {"trains": "all"},
    "alone": {"trains": "flexolmo", "options": {"coordinate": False}},
    "unembedded": {"trains": "flexolmo", "options": {"embedding": "none"}},
    "unbiased": {"trains": "flexolmo", "options": {"bias": "none"}},
    "softplus": {"trains": "flexolmo", "options": {"bias": "softplus"}},
}
"""What each owner trains, once for every row that needs it."""
ABLATED = ("alone", "unembedded", "unbiased", "softplus")
EVERYBODY = 10**6
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform average": ("dense", {"method": "average"}),
    "ensemble, cached prior": ("dense", {"method": "ensemble"}),
    "btx": ("dense", {"method": "btx"}),
    "btx, ridge router": ("dense", {"method": "btx", "options": {"router": "ridge"}}),
    "flexolmo": ("flex", {"method": "flexolmo"}),
    "flexolmo, top 1": ("flex", {"method": "flexolmo", "options": {"top_k": 1}}),
    "flexolmo, top 2": ("flex", {"method": "flexolmo", "options": {"top_k": 2}}),
    "flexolmo, all": ("flex", {"method": "flexolmo", "options": {"top_k": EVERYBODY}}),
    "flexolmo, bias folded": ("flex", {"method": "flexolmo", "options": {"bias": "fold"}}),
    "flexolmo, ridge router": ("flex", {"method": "flexolmo", "options": {"router": "ridge"}}),
    "flexolmo, no coordination": ("alone", {"method": "flexolmo"}),
    "flexolmo, no embedding": ("unembedded", {"method": "flexolmo"}),
    "flexolmo, no bias": ("unbiased", {"method": "flexolmo"}),
    "flexolmo, softplus bias dropped": ("softplus", {"method": "flexolmo"}),
    "flexolmo, softplus bias folded": ("softplus", {"method": "flexolmo", "options": {"bias": "fold"}}),
}
TUNED = {
    "btx, router trained on public text": ("btx", "router"),
    "btx, trained on public text": ("btx", "mixture"),
    "flexolmo, router tuned on public text": ("flexolmo", "router"),
}
"""Row -> (the mixture that it is trained from, what of it trains), on public text."""
FOLLOWED_BY_ALL = "btx, trained on all text"
UNRESTRICTED = "unrestricted mixture"
ROUTED = "prompt routing that never errs"
DENSE = "dense, all text"
"""The seed, trained on the text of all owners in one place for as many tokens as all of them together."""
TOGETHER = "together"
ORDER = ("seed", "best single expert", *MERGES, *TUNED, FOLLOWED_BY_ALL, UNRESTRICTED, DENSE, ROUTED)
REFERENCE = "flexolmo"


def main() -> None:
    options = parse(sys.argv[1:])
    results = results_over_seeds(options, one_seed)
    for seed in options.seeds:
        root = options.out.resolve() / f"seed-{seed}"
        leaving = root / "leaving.json"
        if not leaving.exists():
            leaving.write_text(json.dumps(without_each(Workspace(root)), indent=2) + "\n")
    means = [{row: statistics.mean(scores.values()) for row, scores in rows.items()} for rows in results]
    print(table_over_seeds("bits per byte, mean over owners", ORDER, means, options.seeds), end="\n\n")
    print(differences_over_seeds(REFERENCE, ORDER, means))
    first = options.out.resolve() / f"seed-{options.seeds[0]}" / "leaving.json"
    print(f"\n{leaving_table(json.loads(first.read_text()))}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--public-share", type=float, default=0.3, help="share of public documents of every owner")
    parser.add_argument("--seed-tokens", type=int, default=1_000_000)
    parser.add_argument("--owner-tokens", type=int, default=200_000)
    parser.add_argument("--tuning-tokens", type=int, default=100_000)
    parser.add_argument("--ablations", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("flexolmo-runs"))
    return parser.parse_args(arguments)


def one_seed(root: Path, seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run the experiment with one random seed; return bits per byte by row and owner."""
    workspace = make_workspace(root, seed, options)
    train_seed_and_experts(workspace, options.jobs)
    owners = owners_of(workspace)
    merges = {row: what for row, what in MERGES.items() if options.ablations or what[0] not in ABLATED}
    folders = {row: merged(workspace, row, *settings, owners) for row, settings in merges.items()}
    for row, (base, trains) in TUNED.items():
        folders[row] = tuned(workspace, row, folders[base], trains, [PUBLIC], options.tuning_tokens)
    # what nobody who keeps the owners' text apart could do: the tuning's tokens from all text, for all of the mixture
    folders[FOLLOWED_BY_ALL] = tuned(
        workspace, FOLLOWED_BY_ALL, folders["btx"], "mixture", [PUBLIC, *owners], options.tuning_tokens
    )
    folders[UNRESTRICTED] = unrestricted(workspace, owners, options.owner_tokens * len(owners))
    names = {"seed": "seed", TOGETHER: DENSE, **{f"dense-{owner}": f"dense-{owner}" for owner in owners}}
    names |= {folder: row for row, folder in folders.items()}
    table = workspace.evaluate(*names, domains=owners)
    rows = {
        row: {owner: table.scores[model][owner].values["bits_per_byte"] for owner in owners}
        for model, row in names.items()
    }
    experts = {owner: rows.pop(f"dense-{owner}") for owner in owners}
    rows["best single expert"] = min(experts.values(), key=lambda row: statistics.mean(row.values()))
    # a router of prompts that never errs: each text goes to the model of its own owner
    rows[ROUTED] = {owner: experts[owner][owner] for owner in owners}
    return rows


def make_workspace(root: Path, seed: int, options: argparse.Namespace) -> Workspace:
    text = divided_text(root / "text", options.corpora, options.public_share)
    private = [parts for name, parts in text.items() if name != PUBLIC]
    text[TOGETHER] = joined_text(root / "text", TOGETHER, private)
    domains = {name: {part: str(path) for part, path in parts.items()} for name, parts in text.items()}
    training = {"batch_size": 4, "learning_rate": 4e-3, "seed": seed}
    config = {
        "seed": {
            "preset": options.preset,
            "domains": [PUBLIC],
            "training": {"tokens": options.seed_tokens, "schedule_end": 0.5, "learning_rate": 8e-3},
        },
        "training": {"tokens": options.owner_tokens, **training},
        "domains": domains,
        "experts": {
            f"{kind}-{owner}": {"domain": owner, **settings}
            for kind, settings in KINDS.items()
            for owner in domains
            if owner not in (PUBLIC, TOGETHER) and (options.ablations or kind not in ABLATED)
        }
        | {TOGETHER: {"domain": TOGETHER, "training": {"tokens": options.owner_tokens * len(private)}}},
    }
    write_config(root, config)
    return Workspace(root)


def owners_of(workspace: Workspace) -> list[str]:
    return [name for name in workspace.config.domains if name not in (PUBLIC, TOGETHER)]


def merged(workspace: Workspace, row: str, kind: str, settings: dict[str, Any], owners: list[str]) -> str:
    """Merge the owners' experts of one kind unless the generalist exists; return the name of its folder."""
    folder = folder_name(row)
    top_k = settings.get("options", {}).get("top_k")
    if top_k is not None:
        settings = {**settings, "options": {"top_k": min(top_k, len(owners) + 1)}}
    if not (workspace.generalists / folder / "generalist.json").exists():
        workspace.merge(folder, experts=[f"{kind}-{owner}" for owner in owners], **settings)
    return folder


def unrestricted(workspace: Workspace, owners: list[str], tokens: int) -> str:
    """Train a mixture of copies of the seed on the text of all owners, for as many tokens as all owners together."""
    start = workspace.generalists / "copies"
    if not (start / "generalist.json").exists():
        copies = [workspace.root / "copies" / f"copy-{number}" for number in range(len(owners) + 1)]
        for copy in copies:
            shutil.copytree(workspace.layout.seed, copy, dirs_exist_ok=True)
        workspace.merge(
            start.name,
            method="btx",
            experts=[str(copy) for copy in copies],
            options={"top_k": min(4, len(copies))},
        )
    return tuned(workspace, UNRESTRICTED, start.name, "mixture", [PUBLIC, *owners], tokens, learning_rate=4e-3)


def tuned(
    workspace: Workspace,
    row: str,
    base: str,
    trains: str,
    domains: list[str],
    tokens: int,
    learning_rate: float = 2e-3,
) -> str:
    folder = folder_name(row)
    if not (workspace.generalists / folder / "generalist.json").exists():
        training = {"tokens": tokens, "learning_rate": learning_rate}
        workspace.tune(folder, base, TuningSettings(trains, domains, training=training))
    return folder


def without_each(workspace: Workspace) -> dict[str, dict[str, float]]:
    """Remove each owner from the mixture; return bits per byte by removed owner (or `nobody`) and owner."""
    owners = owners_of(workspace)
    whole = workspace.generalists / folder_name("flexolmo")
    folders = {"nobody": whole.name}
    for owner in owners:
        folders[owner] = f"without-{owner}"
        target = workspace.generalists / folders[owner]
        if not (target / "generalist.json").exists():
            change_experts(whole, target, Change(remove=(f"flex-{owner}",)))
    table = workspace.evaluate("seed", *folders.values(), domains=owners)
    rows = {"everybody": "seed", **folders}
    return {
        left: {owner: table.scores[folder][owner].values["bits_per_byte"] for owner in owners}
        for left, folder in rows.items()
    }


def leaving_table(rows: dict[str, dict[str, float]]) -> str:
    """Return the opt-out matrix: increase of bits per byte on each owner's text in percent, by removed owner."""
    owners = list(rows["nobody"])
    lines = [f"| left | {' | '.join(owners)} |", "|---" + "|---:" * len(owners) + "|"]
    for left, row in rows.items():
        if left != "nobody":
            cells = [f"{100 * (row[owner] / rows['nobody'][owner] - 1):+.1f}%" for owner in owners]
            lines.append(f"| {left} | {' | '.join(cells)} |")
    return "\n".join(lines)


def folder_name(row: str) -> str:
    return row.replace(", ", "-").replace(" ", "-")


if __name__ == "__main__":
    main()
