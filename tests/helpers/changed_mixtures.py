"""Mixtures and other generalists that are made once for a workspace, to be changed."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from typing import Any

from flexolmo_workspaces import train_here

from expertctl.workspace import Workspace


def model_files(folder: Path) -> dict[str, bytes]:
    """Return everything of a model but its manifest and its card, which say how it came about."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.name not in ("generalist.json", "README.md")
    }


def merge(workspace: Workspace, name: str, experts: tuple[str, ...], **settings: Any) -> Path:
    folder = workspace.generalists / name
    if not folder.exists():
        workspace.merge(name, experts=experts, **{"method": "flexolmo", **settings})
    return folder


def train_again(workspace: Workspace, target: Path) -> None:
    if not (workspace.experts / "prose-again").exists():
        train_here(
            workspace,
            "prose-again",
            domain="prose",
            trains="flexolmo",
            options={"public": "public", "samples": 4},
            training={"seed": 5},
        )
    copytree(workspace.experts / "prose-again", target)
