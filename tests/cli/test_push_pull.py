"""`push`, `pull` and `seed --from` with URLs, on files and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cutting_servers import FileHandler, Traffic, serving
from pushed_artefacts import contents

from expertctl import verify
from expertctl.core.artefacts.files import unfinished_sibling
from expertctl.core.manifests.manifest import read_manifest


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertctl.core.remote.retries.FIRST_WAIT_S", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_workspace_moves_through_a_store(workspace: Path, fresh: Path, tmp_path: Path, run: Any) -> None:
    store = f"file://{tmp_path}/store"
    for name in ("seed", "code", "forest"):
        pushed = run("--json", "push", name, f"{store}/{name}", cwd=workspace).json
        assert pushed["url"] == f"{store}/{name}"
        assert pushed["sent"] == pushed["files"] > 0
        pulled = run("--json", "pull", f"{store}/{name}", cwd=fresh).json
        assert pulled["digest"] == read_manifest(workspace / Path(pulled["folder"]).relative_to(fresh)).digest
    assert run("verify", cwd=fresh).status == 0
    assert "forest" in run("show", cwd=fresh).out
    assert "exists already; use --force" in run("pull", f"{store}/code", cwd=fresh).error
    assert run("pull", f"{store}/code", "--force", cwd=fresh).status == 0
    assert run("pull", f"{store}/code", "law", cwd=fresh).status == 0
    assert read_manifest(fresh / "experts" / "law").name == "law"
    assert verify(fresh / "experts" / "law") == []
    assert "the name 'forest' is taken" in run("pull", f"{store}/code", "forest", cwd=fresh).error
    assert "leave NAME out" in run("pull", f"{store}/seed", "law", cwd=fresh).error


def test_the_python_interface_does_the_same(workspace: Path, fresh: Path, tmp_path: Path) -> None:
    from expertctl import Transfer, Workspace

    assert Workspace(workspace).push("code", f"file://{tmp_path}/store/code").sent > 0
    pulled = Workspace(fresh).pull(f"file://{tmp_path}/store/code", "tax", transfer=Transfer(jobs=1, part_bytes=1000))
    assert pulled.folder == fresh / "experts" / "tax"
    assert verify(pulled.folder) == []


def test_pull_to_a_folder_needs_no_workspace(workspace: Path, tmp_path: Path, run: Any) -> None:
    run("push", "code", f"file://{tmp_path}/store/code", cwd=workspace)
    run("push", "text", f"file://{tmp_path}/store/text", cwd=workspace)
    assert "no expertctl.yaml" in run("pull", f"file://{tmp_path}/store/code", cwd=tmp_path).error
    assert run("pull", f"file://{tmp_path}/store/code", "-o", "taken", cwd=tmp_path).status == 0
    assert contents(tmp_path / "taken")["expert.json"] == contents(workspace / "experts" / "code")["expert.json"]
    assert run("--json", "pull", f"file://{tmp_path}/store/text", "-o", "words", cwd=tmp_path).json == {
        "folder": str(tmp_path / "words")
    }
    assert contents(tmp_path / "words") == contents(workspace / "text")
    assert (
        "no artefact; name a folder for it with --output"
        in run("pull", f"file://{tmp_path}/store/text", cwd=workspace).error
    )
    assert run("pull", f"file://{tmp_path}/store/code", "law", "-o", "x", cwd=tmp_path).status == 2


def test_an_interrupted_pull_is_listed_with_the_command_that_resumes_it(
    workspace: Path, fresh: Path, tmp_path: Path, run: Any
) -> None:
    run("push", "code", f"file://{tmp_path}/store/code", cwd=workspace)
    traffic = Traffic()
    with serving(FileHandler, traffic, root=tmp_path / "store") as url:
        size = (workspace / "experts" / "code" / "model.safetensors").stat().st_size
        traffic.cuts = [size, *[1] * 100]
        assert "run the same command again" in run("pull", f"{url}/code", cwd=fresh).error
        assert unfinished_sibling(fresh / "experts" / "code").is_dir()
        command = run("--json", "show", cwd=fresh).json["unfinished"]["code"]
        assert command == f"expertctl pull {url}/code code"
        traffic.cuts = []
        assert run(*command.split()[1:], cwd=fresh).status == 0
    assert run("--json", "show", cwd=fresh).json["unfinished"] == {}


def test_a_seed_from_a_url(workspace: Path, fresh: Path, tmp_path: Path, run: Any) -> None:
    store = tmp_path / "store" / "model"
    store.mkdir(parents=True)
    for path in (workspace / ".origin").iterdir():
        (store / path.name).write_bytes(path.read_bytes())
    (store / "pytorch_model.bin").write_bytes(b"never downloaded")
    made = run("--json", "seed", "--from", f"file://{store}", cwd=fresh).json
    assert made["digest"] == read_manifest(workspace / "seed").digest
    assert verify(fresh / "seed") == []
    assert not list(fresh.rglob("pytorch_model.bin"))
    assert "exists already" in run("seed", "--from", f"file://{tmp_path}/nothing", cwd=fresh).error
    assert "does not exist" in run("seed", "--from", f"file://{tmp_path}/nothing", "--force", cwd=fresh).error
    assert verify(fresh / "seed") == []
