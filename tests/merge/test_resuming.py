"""Resuming merges: complete tensors are kept, incomplete ones are merged again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_models import random_tensors, recipe, tensors_of, write_model

from expertctl.core.hooks.merging import MergeMethod, TensorGroup, TensorMerge
from expertctl.merge.engine.calculator import EngineSettings, Written, run_merge
from expertctl.merge.engine.shards import ShardPlan, plan_shards
from expertctl.merge.engine.writing import JOURNAL_FILE
from expertctl.merge.planning.tensor_planner import plan_tensors
from expertctl.merge.recipes.recipe import Recipe
from expertctl.merge.sources.models import open_source

MOST = 7


class Stopped(Exception):
    """Stands for whatever ends a process."""


class Counting:
    """A mean that says which tensors it was asked for, and may stop at one."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.asked: list[str] = []
        self.stop_at = stop_at

    def method(self) -> MergeMethod:
        return TensorMerge("mean", "", merge=self.merge, uses_seed=False, arrays="any")

    def merge(self, group: TensorGroup, options: Any) -> Any:
        if len(self.asked) == self.stop_at:
            raise Stopped
        self.asked.append(group.name)
        return (group.experts[0] + group.experts[1]) / 2


@pytest.fixture
def what(tmp_path: Path) -> Recipe:
    models = {name: write_model(tmp_path / name, random_tensors(seed)) for seed, name in enumerate("ab")}
    return recipe("mean", models)


def shards_of(what: Recipe, shard_bytes: int = 200) -> list[ShardPlan]:
    sources = {name: open_source(name, folder) for name, folder in what.models.items()}
    return plan_shards(plan_tensors(what, Counting().method(), sources).tensors, shard_bytes)


def run(what: Recipe, folder: Path, counting: Counting, fingerprint: str = "one", shard_bytes: int = 200) -> Written:
    folder.mkdir(exist_ok=True)
    return run_merge(
        counting.method(),
        shards_of(what, shard_bytes),
        folder,
        fingerprint=fingerprint,
        settings=EngineSettings(threads=1),
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("stop_at", range(MOST))
def test_a_stopped_merge_goes_on_after_the_last_complete_tensor(what: Recipe, tmp_path: Path, stop_at: int) -> None:
    whole = Counting()
    run(what, tmp_path / "whole", whole)
    broken = Counting(stop_at)
    with pytest.raises(Stopped):
        run(what, tmp_path / "out", broken)
    resumed = Counting()
    written = run(what, tmp_path / "out", resumed)
    assert written.resumed == stop_at
    assert broken.asked + resumed.asked == whole.asked
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out" / JOURNAL_FILE).exists()


def test_another_merge_takes_nothing_over(what: Recipe, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(what, tmp_path / "out", Counting(3))
    again = Counting()
    assert run(what, tmp_path / "out", again, fingerprint="two").resumed == 0
    assert len(again.asked) == len(random_tensors(0))


def test_bytes_that_the_journal_promises_are_checked(what: Recipe, tmp_path: Path) -> None:
    """After a power cut the journal may be on the disk and the data not."""
    run(what, tmp_path / "whole", Counting())
    with pytest.raises(Stopped):
        run(what, tmp_path / "out", Counting(4))
    lost = json.loads((tmp_path / "out" / JOURNAL_FILE).read_text().splitlines()[2])["tensor"]
    for shard in shards_of(what):
        if lost in shard.layout[1]:
            begin, end = shard.layout[1][lost]
            with (tmp_path / "out" / shard.file).open("r+b") as file:
                file.seek(begin)
                file.write(bytes(end - begin))
    again = Counting()
    assert run(what, tmp_path / "out", again).resumed == 3
    assert lost in again.asked
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "harm", ["half a line", "no journal", "a shard is missing", "a shard is short", "another header"]
)
def test_inconsistent_leftovers_are_discarded(what: Recipe, tmp_path: Path, harm: str) -> None:
    run(what, tmp_path / "whole", Counting())
    with pytest.raises(Stopped):
        run(what, tmp_path / "out", Counting(4))
    first = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    journal = tmp_path / "out" / JOURNAL_FILE
    if harm == "half a line":
        journal.write_text(journal.read_text()[:-9])
    elif harm == "no journal":
        journal.unlink()
    elif harm == "a shard is missing":
        first.unlink()
    elif harm == "a shard is short":
        first.write_bytes(first.read_bytes()[:-1])
    else:
        first.write_bytes(b"\0" * 64 + first.read_bytes()[64:])
    written = run(what, tmp_path / "out", Counting())
    assert written.resumed == (3 if harm == "half a line" else 0)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_headers_come_first_and_the_journal_names_what_is_complete(what: Recipe, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(what, tmp_path / "out", Counting(0))
    for shard in shards_of(what):
        content = (tmp_path / "out" / shard.file).read_bytes()
        assert content.startswith(shard.layout[0])
        assert len(content) == shard.num_bytes
    assert [json.loads(line) for line in (tmp_path / "out" / JOURNAL_FILE).read_text().splitlines()] == [
        {"fingerprint": "one"}
    ]


def test_the_result_is_the_mean(what: Recipe, tmp_path: Path) -> None:
    run(what, tmp_path / "out", Counting())
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert all(((a[name] + b[name]) / 2).equal(tensor) for name, tensor in tensors_of(tmp_path / "out").items())
