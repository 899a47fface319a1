"""The status page: what it shows, what it escapes, and to whom."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from federation_members import BTM

from expertctl import UserError
from expertctl.experts.federation.coordinator.coordinator import Coordinator
from expertctl.experts.federation.protocol.keys import make_key
from expertctl.experts.federation.protocol.requests import Progress
from expertctl.plugins.flower.coordinator.status_page import StatusServer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def busy(tmp_path: Path, hub: Any) -> Coordinator:
    """A coordinator with an owner in training, one that was removed and one without a request."""
    coordinator: Coordinator = hub.coordinator
    for name in ("site-a", "site-b", "site-c"):
        coordinator.invite(name, make_key(tmp_path / name).public)
    (request,) = coordinator.ask(["site-a"], BTM, datetime.now(UTC) + timedelta(hours=1))
    coordinator.files.record_progress(request.id, Progress("training", 3, 10), coordinator.now())
    coordinator.files.record_handout(request.id, "<SCRIPT>", coordinator.now())
    coordinator.remove("site-b")
    return coordinator


@pytest.fixture
def address(busy: Coordinator) -> Any:
    server = StatusServer(busy, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.open()}"
    server.close()


def test_figures_for_prometheus(address: str) -> None:
    reply = httpx.get(f"{address}/metrics", trust_env=False)
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = reply.text.splitlines()
    assert "expertctl_federation_members 2" in lines
    assert 'expertctl_federation_requests{state="asked"} 1' in lines
    assert 'expertctl_federation_events_total{event="removed"} 1' in lines
    assert any(
        line.startswith('expertctl_federation_training_steps{owner="site-a",') and line.endswith(" 3") for line in lines
    )
    names = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert all(line.startswith("#") or line.partition("{")[0].partition(" ")[0] in names for line in lines)


def test_the_page_escapes_what_comes_from_owners(address: str) -> None:
    text = httpx.get(address, trust_env=False).text
    assert "&lt;SCRIPT&gt;" in text
    assert "<SCRIPT>" not in text
    content = httpx.get(f"{address}/status.json", trust_env=False).json()
    assert [owner["owner"] for owner in content["owners"]] == ["site-a", "site-c"]
    assert content["removed"][0]["owner"] == "site-b"


def test_it_can_only_be_read_and_only_by_this_machines_names(busy: Coordinator, address: str) -> None:
    assert httpx.post(address, trust_env=False).status_code == 405
    assert httpx.get(address, headers={"host": "attacker.example"}, trust_env=False).status_code == 400
    assert httpx.get(f"{address}/../members.json", trust_env=False).status_code == 404
    for host in ("0.0.0.0", "::", "hub.example.org"):
        with pytest.raises(UserError, match="is not an address of this machine only"):
            StatusServer(busy, host, 0)
    port = int(address.rpartition(":")[2])
    with pytest.raises(UserError, match="choose another with --status"):
        StatusServer(busy, "127.0.0.1", port).open()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_owners_requests_and_progress(address: str, tmp_path: Path) -> None:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", address], capture_output=True, text=True, timeout=120
    )
    assert "<h1>Federation</h1>" in done.stdout
    assert "0 of 2 owners online; 0 experts accepted, 0 deliveries refused." in done.stdout
    assert "<td>site-a</td><td>no</td><td>asked</td><td>training 3 of 10</td>" in done.stdout
    assert "site-b" in done.stdout
