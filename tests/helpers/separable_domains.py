"""A workspace whose domains a small model can tell apart: prose, numbers and code, each from its own words."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml
from flexolmo_workspaces import train_here

from expertctl.core.testing import tiny_model_folder
from expertctl.workspace import Workspace

WORDS = {
    "prose": [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "and",
        "then",
        "it",
        "sleeps",
        "while",
        "rain",
        "falls",
        "on",
        "old",
        "stones",
    ],
    "numbers": [str(number * 37 % 1000) for number in range(60)],
    "code": [
        "def f(x):",
        "return x",
        "if x == y:",
        "for i in range(n):",
        "print(x)",
        "self.a = b",
        "x += 1",
        "{}",
        "[]",
    ],
}
TRAINING = {"tokens": 2048, "sequence_length": 32, "batch_size": 4, "learning_rate": 0.02, "validation_blocks": 2}


def make_separable_workspace(root: Path) -> Workspace:
    """Make a workspace with a finished expert for each domain of `WORDS`; only feed-forward networks are trained."""
    domains = {}
    for name, words in WORDS.items():
        generator = random.Random(name)
        folder = root / "text" / name
        folder.mkdir(parents=True)
        for part, count in (("train", 24), ("valid", 12)):
            texts = [" ".join(generator.choice(words) for _ in range(60)) for _ in range(count)]
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        domains[name] = {part: f"text/{name}/{part}.jsonl" for part in ("train", "valid")}
    (root / "expertctl.yaml").write_text(yaml.safe_dump({"domains": domains, "training": TRAINING}))
    workspace = Workspace(root)
    workspace.seed(tiny_model_folder(root / ".origin", "olmo2"))
    for name in WORDS:
        train_here(workspace, name, domain=name, trains="feed_forward")
    return workspace
