"""Files of an owner's state that a crash has damaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from federation_messages import REQUEST

from expertctl import UserError
from expertctl.core.artefacts.files import write_json
from expertctl.experts.federation.owner.owner import Owner, OwnerSettings
from expertctl.experts.federation.protocol.requests import Progress


def started(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Return a process that runs Python code; it has begun, so the system knows its command line."""
    command = [sys.executable, "-c", f"print(flush=True); {code}", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_number_that_another_process_has_now_is_not_the_training(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    folder = owner.run_folder(REQUEST)
    folder.mkdir(parents=True)
    with started("input()") as other:
        (folder / "process.txt").write_text(str(other.pid))
        assert not owner.is_working(REQUEST)
        owner.stop(REQUEST)
        assert other.poll() is None
        other.kill()
    with started("input()", REQUEST.id) as training:
        (folder / "process.txt").write_text(str(training.pid))
        assert owner.is_working(REQUEST)
        owner.stop(REQUEST)
        assert training.wait(10) != 1  # it may be ending still


def test_a_licence_that_no_delivery_may_have_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x")
    for licence in ("CC BY\u00a04.0", "two\nlines", "x" * 301):
        with pytest.raises(UserError, match="the licence has to be one printable line"):
            Owner(tmp_path / "state").configure(OwnerSettings(tmp_path / "text.txt", licence=licence))


def test_damaged_files_are_set_aside(tmp_path: Path) -> None:
    owner = Owner(tmp_path)
    for folder in ("requests", "outcomes", f"runs/{REQUEST.id}"):
        (tmp_path / folder).mkdir(parents=True)
    write_json(tmp_path / "requests" / f"{REQUEST.id}.json", REQUEST.as_json())
    (tmp_path / "requests" / f"{'f' * 16}.json").write_text('{"id": ')
    (tmp_path / "requests" / "notes.json").write_text("no request")
    (tmp_path / "outcomes" / f"{REQUEST.id}.json").write_text("")
    (tmp_path / "runs" / REQUEST.id / "progress.json").write_text("[]")
    assert owner.requests() == [REQUEST]
    assert owner.outcome(REQUEST) is None
    assert owner.progress(REQUEST) == Progress("waiting")
    assert (tmp_path / "requests" / f"{'f' * 16}.json.damaged").is_file()
    owner.drop_superseded()
    assert owner.requests() == [REQUEST]
