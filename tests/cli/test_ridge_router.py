"""The ridge regression router on the command line: merging, opting out, joining, reproducing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from flexolmo_workspaces import OWNERS

from expertctl.core.manifests.manifest import read_manifest
from expertctl.workspace import Workspace

OPTIONS = ("--method", "mixture", "--option", "router=ridge", "--option", "router_options={samples: 4}")


def test_experts_opt_out_and_join_a_ridge_mixture(flexolmo_workspace: Workspace, run: Any) -> None:
    root = flexolmo_workspace.root
    two = ",".join(OWNERS[:2])
    assert run("merge", "closed-plan", *OPTIONS, "--experts", two, "--plan", cwd=root).status == 0
    merged = run("merge", "closed", *OPTIONS, "--experts", two, cwd=root)
    assert merged.status == 0
    assert "hidden states of 'prose': " in merged.err
    joined = run("--json", "expert", "add", OWNERS[2], "-m", "closed", "-o", "closed-3", cwd=root)
    assert joined.json["experts"] == list(OWNERS)
    left = run("--json", "expert", "remove", OWNERS[2], "-m", "closed-3", "-o", "closed-2", cwd=root)
    assert left.json["experts"] == list(OWNERS[:2])
    before, after = (root / "generalists" / name for name in ("closed", "closed-2"))
    assert weights(before) == weights(after)
    assert read_manifest(before).digest == read_manifest(after).digest
    assert run("verify", "closed-2", "--absent", OWNERS[2], cwd=root).status == 0
    assert run("verify", "closed-2", cwd=root).status == 0
    assert "was fitted on text; repeat its `expertctl merge`" in run("reproduce", "closed", cwd=root).error
    assert run("generate", "closed-3", "def ", "--max-new-tokens", "2", cwd=root).status == 0
    for name in ("closed", "closed-2", "closed-3"):
        shutil.rmtree(root / "generalists" / name)


def test_wrong_options_of_the_router_are_one_line(flexolmo_workspace: Workspace, run: Any) -> None:
    failed = run("merge", "closed", *OPTIONS[:-1], "router_options={ridge: 0}", cwd=flexolmo_workspace.root)
    assert failed.error == "option 'ridge' of router start 'ridge' is 0; it must be greater than 0"
    assert not (flexolmo_workspace.generalists / "closed").exists()


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")}
