"""Rounds on disk and the round loop: quorum, deadlines, refusals, and kills at any point."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reporters import Recorder
from tiny_families import family_folder, family_model

from expertctl import Reporter, UserError
from expertctl.core.artefacts import files
from expertctl.core.artefacts.safetensors_io import Checkpoint, write_tensors
from expertctl.core.config.settings import TrainingConfig
from expertctl.core.errors import Interrupted
from expertctl.core.models.overlay import overlay_tensors
from expertctl.core.models.stored_names import checkpoint_tensors
from expertctl.core.testing import tiny_model_folder
from expertctl.core.text.block_order import BalancedUnion, RandomSlice
from expertctl.core.text.token_store import EncodedDocument, TokenBlocks, TokenStore, write_part
from expertctl.experts.federation.judging.refusal import RefusalCode
from expertctl.experts.federation.judging.round_weights import AveragingRules
from expertctl.experts.federation.owner import inner_training
from expertctl.experts.federation.owner.inner_training import InnerTraining
from expertctl.experts.federation.rounds import rounds as rounds_module
from expertctl.experts.federation.rounds import storage
from expertctl.experts.federation.rounds.round_loop import OwnerTask, run_rounds
from expertctl.experts.federation.rounds.rounds import RoundPlan, Rounds

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OWNERS = ("clinic", "court", "press")
HOUR = 3600.0


def begin(folder: Path, **settings: object) -> Rounds:
    start = folder / "start.safetensors"
    folder.mkdir(exist_ok=True)
    write_tensors(start, {"w": torch.linspace(-1, 1, 12).reshape(3, 4), "n": torch.tensor([3])})
    plan = RoundPlan(**{"owners": OWNERS, "recipe": "diloco", "round_seconds": HOUR, **settings})  # type: ignore[arg-type]
    return Rounds.begin(folder / "rounds", start, plan, NOW)


def nudge(task: OwnerTask) -> int:
    """Cheap training: a step that depends only on the owner and the round."""
    shared = Checkpoint([task.shared])
    step = torch.randn(3, 4, generator=torch.Generator().manual_seed(100 * task.round + len(task.owner)))
    write_tensors(task.result, {"w": shared.read("w") + 0.1 * step, "n": shared.read("n")})
    return 1000


def delivered_file(rounds: Rounds, owner: str) -> Path:
    work = rounds.open.folder / "work" / owner
    work.mkdir(parents=True, exist_ok=True)
    task = OwnerTask(owner, rounds.number, rounds.open.shared, work / f"{owner}.safetensors")
    nudge(task)
    return task.result


def content(rounds: Rounds) -> dict[str, bytes]:
    """Return everything that must be identical after a kill."""
    return {
        path.relative_to(rounds.root).as_posix(): path.read_bytes()
        for path in sorted(rounds.root.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def test_a_round_waits_for_all_owners_before_the_deadline(tmp_path: Path) -> None:
    rounds = begin(tmp_path)
    assert rounds.state(NOW) == "waiting"
    assert rounds.missing() == list(OWNERS)
    with pytest.raises(UserError, match="round 0 waits for clinic, court, press until 2026-01-01T01:00:00"):
        rounds.close(NOW)
    for owner in OWNERS:
        assert rounds.deliver(owner, delivered_file(rounds, owner), 1000, NOW) is None
    assert Rounds(rounds.root).state(NOW) == "ready"
    report = rounds.close(NOW)
    assert report.shares == dict.fromkeys(OWNERS, 1 / 3)
    assert (report.refused, report.missing, rounds.number) == ({}, (), 1)
    assert rounds.missing() == list(OWNERS)
    assert rounds.report(0) == report
    assert rounds.open.deadline == NOW + timedelta(hours=1)


def test_after_the_deadline_a_quorum_suffices_and_less_is_an_error(tmp_path: Path) -> None:
    rounds = begin(tmp_path, quorum=0.6)
    late = NOW + timedelta(hours=2)
    assert rounds.plan.needed == 2
    rounds.deliver("clinic", delivered_file(rounds, "clinic"), 1000, NOW)
    assert rounds.state(late) == "short"
    with pytest.raises(UserError, match="1 of 3 owners count in round 0, and 2 are needed"):
        rounds.close(late)
    refusal = rounds.deliver("court", delivered_file(rounds, "court"), 1000, late)
    assert refusal is not None
    assert refusal.code is RefusalCode.LATE
    rounds.extend(late + timedelta(hours=1))
    assert rounds.deliver("court", delivered_file(rounds, "court"), 1000, late) is None
    assert rounds.state(late) == "waiting"
    report = rounds.close(late + timedelta(hours=1))
    assert (sorted(report.shares), report.missing) == (["clinic", "court"], ("press",))


def test_a_round_with_its_quorum_waits_only_for_the_grace(tmp_path: Path) -> None:
    rounds = begin(tmp_path, quorum=0.6, grace_seconds=60.0)
    minute = timedelta(minutes=1)
    rounds.deliver("clinic", delivered_file(rounds, "clinic"), 1000, NOW + minute)
    assert rounds.state(NOW + 30 * minute) == "waiting"
    rounds.deliver("court", delivered_file(rounds, "court"), 1000, NOW + 5 * minute)
    assert rounds.state(NOW + 5.9 * minute) == "waiting"
    assert rounds.state(NOW + 6 * minute) == "ready"
    assert rounds.close(NOW + 6 * minute).missing == ("press",)


def test_a_late_delivery_counts_in_the_open_round_with_its_own_start_and_less_share(tmp_path: Path) -> None:
    rounds = begin(tmp_path, quorum=0.6, recipe="fedavg", late_rounds=1)
    slow = delivered_file(rounds, "press")
    kept = tmp_path / "slow.safetensors"
    kept.write_bytes(slow.read_bytes())
    for number in range(2):
        for owner in ("clinic", "court"):
            assert rounds.deliver(owner, delivered_file(rounds, owner), 1000, NOW) is None
        if number == 1:
            assert rounds.deliver("press", kept, 1000, NOW, number=0) is None
            assert rounds.missing() == []
        report = rounds.close(NOW + (number + 1) * timedelta(hours=1))
    assert (report.late, report.missing) == ({"press": 1}, ())
    assert report.shares == pytest.approx({"clinic": 1 / 3, "court": 1 / 3, "press": 1 / 6})
    assert rounds.has_counted("press", 0)
    assert not rounds.has_counted("press", 1)
    assert rounds.has_counted("clinic", 1)
    too_late = rounds.deliver("press", kept, 1000, NOW, number=0)
    assert too_late is not None
    assert too_late.code is RefusalCode.LATE
    first, second, third = (
        Checkpoint([path]).read("w").double() for path in [tmp_path / "start.safetensors", *map(rounds.weights, (1, 2))]
    )
    on_time = [
        0.1 * torch.randn(3, 4, generator=torch.Generator().manual_seed(100 + len(owner)))
        for owner in ("clinic", "court")
    ]
    late = Checkpoint([kept]).read("w").double() - first
    torch.testing.assert_close(third, second + sum(on_time) / 3 + late / 6, atol=1e-6, rtol=0)


def test_with_late_deliveries_allowed_a_deadline_refuses_nobody(tmp_path: Path) -> None:
    rounds = begin(tmp_path, quorum=1.0, late_rounds=2)
    after = NOW + timedelta(hours=5)
    rounds.deliver("clinic", delivered_file(rounds, "clinic"), 1000, NOW)
    assert rounds.state(after) == "short"
    for owner in ("court", "press"):
        assert rounds.deliver(owner, delivered_file(rounds, owner), 1000, after) is None
    assert rounds.close(after).late == {}


def test_a_late_delivery_after_a_kill_in_the_closing_counts_in_the_next_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = begin(tmp_path, quorum=0.6, late_rounds=1)
    slow = tmp_path / "slow.safetensors"
    slow.write_bytes(delivered_file(rounds, "press").read_bytes())
    for owner in ("clinic", "court"):
        rounds.deliver(owner, delivered_file(rounds, owner), 1000, NOW)
    after = NOW + timedelta(hours=1)
    with monkeypatch.context() as killed:
        killed.setattr(Rounds, "_open_next", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rounds.close(after)
    assert rounds.is_closing
    assert rounds.deliver("press", slow, 1000, after, number=0) is None
    assert (rounds.number, rounds.delivered()["press"].late) == (1, 1)
    assert rounds.report(0).missing == ("press",)


@pytest.mark.parametrize("wrong", [{"grace_seconds": -1.0}, {"late_rounds": -1}, {"late_rounds": 101}])
def test_wrong_grace_and_lateness_are_refused(tmp_path: Path, wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="the grace must be at least 0 seconds"):
        begin(tmp_path, **wrong)


def test_invalid_weights_are_refused_with_a_reason_and_can_be_replaced(tmp_path: Path) -> None:
    rounds = begin(tmp_path, quorum=0.6)
    bad = tmp_path / "bad.safetensors"
    write_tensors(bad, {"w": torch.full((3, 4), float("nan")), "n": torch.tensor([3])})
    refusal = rounds.deliver("press", bad, 1000, NOW)
    assert refusal is not None
    assert refusal.code is RefusalCode.NOT_FINITE
    assert rounds.open.refused()["press"]["code"] == "NOT_FINITE"
    assert rounds.deliver("press", delivered_file(rounds, "press"), float("inf"), NOW) is not None
    for owner in ("clinic", "court"):
        rounds.deliver(owner, delivered_file(rounds, owner), 1000, NOW)
    assert rounds.state(NOW) == "ready"
    assert rounds.deliver("press", delivered_file(rounds, "press"), 1000, NOW) is None
    assert sorted(rounds.close(NOW).shares) == list(OWNERS)


def test_unknown_owners_and_other_plans_are_refused(tmp_path: Path) -> None:
    rounds = begin(tmp_path)
    with pytest.raises(UserError, match="'eve' is not an owner of these rounds"):
        rounds.deliver("eve", tmp_path / "start.safetensors", 1, NOW)
    assert begin(tmp_path).number == 0
    with pytest.raises(UserError, match="holds rounds of another plan or model"):
        begin(tmp_path, recipe="fedavg")
    for wrong in ({"quorum": 0.0}, {"owners": ()}, {"owners": ("a", "a")}, {"round_seconds": 0.0}):
        with pytest.raises(UserError):
            RoundPlan(**{"owners": OWNERS, "recipe": "diloco", **wrong})  # type: ignore[arg-type]


def test_weights_of_closed_rounds_are_deleted_and_records_stay(tmp_path: Path) -> None:
    rounds = begin(tmp_path)
    run_rounds(rounds, nudge, 4, now=lambda: NOW)
    names = content(rounds)
    assert sorted(name for name in names if name.endswith(".safetensors")) == [
        "round-00003/model.safetensors",
        "round-00003/outer.safetensors",
        "round-00004/model.safetensors",
        "round-00004/outer.safetensors",
    ]
    assert [rounds.report(number).number for number in range(4)] == [0, 1, 2, 3]
    assert not list(rounds.root.rglob("deliveries"))


class Killed(BaseException):
    """Simulates kill -9: no handler catches it."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kills at the n-th write; `[0]` counts down and is negative for no kill."""
    left = [-1]
    write, put, average = files.write_json, files._put_in_place, rounds_module.average_round
    tidy = rounds_module.Rounds.tidy

    def striking(function: object) -> object:
        def call(*arguments: object, **named: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            result = function(*arguments, **named)  # type: ignore[operator]
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return result

        return call

    for module in (storage, rounds_module):
        monkeypatch.setattr(module, "write_json", striking(write))
    monkeypatch.setattr(files, "_put_in_place", striking(put))
    monkeypatch.setattr(rounds_module, "average_round", striking(average))
    monkeypatch.setattr(rounds_module.Rounds, "tidy", striking(tidy))
    return left


@pytest.mark.parametrize("point", range(1, 47))
def test_a_kill_at_any_point_ends_in_the_same_bytes(tmp_path: Path, kill_at: list[int], point: int) -> None:
    expected, rounds = begin(tmp_path / "expected"), begin(tmp_path / "killed")
    run_rounds(expected, nudge, 2, now=lambda: NOW)
    kill_at[0] = point
    with pytest.raises(Killed):
        run_rounds(rounds, nudge, 2, now=lambda: NOW)
    kill_at[0] = -1
    run_rounds(Rounds(rounds.root), nudge, 2, now=lambda: NOW)
    assert content(rounds) == content(expected)


def test_a_delivery_after_the_closing_record_is_late(tmp_path: Path, kill_at: list[int]) -> None:
    rounds = begin(tmp_path, quorum=0.6)
    for owner in ("clinic", "court"):
        rounds.deliver(owner, delivered_file(rounds, owner), 1000, NOW)
    kill_at[0] = 3  # 1 and 2 are before and after `closing.json`
    after = NOW + timedelta(hours=1)
    with pytest.raises(Killed):
        rounds.close(after)
    kill_at[0] = -1
    assert rounds.is_closing
    refusal = rounds.deliver("press", delivered_file(rounds, "press"), 1000, NOW)
    assert refusal is not None
    assert refusal.code is RefusalCode.LATE
    assert sorted(rounds.close(after).shares) == ["clinic", "court"]


def test_an_owner_that_fails_is_left_out_while_the_quorum_holds(tmp_path: Path) -> None:
    def some_fail(task: OwnerTask) -> int:
        if task.owner == "press" and task.round == 0:
            raise UserError("training diverged: loss nan at step 3")
        return nudge(task)

    recorder = Recorder()
    reports = run_rounds(begin(tmp_path, quorum=0.6), some_fail, 2, now=lambda: NOW, reporter=recorder)
    assert reports[0].refused == {"press": "training diverged: loss nan at step 3"}
    assert sorted(reports[1].shares) == list(OWNERS)
    assert recorder.lines[0].startswith("'press' is left out of round 0: training diverged")


def test_too_few_owners_stop_the_loop_and_the_next_call_readmits_them(tmp_path: Path) -> None:
    rounds, broken = begin(tmp_path), [True]

    def fails_once(task: OwnerTask) -> int:
        if task.owner == "press" and broken[0]:
            raise UserError("no space left")
        return nudge(task)

    with pytest.raises(UserError, match="2 of 3 owners count in round 0, and 3 are needed"):
        run_rounds(rounds, fails_once, 1, now=lambda: NOW)
    broken[0] = False
    assert sorted(run_rounds(rounds, fails_once, 1, now=lambda: NOW)[0].shares) == list(OWNERS)


# --- with the project's training loop ---

CONFIG = TrainingConfig(
    tokens=4 * 6 * 4 * 16,
    sequence_length=16,
    batch_size=4,
    learning_rate=1e-2,
    warmup=0.0,
    device="cpu",
    precision="float32",
    checkpoint_seconds=0.0,
)
STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenBlocks]:
    """Each owner's text is a distinct cycle through the vocabulary, which a model can learn."""
    blocks = {}
    for number, owner in enumerate(OWNERS):
        folder = tmp_path_factory.mktemp(owner)
        rows = [((np.arange(40) * (number + 1) + start) % 60 + 60 * number).tolist() for start in range(0, 60, 2)]
        write_part(folder, [EncodedDocument("x" * 40, row) for row in rows], separator=0, vocabulary=300)
        blocks[owner] = TokenBlocks(TokenStore(folder), CONFIG.sequence_length)
    return blocks


def train_all(
    folder: Path, model: Path, texts: dict[str, TokenBlocks], kill: tuple[str, int] | None = None
) -> tuple[Rounds, dict[str, list[float]]]:
    """Train four rounds; `kill` names an owner and a step after whose checkpoint the process ends once."""
    plan = RoundPlan(OWNERS, "diloco", rules=AveragingRules(max_change=3.0))
    rounds = Rounds.begin(folder / "rounds", model / "model.safetensors", plan, NOW)
    losses: dict[str, list[float]] = {owner: [] for owner in OWNERS}

    def train_owner(task: OwnerTask) -> int:
        class Losses(Reporter):
            def run_progressed(self, run: Path, record: Mapping[str, Any]) -> None:
                losses[task.owner].append(record["loss"])
                if kill == (task.owner, len(losses[task.owner])):
                    raise Interrupted("killed")

        state = folder / "owners" / task.owner
        return InnerTraining(state, model, texts[task.owner], CONFIG, STEPS, Losses())(task)

    try:
        run_rounds(rounds, train_owner, 4, now=lambda: NOW)
    except Interrupted:
        run_rounds(Rounds(rounds.root), train_owner, 4, now=lambda: NOW)
    return rounds, losses


@pytest.mark.slow
def test_real_training_lowers_the_loss_and_a_kill_changes_no_byte(
    tmp_path: Path, model: Path, texts: dict[str, TokenBlocks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inner_training, "PROGRESS_SECONDS", 0.0)  # reports every step
    whole, losses = train_all(tmp_path / "whole", model, texts)
    for owner in OWNERS:
        assert len(losses[owner]) == 4 * STEPS
        assert np.mean(losses[owner][-STEPS:]) < np.mean(losses[owner][:STEPS]) - 0.5
    killed, _ = train_all(tmp_path / "killed", model, texts, kill=("court", 2 * STEPS - 2))
    assert content(killed) == content(whole)


def test_owner_state_past_the_round_is_an_error(tmp_path: Path, model: Path, texts: dict[str, TokenBlocks]) -> None:
    training = InnerTraining(tmp_path / "state", model, texts["court"], CONFIG, STEPS)
    task = OwnerTask("court", 1, model / "model.safetensors", tmp_path / "out.safetensors")
    assert training(task) == len(texts["court"]) * CONFIG.sequence_length
    with pytest.raises(UserError, match="is at step 12, past this round's end at 6; it belongs to other rounds"):
        training(OwnerTask("court", 0, task.shared, task.result))
    with pytest.raises(UserError, match="round 4 exceeds the 24 steps"):
        training(OwnerTask("court", 4, task.shared, task.result))


def test_text_of_several_domains_is_counted_once(
    tmp_path: Path, model: Path, texts: dict[str, TokenBlocks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A balanced union repeats the small domain in every epoch; the owner has no more text for that."""
    small = RandomSlice(texts["court"], 0, 20, seed=0)
    union = BalancedUnion([texts["press"], small])
    monkeypatch.setattr(InnerTraining, "train", lambda self, task: 0.0)
    training = InnerTraining(tmp_path / "state", model, union, CONFIG, STEPS)
    task = OwnerTask("court", 0, model / "model.safetensors", tmp_path / "out.safetensors")
    assert training(task) == (len(texts["press"]) + len(small)) * CONFIG.sequence_length
    assert len(small) < len(texts["press"])


def test_a_round_trained_twice_gives_the_same_bytes(tmp_path: Path, model: Path, texts: dict[str, TokenBlocks]) -> None:
    """A kill after the last checkpoint of a round and before the delivery of its weights."""
    training = InnerTraining(tmp_path / "state", model, texts["court"], CONFIG, STEPS)
    task = OwnerTask("court", 0, model / "model.safetensors", tmp_path / "out.safetensors")
    training(task)
    first = task.result.read_bytes()
    task.result.unlink()
    training(task)
    assert task.result.read_bytes() == first


def test_a_round_has_the_names_of_the_shared_weights(tmp_path: Path, texts: dict[str, TokenBlocks]) -> None:
    """The experts of a Mixtral are stacked in memory, and single tensors in its files."""
    folder = family_folder(tmp_path / "mixtral", "mixtral")
    in_files = folder / "model.safetensors"
    in_memory = tmp_path / "memory.safetensors"
    write_tensors(in_memory, checkpoint_tensors(family_model("mixtral")))
    results = []
    for shared in (in_files, in_memory):
        state, result = tmp_path / shared.stem / "state", tmp_path / f"new-{shared.name}"
        InnerTraining(state, folder, texts["court"], CONFIG, STEPS)(OwnerTask("court", 0, shared, result))
        assert set(Checkpoint([result])) == set(Checkpoint([shared]))
        model = family_model("mixtral", 1)
        overlay_tensors(model, Checkpoint([result]))
        results.append(checkpoint_tensors(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not torch.equal(results[0]["model.norm.weight"], family_model("mixtral").model.norm.weight)


PROCESS = """
import sys, torch
from datetime import datetime, UTC
from pathlib import Path
from typing import Any
from expertctl.core.artefacts.safetensors_io import Checkpoint, write_tensors
from expertctl.experts.federation.rounds.round_loop import run_rounds
from expertctl.experts.federation.rounds.rounds import Rounds

def nudge(task):
    shared = Checkpoint([task.shared])
    step = torch.randn(3, 4, generator=torch.Generator().manual_seed(100 * task.round + len(task.owner)))
    write_tensors(task.result, {"w": shared.read("w") + 0.1 * step, "n": shared.read("n")})
    return 1000

run_rounds(Rounds(Path(sys.argv[1])), nudge, int(sys.argv[2]), now=lambda: datetime(2026, 1, 1, tzinfo=UTC))
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_process_that_is_killed_again_and_again_ends_in_the_same_bytes(tmp_path: Path) -> None:
    expected, rounds = begin(tmp_path / "expected"), begin(tmp_path / "killed")
    run_rounds(expected, nudge, 40, now=lambda: NOW)
    command = [sys.executable, "-c", PROCESS, rounds.root, "40"]
    for kill in range(3):
        process = subprocess.Popen(command)
        while rounds.number < 8 * (kill + 1) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert rounds.number < 40
    assert subprocess.run(command, check=False).returncode == 0
    assert content(rounds) == content(expected)


MEMORY = """
import resource, sys, torch
from pathlib import Path
from typing import Any
from expertctl.core.process.allocator import hand_back_freed_memory
from expertctl.core.artefacts.safetensors_io import Checkpoint, write_tensors
from expertctl.core.artefacts import safetensors_io
from expertctl.experts.federation.judging.round_weights import *
from expertctl.experts.federation.rounds.averaging import *

folder, count = Path(sys.argv[1]), int(sys.argv[2])
recipe, shared = OUTER_RECIPES["diloco"], Checkpoint([folder / "shared.safetensors"])

hand_back_freed_memory()  # as the serving process does
safetensors_io.SPAN = 1 << 20

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def round_of(owners, state):
    contributions = []
    for owner in range(owners):
        examined = examine_delivery(folder / f"owner-{owner}.safetensors", 1.0, shared, AveragingRules(max_change=9.0))
        contributions.append(Contribution(str(owner), folder / f"owner-{owner}.safetensors", examined.digest, 1 / owners))
    average_round(shared, contributions, state, recipe, folder / "after.safetensors", folder / "outer.safetensors")

round_of(1, None)
before = peak()
round_of(count, Checkpoint([folder / "outer.safetensors"]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory has another unit")
@pytest.mark.parametrize("shapes", [{f"layers.{number}.weight": 1 << 20 for number in range(24)}, {"embed": 24 << 20}])
def test_memory_grows_neither_with_owners_nor_with_the_model_nor_with_a_tensor(
    tmp_path: Path, shapes: dict[str, int]
) -> None:
    for number in range(6):
        source = torch.Generator().manual_seed(number)
        tensors = {name: torch.randn(count, generator=source).bfloat16() for name, count in shapes.items()}
        write_tensors(tmp_path / f"owner-{number}.safetensors", tensors)
    (tmp_path / "owner-5.safetensors").rename(tmp_path / "shared.safetensors")
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path, "5"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 24 << 20  # half a model; in float32 it has 96 MiB
