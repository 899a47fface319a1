"""`--nproc`, `--workers` and `--device-map`: the figures and bytes of one process, and refusals of one line."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from expertctl.core.process import workers

DEVICES = "code=cpu,prose=cpu"


def test_eval_and_generate_print_the_same(run: Any, workspace: Path) -> None:
    one = ("--json", "--quiet", "eval", "forest", "--domains", "code")
    plain = run(*one)
    assert plain.status == 0
    assert run(*one, "--nproc", "2").out == plain.out
    assert not multiprocessing.active_children()
    assert run(*one, "--device-map", DEVICES).out == plain.out
    sample = ("--json", "generate", "forest", "def", "--max-new-tokens", "4")
    assert run(*sample, "--device-map", DEVICES).json == run(*sample).json


def test_merge_writes_the_same(run: Any, workspace: Path) -> None:
    for name, options in {"one": (), "two": ("--workers", "2")}.items():
        assert run("merge", name, "--method", "linear", *options).status == 0
    one, two = (workspace / "generalists" / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("eval", "seed", "--nproc", "100000"), "100000 processes are too many for the 2 CPU cores of this machine"),
        (("merge", "new", "--method", "linear", "--workers", "100000"), "give at most 8"),
        (("eval", "forest", "--device-map", "auto", "--nproc", "2"), "a device map is for one process"),
        (("eval", "forest", "--device-map", "nobody=cpu"), "no member 'nobody'; forest has: code, prose"),
        (("eval", "seed", "--device-map", "auto"), "seed has no members that could be on several devices"),
        (("generate", "forest", "def", "--device-map", "code=tpu"), "'tpu' in the device map is not a device"),
        (("generate", "forest", "def", "--device-map", "code=meta"), "device 'meta' of the device map cannot be used"),
        (("generate", "forest", "def", "--device-map", "code=cuda:99"), "there is no device 'cuda:99'"),
        (("generate", "forest", "def", "--device-map", "code=cpu,,"), "'' in the device map is not MEMBER=DEVICE"),
    ],
)
def test_impossible_values_are_one_line(
    run: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr(workers, "available_cores", lambda: 2)
    monkeypatch.setattr("expertctl.core.models.loading._from_pretrained", None)  # no weights are loaded
    result = run(*words)
    assert result.status == 1
    assert said in result.error
    assert len(result.err.strip().splitlines()) == 1
    assert not (workspace / "generalists" / "new").exists()


@pytest.mark.parametrize("number", ["0", "-1", "x", "1.5"])
@pytest.mark.parametrize("words", [("eval", "seed", "--nproc"), ("merge", "new", "--workers")])
def test_numbers_of_processes_are_whole_and_above_zero(
    run: Any, workspace: Path, words: tuple[str, ...], number: str
) -> None:
    result = run(*words, number)
    assert result.status == 2
    assert f"Invalid value for '{words[-1]}'" in result.err
