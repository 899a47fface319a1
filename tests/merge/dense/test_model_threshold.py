"""Thresholds of whole task vectors, against sorting all elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from expertctl.core.hooks.merging import KeptElements, TensorGroup
from expertctl.core.testing import in_numpy
from expertctl.merge.dense.largest import largest_magnitudes
from expertctl.merge.dense.task_vectors.model_threshold import ModelThresholds, Threshold

SHAPES = ((40, 30), (7,), (), (5, 2, 3))


def groups(dtype: torch.dtype, *, coarse: bool, names: tuple[str, ...] = ("a", "b")) -> list[TensorGroup]:
    """Return tensors of a seed and its experts; `coarse`: many changes have the same magnitude."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for number, shape in enumerate(SHAPES):
        seed = torch.zeros(shape, dtype=dtype)
        experts = []
        for _ in names:
            change = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
            experts.append((change.round() if coarse else change).to(dtype))
        made.append(TensorGroup(f"t{number}", tuple(experts), names, (1.0,) * len(names), seed))
    return made


def search(given: list[TensorGroup], state: ModelThresholds, unchanged: int = 0) -> ModelThresholds:
    """Search as the engine does; `unchanged` elements of every expert are in tensors that are not read."""
    size = sum(group.seed.numel() if isinstance(group.seed, torch.Tensor) else group.seed.size for group in given)
    sizes = dict.fromkeys(given[0].expert_names, size + unchanged)
    while not state.is_complete:
        sums: dict[str, Any] = {}
        for group in given:
            for name, counts in state.measure(group).items():
                sums[name] = sums[name] + counts if name in sums else counts
        state = state.advance(sums, sizes)
    return state


def masks(given: list[TensorGroup], state: ModelThresholds, number: int) -> np.ndarray[Any, Any]:
    return np.concatenate([np.asarray(state.mask(group, number)).reshape(-1) for group in given])


def magnitudes(given: list[TensorGroup], number: int) -> np.ndarray[Any, Any]:
    return np.concatenate([abs(np.asarray(group.experts[number])).reshape(-1) for group in given])


@pytest.mark.parametrize("on", ["numpy", "torch"])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unchanged", [0, 700])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.6, 0.97])
def test_the_largest_elements_of_the_model_are_kept(
    on: str, coarse: bool, first: bool, dtype: torch.dtype, unchanged: int, density: float
) -> None:
    given = groups(dtype, coarse=coarse)
    given = [in_numpy(group) for group in given] if on == "numpy" else given
    state = ModelThresholds(
        {"a": Threshold(density), "b": Threshold(0.5)}, is_double=dtype == torch.float64, counts_equal=first
    )
    state = search(given, state, unchanged)
    sizes = magnitudes(given, 0)
    total = sizes.size + unchanged
    count = max(1, int(density * total))
    threshold = np.sort(np.concatenate([sizes, np.zeros(unchanged, sizes.dtype)]))[total - count]
    kept = masks(given, state, 0)
    if threshold == 0:
        assert kept[sizes > 0].all()
        assert state.kept()["a"] == KeptElements(count, count, total)
        return
    assert kept[sizes > threshold].all()
    assert not kept[sizes < threshold].any()
    if first:
        assert kept.sum() == count
        order = np.flatnonzero(sizes == threshold)
        assert kept[order].tolist() == sorted(kept[order].tolist(), reverse=True)  # t0, t1 ...: the first ones
    else:
        assert kept[sizes == threshold].all()
    assert state.kept()["a"] == KeptElements(int(kept.sum()), count, total)


@settings(deadline=None, max_examples=60)
@given(
    values=arrays(np.float32, st.integers(1, 60), elements=st.floats(width=32, allow_nan=False)),
    density=st.floats(0.01, 0.99),
)
def test_any_float_is_ordered(values: np.ndarray[Any, Any], density: float) -> None:
    """Denormal numbers, infinities and both zeros among them."""
    group: Any = TensorGroup("t", (values,), ("a",), (1.0,), np.zeros_like(values))  # type: ignore[arg-type]
    state = search([group], ModelThresholds({"a": Threshold(density)}))
    count = max(1, int(density * values.size))
    threshold = np.sort(np.abs(values))[values.size - count]
    np.testing.assert_array_equal(state.mask(group, 0), np.abs(values) >= threshold)


def test_all_or_nothing_needs_no_pass() -> None:
    assert ModelThresholds({}).is_complete
    assert not ModelThresholds({"a": Threshold(0.2)}).is_complete


@pytest.mark.parametrize("on", ["numpy", "torch"])
def test_equal_elements_beyond_the_count_are_counted(on: str) -> None:
    values: Any = np.array([3, -1, 1, 1, 0, -3, 1, 2], np.float32)
    values = torch.from_numpy(values) if on == "torch" else values
    found = [largest_magnitudes(values, count) for count in range(1, 9)]
    assert [largest.smallest for largest in found] == [3, 3, 2, 1, 1, 1, 1, 0]
    assert [largest.beyond for largest in found] == [1, 0, 0, 3, 2, 1, 0, 0]
