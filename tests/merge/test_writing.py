"""Files of a merge on their way to the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from toy_models import engine_merge, random_tensors, recipe, write_model

from expertctl.core.errors import UserError
from expertctl.core.types import MergeMethod
from expertctl.merge import writing

FIRST = MergeMethod("first", "", merge=lambda group, _: group.experts[0], uses_seed=False, elementwise=True)


def models(root: Path) -> dict[str, Path]:
    return {f"m{number}": write_model(root / f"m{number}", random_tensors(number)) for number in range(2)}


def test_files_are_sent_to_the_disk_while_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    monkeypatch.setattr(writing, "FLUSH_BYTES", 1)
    monkeypatch.setattr(os, "fdatasync", sent.append)
    what = recipe("first", models(tmp_path), weights={"m0": 1, "m1": 1})
    engine_merge(what, tmp_path / "out", method=FIRST)
    assert sent


def test_a_disk_that_fails_meanwhile_ends_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(writing, "FLUSH_BYTES", 1)
    monkeypatch.setattr(os, "fdatasync", fail)
    what = recipe("first", models(tmp_path), weights={"m0": 1, "m1": 1})
    with pytest.raises(UserError, match="Input/output error"):
        engine_merge(what, tmp_path / "out", method=FIRST)
