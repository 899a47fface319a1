"""Files of an owner's state that a crash has damaged."""

from __future__ import annotations

from pathlib import Path

from federation_messages import REQUEST

from expertctl.core.artefacts.files import write_json
from expertctl.experts.federation.owner.owner import Owner
from expertctl.experts.federation.protocol.requests import Progress


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
