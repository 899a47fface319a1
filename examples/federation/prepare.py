"""Prepare the text of `run.sh` (a public and a private share of each owner's documents) and the coordinator's workspace.

python examples/federation/prepare.py FOLDER [--corpora FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools import PUBLIC, divided_text

from expertctl.experts.text.bundled import read_bundled

BUNDLED = ("python", "manual", "science")
OWNERS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpora", type=Path, help="a folder for each owner: train.jsonl, valid.jsonl")
    parser.add_argument("--public-share", type=float, default=0.3)
    parser.add_argument("--seed-tokens", type=int, default=400_000)
    options = parser.parse_args()
    corpora = options.corpora or bundled_text(options.folder / "corpora")
    owners = sorted(path.name for path in corpora.iterdir() if (path / "train.jsonl").is_file())[:OWNERS]
    text = divided_text(options.folder / "private", corpora, options.public_share, owners)
    public = {part: str(path) for part, path in text[PUBLIC].items()}
    # the coordinator scores models on held-out text of every owner, which only a demonstration can do
    domains = {PUBLIC: public} | {
        owner: {"train": public["train"], "valid": str(text[owner]["valid"].resolve())} for owner in owners
    }
    training = {"batch_size": 4, "learning_rate": 4e-3}
    config = {
        "seed": {"preset": "tiny", "domains": [PUBLIC], "training": {"tokens": options.seed_tokens}},
        "training": training,
        "domains": domains,
    }
    (options.folder / "hub").mkdir(exist_ok=True)
    (options.folder / "hub" / "expertctl.yaml").write_text(json.dumps(config, indent=2) + "\n")
    (options.folder / "owners").write_text(" ".join(owners) + "\n")


def bundled_text(folder: Path) -> Path:
    """Write the bundled text to a folder for each owner."""
    for name in BUNDLED:
        bundled = read_bundled(name, 400_000)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for part, texts in (("train", bundled.train), ("valid", bundled.valid)):
            lines = [json.dumps({"text": text}) for text in texts]
            (folder / name / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
