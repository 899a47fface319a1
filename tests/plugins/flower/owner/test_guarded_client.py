"""The allowlist of app bundles, error codes of the owner's app, and child processes that end with their parent."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from federation_members import BTM

from expertctl import UserError
from expertctl.core.artefacts.files import is_alive
from expertctl.experts.federation.owner.owner import Owner
from expertctl.plugins.flower.coordinator.superlink import APP, _json_in
from expertctl.plugins.flower.owner.guarded_client import (
    FAILED,
    NOT_ALLOWED,
    digest_of_bundle,
    guard,
    is_allowed,
    write_allowed,
    write_shim,
)
from expertctl.plugins.flower.processes import child as child_module
from expertctl.plugins.flower.processes.child import Child, environment, flower_command, require_flower

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Flower imports

FILES = {"pyproject.toml": b"x", "expertctl_client.py": b"y"}


def bundle(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED, twice: str | None = None) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        if twice:
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr(twice, b"other")
    return packed.getvalue()


def test_the_digest_of_a_bundle_ignores_its_compression() -> None:
    known = digest_of_bundle(bundle(FILES))
    assert digest_of_bundle(bundle(FILES, zipfile.ZIP_STORED)) == known
    assert digest_of_bundle(bundle(dict(reversed(FILES.items())))) == known
    assert digest_of_bundle(bundle({**FILES, "expertctl_client.py": b"z"})) != known
    assert digest_of_bundle(bundle({**FILES, "more.py": b""})) != known


@pytest.mark.parametrize(
    "content",
    [
        b"no archive",
        bundle({"../up.py": b""}),
        bundle({"/abs.py": b""}),
        bundle({"zeros": bytes(2 << 20)}),
        bundle({f"{number}.py": b"" for number in range(60)}),
    ],
    ids=["no-archive", "above", "absolute", "bomb", "many"],
)
def test_invalid_bundles_are_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the app bundle"):
        digest_of_bundle(content)
    assert not is_allowed(content, tmp_path)


def test_a_bundle_with_a_file_twice_is_refused() -> None:
    with pytest.raises(UserError, match="twice"):
        digest_of_bundle(bundle(FILES, twice="pyproject.toml"))


def test_the_bundle_of_this_installation_is_allowed_and_an_altered_one_is_not(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    write_allowed(tmp_path)
    packed = build_fab_from_disk(APP)
    assert is_allowed(packed, tmp_path)
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert set(files) >= {"pyproject.toml", "expertctl_client.py", "expertctl_server.py"}
    files["expertctl_client.py"] += b"\nimport os\n"
    assert not is_allowed(bundle(files), tmp_path)


def test_the_guard_refuses_before_installation_and_reports_codes(tmp_path: Path) -> None:
    installed: list[bytes] = []
    module = SimpleNamespace(
        install_from_fab=lambda content, skip_prompt: installed.append(content),
        Error=lambda code, reason: (code, reason),
    )
    guard(module, tmp_path)
    assert module.Error(2, "boom, the path was /private/text") == (2, FAILED)
    with pytest.raises(PermissionError, match=NOT_ALLOWED):
        module.install_from_fab(b"anything", skip_prompt=True)
    assert installed == []
    assert module.Error(2, "whatever") == (2, NOT_ALLOWED)


def test_flower_still_has_the_names_that_the_guard_patches() -> None:
    from importlib import import_module

    module: Any = import_module("flwr.supernode.runtime.run_clientapp")
    assert {"install_from_fab", "Error"} <= set(vars(module))


def test_the_shim_comes_first_on_the_nodes_path(tmp_path: Path) -> None:
    folders = environment(tmp_path / "home", write_shim(tmp_path))
    scripts = [Path(folder) / "flwr-clientapp" for folder in folders["PATH"].split(os.pathsep)]
    assert next(path for path in scripts if path.exists()) == tmp_path / "bin" / "flwr-clientapp"
    assert folders["FLWR_TELEMETRY_ENABLED"] == "0"
    assert folders["FLWR_DISABLE_UPDATE_CHECK"] == "1"


def test_output_before_the_json_of_flwr_is_ignored() -> None:
    assert _json_in('warning: {}\nno\n{"a": 1}') == {}
    assert _json_in('Loading...\n{"success": true, "run-id": "7"}\n') == {"success": True, "run-id": "7"}


def test_without_flower_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "expertctl\[federation\]"'):
        require_flower()


def test_missing_flower_commands_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="not installed here"):
        flower_command("flwr")


# --- the owner's app ---


def take_message(content: str) -> Any:
    from flwr.app import ConfigRecord, RecordDict

    return SimpleNamespace(content=RecordDict({"expertctl": ConfigRecord({"request": content})}))


def test_the_app_stores_a_request_in_the_owners_state(hub: Any, new_owner: Callable[..., Owner]) -> None:
    import json

    from expertctl.plugins.flower.owner.taking_in import store_request

    owner = new_owner("site-a")
    (request,) = hub.coordinator.ask(["site-a"], BTM, datetime.now(UTC) + timedelta(hours=1))
    content = json.dumps(request.as_json())
    assert store_request(take_message(content), owner.state) == "TAKEN"
    assert [request.as_json() for request in owner.requests()] == [request.as_json()]
    owner.note_outcome(request, "LATE")
    assert store_request(take_message(content), owner.state) == "TAKEN"
    assert owner.outcome(request) is None  # it is delivered again
    with pytest.raises(UserError):
        store_request(take_message("{}"), owner.state)


# --- processes ---


def wait_until(what: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def test_a_child_ends_with_its_killed_parent(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib, os\n"
        "from expertctl.plugins.flower.processes.child import Child\n"
        "one = Child(pathlib.Path(sys.argv[1]) / 'log')\n"
        "code = 'import os,time;open(%r,\"w\").write(str(os.getpid()));time.sleep(600)' % (sys.argv[1] + '/pid')\n"
        "one.start([sys.executable, '-c', code], os.environ)\n"
        "time.sleep(600)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    wait_until(lambda: (tmp_path / "pid").is_file() and bool((tmp_path / "pid").read_text()))
    pid = (tmp_path / "pid").read_text()
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    wait_until(lambda: not is_alive(pid))


def test_a_child_is_restarted_after_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "PAUSES_S", (0.3,))
    child = Child(tmp_path / "log")
    assert child.is_due()
    child.start([sys.executable, "-c", "print('first'); raise SystemExit(7)"], os.environ)
    statuses: list[int] = []

    def has_ended() -> bool:
        status = child.poll()
        statuses.extend([status] if status is not None else [])
        return bool(statuses)

    wait_until(has_ended)
    assert statuses == [7]
    assert child.recent_output() == "first\n"
    assert not child.is_due()
    wait_until(child.is_due)
    child.start([sys.executable, "-c", "print('second', flush=True); import time; time.sleep(600)"], os.environ)
    wait_until(lambda: "second" in child.recent_output())
    assert "first" not in child.recent_output()
    assert child.is_running
    child.stop()
    assert not child.is_running
