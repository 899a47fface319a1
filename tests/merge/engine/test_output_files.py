"""Writing the files of a merge."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from threading import Event

import pytest
from toy_models import engine_merge, random_tensors, recipe, write_model

from expertctl.core.errors import UserError
from expertctl.core.hooks.merging import TensorMerge
from expertctl.merge.engine import output_files

FIRST = TensorMerge("first", "", merge=lambda group, _: group.experts[0], uses_seed=False, elementwise=True)


def models(root: Path) -> dict[str, Path]:
    return {f"m{number}": write_model(root / f"m{number}", random_tensors(number)) for number in range(2)}


def test_files_are_sent_to_the_disk_while_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    done = Event()
    monkeypatch.setattr(output_files, "FLUSH_BYTES", 10)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (sent.append(descriptor), done.set()))
    flusher = output_files._Flusher()
    flusher.wrote(3, 9)
    flusher.wrote(4, 9)
    flusher.wrote(3, 1)
    assert done.wait(30)
    flusher.stop()
    assert sent == [3]


def test_a_disk_that_failed_meanwhile_is_told_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = Event()

    def fail(_: int) -> None:
        tried.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    flusher = output_files._Flusher()
    flusher.wrote(3, output_files.FLUSH_BYTES)
    assert tried.wait(30)
    with pytest.raises(OSError, match="Input/output error"):
        flusher.stop()


def test_a_merge_reports_a_write_error_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: output_files._Flusher) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(output_files._Flusher, "stop", fail)
    what = recipe("first", models(tmp_path), weights={"m0": 1, "m1": 1})
    with pytest.raises(UserError, match="Input/output error"):
        engine_merge(what, tmp_path / "out", method=FIRST)
