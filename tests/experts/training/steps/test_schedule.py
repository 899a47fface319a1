"""The learning rate over the whole schedule."""

from __future__ import annotations

import pytest

from expertctl.core.config.settings import TrainingConfig
from expertctl.experts.training.steps.schedule import learning_rate, progress_at


def test_warm_up_rises_linearly_from_zero_to_the_peak() -> None:
    config = TrainingConfig(learning_rate=1.0, warmup=0.2)
    assert [learning_rate(config, progress) for progress in (0.0, 0.1, 0.2)] == pytest.approx([0.0, 0.5, 1.0])


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.55), ("cosine", 0.55), ("constant", 1.0)])
def test_decay_reaches_the_middle_half_way(schedule: str, middle: float) -> None:
    config = TrainingConfig.model_validate({"learning_rate": 1.0, "warmup": 0.0, "schedule": schedule})
    assert learning_rate(config, 0.5) == pytest.approx(middle)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_ends_at_the_final_share(schedule: str) -> None:
    config = TrainingConfig.model_validate({"learning_rate": 2.0, "final_learning_rate": 0.25, "schedule": schedule})
    assert learning_rate(config, 1.0) == pytest.approx(0.5)


def test_an_expert_goes_on_where_the_seed_stopped_whatever_their_numbers_of_steps() -> None:
    seed = TrainingConfig(tokens=100 * 64, sequence_length=64, batch_size=1, schedule_end=0.5)
    expert = TrainingConfig(tokens=30 * 64, sequence_length=64, batch_size=1, schedule_begin=0.5)
    last = learning_rate(seed, progress_at(seed, seed.steps - 1))
    first = learning_rate(expert, progress_at(expert, 0))
    assert first < last
    assert first == pytest.approx(last, rel=0.05)


def test_every_step_lies_inside_its_span() -> None:
    config = TrainingConfig(tokens=640, sequence_length=64, batch_size=1, schedule_begin=0.25, schedule_end=0.75)
    points = [progress_at(config, step) for step in range(config.steps)]
    assert points == sorted(points)
    assert 0.25 < points[0] < points[-1] < 0.75


def test_the_rate_stays_and_falls_at_the_end() -> None:
    config = TrainingConfig(learning_rate=2.0, schedule="wsd", warmup=0.1, decay=0.2, final_learning_rate=0.0)
    rates = [learning_rate(config, progress) for progress in (0.05, 0.1, 0.5, 0.8, 0.9, 1.0)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 2.0, 1.0, 0.0])
    assert learning_rate(config.model_copy(update={"decay": 0.0}), 1.0) == 2.0


def test_restarts_are_cosine_decays_one_after_the_other() -> None:
    config = TrainingConfig(learning_rate=1.0, schedule="restarts", warmup=0.0, cycles=2, final_learning_rate=0.1)
    cosine = config.model_copy(update={"schedule": "cosine"})
    for progress in (0.0, 0.1, 0.25, 0.49):
        expected = learning_rate(cosine, 2 * progress)
        assert learning_rate(config, progress) == pytest.approx(expected)
        assert learning_rate(config, progress + 0.5) == pytest.approx(expected)
    assert learning_rate(config, 1.0) == pytest.approx(0.1)
