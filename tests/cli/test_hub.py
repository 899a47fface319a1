"""Commands against a stand-in for the Hugging Face hub, on real sockets that break."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cutting_servers import Traffic, serving
from hub_servers import TOKEN, Hub, HubHandler
from pushed_artefacts import contents

from expertctl import verify
from expertctl.core.process.environment import OFFLINE_BY_DEFAULT

# the hub's library uploads in a way that its transport has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@dataclass
class Place:
    """A hub, its address and its traffic."""

    hub: Hub
    url: str
    traffic: Traffic


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A hub that huggingface_hub in this process uses, as the command line would in its own."""
    hub, traffic = Hub(), Traffic()
    with serving(HubHandler, traffic, hub=hub) as url:
        monkeypatch.setenv(OFFLINE_BY_DEFAULT, "1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        constants = {
            "ENDPOINT": url,
            "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr("expertctl.core.remote.retries.FIRST_WAIT_S", 0.01)
        yield Place(hub, url, traffic)


def error_of(result: Any) -> str:
    """Return the one line of an error that the user can mend; it holds no token."""
    assert result.status == 1, result.err
    assert TOKEN not in result.err + result.out
    return result.error


def test_an_artefact_goes_to_the_hub_and_comes_back(place: Place, workspace: Path, tmp_path: Path, run: Any) -> None:
    size = (workspace / "experts" / "code" / "model.safetensors").stat().st_size
    place.traffic.cuts = [size // 3, size]
    pushed = run("--json", "push", "code", "hub:me/code", "--private", cwd=workspace)
    assert pushed.status == 0, pushed.err
    assert pushed.json["url"] == "hub:me/code"
    assert place.traffic.cuts == []
    repository = place.hub.repositories["me/code"]
    assert repository.private
    files = repository.files("main") or {}
    card = files.pop("README.md").decode()
    assert card.startswith("---\n")
    assert "code" in card
    files.pop(".gitattributes")
    assert files == {
        name: content
        for name, content in contents(workspace / "experts" / "code").items()
        if name not in ("metrics.jsonl", "training.log")
    }

    before = place.traffic.total
    again = run("push", "code", "hub:me/code", cwd=workspace)
    assert "0 of them sent now" in again.out, again.err
    assert place.traffic.total - before < size

    place.traffic.cuts = [place.traffic.total + size // 2, place.traffic.total + size]
    pulled = run("pull", "hub:me/code", "again", cwd=workspace)
    assert pulled.status == 0, pulled.err
    assert place.traffic.cuts == []
    assert verify(workspace / "experts" / "again") == []
    assert not any(path.is_symlink() for path in (workspace / "experts" / "again").iterdir())

    repository.private = False
    public = run("push", "code", "hub:me/code", "--private", cwd=workspace)
    assert "exists already and is public" in error_of(public)
    refused = run("push", "prose", "hub:me/code", cwd=workspace)
    assert "holds other files already; use --force" in error_of(refused)
    branch = run("push", "prose", "hub:me/code", "--revision", "prose", "--force", cwd=workspace)
    assert branch.status == 0, branch.err
    assert repository.branches["prose"] != repository.branches["main"]
    taken = run("pull", "hub:me/code@prose", "-o", tmp_path / "taken", cwd=workspace)
    assert taken.status == 0, taken.err
    assert contents(tmp_path / "taken")["expert.json"] == contents(workspace / "experts" / "prose")["expert.json"]


def test_a_seed_comes_from_the_hub_only_on_request(place: Place, workspace: Path, tmp_path: Path, run: Any) -> None:
    process = push_in_a_process("seed", "hub:org/model", workspace, place)
    assert process.returncode == 0, process.stderr
    seen = len(place.traffic.requests)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "expertctl.yaml").write_text("seed: {from: hub:org/model}\n")
    assert "write hub:org/model" in run("seed", "--from", "org/model", cwd=fresh).error
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(OFFLINE_BY_DEFAULT)  # then it is the user who set HF_HUB_OFFLINE
        assert "HF_HUB_OFFLINE is set" in error_of(run("seed", cwd=fresh))
    assert len(place.traffic.requests) == seen

    made = run("seed", cwd=fresh)
    assert made.status == 0, made.err
    commit = place.hub.repositories["org/model"].branches["main"]
    assert f"hub:org/model@{commit} always names it" in made.err
    assert verify(fresh / "seed") == []
    assert digest(fresh) == digest(workspace)


def push_in_a_process(name: str, url: str, workspace: Path, place: Place) -> subprocess.CompletedProcess[str]:
    """Push as the installed command does, in an environment in which nothing about the network is set."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    inherited.pop(OFFLINE_BY_DEFAULT)
    return subprocess.run(
        [sys.executable, "-m", "expertctl.cli.main", "push", name, url],
        cwd=workspace,
        env=inherited | {"HF_ENDPOINT": place.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def digest(workspace: Path) -> Any:
    return json.loads((workspace / "seed" / "seed.json").read_text())["digest"]


def test_refusals_of_the_hub_say_what_to_do(
    place: Place, workspace: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    login = "run `hf auth login`, or set HF_TOKEN"
    assert "does not exist, or is private" in error_of(run("pull", "hub:me/nothing", cwd=workspace))
    monkeypatch.setenv("HF_TOKEN", "hf_expiredtoken123")
    expired = error_of(run("push", "code", "hub:me/code", cwd=workspace))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "access is denied" in expired
    assert login in expired
    assert "hf_expiredtoken123" not in expired
    place.hub.read_only = True
    forbidden = error_of(run("push", "code", "hub:me/code", cwd=workspace))
    assert "access is denied" in forbidden
    assert login in forbidden
    place.hub.read_only = False
    assert run("push", "code", "hub:me/code", cwd=workspace).status == 0
    assert "no such revision" in error_of(run("pull", "hub:me/code@v9", cwd=workspace))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "the hub cannot be reached" in error_of(run("pull", "hub:me/code", cwd=workspace))
