"""Commands in processes of their own against a stand-in for the Hugging Face hub."""

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

CODE = "import sys; from expertctl.core.remote import retries; retries.FIRST_WAIT_S = 0.01; from expertctl.cli.main import main; sys.exit(main())"


@dataclass
class Place:
    """A hub, its traffic, and how commands reach it."""

    hub: Hub
    traffic: Traffic
    environment: dict[str, str]

    def run(self, *words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", CODE, *map(str, words)],
            cwd=cwd,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    hub, traffic = Hub(), Traffic()
    with serving(HubHandler, traffic, hub=hub) as url:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        yield Place(hub, traffic, environment)


def error_of(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert TOKEN not in run.stderr + run.stdout
    return last


def test_an_artefact_goes_to_the_hub_and_comes_back(place: Place, workspace: Path, tmp_path: Path) -> None:
    size = (workspace / "experts" / "code" / "model.safetensors").stat().st_size
    place.traffic.cuts = [size // 3, size]
    pushed = place.run("--json", "push", "code", "hub:me/code", "--private", cwd=workspace)
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["url"] == "hub:me/code"
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
    again = place.run("push", "code", "hub:me/code", cwd=workspace)
    assert "0 of them sent now" in again.stdout, again.stderr
    assert place.traffic.total - before < size

    place.traffic.cuts = [place.traffic.total + size // 2, place.traffic.total + size]
    pulled = place.run("pull", "hub:me/code", "again", cwd=workspace)
    assert pulled.returncode == 0, pulled.stderr
    assert place.traffic.cuts == []
    assert verify(workspace / "experts" / "again") == []
    assert not any(path.is_symlink() for path in (workspace / "experts" / "again").iterdir())

    refused = place.run("push", "prose", "hub:me/code", cwd=workspace)
    assert "holds other files already; use --force" in error_of(refused)
    branch = place.run("push", "prose", "hub:me/code", "--revision", "prose", "--force", cwd=workspace)
    assert branch.returncode == 0, branch.stderr
    assert repository.branches["prose"] != repository.branches["main"]
    taken = place.run("pull", "hub:me/code@prose", "-o", tmp_path / "taken", cwd=workspace)
    assert taken.returncode == 0, taken.stderr
    assert contents(tmp_path / "taken")["expert.json"] == contents(workspace / "experts" / "prose")["expert.json"]


def test_a_seed_comes_from_the_hub_only_on_request(place: Place, workspace: Path, tmp_path: Path, run: Any) -> None:
    pushed = place.run("push", "seed", "hub:org/model", cwd=workspace)
    assert pushed.returncode == 0, pushed.stderr
    seen = len(place.traffic.requests)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "expertctl.yaml").write_text("seed: {from: hub:org/model}\n")
    assert "write hub:org/model" in run("seed", "--from", "org/model", cwd=fresh).error
    offline = place.run("seed", cwd=fresh, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in error_of(offline)
    assert len(place.traffic.requests) == seen

    made = place.run("seed", cwd=fresh)
    assert made.returncode == 0, made.stderr
    commit = place.hub.repositories["org/model"].branches["main"]
    assert f"hub:org/model@{commit} always names it" in made.stderr
    assert verify(fresh / "seed") == []
    assert digest(fresh) == digest(workspace)


def digest(workspace: Path) -> Any:
    return json.loads((workspace / "seed" / "seed.json").read_text())["digest"]


def test_refusals_of_the_hub_say_what_to_do(place: Place, workspace: Path) -> None:
    login = "run `hf auth login`, or set HF_TOKEN"
    assert "does not exist, or is private" in error_of(place.run("pull", "hub:me/nothing", cwd=workspace))
    expired = error_of(place.run("push", "code", "hub:me/code", cwd=workspace, HF_TOKEN="hf_expiredtoken123"))
    assert "access is denied" in expired
    assert login in expired
    assert "hf_expiredtoken123" not in expired
    place.hub.read_only = True
    forbidden = error_of(place.run("push", "code", "hub:me/code", cwd=workspace))
    assert "access is denied" in forbidden
    assert login in forbidden
    place.hub.read_only = False
    assert place.run("push", "code", "hub:me/code", cwd=workspace).returncode == 0
    assert "no such revision" in error_of(place.run("pull", "hub:me/code@v9", cwd=workspace))
    down = place.run("pull", "hub:me/code", cwd=workspace, HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub cannot be reached" in error_of(down)
