"""Removing artefacts, and what is said of those that were made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from expertctl import load_model
from expertctl.core.artefacts.files import exclusive
from expertctl.core.artefacts.layout import Layout


@pytest.fixture(autouse=True)
def without_generalists(workspace: Path, run: Any) -> None:
    for folder in (workspace / "generalists").iterdir():
        assert run("remove", folder.name, cwd=workspace).status == 0


def test_an_expert_that_nothing_was_made_of_is_removed(workspace: Path, run: Any) -> None:
    assert run("--json", "remove", "code").json == {"removed": "code", "dependents": [], "declared": False}
    assert not (workspace / "experts" / "code").exists()
    assert "no artefact 'code'" in run("remove", "code").error


def test_an_expert_of_a_merge_is_kept_unless_forced(workspace: Path, run: Any) -> None:
    run("merge", "soup", "--method", "average")
    refused = run("remove", "code")
    assert refused.status == 1
    assert "soup could not be reproduced or changed any more; use --force" in refused.error
    assert (workspace / "experts" / "code").is_dir()
    forced = run("--json", "remove", "code", "--force").json
    assert forced["dependents"] == [{"name": "soup", "reads_files": False}]
    load_model(workspace / "generalists" / "soup")
    assert run("remove", "soup").status == 0


def test_members_of_a_stitched_model_and_the_seed_are_read_by_others(workspace: Path, run: Any) -> None:
    run("merge", "woven", "--method", "stitch")
    assert "woven could not be loaded without its files" in run("remove", "code").error
    error = run("remove", "seed").error
    assert "code, prose, woven could not be loaded without its files" in error
    run("merge", "whole", "--method", "stitch", "--self-contained")
    run("remove", "woven")
    assert "whole could not be reproduced or changed any more" in run("remove", "code").error


def test_baselines_start_from_the_seed_too(workspace: Path, run: Any) -> None:
    (workspace / "baselines").mkdir(exist_ok=True)
    (workspace / "experts" / "code").rename(workspace / "baselines" / "code")
    assert "code, prose could not be loaded" in run("remove", "seed").error.replace("prose, code", "code, prose")


def test_an_ensemble_by_symbolic_links_needs_its_experts(
    workspace: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("merge", "forest", "--method", "ensemble", "--option", "prior=uniform")
    file = workspace / "generalists" / "forest" / "experts" / "code.safetensors"
    file.unlink()
    file.symlink_to(workspace / "experts" / "code" / "model.safetensors")
    assert "forest could not be loaded without its files" in run("remove", "code").error


def test_a_run_that_trains_is_kept(workspace: Path, run: Any) -> None:
    with exclusive(Layout(workspace).lock("run-code"), "a test"):
        assert "another process is working on 'code'" in run("remove", "code").error
    assert (workspace / "experts" / "code").is_dir()


def test_what_the_project_file_declares_is_noted(workspace: Path, run: Any) -> None:
    with (workspace / "expertctl.yaml").open("a", encoding="utf-8") as config:
        config.write("\nexperts: {code: {domain: code}}\n")
    removed = run("remove", "code")
    assert removed.out.strip() == "removed 'code'"
    assert "expertctl.yaml still declares 'code'" in removed.err


# --- renaming ---


def test_a_renamed_expert_is_the_same_model_under_another_name(workspace: Path, run: Any) -> None:
    before = run("--json", "show", "code").json
    result = run("--json", "rename", "code", "programs").json
    assert (result["name"], result["digest"]) == ("programs", before["digest"])
    assert not (workspace / "experts" / "code").exists()
    assert run("verify").status == 0
    assert run("train", "programs").status == 0, "its run is finished under the new name too"
    soup = run("--json", "merge", "soup", "--method", "average").json
    assert set(soup["weights"]) == {"programs", "prose"}


def test_a_renamed_generalist_has_its_name_on_its_card(workspace: Path, run: Any) -> None:
    run("merge", "forest", "--method", "ensemble", "--option", "prior=uniform")
    content = run("--json", "eval", "forest", "--domains", "code").json["models"]["forest"]
    assert run("rename", "forest", "wood").status == 0
    assert "# wood\n" in (workspace / "generalists" / "wood" / "README.md").read_text()
    assert run("verify").status == 0
    assert run("--json", "eval", "wood", "--domains", "code").json["models"]["wood"] == content


def test_names_that_others_record_stay(workspace: Path, run: Any) -> None:
    run("merge", "soup", "--method", "average")
    error = run("rename", "code", "programs").error
    assert "other artefacts record its name: soup; remove them first" in error
    assert "is taken by" in run("rename", "soup", "prose").error
    assert "every workspace has its seed" in run("rename", "seed", "origin").error
    assert "no artefact 'coed' (did you mean 'code'?)" in run("rename", "coed", "x").error
    assert run("verify").status == 0
