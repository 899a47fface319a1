"""Guards against diverging: skipped steps, spikes that take training back, and limits on both."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flexolmo_workspaces import make_flexolmo_workspace
from hypothesis import given
from hypothesis import strategies as st
from reporters import Notes

from expertctl import Reporter, UserError, Workspace, verify
from expertctl.core.config.settings import TrainingConfig
from expertctl.core.errors import Interrupted
from expertctl.core.text.block_order import Position
from expertctl.experts.training.run import train_run
from expertctl.experts.training.steps import loop as loops
from expertctl.experts.training.steps.guards import Guards

WATCHING = TrainingConfig(spike_deviations=6, spike_window=16, rollbacks=2)


def fed(guards: Guards, losses: list[float], begin: int = 1) -> list[int]:
    """Return the steps at which the guards found a spike."""
    return [step for step, loss in enumerate(losses, begin) if guards.watch(step, loss, skipped=False) is not None]


@given(st.floats(0.0, 12.0), st.floats(0.0, 0.5), st.integers(0, 2**32))
def test_noise_and_falling_losses_are_no_spikes(level: float, noise: float, seed: int) -> None:
    draw = random.Random(seed)
    losses = [level + 8 * math.exp(-step / 10) + draw.uniform(-noise, noise) for step in range(100)]
    assert fed(Guards(WATCHING), losses) == []


def test_a_spike_is_a_loss_that_stays_high() -> None:
    calm = [3.0, 3.1, 2.9, 3.05] * 6
    assert fed(Guards(WATCHING), [*calm, 9.0, *calm]) == []
    assert fed(Guards(WATCHING), [*calm, 9.0, 9.0, *calm]) == []
    guards = Guards(WATCHING)
    assert fed(guards, [*calm, 9.0, 9.0, 9.0]) == [27]
    assert not guards.is_calm
    spike = guards.watch(28, 9.0, skipped=False)
    assert spike is not None
    assert (spike.first_step, spike.loss) == (25, 9.0)
    assert 3.1 < spike.limit < 4.0
    assert fed(Guards(WATCHING.model_copy(update={"spike_deviations": None})), [*calm, *[9.0] * 30]) == []
    assert fed(Guards(WATCHING), [3.0] * 30 + [3.05] * 9) == []  # of a constant loss, any change is many deviations


def test_spikes_after_the_last_allowed_return_stop_the_run() -> None:
    guards = Guards(WATCHING)
    guards.rollbacks = 2
    fed(guards, [3.0] * 24)
    with pytest.raises(UserError, match=r"training diverged: at step 27 the loss 9\.000 is above .* after 2 returns"):
        fed(guards, [9.0] * 9, begin=25)


def test_skipped_steps_are_allowed_now_and_then() -> None:
    guards = Guards(WATCHING.model_copy(update={"skipped_steps": 2}))
    for step in (1, 60, 101, 170, 202, 299):
        assert guards.watch(step, math.nan, skipped=True) is None
    with pytest.raises(UserError, match="not finite in 3 of the last 100 steps, lastly in step 300"):
        guards.watch(300, math.nan, skipped=True)


def test_the_state_of_guards_outlives_a_checkpoint() -> None:
    whole, first = Guards(WATCHING), Guards(WATCHING)
    draw = random.Random(0)
    losses = [3 + draw.uniform(-0.1, 0.1) for _ in range(30)] + [7.0] * 3
    found = fed(whole, losses)
    fed(first, losses[:20])
    second = Guards(WATCHING)
    second.load(json.loads(json.dumps(first.state())))
    assert fed(second, losses[20:], begin=21) == found == [33]


# --- in a run ---

STEPS = 60
TRAINING = {"tokens": STEPS * 4 * 32, "log_every": 1, "learning_rate": 3e-3, "warmup": 0.0, "schedule": "constant"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_flexolmo_workspace(tmp_path_factory.mktemp("guarded") / "workspace", owners=("prose",), trains="all")


def lines_of(workspace: Workspace, name: str) -> list[dict[str, Any]]:
    path = workspace.layout.experts / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_bad_gradients(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Let the gradient of a parameter be infinite in some steps."""
    finish = loops.TrainingLoop._accumulate

    def spoiled(loop: Any) -> torch.Tensor:
        loss = finish(loop)
        if loop.step in steps:
            next(iter(loop.parameters.values())).grad[0] = math.inf
        return loss

    monkeypatch.setattr(loops.TrainingLoop, "_accumulate", spoiled)


def test_a_step_whose_gradient_is_not_finite_is_skipped(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with_bad_gradients(monkeypatch, 3, 7, STEPS - 1)
    before: dict[int, torch.Tensor] = {}
    steps = loops.TrainingLoop.steps

    def watched(loop: Any) -> Any:
        for report in steps(loop):
            before[report.step] = next(iter(loop.parameters.values())).detach().clone()
            yield report

    monkeypatch.setattr(loops.TrainingLoop, "steps", watched)
    workspace.branch("skipping", domain="means", training=TRAINING)
    train_run(workspace.layout.experts / "skipping", Reporter(), lambda: False)
    assert torch.equal(before[4], before[3])
    assert not torch.equal(before[5], before[4])
    lines = [line for line in lines_of(workspace, "skipping") if "learning_rate" in line]
    assert [line["step"] for line in lines if line.get("skipped_steps")] == [4, 8, STEPS]
    assert all(("loss" in line) == ("skipped_steps" not in line) for line in lines)
    assert verify(workspace.layout.experts / "skipping") == []


def test_too_many_skipped_steps_stop_the_run_and_keep_its_checkpoint(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_bad_gradients(monkeypatch, *range(20, 40))
    training = TRAINING | {"checkpoint_seconds": 0, "skipped_steps": 3}
    workspace.branch("diverging", domain="means", training=training)
    run = workspace.layout.experts / "diverging"
    with pytest.raises(
        UserError, match="training diverged: loss or gradient was not finite in 4 of the last 100 steps"
    ):
        train_run(run, Reporter(), lambda: False)
    monkeypatch.undo()
    train_run(run, Reporter(), lambda: False)
    assert verify(run) == []


def spiking(monkeypatch: pytest.MonkeyPatch, at: int, times: int) -> None:
    """Let the learning rate of a step be far too high, the first `times` times that training gets there."""
    rate, left = loops.learning_rate, [times]

    def spoiled(config: TrainingConfig, progress: float) -> float:
        if left[0] and progress >= at / STEPS:
            left[0] -= 1
            return 3.0
        return rate(config, progress)

    monkeypatch.setattr(loops, "learning_rate", spoiled)


def guarded(workspace: Workspace, name: str, **settings: Any) -> tuple[Path, Callable[[Reporter], None]]:
    watching = {"spike_deviations": 6, "spike_window": 16, "checkpoint_seconds": 1e6}
    workspace.branch(name, domain="means", training=TRAINING | watching | settings)
    run = workspace.layout.experts / name
    return run, lambda reporter: train_run(run, reporter, lambda: False)


def test_a_spike_takes_training_back_and_skips_its_text(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    spiking(monkeypatch, at=40, times=1)
    _, train = guarded(workspace, "spiking")
    drawn: list[tuple[int, Position, Position]] = []
    batch = loops.TrainingLoop._batch

    def watched(loop: Any) -> torch.Tensor:
        begin = loop.position
        tokens = batch(loop)
        drawn.append((loop.step, begin, loop.position))
        return tokens

    monkeypatch.setattr(loops.TrainingLoop, "_batch", watched)
    notes = Notes()
    train(notes)
    lines = lines_of(workspace, "spiking")
    (record,) = [line for line in lines if "rolled_back" in line]
    back, spike = record["step"], record["rolled_back"]
    assert back == 21  # the checkpoint that is written once the window is full
    assert 41 < spike["from_step"] <= 46
    assert spike["loss"] > spike["limit"]
    assert notes.lines[-1].startswith(f"the loss rose to {spike['loss']:.3f}")
    steps = [line["step"] for line in lines if "learning_rate" in line]
    assert steps == list(range(1, STEPS + 1))  # the steps that were undone are gone
    assert lines[-2]["loss"] < spike["limit"]
    last = next(index for index, (step, _, _) in enumerate(drawn) if step == spike["from_step"] - 1)
    step, begin, _ = drawn[last + 1]
    assert (step, begin) == (back, drawn[last][2])  # on with the text behind the spike


def test_a_return_to_before_the_annealing_draws_no_block_again(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    spiking(monkeypatch, at=STEPS - 8, times=1)
    annealing = {"share": (STEPS - 25) / STEPS, "domains": ["prose"]}
    _, train = guarded(workspace, "annealed", annealing=annealing, spike_window=16)
    drawn: list[tuple[int, bool, Position]] = []
    batch = loops.TrainingLoop._batch

    def watched(loop: Any) -> torch.Tensor:
        drawn.append((loop.step, loop.stream is loop.annealing, loop.stream.position))
        return batch(loop)

    monkeypatch.setattr(loops.TrainingLoop, "_batch", watched)
    train(Notes())
    (record,) = [line for line in lines_of(workspace, "annealed") if "rolled_back" in line]
    assert record["step"] == 21  # before the annealing, which begins at 25
    assert record["rolled_back"]["from_step"] > STEPS - 8
    for anneals in (False, True):
        places = [(position.epoch, position.index) for _, part, position in drawn if part is anneals]
        assert places == sorted(set(places))
    assert [step for step, anneals, _ in drawn if not anneals] == [*range(25), *range(21, 25)]


def test_a_resumed_run_does_not_forget_that_it_was_taken_back(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    spiking(monkeypatch, at=40, times=1)
    whole, train = guarded(workspace, "whole")
    train(Reporter())
    monkeypatch.undo()
    spiking(monkeypatch, at=40, times=1)
    run, _ = guarded(workspace, "stopped")

    def stopped() -> bool:
        lines = lines_of(workspace, "stopped")
        return any("rolled_back" in line for line in lines) and lines[-1]["step"] == 50

    with pytest.raises(Interrupted, match="stopped at step 50"):
        train_run(run, Reporter(), stopped)
    train_run(run, Reporter(), lambda: False)
    left, right = ((folder / "model.safetensors").read_bytes() for folder in (whole, run))
    assert left == right


def test_spikes_that_come_back_stop_the_run(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    spiking(monkeypatch, at=40, times=100)
    _, train = guarded(workspace, "hopeless", rollbacks=1)
    with pytest.raises(UserError, match="after 1 returns to a checkpoint"):
        train(Reporter())
