"""Workspaces with experts that were really trained with `flexolmo`, in this process, for a few steps."""

from __future__ import annotations

import inspect
import json
import random
import statistics
import string
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from expertctl import Reporter, TuningSettings
from expertctl.core.testing import tiny_model_folder
from expertctl.experts.training.run import train_run
from expertctl.workspace import Workspace

DOMAINS: dict[str, ModuleType] = {"public": string, "prose": textwrap, "chance": random, "means": statistics}
OWNERS = ("prose", "chance", "means")
TRAINING = {
    "tokens": 1024,
    "sequence_length": 32,
    "batch_size": 4,
    "learning_rate": 0.02,
    "validation_blocks": 2,
}


def write_text(folder: Path, module: ModuleType, documents: int = 16) -> dict[str, str]:
    """Write a module's source as `train.jsonl` and `valid.jsonl`; return what a domain's configuration says."""
    lines = inspect.getsource(module).splitlines()[:240]
    size = max(len(lines) // documents, 1)
    texts = ["\n".join(lines[index * size : (index + 1) * size]) for index in range(documents)]
    folder.mkdir(parents=True)
    for name, part in (("train", texts[:12]), ("valid", texts[12:])):
        content = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in ("train", "valid")}


def make_flexolmo_workspace(
    root: Path,
    family: str = "olmo2",
    *,
    owners: tuple[str, ...] = OWNERS,
    tied: bool = False,
    options: dict[str, Any] | None = None,
    trains: str = "flexolmo",
) -> Workspace:
    """Make a workspace with an imported seed and one finished expert for each owner."""
    root.mkdir(parents=True)
    config = {
        "domains": {name: write_text(root / "text" / name, module) for name, module in DOMAINS.items()},
        "training": TRAINING,
    }
    (root / "expertctl.yaml").write_text(yaml.safe_dump(config))
    workspace = Workspace(root)
    workspace.seed(tiny_model_folder(root / ".origin", family, tied=tied))
    chosen = options if options is not None else {"public": "public", "samples": 4}
    for owner in owners:
        train_here(workspace, owner, domain=owner, trains=trains, options=chosen if trains == "flexolmo" else None)
    return workspace


def train_here(workspace: Workspace, name: str, **settings: Any) -> Path:
    """Branch and train one expert in this process."""
    workspace.branch(name, **settings)
    train_run(workspace.experts / name, Reporter(), lambda: False)
    return workspace.experts / name


def tune_here(workspace: Workspace, name: str, base: str, *, force: bool = False, **settings: Any) -> Path:
    """Tune a generalist in this process."""
    from expertctl.experts.runs.tuning import start_tuning

    start_tuning(workspace.layout, workspace.config, name, base, TuningSettings(**settings), force=force)
    folder = workspace.generalists / name
    train_run(folder, Reporter(), lambda: False)
    return folder
