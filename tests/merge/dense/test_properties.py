"""What dense methods hold to whatever the numbers are: identity, order, edges of options, random masks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from expertctl.core.errors import UserError
from expertctl.core.hooks.manager import installed_plugins
from expertctl.core.hooks.merging import MergeMethod, TensorGroup, TensorMerge
from expertctl.core.hooks.options import parse_options
from expertctl.core.testing import assert_merge_ok, in_numpy, tensor_group
from expertctl.merge.dense import largest
from expertctl.merge.dense.arrays import inner_products, map_chunks, random_mask
from expertctl.merge.dense.averages.linear import fused_weighted_sum
from expertctl.merge.dense.largest import kth_largest_magnitude

BY_ORDER = {"slerp"}
"""From the first to the second: order is meant."""
COUNTS = {"slerp": 2, "nuslerp": 2, "nearswap": 1, "arcee_fusion": 1, "passthrough": 1}
METHODS = [
    method.name
    for method in installed_plugins().offers(MergeMethod).values()
    if isinstance(method, TensorMerge) and method.statistics is None
]


def merger(name: str, **values: Any) -> Callable[[TensorGroup], Any]:
    method = installed_plugins().offer(MergeMethod, name)
    assert isinstance(method, TensorMerge)
    options = parse_options(method.options, values, name)
    merge = method.merge
    return lambda group: merge(group, options)


def numbers(*shape: int) -> Any:
    return arrays(np.float32, shape, elements=st.floats(-100, 100, width=32))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in BY_ORDER])
def test_every_method_has_the_properties_of_a_merge(name: str) -> None:
    method = installed_plugins().offer(MergeMethod, name)
    assert isinstance(method, TensorMerge)
    count = COUNTS.get(name, 3)
    assert_merge_ok(method.merge, parse_options(method.options, {}, name), num_experts=count, arrays="any")


@pytest.mark.parametrize(
    "name", ["linear", "average", "ties", "task_arithmetic", "dare_ties", "model_stock", "karcher"]
)
@settings(deadline=None, max_examples=20)
@given(seed=numbers(3, 4), count=st.integers(2, 4))
def test_copies_of_the_seed_give_the_seed(name: str, seed: Any, count: int) -> None:
    group = TensorGroup("w", (seed,) * count, tuple("abcd"[:count]), (1 / count,) * count, seed)
    np.testing.assert_allclose(merger(name)(group), seed, rtol=1e-6, atol=1e-30)


@settings(deadline=None, max_examples=30)
@given(seed=numbers(5), count=st.integers(1, 5))
def test_an_average_of_copies_is_exact(seed: Any, count: int) -> None:
    group = TensorGroup("w", (seed,) * count, tuple("abcde"[:count]), (1 / count,) * count, seed)
    np.testing.assert_array_equal(merger("average")(group), seed)


@pytest.mark.parametrize("name", ["linear", "average", "task_arithmetic"])
@settings(deadline=None, max_examples=30)
@given(tensors=st.lists(numbers(4), min_size=2, max_size=4), data=st.data())
def test_one_hot_weights_give_that_expert(name: str, tensors: list[Any], data: Any) -> None:
    chosen = data.draw(st.integers(0, len(tensors) - 1))
    weights = tuple(float(number == chosen) for number in range(len(tensors)))
    group = TensorGroup("w", tuple(tensors), tuple("abcd"[: len(tensors)]), weights, np.zeros(4, "f4"))
    np.testing.assert_array_equal(merger(name)(group), tensors[chosen])


@settings(deadline=None, max_examples=30)
@given(a=numbers(6), b=numbers(6))
def test_the_ends_of_the_arc_are_the_models(a: Any, b: Any) -> None:
    group = TensorGroup("w", (a, b), ("a", "b"), (1.0, 1.0))
    np.testing.assert_allclose(merger("slerp", t=0.0)(group), a, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merger("slerp", t=1.0)(group), b, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    values=arrays(np.float32, st.integers(1, 60), elements=st.sampled_from([0.0, -1.0, 1.0, 2.5, -2.5, 7.0])),
    data=st.data(),
)
def test_the_kth_largest_magnitude_is_that_of_a_sorted_list(values: Any, data: Any) -> None:
    count = data.draw(st.integers(1, values.size))
    expected = sorted(np.abs(values), reverse=True)[count - 1]
    assert kth_largest_magnitude(values, count) == expected
    assert kth_largest_magnitude(torch.from_numpy(values), count) == expected
    assert kth_largest_magnitude(values + 1, count, np.ones_like(values)) == expected


@settings(deadline=None, max_examples=60)
@given(
    values=arrays(np.float32, st.integers(33, 300), elements=st.floats(-4, 4, width=16)),
    repeats=st.integers(1, 9),
    share=st.floats(0, 1),
    dtype=st.sampled_from(["f4", "f8"]),
)
def test_a_bracketed_threshold_is_that_of_a_sorted_list(values: Any, repeats: int, share: float, dtype: str) -> None:
    values = np.tile(values, repeats).astype(dtype)  # the sample is unlike the array at some strides
    count = max(1, int(share * values.size))
    expected = np.sort(np.abs(values))[::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(largest, "SAMPLE_SIZE", 8)
        found = largest.largest_magnitudes(values, count)
    assert found.smallest == expected[count - 1]
    assert found.beyond == (
        (expected == expected[count - 1]).sum() - (expected[:count] == expected[count - 1]).sum()
    ) * (found.smallest != 0)


@pytest.mark.parametrize("count", [1, 2, 150_000, 200_000])
def test_not_a_number_is_the_largest_magnitude(count: int) -> None:
    values = np.random.default_rng(0).standard_normal(200_000).astype("f4")
    values[7] = np.nan
    expected = np.sort(np.abs(values))[::-1]
    np.testing.assert_equal(largest.largest_magnitudes(values, count).smallest, float(expected[count - 1]))


def test_elements_as_large_as_the_threshold_are_all_kept() -> None:
    group = TensorGroup("w", (np.array([3.0, -3.0, 3.0, 1.0], "f4"),), ("a",), (1.0,), np.zeros(4, "f4"))
    np.testing.assert_array_equal(merger("ties", density=0.25)(group), [3, -3, 3, 0])


@pytest.mark.parametrize("name", ["ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "breadcrumbs_ties"])
def test_density_zero_keeps_the_seed_and_one_keeps_everything(name: str) -> None:
    group = in_numpy(tensor_group((9, 8), num_experts=1, weights=(1.0,)))
    np.testing.assert_array_equal(merger(name, density=0.0)(group), group.seed)
    np.testing.assert_allclose(merger(name, density=1.0)(group), group.experts[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "values", "part"),
    [
        ("ties", {"density": 1.5}, "density is 1.5; it must be in the range 0 to 1"),
        ("ties", {"density": [0.2, -1]}, "density is -1"),
        ("slerp", {"t": 2}, "t is 2.0; it must be in the range 0 to 1"),
        ("della", {"density": 0.1, "epsilon": 0.3}, "outside the range 0 to 1"),
        ("dare_ties", {"rescale": "l3"}, "option rescale"),
        ("nearswap", {"t": -1}, "t is -1.0"),
        ("fisher", {"floor": 0}, "floor is 0.0"),
        ("karcher", {"max_iter": 0}, "max_iter is 0"),
        ("ties", {"desnity": 1}, "did you mean 'density'?"),
    ],
)
def test_impossible_options_are_refused(name: str, values: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as caught:
        merger(name, **values)
    assert part in str(caught.value)


# --- random masks ---


def test_a_mask_depends_on_names_and_seed_alone() -> None:
    like = np.zeros((300, 400), "f4")
    first = random_mask(like, 0.3, 0, "w", "law")
    assert np.array_equal(first, random_mask(like.reshape(400, 300), 0.3, 0, "w", "law").reshape(300, 400))
    assert np.array_equal(first, random_mask(torch.zeros(300, 400), 0.3, 0, "w", "law").numpy())
    for other in (("v", "law", 0), ("w", "code", 0), ("w", "law", 1)):
        assert not np.array_equal(first, random_mask(like, 0.3, other[2], other[0], other[1]))


def test_a_masks_bits_never_change() -> None:
    """Results of earlier merges can be made again: the stream is pinned."""
    kept = random_mask(np.zeros(40, "f4"), 0.5, 0, "w", "law")
    assert "".join(str(int(bit)) for bit in kept) == GOLDEN


GOLDEN = "1110110001001010100111000010111001000100"


@pytest.mark.parametrize("density", [0.02, 0.5, 0.9])
def test_a_masks_share_is_its_density(density: float) -> None:
    kept = random_mask(np.zeros(400_000, "f4"), density, 0, "w", "law")
    assert abs(kept.mean() - density) < 5 * (density * (1 - density) / kept.size) ** 0.5


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della"])
def test_random_methods_do_not_depend_on_the_order_of_experts(name: str) -> None:
    group = in_numpy(tensor_group((40, 30), weights=(0.5, 0.2, 0.3)))
    turned = replace(
        group,
        experts=group.experts[::-1],
        expert_names=group.expert_names[::-1],
        weights=group.weights[::-1],
    )
    np.testing.assert_allclose(merger(name)(group), merger(name)(turned), rtol=1e-5, atol=1e-6)


def test_threads_do_not_disturb_each_other() -> None:
    groups = [in_numpy(tensor_group((200, 150), seed=seed)) for seed in range(8)]
    merge = merger("dare_ties")
    expected = [merge(group) for group in groups]
    with ThreadPoolExecutor(4) as pool:
        merged = list(pool.map(merge, groups))
    assert all(np.array_equal(*pair) for pair in zip(expected, merged, strict=True))


# --- shared parts ---


def test_a_weighted_sum_has_the_bits_of_torchs_fused_addition() -> None:
    group = tensor_group((300, 257))
    for weights in ((0.3, 1.1, 0.7), (1.0, 1.0, 1.0), (0.25, -0.5, 2.0), (0.0, 1.0, 0.1)):
        total = fused_weighted_sum(in_numpy(group).experts, weights)
        assert np.array_equal(total, fused_weighted_sum(group.experts, weights).numpy())


def test_chunked_results_equal_whole_results() -> None:
    values = np.random.default_rng(0).standard_normal((700, 300)).astype("f4")
    mapped = map_chunks(lambda a, b: a * 2 + b, values, values)
    np.testing.assert_array_equal(mapped, values * 2 + values)
    assert map_chunks(lambda a: a + 1, np.zeros((0, 4), "f4")).shape == (0, 4)


def test_inner_products_are_those_of_the_differences() -> None:
    group = in_numpy(tensor_group((400, 300)))
    flat = [(expert - group.seed).ravel().astype("f8") for expert in group.experts]
    expected = [[a @ b for b in flat] for a in flat]
    np.testing.assert_allclose(inner_products(group.experts, group.seed), expected, rtol=1e-5)
