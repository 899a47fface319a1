"""Fixtures of the command-line tests: running a command, and a workspace with text and finished experts."""

from __future__ import annotations

import inspect
import json
import shutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from expertctl.cli.main import main
from expertctl.core.process.environment import LIBRARY_SETTINGS

CONFIG = """\
seed: {preset: tiny, training: {tokens: 2000, schedule_end: 0.5}}
training: {tokens: 1000, sequence_length: 64, batch_size: 2, learning_rate: 0.01}
domains:
  code: {train: text/code-train.jsonl, valid: text/code-valid.jsonl}
  prose: {path: text/prose.jsonl, valid_share: 0.3, licence: PSF-2.0}
"""


@dataclass(frozen=True)
class Result:
    """How one call of the command line ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which has to be one JSON object and nothing else."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The last line on standard error, which has to be an `Error:` line."""
        last = self.err.strip().splitlines()[-1]
        assert last.startswith("Error: "), self.err
        return last.removeprefix("Error: ")


Run = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls the command line in this process: `run("eval", "seed", cwd=folder)`."""
    for name, value in LIBRARY_SETTINGS.items():
        monkeypatch.setenv(name, value)  # so that what `main` sets is taken back
    _quiet_transformers(monkeypatch)

    def call(*arguments: str | Path, cwd: Path | None = None) -> Result:
        if cwd is not None:
            monkeypatch.chdir(cwd)
        capfd.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Result(status, out, err)

    return call


def _quiet_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what the environment does in a process of its own: another test may have imported transformers before."""
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", False)


def write_texts(folder: Path) -> None:
    """Write two small domains: functions of the standard library, and paragraphs of its documentation."""
    folder.mkdir(parents=True)
    code = [inspect.getsource(value) for value in vars(textwrap.TextWrapper).values() if inspect.isfunction(value)]
    prose = [part for part in (argparse_doc() + json_doc()).split("\n\n") if len(part) > 40]
    write_documents(folder / "code-train.jsonl", code[2:] * 2)
    write_documents(folder / "code-valid.jsonl", code[:2])
    write_documents(folder / "prose.jsonl", prose)


def argparse_doc() -> str:
    import argparse

    return "\n\n".join(filter(None, [argparse.__doc__, *(inspect.getdoc(value) for value in vars(argparse).values())]))


def json_doc() -> str:
    return "\n\n".join(filter(None, [json.__doc__, *(inspect.getdoc(value) for value in vars(json).values())]))


def write_documents(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture(scope="session")
def _original(tmp_path_factory: pytest.TempPathFactory, new_workspace: Any) -> Path:
    """A workspace with a seed and the experts code and prose, made without training, and an ensemble."""
    from expertctl.workspace import Workspace

    folder = tmp_path_factory.mktemp("cli") / "ws"
    new_workspace(folder, ("code", "prose"), config=CONFIG)
    write_texts(folder / "text")
    Workspace(folder).merge("forest", method="ensemble", options={"samples": 8})
    return folder


@pytest.fixture
def workspace(_original: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy that the test may change; it is the current folder."""
    folder = tmp_path / "ws"
    shutil.copytree(_original, folder, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """A workspace in which nothing but text and configuration is there."""
    folder = tmp_path / "fresh"
    write_texts(folder / "text")
    (folder / "expertctl.yaml").write_text(CONFIG, encoding="utf-8")
    return folder
