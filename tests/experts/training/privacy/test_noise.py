"""The noise: distributed as it should be, the same for the same key, and unknown without it."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from expertctl import UserError
from expertctl.experts.training.privacy.noise import KEY_FILE, NoiseSource, secret_source, seeded_source

SOURCE = NoiseSource(b"k" * 32)


def test_it_is_normal() -> None:
    numbers = SOURCE.normal("any", (300, 101)).flatten().numpy()
    assert stats.kstest(numbers, "norm").pvalue > 0.01
    half = len(numbers) // 2
    assert abs(float(np.corrcoef(numbers[:half], numbers[half : 2 * half])[0, 1])) < 0.03, (
        "Box and Muller's pairs are independent"
    )


def test_it_is_uniform_and_never_0_or_1() -> None:
    numbers = SOURCE.uniform("any", 100_000)
    assert stats.kstest(numbers, "uniform").pvalue > 0.01
    assert 0 < numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1


def test_draws_are_binomial_and_independent_between_steps() -> None:
    counts = [len(SOURCE.sampled_indices(f"draw/{step}", 400, 0.05)) for step in range(500)]
    assert np.mean(counts) == pytest.approx(20, abs=0.6)
    assert np.var(counts) == pytest.approx(400 * 0.05 * 0.95, rel=0.2)
    assert len(SOURCE.sampled_indices("draw/0", 50, 1.0)) == 50
    both = set(SOURCE.sampled_indices("draw/0", 400, 0.5)) & set(SOURCE.sampled_indices("draw/1", 400, 0.5))
    assert 60 < len(both) < 140


@given(st.text(max_size=20), st.integers(0, 40))
def test_the_same_purpose_gives_the_same_numbers_and_more_of_them_begin_alike(purpose: str, count: int) -> None:
    assert np.array_equal(SOURCE.uniform(purpose, count), SOURCE.uniform(purpose, count + 3)[:count])
    assert not np.array_equal(SOURCE.uniform(purpose, 8), SOURCE.uniform(purpose + "x", 8))
    assert not np.array_equal(SOURCE.uniform(purpose, 8), NoiseSource(b"l" * 32).uniform(purpose, 8))


def test_a_secret_key_is_made_once_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    first = secret_source(tmp_path / "state")
    path = tmp_path / "state" / KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret_source(tmp_path / "state") == first
    assert secret_source(tmp_path / "other") != first
    assert first.key.hex() not in repr(first)
    assert str(first.key) not in repr(first)


def test_a_damaged_key_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_bytes(b"short")
    with pytest.raises(UserError, match=r"privacy.key is damaged.*to train from the start"):
        secret_source(tmp_path)


def test_a_seeded_source_is_the_seeds() -> None:
    assert seeded_source(3) == seeded_source(3) != seeded_source(4)
