"""What the commands say about memories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

KNN = ("--decoder", "knn", "--decoder-option", "memory=notes")


@pytest.mark.slow
def test_a_memory_is_built_used_shown_renamed_and_removed(workspace: Path, run: Any) -> None:
    built = run(
        "--json", "memory", "build", "notes", "--domains", "prose", "--k", "8", "--fit-tokens", "400", cwd=workspace
    ).json
    assert (built["kind"], built["model"], built["domains"]) == ("memory", "seed", ["prose"])
    assert built["index"]["kind"] == "exact"
    assert built["fit"]["bits_with"] <= built["fit"]["bits_without"]

    assert run("--json", "memory", "list").json["memories"] == [built]
    assert "notes" in run("show").out
    shown = run("show", "notes").out
    assert "keys of width" in shown or "of width" in shown
    assert run("--json", "show", "notes").json["keys"] == built["keys"]
    assert "notes: intact" in run("verify").out

    plain = run("--json", "eval", "seed", "--domains", "prose").json
    with_memory = run("--json", "eval", "seed", "--domains", "prose", *KNN).json
    bits = [table["models"]["seed"]["bits_per_byte"]["prose"] for table in (plain, with_memory)]
    assert bits[1] < bits[0]
    assert run("generate", "seed", "A text", "--max-new-tokens", "3", *KNN).status == 0
    assert "and code computes other keys" in run("generate", "code", "A text", *KNN).error

    fitted = run("--json", "memory", "fit", "notes", "--domains", "code", "--k", "5", "--tokens", "400").json
    assert (fitted["fit"]["k"], fitted["fit"]["domains"]) == (5, ["code"])
    assert run("rename", "notes", "book").status == 0
    assert "no memory 'notes'" in run("generate", "seed", "x", *KNN).error
    (workspace / "memories" / "book" / "keys.bin").write_bytes(b"x")
    damaged = run("verify", "book")
    assert damaged.status == 1
    assert "file keys.bin was changed" in damaged.out
    assert run("--json", "remove", "book").json == {"removed": "book", "dependents": [], "declared": False}
    assert "no memories" in run("memory", "list").out


def test_the_name_of_an_expert_is_taken(workspace: Path, run: Any) -> None:
    assert "the name 'code' is taken" in run("memory", "build", "code", "--domains", "prose", cwd=workspace).error
    assert not (workspace / "memories" / "code").exists()
